// The pre-activation s = theta + phi, as forward and backward read it, and what becomes of it.
#pragma once
#include "tile.cuh"

namespace attn_gate::cuda {

// Walks over the channels of coarse voxel `offset`: i, i + step, ... phi is that of theta's grid.
template <class T>
struct Cursor {
  const T *theta, *phi;
  int64_t theta_step, phi_step;
  __device__ __forceinline__ Cursor(const Chain& chain, int64_t n, int i, int64_t offset, int step)
      : theta(at<const T>(chain.theta, n, i, offset)),
        phi(chain.phi && !chain.phi_resized() ? at<const T>(chain.phi, n, i, offset) : nullptr),
        theta_step(step * chain.theta.channel), phi_step(step * chain.phi.channel) {}
  __device__ __forceinline__ void advance() {
    theta += theta_step;
    phi += phi ? phi_step : 0;
  }
  // V elements of s: voxels of a channel in contiguous maps, channels of a voxel in channels-last ones.
  template <int V>
  __device__ __forceinline__ Values<Acc<T>, V> read() const {
    Values<Acc<T>, V> s = load<V>(theta);
    return phi ? add(s, load<V>(phi)) : s;
  }
};

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

// ds of V elements; a closed relu lets nothing through, not even NaN.
template <class A, int V>
__device__ __forceinline__ Values<A, V> slope_of(Activation kind, const Values<A, V>& s,
                                                 const Values<A, V>& psi, const Values<A, V>& dlogit) {
  auto ds = activated_grad(kind, s);
#pragma unroll
  for (int k = 0; k < V; ++k) ds.v[k] = ds.v[k] == A(0) ? A(0) : ds.v[k] * (dlogit.v[k] * psi.v[k]);
  return ds;
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
