// The gradient of the weights, dW = ds [x; g]^T: a product whose depth are the voxels, for which both factors
// are turned. A tile's share joins the sums of its group; where those of all groups would outgrow ds
// (Layout::weight_panels), ds is kept instead, and a pass of its own makes dW of it.
#pragma once
#include "preactivation.h"

namespace attn_gate::cpu {
namespace {

// Columns of the weight gradient that a panel covers at most: whole blocks of kCols vectors everywhere.
constexpr int kPanel = 48;
// Rows of the input that matrix units take for it at a time.
constexpr int64_t kRowsPacked = 64;

// Columns of each panel over `rows` rows of the input: whole vectors, and about as many in the last panel.
inline int64_t panel_width(int64_t rows) {
  const int64_t panels = (rows + kPanel - 1) / kPanel;
  return panels > 0 ? round_up((rows + panels - 1) / panels, 16) : kPanel;
}

// A panel of the weight gradient, all of theta's or all of phi's: rows [row, row + rows) of the input [x; g],
// padded to `width` columns, from column `at` on.
struct Panel {
  bool of_x;
  int64_t row, rows, width, at;
};
template <class F>
void for_weight_panels(const Problem& p, const Layout& layout, int64_t begin, int64_t end, F&& f) {
  const int64_t wx = layout.panel_x, wg = layout.panel_g, of_x = layout.columns_x / wx;
  for (int64_t u = begin; u < end; ++u) {
    if (u < of_x) {
      f(Panel{true, u * wx, smaller(wx, p.rows_x() - u * wx), wx, u * wx});
    } else {
      const int64_t k = (u - of_x) * wg;
      f(Panel{false, p.rows_x() + k, smaller(wg, p.rows_g() - k), wg, layout.columns_x + k});
    }
  }
}
inline int64_t count_weight_panels(const Problem& p, const Layout& layout) {
  return layout.columns_x / layout.panel_x + (p.rows_g() + layout.panel_g - 1) / layout.panel_g;
}

// panel[i * width + r] = rows[r * ld + i], zeros behind the last row.
template <class A>
void turn_panel(const A* rows, int64_t ld, int64_t count, int64_t width, int64_t len, A* panel) {
  transpose<A>(rows, ld, count, len, panel, width);
  for (int64_t i = 0; count < width && i < len; ++i)
    for (int64_t r = count; r < width; ++r) panel[i * width + r] = A(0);
}

// sums[i][r] (+)= sum over the tile's voxels of ds_i * panel_r: both operands are turned, so that the voxels
// are the depth of the product.
template <class A>
void add_weights(const Problem& p, const A* ds_t, int64_t ld, const A* panel, int64_t width, int64_t len,
                 bool first, A* sums) {
  for_panels<A>(width, [&](auto nv, int64_t q) {
    constexpr int NV = decltype(nv)::value;
    for (int64_t i = 0; i < p.inter; i += kRows) {
      const int64_t block = i / kBlock<A> * kBlock<A>;
      Vec<A> acc[kRows][NV];
      A* to = sums + i * width + q;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) acc[r][j] = first ? Vec<A>{} : load(to + r * width + j * kLanes<A>);
      multiply<A, NV>(ds_t + block * ld + (i - block), kBlock<A>, panel + q, width, len, acc);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) store(to + r * width + j * kLanes<A>, acc[r][j]);
    }
  });
}

// sums[r][i] (+)= sum over the tile's voxels of rows_r * ds_i, by matrix units: of rows [k0, k1) of the
// input, some at a time, which the units take as they take weights.
template <class T, class Aside>
void add_weights_by_units(const Worker<T>& work, Aside& aside, int64_t k0, int64_t k1, const float* ds_t,
                          int64_t len, bool first, uint16_t* packed, float* sums) {
  const int64_t ld = work.ld, Ip = work.packed.inter, padded = round_up(len, MatrixUnits::kDepth);
  for (int64_t k = k0; k < k1; k += kRowsPacked) {
    const int64_t some = smaller(kRowsPacked, k1 - k);
    for (int64_t r = 0; r < some; ++r) {
      float* row = work.rows + (k + r) * ld;
      for (int64_t i = round_up(len, kLanes<float>); i < padded; ++i) row[i] = 0;
      work.units->pack(row, r % MatrixUnits::kRows, padded, work.parts_x,
                       packed + r / MatrixUnits::kRows * MatrixUnits::kRows * 3 * padded);
    }
    work.units->multiply(packed, work.parts_x, some, ds_t, work.parts_of_sums, len, Ip, Ip, !first,
                         sums + (k - k0) * Ip, look<Aside>, &aside);
  }
}

// Panels [begin, end) of dW = ds [x; g]^T over all voxels, from ds as the tiles have left it. Each panel's
// rows of x or g are read by one thread, once.
template <class T>
void weight_panels(const Problem& p, const Layout& layout, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Tiles tiles(p, layout.tile);
  const int64_t ld = layout.tile, Ip = layout.weight_rows, taps = p.taps();
  const Patches patches = patches_of(p.fine, p.coarse, p.kernel, p.stride),
                flat = same_grid_patches(p.coarse);
  Buffer<A> rows(kPanel * ld), panel(kPanel * ld);
  for_weight_panels(p, layout, begin, end, [&](const Panel& u) {
    const A* turned = static_cast<const A*>(p.turned) + (u.of_x ? 0 : layout.turned_g);
    const int64_t k0 = u.of_x ? u.row / taps : u.row - p.rows_x(), count = u.of_x ? u.rows / taps : u.rows;
    for (int64_t t = 0; t < tiles.count; ++t) {
      const auto [n, v0, v1] = tiles[t];
      load_tile<T>(u.of_x ? p.x : p.g, u.of_x ? patches : flat, n, v0, v1, k0, k0 + count,
                   static_cast<A*>(rows), ld);
      centre_rows(p, u.row, u.row + u.rows, v1 - v0, ld, static_cast<A*>(rows));
      turn_panel(static_cast<const A*>(rows), ld, u.rows, u.width, v1 - v0, static_cast<A*>(panel));
      add_weights<A>(p, turned + t * Ip * ld, ld, static_cast<const A*>(panel), u.width, v1 - v0, t == 0,
                     static_cast<A*>(p.partial) + u.at * Ip);
    }
  });
}

}  // namespace
}  // namespace attn_gate::cpu
