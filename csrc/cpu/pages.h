// Memory of large results and workspaces: huge pages, and whether there are any yet.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>

#include "problem.h"
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace attn_gate::cpu {

// From 32 MiB on (DEFAULT_MMAP_THRESHOLD_MAX) glibc gives each block its own mapping, and takes that down
// when the block is freed: each call meets fresh pages, one fault each, which cost as much as all the
// writing. Of huge pages there are 512 times fewer. Below, memory comes from the heap and mostly has its
// pages.
inline void advise_huge_pages(const torch::stable::Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t page = int64_t(2) << 20, least = 16 * page;
  const int64_t bytes = t.numel() * t.element_size();
  if (bytes < least) return;
  const int64_t address = int64_t(reinterpret_cast<uintptr_t>(t.mutable_data_ptr()));
  const int64_t first = (address + page - 1) / page * page, last = (address + bytes) / page * page;
  madvise(reinterpret_cast<void*>(first), size_t(last - first), MADV_HUGEPAGE);
#else
  (void)t;
#endif
}

// Whether the memory of a result above kLarge has its pages: the one in the middle stands for all. Others
// come at first touch, and come cleared, by way of the caches.
inline bool has_pages(const torch::stable::Tensor& t) {
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

}  // namespace attn_gate::cpu
