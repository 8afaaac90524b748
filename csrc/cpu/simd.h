// Vectors in the compiler's own vector extension: one source for every instruction set, no intrinsics.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "half.h"

namespace attn_gate::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kRows = 8;  // 8 x 3 accumulators + 3 + 1 of 32 registers
#elif defined(__AVX2__)
constexpr int kBytes = 32, kRows = 4;  // 4 x 3 accumulators + 3 + 1 of 16 registers
#elif defined(__aarch64__)
constexpr int kBytes = 16, kRows = 8;
#else
constexpr int kBytes = 16, kRows = 4;
#endif
constexpr int kCols = 3;  // vectors a micro-kernel's block is wide

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kBytes)));
  typedef int32_t integer __attribute__((vector_size(kBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kBytes)));
};
template <class A>
using Vec = typename VectorOf<A>::type;
template <class A>
constexpr int kLanes = kBytes / int(sizeof(A));
// Rows of a packed block: the micro-kernel's rows, or a vector where that is longer (so that a transposition
// packs it).
template <class A>
constexpr int kBlock = kLanes<A> > kRows ? kLanes<A> : kRows;

template <class A>
inline Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class A>
inline void store(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof v);
}
typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));
typedef uint16_t AllHalves __attribute__((vector_size(kBytes)));
typedef uint32_t Words __attribute__((vector_size(kBytes)));

// A vector of A from one of what elements of type T are in memory, and back.
template <class A, class T>
using Stored = std::conditional_t<std::is_same_v<T, A>, Vec<A>, Halves>;
template <class A, class T>
inline Vec<A> widened(Stored<A, T> bits) {
  if constexpr (std::is_same_v<T, A>) {
    return bits;
  } else if constexpr (std::is_same_v<T, bf16>) {
    return (Vec<A>)(__builtin_convertvector(bits, Words) << 16);
  } else {  // as to_acc(f16)
    static_assert(std::is_same_v<T, f16>);
    const Words u = __builtin_convertvector(bits, Words), magnitude = (u & 0x7fff) << 13;
    const Words scaled = (Words)((Vec<A>)magnitude * as_float(0x77800000));
    return (Vec<A>)((magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : scaled) | (u & 0x8000) << 16);
  }
}
// Rounded as from_acc<bf16> does: the upper half of each word.
inline Words rounded_to_bf16(Vec<float> v) {
  const Words u = (Words)v;
  return v != v ? Words{} + 0x7fc00000 : u + 0x7fff + ((u >> 16) & 1);
}
template <class T, class A>
inline Stored<A, T> rounded_to(Vec<A> v) {
  if constexpr (std::is_same_v<T, A>) {
    return v;
  } else if constexpr (std::is_same_v<T, bf16>) {
    return __builtin_convertvector(rounded_to_bf16(v) >> 16, Halves);
  } else {  // as from_acc<f16>
    static_assert(std::is_same_v<T, f16>);
    const Words u = (Words)v, magnitude = u & 0x7fffffff;
    const Words normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13,
                subnormal = (Words)((Vec<A>)magnitude + 0.5f) - 0x3f000000;
    Words bits = magnitude < 0x38800000 ? subnormal : normal;
    bits = magnitude >= 0x477ff000 ? Words{} + 0x7c00 : bits;
    bits = magnitude > 0x7f800000 ? Words{} + 0x7e00 : bits;
    return __builtin_convertvector(bits | ((u >> 16) & 0x8000), Halves);
  }
}
// Two vectors as one of bfloat16.
template <size_t... L>
inline AllHalves rounded_to_bf16(Vec<float> a, Vec<float> b, std::index_sequence<L...>) {
  return __builtin_shufflevector((AllHalves)rounded_to_bf16(a), (AllHalves)rounded_to_bf16(b),
                                 int(2 * L + 1)...);
}
inline AllHalves rounded_to_bf16(Vec<float> a, Vec<float> b) {
  return rounded_to_bf16(a, b, std::make_index_sequence<size_t(kBytes) / 2>{});
}
template <class A, class T>
inline Vec<A> load_as(const T* p) {
  Stored<A, T> bits;
  std::memcpy(&bits, p, sizeof bits);
  return widened<A, T>(bits);
}
template <class A, class T>
inline void store_as(T* p, Vec<A> v) {
  const auto bits = rounded_to<T, A>(v);
  std::memcpy(p, &bits, sizeof bits);
}
template <class T, class A>
inline void convert_row(const T* src, A* dst, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) store(dst + i, load_as<A>(src + i));
  for (; i < n; ++i) dst[i] = to_acc(src[i]);
}
template <class T, class A>
inline void convert_row_back(const A* src, T* dst, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) store_as<A>(dst + i, load(src + i));
  for (; i < n; ++i) dst[i] = from_acc<T>(src[i]);
}

