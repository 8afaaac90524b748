// The machinery of cuda_on_host.h: fibers, barriers, exchanges, shared memory.
#include "cuda_on_host.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "trace.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(ON_HOST_RACES)
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void*);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void*, unsigned flags);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#endif

#if !defined(__x86_64__)
#error "cuda_on_host switches stacks in x86-64 assembly"
#endif

// Saves the callee's registers and stack pointer to *save, and goes on where `load` was saved.
extern "C" void on_host_switch(void** save, void* load);
asm(R"(.text
.hidden on_host_switch
.globl on_host_switch
.type on_host_switch,@function
on_host_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size on_host_switch,.-on_host_switch
)");

namespace on_host {

int processors = 2;
uint64_t order = 0;
int far = 0;
int64_t last_blocks = INT64_MAX;
std::vector<Launch> launches;
uint3 thread_index{}, block_index{};
dim3 grid_size{};

namespace {

constexpr size_t kStack = 256 << 10;
constexpr int kWarp = 32;

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  bool done = false;
  int waits_at = 0;            // the line of the barrier or shuffle
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* race_fiber = nullptr;  // ThreadSanitizer's
};

struct Warp {
  unsigned arrived = 0, generation = 0;
  int line = 0;
  unsigned char slots[2][kWarp][16];
};

struct Piece {
  void* data;
  size_t bytes;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Piece> pieces;
  const std::function<void()>* kernel = nullptr;
  int threads = 0, running = 0, arrived = 0, line = 0, current = -1;
  unsigned generation = 0;
  bool progress = false;
  size_t shared_taken = 0, shared_asked = 0;
  char barrier_edges[2], end_edge, piece_edge;
  // the scheduler's own stack
  void *sp = nullptr, *fake_stack = nullptr, *race_fiber = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
} block;

// Freed after the launch: memory that comes back would look to ThreadSanitizer like a race between blocks.
std::vector<void*> garbage;

void edge_to(void* edge) {
#if defined(ON_HOST_RACES)
  __tsan_release(edge);
#else
  (void)edge;
#endif
}
void edge_from(void* edge) {
#if defined(ON_HOST_RACES)
  __tsan_acquire(edge);
#else
  (void)edge;
#endif
}

// Copies that sanitizers and the trace don't see.
ON_HOST_UNCHECKED void copy(void* to, const void* from, size_t bytes) {
  auto* d = static_cast<volatile char*>(to);
  auto* s = static_cast<const volatile char*>(from);
  for (size_t i = 0; i < bytes; ++i) d[i] = s[i];
}
ON_HOST_UNCHECKED void fill(void* to, int value, size_t bytes) {
  auto* d = static_cast<volatile char*>(to);
  for (size_t i = 0; i < bytes; ++i) d[i] = char(value);
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s (block %u, thread %d)\n", what, block_index.x, block.current);
  int shown = 0;
  for (int i = 0; i < block.threads && shown < 4; ++i)
    if (!block.fibers[size_t(i)].done && block.fibers[size_t(i)].waits_at && ++shown)
      std::fprintf(stderr, "  thread %d waits at line %d\n", i, block.fibers[size_t(i)].waits_at);
  std::abort();
}

ON_HOST_UNCHECKED void to_scheduler() {
  Fiber& me = block.fibers[size_t(block.current)];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(me.done ? nullptr : &me.fake_stack, block.bottom, block.size);
#endif
#if defined(ON_HOST_RACES)
  __tsan_switch_to_fiber(block.race_fiber, 1);  // 1: a switch orders nothing
#endif
  on_host_switch(&me.sp, block.sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(me.fake_stack, nullptr, nullptr);
#endif
}

ON_HOST_UNCHECKED void to_thread(int i) {
  Fiber& fiber = block.fibers[size_t(i)];
  block.current = i;
  thread_index.x = unsigned(i);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block.fake_stack, fiber.stack, kStack);
#endif
#if defined(ON_HOST_RACES)
  __tsan_switch_to_fiber(fiber.race_fiber, 1);
#endif
  on_host_switch(&block.sp, fiber.sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block.fake_stack, nullptr, nullptr);
#endif
}

void release_barrier() {
  block.arrived = block.line = 0;
  ++block.generation;
}

ON_HOST_UNCHECKED void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.bottom, &block.size);
#endif
  (*block.kernel)();
  edge_to(&block.end_edge);
  block.fibers[size_t(block.current)].done = block.progress = true;
  // Threads that have ended no longer count at barriers, as on the GPU.
  if (--block.running > 0 && block.arrived == block.running) release_barrier();
  to_scheduler();
  std::abort();
}

