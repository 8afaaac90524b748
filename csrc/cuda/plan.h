// How a problem is cut into blocks, and the shared memory that they take. Host only.
#pragma once
#include <algorithm>
#include <limits>

#include "problem.h"

namespace attn_gate::cuda {

// ------------------------------------------------------------------------------------------- shared memory

// What a kernel takes of shared memory, in the order in which it takes it.
struct SharedBytes {
  int64_t element, total = 256;  // the tile
  SharedBytes& add(int64_t count) {
    total += (count * element + 15) / 16 * 16;
    return *this;
  }
};

inline int64_t shared_bytes(const Forward& p, int element, int wide) {
  return SharedBytes{element}
      .add(p.tiling.box)
      .add(kThreads * wide)
      .add(std::min(p.chain.inter, kCachedPsi))
      .total;
}

inline int64_t shared_bytes(const Backward& p, int element, int wide) {
  const bool resized = p.tiling.mode != Resize::identity;
  return SharedBytes{element}
      .add(p.tiling.box)
      .add(p.keeps_dots() ? p.tiling.fine_box : 0)
      .add(kThreads * wide)
      .add(resized ? kThreads * wide : 0)
      .add(std::min(p.chain.inter, kCachedPsi))
      .add(p.chain.inter < kCachedPsi ? p.chain.inter + 1 : 0)
      .total;
}

// ---------------------------------------------------------------------------------------------------- tiles

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cuts an axis into equal tiles of at most `most` voxels, in multiples of `multiple`.
inline int cut(Axis& axis, int64_t most, int multiple) {
  const int64_t length = axis.by_coarse ? axis.coarse : axis.fine;
  most = std::max<int64_t>(most / multiple * multiple, multiple);
  const int64_t tiles = ceil_div(length, most), even = ceil_div(length, tiles);
  axis.tile = int(ceil_div(even, multiple) * multiple);
  axis.tiles = int(ceil_div(length, axis.tile));
  return axis.tile;
}

// The most coarse voxels of an axis that a tile needs, and the most fine ones that it has: exact where the
// axes are equal, else with room for rounding.
inline int64_t most_needed(const Axis& axis, int align) {
  if (axis.coarse == axis.fine) return std::min<int64_t>(axis.coarse, axis.tile);
  const int64_t own = axis.by_coarse ? axis.tile : ceil_div(axis.tile * axis.coarse, axis.fine);
  return axis.tiles == 1 ? axis.coarse : std::min(axis.coarse, own + 3 + 2 * (align - 1));
}
inline int64_t most_fine(const Axis& axis, bool receives) {
  if (receives && axis.tiles > 1 && axis.coarse != axis.fine)
    return std::min(axis.fine, ceil_div((axis.tile + 2) * axis.fine, axis.coarse) + 2);
  if (!axis.by_coarse || axis.coarse == axis.fine) return std::min<int64_t>(axis.fine, axis.tile);
  return axis.tiles == 1 ? axis.fine : std::min(axis.fine, ceil_div(axis.tile * axis.fine, axis.coarse) + 2);
}

// Tiles of at most about `voxels` fine voxels (coarse ones along axes that are finer there), whole rows
// first: rows have no halo, and are read in whole sectors. `by_coarse`: cut all axes of the coarse grid.
// multiple: of the tiles along w; align: of the coarse rows.
inline Tiling tile_grid(const Grid& coarse, const Grid& fine, Resize mode, int64_t voxels, bool by_coarse,
                        bool receives, int multiple, int align) {
  Tiling t;
  if (coarse == fine) {
    t.w.coarse = t.w.fine = fine.voxels();
    t.box = t.fine_box = cut(t.w, voxels, multiple);
    return t;
  }
  auto axis = [&](int64_t c, int64_t f) { return Axis{c, f, 1, 1, by_coarse || c > f}; };
  t.mode = mode;
  t.receives = receives;
  t.align = align;
  t.d = axis(coarse.d, fine.d);
  t.h = axis(coarse.h, fine.h);
  t.w = axis(coarse.w, fine.w);
  // A coarse voxel stands for that many fine ones, where the coarse grid is cut.
  auto ratio = [](const Axis& a) {
    return a.by_coarse ? std::max<int64_t>(ceil_div(a.fine, a.coarse), 1) : 1;
  };
  int64_t left = std::max<int64_t>(voxels / (ratio(t.d) * ratio(t.h) * ratio(t.w)), 1);
  left = std::max<int64_t>(left / cut(t.w, left, multiple), 1);
  int64_t across = left;
  if (fine.d > 1 || coarse.d > 1)
    for (across = 1; across * across < left;) across *= 2;
  left = std::max<int64_t>(left / cut(t.h, across, 1), 1);
  cut(t.d, left, 1);
  auto product = [](int64_t a, int64_t b, int64_t c) {
    const double exact = double(a) * double(b) * double(c);
    return exact < std::numeric_limits<int>::max() ? int(exact) : std::numeric_limits<int>::max();
  };
  t.box = product(most_needed(t.d, 1), most_needed(t.h, 1), most_needed(t.w, align));
  t.fine_box = product(most_fine(t.d, t.receives), most_fine(t.h, t.receives), most_fine(t.w, t.receives));
  return t;
}

// Whether every tile's fine rows begin and end at multiples of `wide`, where the coarse grid is cut.
// In the kernel's precision, double for doubles: it must find the same voxels.
inline bool fine_rows_aligned(const Tiling& t, int wide, int element) {
  if (!t.w.by_coarse || t.w.coarse == t.w.fine) return true;
  for (int i = 0; i < t.w.tiles; ++i) {
    const int64_t lower = int64_t(i) * t.w.tile;
    const int64_t first = element == 8 ? first_output<double>(t.mode, lower, t.w.coarse, t.w.fine)
                                       : first_output<float>(t.mode, lower, t.w.coarse, t.w.fine);
    if (first % wide) return false;
  }
  return true;
}

// ------------------------------------------------------------------------------------------------- forward

// The coarse voxels that all tiles together need, over those that there are.
inline double halo(const Tiling& t) {
  auto of = [](const Axis& a) {
    const bool cut_up = a.tiles > 1 && a.coarse != a.fine;
    return cut_up
               ? double(ceil_div(a.tile * a.coarse, a.by_coarse ? a.coarse : a.fine) + 2) * a.tiles / a.coarse
               : 1.0;
  };
  return of(t.d) * of(t.h) * of(t.w);
}

// Chooses tiles and slices: the fewest bytes, counted more where too few blocks are there to ask for them.
// chain_wide, stream_wide: whether the maps' memory allows wide accesses.
inline void plan_forward(Forward& p, Resize mode, int element, int wide, bool chain_wide, bool stream_wide,
                         int processors) {
  const Chain& chain = p.chain;
  const bool same = p.coarse == p.fine, rows = !chain.theta || !chain.theta.channels_last();
  const int align = rows && chain.theta && chain_wide && !same ? wide : 1;
  const double stream = 2.0 * double(p.x.channels) * double(p.fine.voxels());
  const double chain_bytes =
      (chain.theta ? (chain.phi ? 2.0 : 1.0) * chain.inter : 1.0) * double(p.coarse.voxels());
  const int64_t fewest = std::max<int64_t>(8, 32 / element);  // channels in a slice
  double best = 0;
  const Forward asked = p;
  for (int64_t voxels = same ? 1024 : 8192; voxels >= 32; voxels /= 2)
    for (int64_t slices = 1; slices == 1 || ceil_div(asked.x.channels, slices) >= fewest; slices *= 2) {
      Forward q = asked;
      q.tiling = tile_grid(q.coarse, q.fine, mode, voxels, false, false, wide, align);
      q.slice = int(ceil_div(std::max<int64_t>(ceil_div(q.x.channels, slices), 1), wide) * wide);
      q.slices = int(std::max<int64_t>(ceil_div(q.x.channels, q.slice), 1));
      q.wide = stream_wide && fine_rows_aligned(q.tiling, wide, element);
      q.chain.wide = chain_wide;
      if (shared_bytes(q, std::max(element, 4), wide) > kMaxShared) break;
      const double blocks = double(q.batch * q.tiling.tiles() * q.slices), wanted = 4.0 * processors;
      const double cost = (stream + chain_bytes * q.slices * halo(q.tiling)) * std::max(1.0, wanted / blocks);
      if (best == 0 || cost < best) {
        best = cost;
        p = q;
      }
    }
}

// ------------------------------------------------------------------------------------------------ backward

// The largest tiles that leave enough blocks; false where none fits into shared memory. Tiles of the coarse
// grid have all fine voxels that they receive from.
inline bool plan_backward(Backward& p, const Grid& coarse, const Grid& fine, Resize mode, bool by_coarse,
                          int element, int wide, bool stream_wide, int processors) {
  bool found = false;
  const bool receives = by_coarse && !(coarse == fine);
  for (int64_t voxels = receives ? 8192 : 1024; voxels >= 32; voxels /= 2) {
    Backward q = p;
    q.tiling = tile_grid(coarse, fine, mode, voxels, by_coarse, receives, wide, 1);
    q.wide = stream_wide && fine_rows_aligned(q.tiling, wide, element);
    if (shared_bytes(q, std::max(element, 4), wide) > kMaxShared) continue;
    p = q;
    found = true;
    if (p.batch * p.tiling.tiles() >= 4 * processors) break;
  }
  return found;
}

}  // namespace attn_gate::cuda