// A store past the caches, on whole vectors' boundaries: its line isn't read first, and takes no other's
// place. For what is too large to be found in the caches again. Whoever reads it next must come after
// streams_end().
template <class V>
inline void stream(void* p, V v) {
#if defined(__clang__)
  __builtin_nontemporal_store(v, static_cast<V*>(p));
#elif defined(__x86_64__)
  float* to = static_cast<float*>(p);
  if constexpr (sizeof(V) == 16) {
    typedef float Floats __attribute__((vector_size(16)));
    __builtin_ia32_movntps(to, (Floats)v);
#if defined(__AVX__)
  } else if constexpr (sizeof(V) == 32) {
    typedef float Floats __attribute__((vector_size(32)));
    __builtin_ia32_movntps256(to, (Floats)v);
#endif
#if defined(__AVX512F__)
  } else if constexpr (sizeof(V) == 64) {
    typedef float Floats __attribute__((vector_size(64)));
    __builtin_ia32_movntps512(to, (Floats)v);
#endif
  } else {
    std::memcpy(p, &v, sizeof v);
  }
#else
  std::memcpy(p, &v, sizeof v);
#endif
}
inline void streams_end() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}
// Whether there are such stores of a vector of A as elements of type T; others are plain ones.
#if defined(__clang__) || defined(__x86_64__)
template <class A, class T>
constexpr bool kStreams = kLanes<A> * sizeof(T) >= 16;
#else
template <class A, class T>
constexpr bool kStreams = false;
#endif
template <class A, class T>
inline void stream_as(T* p, Vec<A> v) {
  stream(p, rounded_to<T, A>(v));
}
// Whether a cache line begins here.
inline bool begins_line(const void* p) { return uintptr_t(p) % 64 == 0; }
template <class A>
inline Vec<A> splat(A a) {
  return a - Vec<A>{};
}
template <class A>
inline A horizontal_sum(Vec<A> v) {
  A s = 0;
  for (int l = 0; l < kLanes<A>; ++l) s += v[l];
  return s;
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// exp to 2 ulp for |x| <= 87 (Cephes' polynomial), inf above 88.4; NaN stays NaN.
inline Vec<float> exponential(Vec<float> x) {
  using I = VectorOf<float>::integer;
  x = x < -87.f ? splat(-87.f) : x;
  x = x > 89.f ? splat(89.f) : x;
  Vec<float> shifted =
      x * 1.44269504f + 12582912.f;  // adding 1.5 * 2^23 rounds to an integer in the low bits
  Vec<float> n = shifted - 12582912.f;
  Vec<float> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  I scale = ((I)shifted << 23) + 0x3f800000;  // 2^n: the constant's low bits shift out
  return p * (Vec<float>)scale;
}
inline Vec<double> exponential(Vec<double> x) {
  for (int l = 0; l < kLanes<double>; ++l) x[l] = std::exp(x[l]);
  return x;
}
template <class A>
inline Vec<A> sigmoid(Vec<A> z) {
  return A(1) / (A(1) + exponential(-z));
}

// to[r][j] = from[r][j]: a product on a copy keeps its sums in registers, whoever holds the address of the
// original.
template <class A, int NV>
inline __attribute__((always_inline)) void copy(const Vec<A> (&from)[kRows][NV], Vec<A> (&to)[kRows][NV]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int j = 0; j < NV; ++j) to[r][j] = from[r][j];
}
// acc[r][j] += a[r] * x[j * lanes + (0 .. lanes)]: kCols vectors and kRows broadcasts are loaded for
// kRows * kCols multiply-adds.
template <class A, int NV>
inline __attribute__((always_inline)) void multiply_once(const A* a, const A* x, Vec<A> (&acc)[kRows][NV]) {
  Vec<A> b[NV];
#pragma GCC unroll 3
  for (int j = 0; j < NV; ++j) b[j] = load(x + j * kLanes<A>);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int j = 0; j < NV; ++j) acc[r][j] += a[r] * b[j];
}
// acc[r][j] += sum_k a[k * lda + r] * x[k * ldx + j * lanes + (0 .. lanes)]: the one matrix product of the
// library.
template <class A, int NV>
inline __attribute__((always_inline)) void multiply(const A* a, int64_t lda, const A* x, int64_t ldx,
                                                    int64_t depth, Vec<A> (&acc)[kRows][NV]) {
  for (int64_t k = 0; k < depth; ++k) multiply_once<A, NV>(a + k * lda, x + k * ldx, acc);
}
// a, b = the even, the odd elements of [a, b].
template <class V, size_t... L>
inline __attribute__((always_inline)) void split(V& a, V& b, std::index_sequence<L...>) {
  const V even = __builtin_shufflevector(a, b, int(2 * L)...),
          odd = __builtin_shufflevector(a, b, int(2 * L + 1)...);
  a = even, b = odd;
}
template <class V>
inline __attribute__((always_inline)) void split(V& a, V& b) {
  split(a, b, std::make_index_sequence<sizeof(V) / sizeof(a[0])>{});
}
// Calls f(vectors, v) for panels of kCols vectors (the last ones narrower) that cover `width` voxels.
template <class A, class F>
inline void for_panels(int64_t width, F&& f) {
  static_assert(kCols == 3);
  int64_t v = 0, vectors = (width + kLanes<A> - 1) / kLanes<A>;
  for (; vectors > 4 || vectors == 3; vectors -= 3, v += 3 * kLanes<A>)
    f(std::integral_constant<int, 3>{}, v);
  for (; vectors > 1; vectors -= 2, v += 2 * kLanes<A>) f(std::integral_constant<int, 2>{}, v);
  if (vectors == 1) f(std::integral_constant<int, 1>{}, v);
}

