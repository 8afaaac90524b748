// How a problem is cut into blocks, and the shared memory that they take. Host only.
#pragma once
#include <algorithm>
#include <limits>

#include "problem.h"

namespace attn_gate::cuda {

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
// The most outputs of an axis that `count` inputs in a row receive from, if the row begins at a multiple of
// `every`. Beside input 0 lie outputs of its own, half an input's, which input 1 receives from too. Where an
// output lies right on an input, rounding may take one more; with even ratios none does.
inline int64_t most_receivers(Resize mode, int64_t count, int64_t every, int64_t in, int64_t out) {
  if (count >= in) return out;
  if (in == out) return count;
  const bool corners = mode == Resize::align_corners, from_one = mode == Resize::linear && every == 1;
  const int64_t above = out - corners, below = std::max<int64_t>(in - corners, 1);
  const int64_t halves = 2 * count + (mode == Resize::nearest ? 0 : from_one ? 3 : 2);
  const bool between = mode == Resize::linear && out % (2 * in) == 0 && out < (1 << 20);
  return std::min(out, ceil_div(halves * above, 2 * below) + !between);
}
inline int64_t most_fine(const Axis& axis, Resize mode, bool receives) {
  if (axis.tiles == 1) return axis.fine;
  if (receives && axis.coarse != axis.fine)
    return most_receivers(mode, axis.tile, axis.tile, axis.coarse, axis.fine);
  if (!axis.by_coarse || axis.coarse == axis.fine) return std::min<int64_t>(axis.fine, axis.tile);
  return std::min(axis.fine, ceil_div(axis.tile * axis.fine, axis.coarse) + 2);
}

// Tiles of at most about `voxels` fine voxels (coarse ones along axes that are finer there), whole rows
// first: rows have no halo, and are read in whole sectors. `by_coarse`: cut all axes of the coarse grid.
// multiple: of the tiles along w; align: of the coarse rows.
// whole: equal grids are one row.
inline Tiling tile_grid(const Grid& coarse, const Grid& fine, Resize mode, int64_t voxels, bool by_coarse,
                        bool receives, int multiple, int align, bool whole = true) {
  Tiling t;
  if (coarse == fine && whole) {
    t.w.coarse = t.w.fine = fine.voxels();
    t.box = t.fine_box = cut(t.w, voxels, multiple);
    return t;
  }
  auto axis = [&](int64_t c, int64_t f) { return Axis{c, f, 1, 1, by_coarse || c > f}; };
  t.mode = coarse == fine ? Resize::identity : mode;
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
  t.fine_box =
      product(most_fine(t.d, mode, receives), most_fine(t.h, mode, receives), most_fine(t.w, mode, receives));
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

// ------------------------------------------------------------------------------------------- shared memory

// What a kernel takes of shared memory, in the order in which it takes it.
struct SharedBytes {
  int64_t element, total = 256;  // the tile
  SharedBytes& add(int64_t count) { return bytes(count * element); }
  SharedBytes& bytes(int64_t count) {
    total += (count + 15) / 16 * 16;
    return *this;
  }
  int64_t tap() const { return element == 8 ? 16 : 12; }
};

inline int64_t shared_bytes(const Forward& p, int element, int wide) {
  SharedBytes bytes{element};
  bytes.add(p.tiling.box).add(kThreads * wide).add(std::min(p.chain.inter, kCachedPsi));
  if (p.chain.phi_resized()) {
    const Tiling& t = p.tiling;
    bytes.bytes(128);
    for (int64_t need : {most_needed(t.d, 1), most_needed(t.h, 1), most_needed(t.w, t.align)})
      bytes.bytes(need * bytes.tap());
    bytes.bytes(int64_t(p.chunk) * p.phi_box * 16 / wide);
  }
  return bytes.total;
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

inline int64_t shared_bytes(const PhiBackward& p, int element, int wide) {
  SharedBytes bytes{element};
  bytes.bytes(256);  // pointers
  bytes.bytes(p.h.need * bytes.tap()).bytes(p.w.need * bytes.tap());
  bytes.bytes(int64_t(p.h.tile) * 8).bytes(int64_t(p.w.tile) * 8);
  bytes.add(int64_t(p.rows) * p.w.need).bytes(p.scratch);
  bytes.add(p.keeps_planes ? 2 * int64_t(p.h.need) * p.w.need : 0);
  bytes.bytes(2 * int64_t(p.phi_plane()) * p.slice * 16 / wide);
  bytes.add(p.chain.dphi ? 2 * int64_t(p.own_plane()) * p.slice : 0);
  return bytes.add(p.slice).add(p.slice + 1).total;
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

// The most voxels of phi's axis that `need` ones of theta's are interpolated from.
inline int64_t most_sources(int64_t need, int64_t coarse, int64_t gating, int align) {
  if (need >= coarse) return gating;
  return std::min(gating, ceil_div(need * gating, coarse) + 2 + 2 * (align - 1));
}

// How much of phi lies in shared memory at a time. Returns the bytes of it that all tiles together read.
inline double plan_phi(Forward& p, int element, int wide) {
  const Tiling& t = p.tiling;
  const Grid &coarse = p.coarse, &gating = p.chain.gating;
  const bool last = p.chain.theta.channels_last();
  const int align = p.chain.phi_wide && !last ? wide : 1;
  const double box = double(most_sources(most_needed(t.d, 1), coarse.d, gating.d, 1)) *
                     double(most_sources(most_needed(t.h, 1), coarse.h, gating.h, 1)) *
                     double(most_sources(most_needed(t.w, t.align), coarse.w, gating.w, align));
  p.phi_box = int(std::min(box, 1e9));
  // Whole sectors of channels-last maps, and whole vectors.
  const int unit = last ? std::max(wide, 32 / element) : 1;
  p.chunk = p.chain.inter;
  while (p.chunk > unit && double(p.chunk) * p.phi_box * element > (16 << 10))
    p.chunk = std::max(unit, int(ceil_div(p.chunk / 2, unit) * unit));
  return box * double(t.tiles()) * p.chain.inter * element;
}

// Chooses tiles and slices: the fewest bytes, counted more where too few blocks are there to ask for them.
// chain_wide, stream_wide: whether the maps' memory allows wide accesses.
inline void plan_forward(Forward& p, Resize mode, int element, int wide, bool chain_wide, bool stream_wide,
                         int processors) {
  const Chain& chain = p.chain;
  const bool same = p.coarse == p.fine, rows = !chain.theta || !chain.theta.channels_last();
  const bool resized = chain.phi_resized();
  const int align = rows && chain.theta && chain_wide && !same ? wide : 1;
  const double stream = 2.0 * element * double(p.x.channels) * double(p.fine.voxels());
  const double chain_bytes = element * double(p.coarse.voxels()) *
                             (chain.theta ? (chain.phi && !resized ? 2.0 : 1.0) * chain.inter : 1.0);
  const int64_t fewest = std::max<int64_t>(8, 32 / element);  // channels in a slice
  double best = 0;
  const Forward asked = p;
  for (int64_t voxels = same && !resized ? 1024 : 8192; voxels >= (resized ? 1 : 32); voxels /= 2)
    for (int64_t slices = 1; slices == 1 || ceil_div(asked.x.channels, slices) >= fewest; slices *= 2) {
      Forward q = asked;
      q.tiling = tile_grid(q.coarse, q.fine, mode, voxels, false, false, wide, align, !resized);
      q.slice = int(ceil_div(std::max<int64_t>(ceil_div(q.x.channels, slices), 1), wide) * wide);
      q.slices = int(std::max<int64_t>(ceil_div(q.x.channels, q.slice), 1));
      q.wide = stream_wide && fine_rows_aligned(q.tiling, wide, element);
      q.chain.wide = chain_wide;
      double chain_cost = chain_bytes * halo(q.tiling);
      if (resized) chain_cost += plan_phi(q, element, wide);
      if (shared_bytes(q, std::max(element, 4), wide) > kMaxShared) break;
      const double blocks = double(q.batch * q.tiling.tiles() * q.slices), wanted = 4.0 * processors;
      const double cost = (stream + chain_cost * q.slices) * std::max(1.0, wanted / blocks);
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

// ------------------------------------------------------------------------------------- backward, resized phi

inline void cut(PhiAxis& axis, Resize mode, Resize alpha_resize, int64_t most, int align, int phi_align) {
  axis.tiles = int(ceil_div(axis.gating, std::min(axis.gating, most)));
  axis.tile = int(ceil_div(axis.gating, axis.tiles));
  axis.tiles = int(ceil_div(axis.gating, axis.tile));
  axis.need = int(std::min(
      axis.coarse, most_receivers(mode, axis.tile, axis.tile, axis.gating, axis.coarse) + 2 * (align - 1)));
  axis.phi = int(most_sources(axis.need, axis.coarse, axis.gating, phi_align));
  axis.fine_need = int(most_receivers(alpha_resize, axis.need, 1, axis.coarse, axis.fine));
}

// Rows of a plane at a time, and their room: several voxels for each thread.
inline void plan_rows(PhiBackward& p, int element, int wide) {
  const int64_t acc = std::max(element, 4);
  auto scratch = [&](int64_t rows) {
    const int64_t fine_rows = most_receivers(p.alpha_resize, rows, 1, p.h.coarse, p.h.fine);
    const bool reads = p.dfine && p.alpha_resize != Resize::identity;
    return std::max({rows * p.w.need * p.slice * element, reads ? fine_rows * p.w.fine_need * acc : 0,
                     p.chain.theta.channels_last() ? kThreads * wide * acc : 0});
  };
  p.rows = p.h.need;
  while (p.rows > 1 && scratch(p.rows) > (12 << 10)) p.rows = int(ceil_div(p.rows, 2));
  p.scratch = int(std::min<int64_t>(scratch(p.rows), 1 << 30));
}

// Chooses tiles of phi's grid and slices of channels, as plan_forward does; false where nothing fits.
inline bool plan_phi_backward(PhiBackward& p, bool keeps_planes, int element, int wide, int processors) {
  const Chain& chain = p.chain;
  const bool last = chain.theta.channels_last();
  const int align = chain.wide && !last ? wide : 1, phi_align = chain.phi_wide && !last ? wide : 1;
  const double R = double(chain.coarse.voxels()), Q = double(chain.gating.voxels()),
               S = double(p.fine.voxels());
  const int vector = chain.wide || chain.phi_wide ? wide : 1, sector = 32 / element;
  auto halo = [](const PhiAxis& a) { return a.tiles == 1 ? 1.0 : (a.tile + 1.0) / a.tile; };
  auto phi_halo = [](const PhiAxis& a) { return double(a.phi) * a.tiles / double(a.gating); };
  double best = 0;
  PhiBackward asked = p;
  asked.keeps_planes = keeps_planes;
  for (int64_t w = asked.w.gating; best == 0 && w >= 1; w = w > 1 ? ceil_div(w, 2) : 0)
    for (int64_t h = asked.h.gating; h >= 1; h = h > 1 ? ceil_div(h, 2) : 0)
      for (int64_t slices = 1; slices <= std::max(chain.inter, 1); slices *= 2) {
        PhiBackward q = asked;
        cut(q.w, chain.phi_resize, q.alpha_resize, w, align, phi_align);
        cut(q.h, chain.phi_resize, q.alpha_resize, h, 1, 1);
        q.slice = int(ceil_div(std::max<int64_t>(ceil_div(chain.inter, slices), 1), vector) * vector);
        if (last && q.slice > 32 * (chain.wide ? wide : 1)) continue;  // a lane keeps its channels
        q.slices = int(std::max<int64_t>(ceil_div(chain.inter, q.slice), 1));
        plan_rows(q, element, wide);
        if (shared_bytes(q, std::max(element, 4), wide) > kMaxShared) continue;
        // Of a sector that holds fewer channels than it could, the rest is read for nothing.
        const double waste = last ? std::max(1.0, double(std::min(sector, chain.inter)) / q.slice) : 1.0;
        for (int64_t d = asked.d.gating; d >= 1; d = d > 1 ? ceil_div(d, 2) : 0) {
          cut(q.d, chain.phi_resize, q.alpha_resize, d, 1, 1);
          const double h_r = halo(q.d) * halo(q.h) * halo(q.w);
          const double h_q = phi_halo(q.d) * phi_halo(q.h) * phi_halo(q.w);
          const double maps = waste * element * chain.inter * (R * (1 + h_r) + Q * (1 + h_q));
          const double ones = 4.0 * q.slices * h_r * (2 * R + (p.dfine ? S : 0));
          const double blocks = double(q.batch * q.tiles() * q.slices), wanted = 2.0 * processors;
          const double cost = (maps + ones) * std::max(1.0, wanted / blocks);
          if (best == 0 || cost < best) {
            best = cost;
            p = q;
          }
        }
      }
  return best > 0;
}

inline bool plan_phi_backward(PhiBackward& p, int element, int wide, int processors) {
  const bool reads = p.dfine && p.alpha_resize != Resize::identity;
  return (reads && plan_phi_backward(p, true, element, wide, processors)) ||
         plan_phi_backward(p, false, element, wide, processors);
}

}  // namespace attn_gate::cuda
