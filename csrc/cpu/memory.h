// Where results and workspaces lie.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include "../tensors.h"

namespace attn_gate::cpu {

// Uninitialised, in the accumulation dtype.
Tensor new_acc(const Tensor& like, const Ints& shape);

// Uninitialised [N, channels, grid] in the dtype and layout of `like`.
Tensor new_map(const Tensor& like, int64_t channels, const Ints& grid);

// Whether the memory of a result above kLarge has its pages: the one in the middle stands for all. Others
// come at first touch, and come cleared, by way of the caches.
bool has_pages(const Tensor& t);

// How many bytes of freed memory may be kept: sets it, and returns what it was.
int64_t keep_memory(int64_t limit);

}  // namespace attn_gate::cpu
