// bfloat16 and float16 in memory, float in registers. Branch-free, so that the compiler can vectorise loops
// over them; simd.h has the same of whole vectors.
#pragma once
#include <cstdint>
#include <cstring>

namespace attn_gate::cpu {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float as_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t as_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float to_acc(float v) { return v; }
inline double to_acc(double v) { return v; }
inline float to_acc(bf16 v) { return as_float(uint32_t(v.bits) << 16); }
inline float to_acc(f16 v) {
  uint32_t magnitude = uint32_t(v.bits & 0x7fff) << 13, sign = uint32_t(v.bits & 0x8000) << 16;
  float scaled = as_float(magnitude) * as_float(0x77800000);  // * 2^112: right for subnormals too
  uint32_t bits = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : as_bits(scaled);  // inf, NaN
  return as_float(bits | sign);
}

template <class T>
inline T from_acc(float v);
template <>
inline float from_acc<float>(float v) {
  return v;
}
template <>
inline bf16 from_acc<bf16>(float v) {  // to nearest even
  uint32_t u = as_bits(v), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return {uint16_t(v != v ? 0x7fc0 : rounded)};
}
template <>
inline f16 from_acc<f16>(float v) {  // to nearest even, overflow to inf
  uint32_t u = as_bits(v), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;  // the addition rounds at 2^-24
  uint32_t bits = magnitude < 0x38800000 ? subnormal : normal;
  bits = magnitude >= 0x477ff000 ? 0x7c00 : bits;
  bits = magnitude > 0x7f800000 ? 0x7e00 : bits;
  return {uint16_t(bits | sign)};
}
template <class T>
inline T from_acc(double v);
template <>
inline double from_acc<double>(double v) {
  return v;
}

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

}  // namespace
}  // namespace attn_gate::cpu
