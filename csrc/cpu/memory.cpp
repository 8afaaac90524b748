// Large results lie in blocks of our own, which are kept when they are freed, for the next results of their
// size.
//
// From 32 MiB on (DEFAULT_MMAP_THRESHOLD_MAX) glibc maps each block anew, and takes it down when it is freed:
// each call then meets fresh pages, which cost as much as all else that a gate does there, and several times
// that in a virtual machine whose host takes free memory back. Smaller ones come from the heap, whose end
// glibc gives back when more than a moving threshold is free.
//
// What is kept is lent to the system (MADV_FREE): where memory gets short, it takes the pages.
#include "memory.h"

#include <torch/csrc/stable/ops.h>

#include "problem.h"
#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <deque>
#include <mutex>
#include <new>
#include <optional>

// From torch 2.11 on; without it results lie in memory of torch's.
extern "C" __attribute__((weak)) AOTITorchError
torch_from_blob(void* data, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t offset,
                int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
                int32_t layout, const uint8_t* metadata, int64_t metadata_size,
                void (*deleter)(void* data, void* context), void* context);
#endif

namespace attn_gate::cpu {

#if defined(__linux__)
namespace {

constexpr int64_t kHugePage = int64_t(2) << 20, kKept = int64_t(4) << 20;

struct Block {
  void* data;
  int64_t bytes;
};

Block map(int64_t bytes) {
  // Aligned to huge pages, of which there are 512 times fewer; what is over on both sides goes back.
  char* const start = static_cast<char*>(
      mmap(nullptr, size_t(bytes + kHugePage), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (start == MAP_FAILED) return {nullptr, bytes};
  const int64_t before = -int64_t(reinterpret_cast<uintptr_t>(start)) & (kHugePage - 1);
  char* const data = start + before;
  if (before) munmap(start, size_t(before));
  munmap(data + bytes, size_t(kHugePage - before));
#if defined(MADV_HUGEPAGE)
  madvise(data, size_t(bytes), MADV_HUGEPAGE);
#endif
  return {data, bytes};
}

void unmap(const Block& block) { munmap(block.data, size_t(block.bytes)); }

class Keeper {
 public:
  int64_t limit() const { return limit_; }
  int64_t set_limit(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    const int64_t was = limit_.exchange(bytes);
    shrink(bytes);
    return was;
  }
  // The smallest that is large enough and at most a quarter too large, of these the one freed last.
  std::optional<Block> take(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    auto best = blocks_.end();
    for (auto b = blocks_.begin(); b != blocks_.end(); ++b)
      if (b->bytes >= bytes && b->bytes <= bytes + bytes / 4 &&
          (best == blocks_.end() || b->bytes <= best->bytes))
        best = b;
    if (best == blocks_.end()) return std::nullopt;
    const Block block = *best;
    blocks_.erase(best);
    held_ -= block.bytes;
    return block;
  }
  void give_back(const Block& block) noexcept {
    if (block.bytes > limit_) return unmap(block);
#if defined(MADV_FREE)
    madvise(block.data, size_t(block.bytes), MADV_FREE);
#endif
    const std::lock_guard lock(mutex_);
    try {
      blocks_.push_back(block);
    } catch (const std::bad_alloc&) {
      return unmap(block);
    }
    held_ += block.bytes;
    shrink(limit_);
  }
  void drop() {
    const std::lock_guard lock(mutex_);
    shrink(0);
  }
  // A forked child must not find it locked by a thread that it doesn't have.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  void shrink(int64_t most) {
    for (; held_ > most; blocks_.pop_front()) {
      held_ -= blocks_.front().bytes;
      unmap(blocks_.front());
    }
  }
  std::mutex mutex_;
  std::deque<Block> blocks_;  // freed first in front
  int64_t held_ = 0;
  std::atomic<int64_t> limit_{int64_t(1) << 30};
};

Keeper& keeper() {
  static Keeper* const never_destroyed = [] {  // results may be freed after static objects
    const auto lock = [] { keeper().lock(); };
    const auto unlock = [] { keeper().unlock(); };
    pthread_atfork(lock, unlock, unlock);
    return new Keeper;
  }();
  return *never_destroyed;
}

// Null where the system has no memory.
Block new_block(int64_t bytes) {
  if (const auto kept = keeper().take(bytes)) return *kept;
  Block block = map(bytes);
  if (!block.data) {
    keeper().drop();
    block = map(bytes);
  }
  return block;
}

}  // namespace
#endif

namespace {

// Of strides as `format` has them.
Ints strides_of(const Ints& shape, MemoryFormat format) {
  const size_t dims = shape.size();
  Ints strides(dims);
  int64_t next = 1;
  if (format != MemoryFormat::Contiguous) {
    strides[1] = next;
    next = shape[1];
  }
  for (size_t i = dims; i-- > 0;) {
    if (i == 1 && format != MemoryFormat::Contiguous) continue;
    strides[i] = next;
    next *= shape[i];
  }
  return strides;
}

Tensor new_tensor(const Tensor& like, const Ints& shape, ScalarType dtype, MemoryFormat format) {
#if defined(__linux__)
  int64_t bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  for (int64_t n : shape) bytes *= n;
  if (bytes >= kKept && torch_from_blob && keeper().limit() > 0) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const Block block = new_block((bytes + page - 1) / page * page);
    const Ints strides = strides_of(shape, format);
    const auto give_back = [](void* data, void* context) {
      keeper().give_back({data, int64_t(reinterpret_cast<intptr_t>(context))});
    };
    AtenTensorHandle handle = nullptr;
    if (block.data) {
      // Where this fails the block stays lost: it may have been given back already.
      STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(
          block.data, int64_t(shape.size()), shape.data(), strides.data(), 0,
          torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
          aoti_torch_device_type_cpu(), like.get_device_index(), &handle, aoti_torch_layout_strided(),
          nullptr, 0, give_back, reinterpret_cast<void*>(intptr_t(block.bytes))));
      return Tensor(handle);
    }
  }
#endif
  return torch::stable::empty(shape, dtype, std::nullopt, like.device(), std::nullopt, format);
}

}  // namespace

Tensor new_acc(const Tensor& like, const Ints& shape) {
  return new_tensor(like, shape, acc_dtype(like), MemoryFormat::Contiguous);
}

Tensor new_map(const Tensor& like, int64_t channels, const Ints& grid) {
  return new_tensor(like, map_shape(like, channels, grid), like.scalar_type(), map_format(like));
}

bool has_pages(const Tensor& t) {
#if defined(__linux__)
  const int64_t page = sysconf(_SC_PAGESIZE), middle = t.numel() * t.element_size() / 2;
  if (2 * middle <= kLarge) return false;
  const int64_t address = int64_t(reinterpret_cast<uintptr_t>(t.mutable_data_ptr())) + middle;
  unsigned char state = 0;
  mincore(reinterpret_cast<void*>(address / page * page), 1, &state);
  return state & 1;
#else
  (void)t;
  return false;
#endif
}

int64_t keep_memory(int64_t limit) {
  STD_TORCH_CHECK(limit >= 0, "attn_gate: limit is a number of bytes, got ", limit);
#if defined(__linux__)
  return keeper().set_limit(limit);
#else
  return 0;
#endif
}

}  // namespace attn_gate::cpu
