// Products of float32 matrices on units that multiply matrices of bfloat16 (Intel's AMX), and of bfloat16
// matrices by the dot products that vectors make (AVX-512's BF16).
//
// A float32 is the sum of three bfloat16, its leading, middle and trailing 8 bits of mantissa, and so a
// product is the sum of nine, of which the six largest are made: what is left out is below 2^-23 of the
// product, 2^-25 on average. Sums are float32's. That is as exact as float32's own multiply-adds (Henry, Tang
// and Heinecke 2019, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
// computations"), and the units have 16 times their arithmetic. Infinity, NaN and sums that overflow, as some
// do that wouldn't in another order, come out as infinity or NaN, not always as the one that float32 would
// give. Numbers below 2^-110 lose bits, those below 2^-126 count as 0.
#pragma once
#include <cstdint>

namespace attn_gate::cpu {

struct MatrixUnits {
  static constexpr int64_t kRows = 16, kDepth = 32, kVoxels = 16;  // of one instruction

  // bfloat16 that a value is the sum of at most: 3, or 1. With one W has to be bfloat16, and values of rows
  // are rounded to it, whatever parts_w and parts_x say.
  int parts;
  // Sets up the units of the calling thread, and gives them back.
  void (*acquire)();
  void (*release)();
  // How often a product of such sizes calls what is to be done aside.
  int64_t (*asides_of)(int64_t inter, int64_t depth, int64_t len);
  // Row r < kRows of a tile of rows of W, `depth` columns (whole kDepth) of it, as the sum of `parts`
  // bfloat16: to[step][3][kRows][kDepth]. Whether all of them are bfloat16 already.
  bool (*pack)(const float* row, int64_t r, int64_t depth, int parts, uint16_t* to);
  // sums[i][v] = (add: +=) W rows[depth][v], for i < inter and v < len, rounded up to what the kernels'
  // vectors take at least and to whole tiles at most, where each of W is the sum of parts_w (1 or 3)
  // bfloat16, each of rows of parts_x. Rows of `rows` and `sums` are ld apart. Between two steps it calls
  // aside(context), asides_of() times in all.
  void (*multiply)(const uint16_t* w, int parts_w, int64_t inter, const float* rows, int parts_x,
                   int64_t depth, int64_t len, int64_t ld, bool add, float* sums, void (*aside)(void*),
                   void* context);
  // The same of rows of bfloat16 [depth / 2][v], as pairs.h makes them: whole kDepth.
  void (*multiply_pairs)(const uint16_t* w, int parts_w, int64_t inter, const float* pairs, int64_t depth,
                         int64_t len, int64_t ld, bool add, float* sums, void (*aside)(void*), void* context);
};

extern const MatrixUnits amx;
bool has_matrix_units();  // here, and ATEN_CPU_CAPABILITY doesn't rule them out
// For use, which the process asks the system for at the first call: from then on it has larger signal frames.
// Null where there are none or the system refuses.
const MatrixUnits* matrix_units();

// Those of a CPU without matrix units, for maps and weights that are bfloat16 alone; or null.
extern const MatrixUnits dots;
const MatrixUnits* dot_products();

}  // namespace attn_gate::cpu