// Swaps blocks of `Half` lanes between a and b.
template <class A, int Half, bool Upper, size_t... L>
inline Vec<A> exchange(Vec<A> a, Vec<A> b, std::index_sequence<L...>) {
  constexpr int n = kLanes<A>;
  if constexpr (Upper) {
    return __builtin_shufflevector(a, b, ((L & Half) ? int(L) + n : int(L) + Half)...);
  } else {
    return __builtin_shufflevector(a, b, ((L & Half) ? int(L) - Half + n : int(L))...);
  }
}
// The sum of m[i]'s lanes, in lane i.
template <class A, int Half = kLanes<A> / 2>
inline __attribute__((always_inline)) Vec<A> horizontal_sums(Vec<A> (&m)[kLanes<A>]) {
  constexpr auto lanes = std::make_index_sequence<kLanes<A>>{};
#pragma GCC unroll 8
  for (int i = 0; i < Half; ++i)
    m[i] = exchange<A, Half, false>(m[i], m[i + Half], lanes) +
           exchange<A, Half, true>(m[i], m[i + Half], lanes);
  if constexpr (Half > 1) return horizontal_sums<A, Half / 2>(m);
  return m[0];
}

// Transpositions go by pieces of the elements that four floats, or two doubles, take: those of a vector's
// worth of rows are loaded side by side, and what remains to do is within pieces.
template <class A>
constexpr int kPiece = 16 / int(sizeof(A));

