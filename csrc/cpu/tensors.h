// What the CPU operators share beside csrc/tensors.h.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../tensors.h"
#include "problem.h"

namespace attn_gate::cpu {

// Large outputs are fresh pages: 2 MiB pages spare most of the faults, which cost as much as the writing.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t page = size_t(2) << 20;
  const size_t begin = (reinterpret_cast<size_t>(data) + page - 1) / page * page;
  const size_t end = (reinterpret_cast<size_t>(data) + bytes) / page * page;
  if (end > begin && end - begin >= 2 * page)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace attn_gate::cpu
