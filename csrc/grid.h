// What kernels of all devices say of maps: their dtype and their grid.
#pragma once
#include <cstdint>

#include "gate_math.h"

namespace attn_gate {

enum class DType : int { f32, f64, bf16, f16 };

struct Grid {
  int64_t d = 1, h = 1, w = 1;  // 2D maps have d = 1
  ATTN_GATE_MEMBER int64_t voxels() const { return d * h * w; }
  ATTN_GATE_MEMBER bool operator==(const Grid& o) const { return d == o.d && h == o.h && w == o.w; }
};

}  // namespace attn_gate
