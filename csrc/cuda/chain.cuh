// The pre-activation s = theta + resize(phi), as forward and backward read it.
#pragma once
#include "tile.cuh"

namespace attn_gate::cuda {

// Walks over the channels of coarse voxel `offset`: i, i + step, ...
template <class T>
struct Cursor {
  const T *theta, *phi;
  int64_t theta_step, phi_step;
  __device__ __forceinline__ Cursor(const Chain& chain, int64_t n, int i, int64_t offset, int step)
      : theta(at<const T>(chain.theta, n, i, offset)),
        phi(chain.phi ? at<const T>(chain.phi, n, i, chain.phi_resized() ? 0 : offset) : nullptr),
        theta_step(step * chain.theta.channel), phi_step(step * chain.phi.channel) {}
  __device__ __forceinline__ void advance() {
    theta += theta_step;
    phi += phi ? phi_step : 0;
  }
  // V elements of s: voxels of a channel in contiguous maps, channels of a voxel in channels-last ones. phi
  // that is resized is read element by element; `corners` are the voxel's in it.
  template <int V>
  __device__ __forceinline__ Values<Acc<T>, V> read(const Chain& chain,
                                                    const Corners<Acc<T>>& corners) const {
    Values<Acc<T>, V> s = load<V>(theta);
    if (!phi) return s;
    Values<Acc<T>, V> more;
    if (V == 1 && chain.phi_resized()) {
      more.v[0] = corners.mix([&](int64_t voxel) { return load<1>(phi + voxel * chain.phi.voxel); }).v[0];
    } else {
      more = load<V>(phi);
    }
#pragma unroll
    for (int k = 0; k < V; ++k) s.v[k] += more.v[k];
    return s;
  }
};

template <int V, class A>
__device__ __forceinline__ Corners<A> phi_corners(const Chain& chain, int64_t offset) {
  if (V > 1 || !chain.phi_resized()) return {};
  return corners_of<A>(chain.phi_resize, chain.gating, chain.coarse, offset);
}

// Called, not inlined: erf and log1p would multiply the kernels' size for what few gates use.
template <class A>
__device__ __noinline__ A activate_smooth(Activation kind, A s) {
  return activate(kind, s);
}
template <class A>
__device__ __noinline__ A activate_smooth_grad(Activation kind, A s) {
  return activate_grad(kind, s);
}

// The kind is the same for all threads.
template <class A, int V>
__device__ __forceinline__ Values<A, V> activated(Activation kind, Values<A, V> s) {
  if (kind == Activation::relu) {
#pragma unroll
    for (int k = 0; k < V; ++k) s.v[k] = activate(Activation::relu, s.v[k]);
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k) s.v[k] = activate_smooth(kind, s.v[k]);
  }
  return s;
}

template <class A, int V>
__device__ __forceinline__ Values<A, V> activated_grad(Activation kind, Values<A, V> s) {
  if (kind == Activation::relu) {
#pragma unroll
    for (int k = 0; k < V; ++k) s.v[k] = activate_grad(Activation::relu, s.v[k]);
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k) s.v[k] = activate_smooth_grad(kind, s.v[k]);
  }
  return s;
}

// psi's weights: copied to shared memory, if they are few enough.
template <class A>
__device__ __forceinline__ const A* cached_psi(const Chain& chain, A* cache) {
  const A* psi = static_cast<const A*>(chain.psi);
  if (chain.inter > kCachedPsi) return psi;
  for (int i = int(threadIdx.x); i < chain.inter; i += kThreads) cache[i] = psi[i];
  return cache;
}

}  // namespace attn_gate::cuda
