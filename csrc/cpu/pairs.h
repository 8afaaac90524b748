// Input of bfloat16 as matrix units take it: of two rows of the product's depth the values of a voxel side by
// side, in the 32 bits that a row of a tile (tiles.h) has for one.
#pragma once
#include "tiles.h"

namespace attn_gate::cpu {
namespace {

// to[i] = a[i], b[i] of two vectors' worth of voxels.
template <size_t... L>
inline void pair_halves(const bf16* a, const bf16* b, float* to, std::index_sequence<L...>) {
  constexpr int n = 2 * kLanes<float>;
  AllHalves from_a, from_b;
  std::memcpy(&from_a, a, sizeof from_a);
  std::memcpy(&from_b, b, sizeof from_b);
  store(to, (Vec<float>)__builtin_shufflevector(from_a, from_b, int(L / 2 + L % 2 * n)...));
  store(to + n / 2, (Vec<float>)__builtin_shufflevector(from_a, from_b, int(n / 2 + L / 2 + L % 2 * n)...));
}
// to[i] = a[i], b[i] of n voxels, or a[i], 0 where there is no b; zeros up to the next whole vector.
inline void pair_rows(const bf16* a, const bf16* b, float* to, int64_t n) {
  constexpr int lanes = kLanes<float>;
  const auto words = [](const bf16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return __builtin_convertvector(halves, Words);
  };
  int64_t i = 0;
  for (; b && i + 2 * lanes <= n; i += 2 * lanes)
    pair_halves(a + i, b + i, to + i, std::make_index_sequence<size_t(2 * lanes)>{});
  for (; i + lanes <= n; i += lanes)
    store(to + i, (Vec<float>)(b ? words(a + i) | words(b + i) << 16 : words(a + i)));
  for (const int64_t padded = round_up(n, lanes); i < padded; ++i)
    to[i] = i < n ? as_float(uint32_t(a[i].bits) | (b ? uint32_t(b[i].bits) << 16 : 0)) : 0.f;
}

// Channels [c0, c1) of the voxels [v0, v1) of sample n as pairs of rows `ld` apart; zeros up to the next
// whole vector, and beside an odd row. The two taps of a patch two voxels wide are neighbours in memory, and
// channels that lie last are.
inline void load_pairs(const Map& m, const Patches& p, int64_t n, int64_t v0, int64_t v1, int64_t c0,
                       int64_t c1, float* rows, int64_t ld) {
  const int64_t len = v1 - v0, padded = round_up(len, kLanes<float>), taps = p.kernel.voxels(),
                voxels = m.grid.voxels();
  const bf16* base = sample_of<bf16>(m, n) + c0 * (m.channels_last ? 1 : voxels);
  if (!m.channels_last && taps == 1) {
    for (int64_t c = c0; c < c1; c += 2, base += 2 * voxels, rows += ld)
      pair_rows(base + v0, c + 1 < c1 ? base + voxels + v0 : nullptr, rows, len);
    return;
  }
  for (int64_t r = 0; r < (c1 - c0) * taps / 2; ++r)
    for (int64_t i = len; i < padded; ++i) rows[r * ld + i] = 0.f;
  for_row_pieces(p, v0, v1, [&](int64_t first, int64_t some, int64_t offset) {
    if (m.channels_last) {
      const int64_t pairs = m.channels / 2;
      return transpose<float>(reinterpret_cast<const float*>(base) + offset * pairs, p.stride.w * pairs, some,
                              (c1 - c0) / 2, rows + first, ld);
    }
    for (int64_t c = 0; c < c1 - c0; ++c)
      for_taps(p, [&](int64_t tap, int64_t step) {
        if (tap % 2 == 0)
          std::memcpy(rows + (c * taps + tap) / 2 * ld + first, base + c * voxels + offset + step,
                      size_t(some) * sizeof(float));
      });
  });
}

}  // namespace
}  // namespace attn_gate::cpu
