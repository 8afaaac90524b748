// Memory of large results, made ready before it is written.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cstddef>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace attn_gate::cpu {

// Pages of fresh memory come at first touch, one fault each, which cost as much as all the writing. So they
// are asked for before: as 2 MiB pages from 32 MiB on, where glibc has given the result a mapping of its own
// (DEFAULT_MMAP_THRESHOLD_MAX). Below, it lies at the heap's end, which free() cuts off again: huge pages
// would be split each time, and the next ones come from elsewhere, cold; there the small ones are asked for
// many at a time, by all threads. Linux before 5.14 refuses that, and nothing is lost.
inline void ready_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t small = size_t(4) << 10, large = size_t(2) << 20, own_mapping = size_t(32) << 20;
  constexpr size_t worthwhile = size_t(1) << 20, piece = size_t(256) << 10;
  constexpr int populate_write = 23;  // MADV_POPULATE_WRITE, which older headers lack
  if (bytes < worthwhile) return;
  const bool own = bytes >= own_mapping;
  const size_t page = own ? large : small, address = reinterpret_cast<size_t>(data);
  char* const begin = static_cast<char*>(data) + ((address + page - 1) / page * page - address);
  const size_t length = (address + bytes) / page * page - reinterpret_cast<size_t>(begin);
  if (own) {
    madvise(begin, length, MADV_HUGEPAGE);
    return;
  }
  torch::stable::parallel_for(0, int64_t((length + piece - 1) / piece), 1, [&](int64_t b, int64_t e) {
    const size_t from = size_t(b) * piece, to = size_t(e) * piece < length ? size_t(e) * piece : length;
    madvise(begin + from, to - from, populate_write);
  });
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace attn_gate::cpu
