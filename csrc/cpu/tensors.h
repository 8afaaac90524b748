// What the CPU operators share: checks of tensors, and new ones, as the kernels take them.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>
#include <string>
#include <vector>

#include "problem.h"

namespace attn_gate::cpu {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

inline std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: break;
  }
  STD_TORCH_CHECK(false, "attn_gate: maps are float32, float64, bfloat16 or float16, got ",
                  torch::headeronly::toString(x.scalar_type()));
  return DType::f32;
}

inline ScalarType acc_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

enum class Storage { contiguous, channels_last, other };
inline Storage storage_of(const Tensor& t) {
  if (t.is_contiguous()) return Storage::contiguous;
  int64_t stride =
      t.size(1);  // channels last: channels fastest, then the grid from its last axis on, batch slowest
  if (t.size(1) != 1 && t.stride(1) != 1) return Storage::other;
  for (int64_t i = t.dim() - 1; i >= 2; --i) {
    if (t.size(i) != 1 && t.stride(i) != stride) return Storage::other;
    stride *= t.size(i);
  }
  return t.size(0) == 1 || t.stride(0) == stride ? Storage::channels_last : Storage::other;
}

inline void check_map(const Tensor& t, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(t.is_cpu(), "attn_gate: ", name, " is not a CPU tensor");
  STD_TORCH_CHECK(t.dim() == 4 || t.dim() == 5, "attn_gate: ", name,
                  " is [N, channels, H, W] or [N, channels, D, H, W], got ", shape_of(t));
  STD_TORCH_CHECK(t.dim() == like.dim() && t.size(0) == like.size(0), "attn_gate: ", name, " has shape ",
                  shape_of(t), ", which does not fit ", shape_of(like));
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), "attn_gate: ", name, " has dtype ",
                  torch::headeronly::toString(t.scalar_type()), " where ",
                  torch::headeronly::toString(like.scalar_type()), " is needed");
}

inline Grid grid_of(const Tensor& t) {
  Grid g;
  const int64_t n = t.dim();
  g.w = t.size(n - 1);
  g.h = t.size(n - 2);
  g.d = n == 5 ? t.size(2) : 1;
  return g;
}

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

// Uninitialised [N, channels, grid] in the dtype and layout of `like`.
inline Tensor new_map(const Tensor& like, int64_t channels, const Ints& grid) {
  Ints shape{like.size(0), channels};
  shape.insert(shape.end(), grid.begin(), grid.end());
  const auto format = storage_of(like) != Storage::channels_last ? MemoryFormat::Contiguous
                      : like.dim() == 4                          ? MemoryFormat::ChannelsLast
                                                                 : MemoryFormat::ChannelsLast3d;
  return torch::stable::empty(shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt, format);
}

// A parameter or 1-channel map in the accumulation dtype, dense.
inline Tensor check_acc(const Tensor& t, const char* name, const Tensor& x, const Ints& shape) {
  STD_TORCH_CHECK(t.is_cpu(), "attn_gate: ", name, " is not a CPU tensor");
  STD_TORCH_CHECK(t.scalar_type() == acc_dtype(x), "attn_gate: ", name, " has dtype ",
                  torch::headeronly::toString(t.scalar_type()), " where ",
                  torch::headeronly::toString(acc_dtype(x)), " is needed");
  bool same = t.dim() == int64_t(shape.size());
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == shape[size_t(i)];
  std::string wanted;
  for (int64_t s : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(s);
  STD_TORCH_CHECK(same, "attn_gate: ", name, " has shape ", shape_of(t), " where [", wanted, "] is needed");
  return torch::stable::contiguous(t);
}

inline Ints grid_sizes(const Tensor& t) {
  Ints shape(t.sizes().begin(), t.sizes().end());
  return Ints(shape.begin() + 2, shape.end());
}
inline Ints sizes_of(const Tensor& t) { return Ints(t.sizes().begin(), t.sizes().end()); }

}  // namespace attn_gate::cpu
