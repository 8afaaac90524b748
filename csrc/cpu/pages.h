// Memory of large results and workspaces as huge pages.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
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

}  // namespace attn_gate::cpu
