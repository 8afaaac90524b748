// Memory of large results and workspaces, made ready before it is written.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace attn_gate::cpu {

// Pages of fresh memory come at first touch, one fault each, which cost as much as all the writing. So those
// of a tensor of 1 MiB or more are asked for before. From 32 MiB on, where glibc gives each its own mapping
// (DEFAULT_MMAP_THRESHOLD_MAX), as huge pages. Below, it may lie at the end of the heap, which free() cuts
// off again: that splits huge pages, and the next ones come from elsewhere, cold. There all that it lies on
// is populated, by all threads; Linux before 5.14 refuses, and nothing is lost. What is written in the tensor
// stays.
inline void ready_pages(const torch::stable::Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t MiB = int64_t(1) << 20, piece = MiB / 4;
  constexpr int populate_write = 23;  // MADV_POPULATE_WRITE, which older headers lack
  const int64_t bytes = t.numel() * t.element_size();
  if (bytes < MiB) return;
  const bool huge = bytes >= 32 * MiB;
  const int64_t page = huge ? 2 * MiB : int64_t(sysconf(_SC_PAGESIZE));
  const int64_t address = int64_t(reinterpret_cast<uintptr_t>(t.mutable_data_ptr()));
  const int64_t first = (address + page - 1) / page * page, last = (address + bytes) / page * page;
  const auto advise = [=](int64_t from, int64_t to, int advice) {
    if (from < to) madvise(reinterpret_cast<void*>(from), size_t(to - from), advice);
  };
  if (huge) return advise(first, last, MADV_HUGEPAGE);
  torch::stable::parallel_for(0, (last - first + piece - 1) / piece, 1, [=](int64_t b, int64_t e) {
    advise(first + b * piece, std::min(first + e * piece, last), populate_write);
  });
#else
  (void)t;
#endif
}

}  // namespace attn_gate::cpu