void begin_fiber(Fiber& fiber) {
#if defined(ON_HOST_RACES)
  const size_t bytes = kStack;  // new pages each time: they have no history of accesses
  fiber.stack =
      static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  fiber.race_fiber = __tsan_create_fiber(0);
#else
  if (!fiber.stack) fiber.stack = static_cast<char*>(std::aligned_alloc(4096, kStack));
#endif
  auto** sp = reinterpret_cast<void**>(fiber.stack + kStack);
  *--sp = nullptr;  // where run_thread would return to; keeps the stack aligned as after a call
  *--sp = reinterpret_cast<void*>(&run_thread);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  fiber.sp = sp;
  fiber.done = false;
  fiber.waits_at = 0;
}

void run_block(int index, const std::vector<int>& sequence) {
  block_index.x = unsigned(index);
  block.running = block.threads;
  block.arrived = block.line = 0;
  block.shared_taken = 0;
  block.warps.assign(size_t(block.threads / kWarp), Warp{});
  for (int i = 0; i < block.threads; ++i) begin_fiber(block.fibers[size_t(i)]);
  trace_block_begins();
  while (block.running > 0) {
    block.progress = false;
    for (int i : sequence)
      if (!block.fibers[size_t(i)].done) to_thread(i);
    if (!block.progress) fail("deadlock: no thread of the block can go on");
  }
  block.current = -1;
  trace_block_ends();
#if defined(ON_HOST_RACES)
  for (Fiber& fiber : block.fibers) {
    __tsan_destroy_fiber(fiber.race_fiber);
    munmap(fiber.stack, kStack);
  }
#endif
  for (const Piece& piece : block.pieces) garbage.push_back(piece.data);
  block.pieces.clear();
}

std::vector<int> sequence_of(int threads) {
  std::vector<int> sequence(static_cast<size_t>(threads));
  std::iota(sequence.begin(), sequence.end(), 0);
  if (order == 1) std::reverse(sequence.begin(), sequence.end());
  if (order > 1) std::shuffle(sequence.begin(), sequence.end(), std::mt19937_64(order));
  return sequence;
}

}  // namespace

bool inside_kernel() { return block.current >= 0; }

bool on_fiber_stack(const void* address) {
  const char *at = static_cast<const char*>(address), *stack = block.fibers[size_t(block.current)].stack;
  return stack <= at && at < stack + kStack;
}

void launch(const char* params, int64_t blocks, int threads, size_t shared,
            const std::function<void()>& kernel) {
  if (blocks < 1 || blocks > 0x7fffffff || threads % kWarp != 0 || threads > 1024) fail("bad launch");
  if (shared > (48 << 10)) fail("more shared memory than a block has without asking");
  launches.push_back({params, blocks, shared, -traced_sectors, -traced_waves, -traced_least});
  block.kernel = &kernel;
  block.threads = threads;
  block.shared_asked = shared;
  block.fibers.resize(size_t(threads));
  grid_size = dim3(unsigned(blocks));
#if defined(ON_HOST_RACES)
  block.race_fiber = __tsan_get_current_fiber();
#endif
  const auto sequence = sequence_of(threads);
  for (int64_t i = std::max<int64_t>(blocks - last_blocks, 0); i < blocks; ++i) run_block(int(i), sequence);
  launches.back().sectors += traced_sectors;
  launches.back().waves += traced_waves;
  launches.back().least += traced_least;
  edge_from(&block.end_edge);
  for (void* memory : garbage) std::free(memory);
  garbage.clear();
}

