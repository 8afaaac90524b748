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
  int64_t sectors = 0;           // of global memory, where trace.cpp counts them
  int64_t waves = 0, least = 0;  // of shared memory: passes that its banks took, and would without conflicts
};
extern std::vector<Launch> launches;  // since a test last took them
extern int far;                       // bytes of an element: kernels get maps with strides beyond 32 bits
extern int64_t last_blocks;           // of a launch are all that run
extern uint3 thread_index, block_index;
extern dim3 grid_size;

bool inside_kernel();
bool on_fiber_stack(const void* address);
void launch(const char* params, int64_t blocks, int threads, size_t shared,
            const std::function<void()>& kernel);
void barrier(int line);
void* shared_piece(int index, size_t bytes);  // the block's index-th piece, the same for all threads
void exchange(const void* mine, void* theirs, size_t bytes, int lane_mask, int line);

// A map's elements moved to where each channel (of channels-last maps: each voxel) begins 2^31 elements
// behind the one before, in memory of which only what is written exists; and back, as this ends.
class FarMap {
 public:
  FarMap(attn_gate::cuda::Map& map, int64_t batch, int64_t voxels);
  FarMap(FarMap&& other) noexcept;
  ~FarMap();

 private:
  void copy(bool back) const;
  attn_gate::cuda::Map near_, far_;
  int64_t batch_, voxels_;
  size_t bytes_;
};

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

struct Reduce;

struct Shared {
  int taken = 0;
  template <class A>
  A* take(int count) {
    return static_cast<A*>(on_host::shared_piece(taken++, size_t(count) * sizeof(A)));
  }
};

// The kernel's maps, with the grid of each.
struct MapOn {
  Map* map;
  Grid grid;
};
inline std::vector<MapOn> maps_of(Chain& c) {
  const Grid phi = c.phi_resized() ? c.gating : c.coarse;
  return {{&c.theta, c.coarse}, {&c.phi, phi}, {&c.dtheta, c.coarse}, {&c.dphi, phi}};
}
inline std::vector<MapOn> maps_of(PhiBackward& p) { return maps_of(p.chain); }
inline std::vector<MapOn> maps_of(Forward& p) {
  auto maps = maps_of(p.chain);
  maps.insert(maps.end(), {{&p.x, p.fine}, {&p.y, p.fine}});
  return maps;
}
inline std::vector<MapOn> maps_of(Backward& p) {
  auto maps = maps_of(p.chain);
  maps.insert(maps.end(), {{&p.x, p.fine}, {&p.dy, p.fine}, {&p.dx, p.fine}});
  return maps;
}

template <class P>
void move_far(P& p, std::vector<on_host::FarMap>& moved) {
  for (const MapOn& on : maps_of(p))
    if (*on.map && p.batch * on.map->channels * on.grid.voxels() > 0)
      moved.emplace_back(*on.map, p.batch, on.grid.voxels());
}
inline void move_far(Reduce&, std::vector<on_host::FarMap>&) {}  // has no maps

template <class P>
void launch(void (*kernel)(P), int64_t blocks, size_t shared, void*, const P& params) {
  P p = params;
  std::vector<on_host::FarMap> moved;
  if (on_host::far) move_far(p, moved);
  on_host::launch(typeid(P).name(), blocks, kThreads, shared, [&] { kernel(p); });
}

}  // namespace attn_gate::cuda
