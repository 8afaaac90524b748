// CUDA on the host, for tests: every thread of a block is a fiber, blocks run one after the other.
//
// The kernels in csrc/cuda compile against this unchanged (device.h includes it). What it shows that numbers
// alone don't:
//   - shared memory starts as NaN, and every piece of it is an allocation of its own size: AddressSanitizer
//   sees
//     one element too far;
//   - threads run in an order that tests choose (`order`): a missing barrier shows in some of them;
//   - barriers where not all threads wait, or at different lines, and shuffles that lack a lane end the
//   process;
//   - under ThreadSanitizer threads are fibers of its own, ordered by barriers alone: it names the line of a
//   race,
//     within a block or between blocks, also where the numbers came out right;
//   - trace.cpp counts memory transactions.
//
// It knows what the kernels use: one-dimensional blocks and grids, dynamic shared memory, __syncthreads,
// __shfl_xor_sync with all lanes, __ldg.
#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <typeinfo>
#include <vector>

#include "cuda/problem.h"

#undef __global__
#undef __device__
#undef __forceinline__
#undef __launch_bounds__
#undef __noinline__
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __noinline__ __attribute__((noinline))

// The machinery itself is not what sanitizers shall look at.
#define ON_HOST_UNCHECKED __attribute__((noinline, no_sanitize("thread", "address")))

namespace on_host {

extern int processors;  // what the kernels' launches take for the number of multiprocessors
extern uint64_t order;  // 0: threads run in order, 1: in reverse; else in an order drawn from this seed
struct Launch {
  const char* params;  // the type of the kernel's parameters, as the compiler names it
  int64_t blocks;
  size_t shared;
};
extern std::vector<Launch> launches;  // since a test last took them
extern uint3 thread_index, block_index;
extern dim3 grid_size;

bool inside_kernel();
bool on_fiber_stack(const void* address);
void launch(const char* params, int64_t blocks, int threads, size_t shared,
            const std::function<void()>& kernel);
void barrier(int line);
void* shared_piece(int index, size_t bytes);  // the block's index-th piece, the same for all threads
void exchange(const void* mine, void* theirs, size_t bytes, int lane_mask, int line);

}  // namespace on_host

#define threadIdx (on_host::thread_index)
#define blockIdx (on_host::block_index)
#define gridDim (on_host::grid_size)

inline void __syncthreads(int line = __builtin_LINE()) { on_host::barrier(line); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int lane_mask, int line = __builtin_LINE()) {
  T other;
  on_host::exchange(&value, &other, sizeof(T), lane_mask, line);
  return other;
}

template <class T>
T __ldg(const T* from) {
  return *from;
}

namespace attn_gate::cuda {

struct Shared {
  int taken = 0;
  template <class A>
  A* take(int count) {
    return static_cast<A*>(on_host::shared_piece(taken++, size_t(count) * sizeof(A)));
  }
};

template <class P>
void launch(void (*kernel)(P), int64_t blocks, size_t shared, void*, const P& params) {
  on_host::launch(typeid(P).name(), blocks, kThreads, shared, [&] { kernel(params); });
}

}  // namespace attn_gate::cuda
