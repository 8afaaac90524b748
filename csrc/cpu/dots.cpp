// Dot products of pairs of bfloat16, which AVX-512 vectors of some CPUs make (VDPBF16PS: AMD since Zen 4,
// Intel's Cooper Lake): twice float32's arithmetic, for maps and weights that are bfloat16. Of inputs with
// more bits than that (ds, in backward) they multiply the value rounded to bfloat16. Subnormals count as 0.
#if defined(__AVX512BF16__)
#include <immintrin.h>

#include "matrix_units.h"
#include "simd.h"

namespace attn_gate::cpu {
namespace {

constexpr int64_t kTileRows = MatrixUnits::kRows, kDepth = MatrixUnits::kDepth;
constexpr int64_t kTile = kTileRows * kDepth;
static_assert(MatrixUnits::kVoxels == kLanes<float> && kTileRows % kRows == 0 && kCols == 3);

void nothing() {}

// Rows as they are, which have to be bfloat16 (`parts` of MatrixUnits).
bool pack(const float* row, int64_t r, int64_t depth, int, uint16_t* to) {
  for (int64_t k = 0; k < depth; k += kLanes<float>) {
    const Halves halves = __builtin_convertvector((Words)load(row + k) >> 16, Halves);
    std::memcpy(to + k / kDepth * 3 * kTile + r * kDepth + k % kDepth, &halves, sizeof halves);
  }
  return true;
}

// Of the depth at a time: pairs of rows of one panel of voxels then stay in the first-level cache.
constexpr int64_t kChunk = 256;

int64_t asides_of(int64_t inter, int64_t depth, int64_t len) {
  int64_t panels = 0;
  for_panels<float>(len, [&](auto, int64_t) { ++panels; });
  return panels * ((inter + kRows - 1) / kRows) * ((depth + kChunk - 1) / kChunk);
}

// sums = (add: +=) kRows rows of W times NV vectors of voxels.
template <int NV>
void multiply_block(const uint16_t* w, const float* pairs, int64_t steps, int64_t ld, bool add, float* sums,
                    int64_t sums_ld) {
  Vec<float> acc[kRows][NV] = {};
  for (int64_t step = 0; step < steps; ++step, w += 3 * kTile) {
#pragma GCC unroll 16
    for (int64_t q = 0; q < kDepth / 2; ++q, pairs += ld) {
      __m512bh x[NV];
#pragma GCC unroll 3
      for (int j = 0; j < NV; ++j) x[j] = (__m512bh)_mm512_loadu_si512(pairs + j * kLanes<float>);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        std::memcpy(&pair, w + r * kDepth + 2 * q, sizeof pair);
        const __m512bh all = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) acc[r][j] = (Vec<float>)_mm512_dpbf16_ps((__m512)acc[r][j], all, x[j]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r, sums += sums_ld)
    for (int j = 0; j < NV; ++j) {
      float* to = sums + j * kLanes<float>;
      store(to, add ? load(to) + acc[r][j] : acc[r][j]);
    }
}

// Rounds rows [0, depth) of `width` floats to bfloat16, two rows side by side; zeros up to a whole step.
void pair_up(const float* rows, int64_t depth, int64_t ld, int64_t width, float* pairs, int64_t pitch) {
  alignas(64) static constexpr uint16_t turns[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                     21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                     11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(turns);
  for (int64_t k = 0; k < round_up(depth, kDepth); k += 2, rows += 2 * ld, pairs += pitch)
    for (int64_t v = 0; v < width; v += kLanes<float>) {
      const __m512 a = k < depth ? _mm512_loadu_ps(rows + v) : _mm512_setzero_ps(),
                   b = k + 1 < depth ? _mm512_loadu_ps(rows + ld + v) : _mm512_setzero_ps();
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);
      _mm512_storeu_si512(pairs + v, _mm512_permutexvar_epi16(order, both));
    }
}

// The product, chunk by chunk of the depth; input(k, rows, v, width) is the pairs of rows [k, k + rows) of a
// panel of voxels, `pitch` apart.
template <class Input>
void multiply_all(const uint16_t* w, int64_t inter, int64_t depth, int64_t len, int64_t ld, bool add,
                  float* sums, int64_t pitch, void (*aside)(void*), void* context, Input&& input) {
  const int64_t steps = (depth + kDepth - 1) / kDepth;
  for (int64_t k = 0; k < depth; k += kChunk)
    for_panels<float>(len, [&](auto nv, int64_t v) {
      constexpr int NV = decltype(nv)::value;
      const int64_t rows = smaller(kChunk, depth - k);
      const float* pairs = input(k, rows, v, NV * kLanes<float>);
      for (int64_t i = 0; i < inter; i += kRows) {
        const uint16_t* from = w + (i / kTileRows * steps + k / kDepth) * 3 * kTile + i % kTileRows * kDepth;
        multiply_block<NV>(from, pairs, (rows + kDepth - 1) / kDepth, pitch, add || k > 0, sums + i * ld + v,
                           ld);
        aside(context);
      }
    });
}
void multiply_pairs(const uint16_t* w, int, int64_t inter, const float* pairs, int64_t depth, int64_t len,
                    int64_t ld, bool add, float* sums, void (*aside)(void*), void* context) {
  multiply_all(w, inter, depth, len, ld, add, sums, ld, aside, context,
               [&](int64_t k, int64_t, int64_t v, int64_t) { return pairs + k / 2 * ld + v; });
}
void multiply(const uint16_t* w, int, int64_t inter, const float* rows, int, int64_t depth, int64_t len,
              int64_t ld, bool add, float* sums, void (*aside)(void*), void* context) {
  constexpr int64_t pitch = kCols * kLanes<float>;
  alignas(64) float pairs[kChunk / 2 * pitch];
  multiply_all(w, inter, depth, len, ld, add, sums, pitch, aside, context,
               [&](int64_t k, int64_t count, int64_t v, int64_t width) {
                 pair_up(rows + k * ld + v, count, ld, width, pairs, pitch);
                 return static_cast<const float*>(pairs);
               });
}

}  // namespace

const MatrixUnits dots = {1, nothing, nothing, asides_of, pack, multiply, multiply_pairs};

}  // namespace attn_gate::cpu
#endif