template <class V, size_t... L>
inline __attribute__((always_inline)) auto concatenated(V low, V high, std::index_sequence<L...>) {
  return __builtin_shufflevector(low, high, int(L)...);
}
// The pieces of `Elements` elements at src, src + step, ..., `Count` of them, in one vector.
template <class Element, int Elements, int Count, class T>
inline __attribute__((always_inline)) auto gathered(const T* src, int64_t step) {
  if constexpr (Count == 1) {
    typedef Element Piece __attribute__((vector_size(Elements * sizeof(Element))));
    Piece piece;
    std::memcpy(&piece, src, sizeof piece);
    return piece;
  } else {
    constexpr int half = Count / 2;
    return concatenated(gathered<Element, Elements, half>(src, step),
                        gathered<Element, Elements, half>(src + half * step, step),
                        std::make_index_sequence<size_t(Count * Elements)>{});
  }
}
// In each piece the lower, or the upper, halves of a's and b's, by turns `Run` elements of each.
template <class A, int Run, bool Upper, size_t... L>
inline __attribute__((always_inline)) Vec<A> zipped(Vec<A> a, Vec<A> b, std::index_sequence<L...>) {
  constexpr int n = kLanes<A>, p = kPiece<A>, first = Upper ? p / 2 : 0;
  return __builtin_shufflevector(
      a, b,
      (int(L) / p * p + first + int(L) % p / (2 * Run) * Run + int(L) % Run + (int(L) / Run % 2 ? n : 0))...);
}
template <class A, int Run>
inline __attribute__((always_inline)) void zip(Vec<A>& a, Vec<A>& b) {
  constexpr auto lanes = std::make_index_sequence<size_t(kLanes<A>)>{};
  const Vec<A> low = zipped<A, Run, false>(a, b, lanes), high = zipped<A, Run, true>(a, b, lanes);
  a = low, b = high;
}

// dst[c * ldd + r] = src[r * lds + c] for r < rows, c < cols; Add: += instead of =.
template <class A, bool Add = false, class From, class To>
inline void transpose(const From* src, int64_t lds, int64_t rows, int64_t cols, To* dst, int64_t ldd) {
  constexpr int n = kLanes<A>, p = kPiece<A>;
  const auto put = [&](int64_t r, int64_t c) {
    To& to = dst[c * ldd + r];
    const A v = to_acc(src[r * lds + c]);
    to = from_acc<To>(Add ? to_acc(to) + v : v);
  };
  int64_t r = 0;
  for (; r + n <= rows; r += n) {
    int64_t c = 0;
    for (; c + p <= cols; c += p) {
      Vec<A> m[p];
#pragma GCC unroll 4
      for (int i = 0; i < p; ++i) {
        using Element = std::conditional_t<std::is_same_v<From, A>, A, uint16_t>;
        m[i] = widened<A, From>(gathered<Element, p, n / p>(src + (r + i) * lds + c, p * lds));
      }
      if constexpr (p == 4) {
        zip<A, 1>(m[0], m[1]);
        zip<A, 1>(m[2], m[3]);
        zip<A, 2>(m[0], m[2]);
        zip<A, 2>(m[1], m[3]);
        std::swap(m[1], m[2]);
      } else {
        zip<A, 1>(m[0], m[1]);
      }
      To* to = dst + c * ldd + r;
#pragma GCC unroll 4
      for (int i = 0; i < p; ++i, to += ldd) store_as<A>(to, Add ? load_as<A>(to) + m[i] : m[i]);
    }
    for (; c < cols; ++c)
      for (int i = 0; i < n; ++i) put(r + i, c);
  }
  for (r = rows - rows % n; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) put(r, c);
}

}  // namespace
}  // namespace attn_gate::cpu
