// The gate's scalar formulas, written once for host and device.
//
//   q     = activation(theta + phi)
//   alpha = sigmoid(psi . q + b)
//   resize: source index and weights as torch.nn.functional.interpolate(size=...) defines them
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define ATTN_GATE_HD __host__ __device__ __forceinline__
#define ATTN_GATE_MEMBER __host__ __device__ __forceinline__
#else
#define ATTN_GATE_HD static inline  // internal: each instruction set keeps its own copy
// Objects of several instruction sets use them: no copy of their own for the linker to choose among.
#define ATTN_GATE_MEMBER __attribute__((always_inline)) inline
#endif

namespace attn_gate {

enum class Activation : int { relu, leaky_relu, softplus, silu, gelu };
enum class Resize : int { identity, nearest, linear, align_corners };

constexpr double kLeakySlope = 0.01;  // PyTorch's default negative_slope

template <class A>
ATTN_GATE_HD A sigmoid(A z) {
  return A(1) / (A(1) + std::exp(-z));
}

// NaN passes through every branch: comparisons are written so that NaN takes the side that keeps it.
template <class A>
ATTN_GATE_HD A activate(Activation kind, A s) {
  switch (kind) {
    case Activation::relu: return s <= A(0) ? A(0) : s;
    case Activation::leaky_relu: return s <= A(0) ? A(kLeakySlope) * s : s;
    case Activation::softplus:  // PyTorch's threshold of 20 only avoids overflow; this form has none
      return (s > A(0) ? s : A(0)) + std::log1p(std::exp(-std::fabs(s)));
    case Activation::silu: return s * sigmoid(s);
    default:  // gelu, exact
      return A(0.5) * s * (A(1) + std::erf(s * A(0.70710678118654752440)));
  }
}

template <class A>
ATTN_GATE_HD A activate_grad(Activation kind, A s) {
  switch (kind) {
    case Activation::relu: return s <= A(0) ? A(0) : A(1);
    case Activation::leaky_relu: return s <= A(0) ? A(kLeakySlope) : A(1);
    case Activation::softplus: return sigmoid(s);
    case Activation::silu: {
      A a = sigmoid(s);
      return a * (A(1) + s * (A(1) - a));
    }
    default:
      return A(0.5) * (A(1) + std::erf(s * A(0.70710678118654752440))) +
             s * A(0.39894228040143267794) * std::exp(A(-0.5) * s * s);
  }
}

// out[o] = (1 - t) * in[lower] + t * in[upper] along one axis.
template <class A>
struct ResizeTap {
  int64_t lower, upper;
  A t;
};

template <class A>
ATTN_GATE_HD ResizeTap<A> resize_tap(Resize mode, int64_t o, int64_t in, int64_t out) {
  if (mode == Resize::identity || in == out) return {o, o, A(0)};
  if (mode == Resize::nearest) {  // PyTorch computes the scale in float32 and truncates
    int64_t i = int64_t(float(o) * (float(in) / float(out)));
    i = i < in ? i : in - 1;
    return {i, i, A(0)};
  }
  A source;
  if (mode == Resize::align_corners) {
    source = out > 1 ? A(o) * (A(in - 1) / A(out - 1)) : A(0);
  } else {
    source = std::fma(A(o) + A(0.5), A(in) / A(out),
                      A(-0.5));  // spelled out: the same bits wherever it is inlined
    source = source < A(0) ? A(0) : source;
  }
  int64_t lower = int64_t(source);
  lower = lower < in - 1 ? lower : in - 1;
  return {lower, lower + 1 < in ? lower + 1 : in - 1, source - A(lower)};
}

// The first o in [0, out] whose taps begin at `lower` or beyond it: taps rise with o.
template <class A>
ATTN_GATE_HD int64_t first_output(Resize mode, int64_t lower, int64_t in, int64_t out) {
  if (lower <= 0) return 0;
  if (lower >= in) return out;
  if (mode == Resize::identity || in == out) return lower;
  A guess = mode == Resize::align_corners ? A(lower) * (A(out - 1) / A(in - 1))
            : mode == Resize::nearest     ? A(lower) * (A(out) / A(in))
                                          : (A(lower) + A(0.5)) * (A(out) / A(in)) - A(0.5);
  int64_t o = int64_t(guess);
  o = o < 0 ? 0 : o > out ? out : o;
  while (o > 0 && resize_tap<A>(mode, o - 1, in, out).lower >= lower) --o;
  while (o < out && resize_tap<A>(mode, o, in, out).lower < lower) ++o;
  return o;
}

}  // namespace attn_gate