ON_HOST_UNCHECKED void barrier(int line) {
  const unsigned generation = block.generation;
  block.progress = true;
  if (block.line && block.line != line) fail("threads of one block wait at different barriers");
  block.line = line;
  edge_to(&block.barrier_edges[generation & 1]);
  Fiber& me = block.fibers[size_t(block.current)];
  if (++block.arrived == block.running) {
    release_barrier();
  } else {
    me.waits_at = line;
    while (block.generation == generation) to_scheduler();
    me.waits_at = 0;
  }
  edge_from(&block.barrier_edges[generation & 1]);
}

ON_HOST_UNCHECKED void exchange(const void* mine, void* theirs, size_t bytes, int lane_mask, int line) {
  const int lane = block.current % kWarp, me = block.current;
  Warp& warp = block.warps[size_t(me / kWarp)];
  block.progress = true;
  if (bytes > 16 || lane_mask < 0 || lane_mask >= kWarp) fail("bad shuffle");
  if (warp.arrived && warp.line != line) fail("lanes of one warp are at different shuffles");
  warp.line = line;
  const unsigned generation = warp.generation;
  copy(warp.slots[generation & 1][lane], mine, bytes);
  warp.arrived |= 1u << lane;
  if (warp.arrived == 0xffffffffu) {
    warp.arrived = 0;
    ++warp.generation;
  } else {
    block.fibers[size_t(me)].waits_at = line;
    while (warp.generation == generation) to_scheduler();
    block.fibers[size_t(me)].waits_at = 0;
  }
  copy(theirs, warp.slots[generation & 1][lane ^ lane_mask], bytes);
}

ON_HOST_UNCHECKED void* shared_piece(int index, size_t bytes) {
  if (size_t(index) == block.pieces.size()) {
    // malloc, not aligned_alloc: rounded up to the alignment, one element too far would lie inside.
    void* data = std::malloc(bytes);
    fill(data, 0xff, bytes);  // NaN
    block.pieces.push_back({data, bytes});
    block.shared_taken += (bytes + 15) / 16 * 16;
    if (block.shared_taken > block.shared_asked)
      fail("the kernel takes more shared memory than its launch gives");
    trace_shared(index, data, bytes);
    edge_to(&block.piece_edge);
  }
  edge_from(&block.piece_edge);
  const Piece& piece = block.pieces[size_t(index)];
  if (piece.bytes != bytes) fail("threads take different pieces of shared memory");
  return piece.data;
}

FarMap::FarMap(attn_gate::cuda::Map& map, int64_t batch, int64_t voxels)
    : near_(map), far_(map), batch_(batch), voxels_(voxels) {
  constexpr int64_t stride = (int64_t(1) << 31) + 4096;
  (map.channels_last() ? far_.voxel : far_.channel) = stride;
  far_.sample = stride * (map.channels_last() ? voxels : map.channels);
  bytes_ = size_t(far_.sample) * size_t(batch) * size_t(far);
  far_.data =
      mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (far_.data == MAP_FAILED) fail("no address space for far maps");
  copy(false);
  map = far_;
}
FarMap::FarMap(FarMap&& other) noexcept
    : near_(other.near_), far_(other.far_), batch_(other.batch_), voxels_(other.voxels_),
      bytes_(other.bytes_) {
  other.far_.data = nullptr;
}
FarMap::~FarMap() {
  if (!far_.data) return;
  copy(true);
  munmap(far_.data, bytes_);
}
void FarMap::copy(bool back) const {
  const attn_gate::cuda::Map &from = back ? far_ : near_, &to = back ? near_ : far_;
  auto offset = [](const attn_gate::cuda::Map& m, int64_t n, int64_t c, int64_t v) {
    return static_cast<char*>(m.data) + far * (n * m.sample + c * m.channel + v * m.voxel);
  };
  for (int64_t n = 0; n < batch_; ++n)
    for (int64_t c = 0; c < near_.channels; ++c)
      for (int64_t v = 0; v < voxels_; ++v)
        std::memcpy(offset(to, n, c, v), offset(from, n, c, v), size_t(far));
}

}  // namespace on_host
