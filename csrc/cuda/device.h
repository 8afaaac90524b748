// What the kernels use of CUDA, so that the same sources also compile for the host, where the tests run every
// thread as a fiber (tests/cuda_on_host).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "problem.h"

#if defined(ATTN_GATE_CUDA_ON_HOST)
#include "cuda_on_host.h"
#else
#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/Exception.h>

namespace attn_gate::cuda {

// Pieces of the block's dynamic shared memory, handed out in order. All threads take the same pieces.
struct Shared {
  unsigned char* next;
  __device__ Shared() {
    extern __shared__ __align__(16) unsigned char memory[];
    next = memory;
  }
  template <class A>
  __device__ A* take(int count) {
    A* piece = reinterpret_cast<A*>(next);
    next += (count * int(sizeof(A)) + 15) / 16 * 16;
    return piece;
  }
};

template <class P>
void launch(void (*kernel)(P), int64_t blocks, size_t shared, void* stream, const P& params) {
  cudaLaunchConfig_t config{};
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "attn_gate: ", blocks, " blocks are too many for one launch");
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, params);
  // Our runtime is a static one, whose last error PyTorch doesn't clear: it would spoil the next launch.
  if (error != cudaSuccess) (void)cudaGetLastError();
  STD_CUDA_CHECK(error);
}

}  // namespace attn_gate::cuda
#endif

namespace attn_gate::cuda {

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulator<T>::type;

// Blocks that a multiprocessor must be able to hold: at most 80 registers a thread, or 128 in double.
template <class T>
constexpr int kResident = sizeof(Acc<T>) == 8 ? 2 : 3;

__device__ __forceinline__ float to_acc(float v) { return v; }
__device__ __forceinline__ double to_acc(double v) { return v; }
__device__ __forceinline__ float to_acc(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_acc(__nv_bfloat16 v) { return __bfloat162float(v); }
template <class T>
__device__ __forceinline__ T from_acc(Acc<T> v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_acc<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_acc<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Numbers in registers: V voxels of a channel, or V channels of a voxel.
template <class A, int V>
struct Values {
  A v[V];
};

template <class A, int V>
__device__ __forceinline__ Values<A, V> add(Values<A, V> a, const Values<A, V>& b) {
#pragma unroll
  for (int k = 0; k < V; ++k) a.v[k] += b.v[k];
  return a;
}

template <class T>
constexpr int kWide = 16 / int(sizeof(T));  // elements of the widest access

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

template <int V, class T>
__device__ __forceinline__ Values<Acc<T>, V> unpacked(const Pack<T, V>& pack) {
  Values<Acc<T>, V> out;
#pragma unroll
  for (int k = 0; k < V; ++k) out.v[k] = to_acc(pack.v[k]);
  return out;
}

// V elements in one access. What a kernel reads, nobody writes meanwhile: through the read-only cache.
template <int V, class T>
__device__ __forceinline__ Values<Acc<T>, V> load(const T* from) {
  Pack<T, V> pack;
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(pack) == 16) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from));
    __builtin_memcpy(&pack, &bits, 16);
  } else {
    static_assert(V == 1);
    pack.v[0] = __ldg(from);
  }
#else
  pack = *reinterpret_cast<const Pack<T, V>*>(from);
#endif
  return unpacked(pack);
}

// The same from shared memory, which that cache doesn't reach.
template <int V, class T>
__device__ __forceinline__ Values<Acc<T>, V> load_shared(const T* from) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
  return unpacked(pack);
}

template <int V, class T>
__device__ __forceinline__ void store(T* to, const Values<Acc<T>, V>& values) {
  Pack<T, V> pack;
#pragma unroll
  for (int k = 0; k < V; ++k) pack.v[k] = from_acc<T>(values.v[k]);
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(pack) == 16) {
    uint4 bits;
    __builtin_memcpy(&bits, &pack, 16);
    *reinterpret_cast<uint4*>(to) = bits;
  } else {
    *to = pack.v[0];
  }
#else
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
#endif
}

// A run of V numbers in shared memory, at most 16 bytes at a time. Eight lanes with two such parts each reach
// over 256 bytes, whose halves lie in the same banks: the lanes of the second half begin with the other part.
template <class A, int V>
struct Run {
  static constexpr int kPart = V * int(sizeof(A)) < 16 ? V : 16 / int(sizeof(A));
  static_assert(V == kPart || V == 2 * kPart);
  static __device__ __forceinline__ int first_part(const A* at) {
    return V > kPart && (reinterpret_cast<uintptr_t>(at) & 128) ? kPart : 0;
  }
};

template <int V, class A>
__device__ __forceinline__ Values<A, V> load_run(const A* from) {
  constexpr int kPart = Run<A, V>::kPart;
  const int first = Run<A, V>::first_part(from);
  const auto one = load_shared<kPart>(from + first);
  Values<A, V> out;
#pragma unroll
  for (int j = 0; j < kPart; ++j) out.v[j] = one.v[j];
  if constexpr (V > kPart) {
    const auto other = load_shared<kPart>(from + kPart - first);
#pragma unroll
    for (int j = 0; j < kPart; ++j) {
      out.v[j] = first ? other.v[j] : one.v[j];
      out.v[kPart + j] = first ? one.v[j] : other.v[j];
    }
  }
  return out;
}

template <int V, class A>
__device__ __forceinline__ void store_run(A* to, const Values<A, V>& values) {
  constexpr int kPart = Run<A, V>::kPart;
  const int first = Run<A, V>::first_part(to);
  Pack<A, kPart> part;
#pragma unroll
  for (int j = 0; j < kPart; ++j) part.v[j] = V > kPart && first ? values.v[V - kPart + j] : values.v[j];
  *reinterpret_cast<Pack<A, kPart>*>(to + first) = part;
  if constexpr (V > kPart) {
#pragma unroll
    for (int j = 0; j < kPart; ++j) part.v[j] = first ? values.v[j] : values.v[kPart + j];
    *reinterpret_cast<Pack<A, kPart>*>(to + kPart - first) = part;
  }
}

template <class A>
__device__ __forceinline__ A sum_over_lanes(A value, int from, int to) {  // lanes that differ in these bits
  for (int bit = from; bit < to; bit *= 2) value += __shfl_xor_sync(0xffffffffu, value, bit);
  return value;
}

template <class T>
__device__ __forceinline__ T* at(const Map& m, int64_t n, int64_t c, int64_t voxel) {
  return static_cast<T*>(m.data) + n * m.sample + c * m.channel + voxel * m.voxel;
}

}  // namespace attn_gate::cuda
