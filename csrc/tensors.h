// What the operators of all devices share: checks of tensors, and new ones, as kernels take them.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "grid.h"

namespace attn_gate {

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

inline void check_map_dtype(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "attn_gate: maps are float32, float64, bfloat16 or float16, got ",
                  torch::headeronly::toString(dtype));
}

inline DType dtype_of(const Tensor& x) {
  check_map_dtype(x);
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    default: return DType::f16;
  }
}

inline Grid grid_of(const Tensor& t) {
  const int64_t n = t.dim();
  return {n == 5 ? t.size(2) : 1, t.size(n - 2), t.size(n - 1)};
}

inline ScalarType acc_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Resize resize_of(const std::string& mode, const char* name) {
  if (mode == "nearest") return Resize::nearest;
  if (mode == "linear") return Resize::linear;
  if (mode == "align_corners") return Resize::align_corners;
  STD_TORCH_CHECK(false, "attn_gate: ", name, " is \"linear\", \"nearest\" or \"align_corners\", got \"",
                  mode, "\"");
  return Resize::linear;
}

inline Activation activation_of(const std::string& name) {
  if (name == "relu") return Activation::relu;
  if (name == "leaky_relu") return Activation::leaky_relu;
  if (name == "softplus") return Activation::softplus;
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  STD_TORCH_CHECK(false, "attn_gate: activation is relu, leaky_relu, softplus, silu or gelu, got ", name);
  return Activation::relu;
}

// Grids of no voxels can't be resized to others, nor others to them.
inline void check_resizable(const Grid& from, const Grid& to, const char* name) {
  STD_TORCH_CHECK((from.voxels() == 0) == (to.voxels() == 0), "attn_gate: ", name, " has a grid of ",
                  from.voxels(), " voxels, which can't be resized to ", to.voxels());
}

enum class Storage { contiguous, channels_last, other };
inline Storage storage_of(const Tensor& t) {
  if (t.is_contiguous()) return Storage::contiguous;
  // channels last: channels fastest, then the grid from its last axis on, batch slowest
  int64_t stride = t.size(1);
  if (t.size(1) != 1 && t.stride(1) != 1) return Storage::other;
  for (int64_t i = t.dim() - 1; i >= 2; --i) {
    if (t.size(i) != 1 && t.stride(i) != stride) return Storage::other;
    stride *= t.size(i);
  }
  return t.size(0) == 1 || t.stride(0) == stride ? Storage::channels_last : Storage::other;
}

inline void check_device(const Tensor& t, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(t.device() == like.device(), "attn_gate: ", name,
                  " is on another device than the other tensors");
}

inline void check_map(const Tensor& t, const char* name, const Tensor& like) {
  check_device(t, name, like);
  STD_TORCH_CHECK(t.dim() == 4 || t.dim() == 5, "attn_gate: ", name,
                  " is [N, channels, H, W] or [N, channels, D, H, W], got ", shape_of(t));
  STD_TORCH_CHECK(t.dim() == like.dim() && t.size(0) == like.size(0), "attn_gate: ", name, " has shape ",
                  shape_of(t), ", which does not fit ", shape_of(like));
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), "attn_gate: ", name, " has dtype ",
                  torch::headeronly::toString(t.scalar_type()), " where ",
                  torch::headeronly::toString(like.scalar_type()), " is needed");
}

// A parameter or 1-channel map in the accumulation dtype, dense.
inline Tensor check_acc(const Tensor& t, const char* name, const Tensor& x, const Ints& shape) {
  check_device(t, name, x);
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

// New maps [N, channels, grid] are in the layout of `like`.
inline Ints map_shape(const Tensor& like, int64_t channels, const Ints& grid) {
  Ints shape{like.size(0), channels};
  shape.insert(shape.end(), grid.begin(), grid.end());
  return shape;
}
inline MemoryFormat map_format(const Tensor& like) {
  if (storage_of(like) != Storage::channels_last) return MemoryFormat::Contiguous;
  return like.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

inline Ints grid_sizes(const Tensor& t) {
  Ints shape(t.sizes().begin(), t.sizes().end());
  return Ints(shape.begin() + 2, shape.end());
}
inline Ints sizes_of(const Tensor& t) { return Ints(t.sizes().begin(), t.sizes().end()); }

// Whether the operator's bits `needs` ask for its i-th result.
inline bool wants(int64_t needs, int i) { return (needs >> i) & 1; }

}  // namespace attn_gate
