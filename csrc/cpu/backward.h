// Backward. Bytes that must move on one grid: x, g and dy read once, dx and dg written once.
//
//   d_alpha = resize^T(sum_c dy * x)
//   d_logit = d_alpha * alpha * (1 - alpha)
//   ds      = d_logit * psi * activation'(s)
//   dx      = dy * resize(alpha) + W_theta^T ds
//   dg      = W_phi^T ds
//   dW      = ds [x; g]^T
//   dbias   = sum ds
//   dpsi    = sum d_logit * q
//   db      = sum d_logit
//
// s is recomputed tile by tile, or read where forward stored it.
//
// Parameter gradients are summed per group of tiles; the groups depend on the problem alone, never on the
// number of threads, and are added in order: the same bits from run to run.
#pragma once
#include "norms.h"

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

// The first `rows` rows of dx or dg of the tile: out[k][v] = init + (W^T ds)[k][v]. `out` may hold the
// initial value.
template <bool Init, class T, class A>
void project_back(const Worker<T>& work, const A* ds, bool of_x, int64_t rows, int64_t len, A* out,
                  NextTile<T>& next) {
  if (work.units) return work.multiply_back_by_units(next, of_x, rows, ds, len, Init, out);
  const int64_t ld = work.ld, I = work.p.inter;
  for_panels<A>(len, [&](auto nv, int64_t at) {
    constexpr int NV = decltype(nv)::value;
    for (int64_t k = 0; k < rows; k += kRows) {
      const int some = int(smaller(kRows, rows - k));
      Vec<A> acc[kRows][NV] = {};
      multiply<A, NV>(work.weights_back(of_x, k), kRows, ds + at, ld, I, acc);
      for (int r = 0; r < some; ++r)
        for (int j = 0; j < NV; ++j) {
          A* to = out + (k + r) * ld + at + j * kLanes<A>;
          store(to, Init ? load(to) + acc[r][j] : acc[r][j]);
        }
    }
  });
}

// out = rows (+ dy * alpha, if there is a dy) of a tile's voxels, of a map whose voxels lie side by side as
// in a tile. dy has been fetched.
template <class T, class A>
void store_rows(const Worker<T>& work, const A* rows, const Map& out, const Map& dy, const A* alpha,
                int64_t n, int64_t v, int64_t len) {
  const int64_t pitch = out.grid.voxels();
  T* to = sample_of<T>(out, n) + v;
  const T* from = dy ? sample_of<T>(dy, n) + v : nullptr;
  const bool streams = kStreams<A, T> && work.p.streams(out);
  for (int64_t c = 0; c < out.channels; ++c, rows += work.ld, to += pitch) {
    const bool past = streams && begins_line(to);
    int64_t i = 0;
    for (; i + kLanes<A> <= len; i += kLanes<A>) {
      Vec<A> sum = load(rows + i);
      if (from) sum += load_as<A>(from + i) * load(alpha + i);
      past ? stream_as<A>(to + i, sum) : store_as<A>(to + i, sum);
    }
    for (; i < len; ++i) to[i] = from_acc<T>(rows[i] + (from ? to_acc(from[i]) * alpha[i] : A(0)));
    if (from) from += pitch;
  }
}

// The same for a map whose voxels lie side by side as in a tile, straight to memory: the rows are its
// channels, and dy * alpha, if there is a dy, is added on the way.
template <class T, class A>
void project_back_to(const Worker<T>& work, const A* ds, bool of_x, const Map& out, const Map& dy,
                     const A* alpha, int64_t n, int64_t v, int64_t len, NextTile<T>& next) {
  if (work.units) {
    work.multiply_back_by_units(next, of_x, out.channels, ds, len, false, work.rows);
    return store_rows<T>(work, work.rows, out, dy, alpha, n, v, len);
  }
  const int64_t ld = work.ld, I = work.p.inter, pitch = out.grid.voxels(), rows = out.channels;
  T* const to = sample_of<T>(out, n) + v;
  const T* const from = dy ? sample_of<T>(dy, n) + v : nullptr;
  const bool streams = kStreams<A, T> && work.p.streams(out);
  for (int64_t k = 0; k < rows; k += kRows) {
    const int some = int(smaller(kRows, rows - k));
    for_panels<A>(len, [&](auto nv, int64_t at) {
      constexpr int NV = decltype(nv)::value;
      const bool whole = at + NV * kLanes<A> <= len;
      constexpr bool of_lines = NV * kLanes<A> * sizeof(T) % 64 == 0;
      const auto past = [&](int r) {
        return of_lines && streams && whole && begins_line(to + (k + r) * pitch + at);
      };
      // Stores to lines that are still on their way would hold up the arithmetic.
      for (int r = 0; r < some; ++r)
        for (int64_t i = 0; i < NV * kLanes<A>; i += int64_t(64 / sizeof(T))) {
          if (!past(r)) __builtin_prefetch(to + (k + r) * pitch + at + i, 1, 3);
          if (from) __builtin_prefetch(from + (k + r) * pitch + at + i, 0, 3);
        }
      Vec<A> acc[kRows][NV] = {};
      multiply<A, NV>(work.weights_back(of_x, k), kRows, ds + at, ld, I, acc);
      for (int r = 0; r < some; ++r) {
        const int64_t first = (k + r) * pitch + at;
        for (int j = 0; whole && j < NV; ++j) {
          const int64_t i = first + j * kLanes<A>;
          Vec<A> sum = acc[r][j];
          if (from) sum += load_as<A>(from + i) * load(alpha + at + j * kLanes<A>);
          past(r) ? stream_as<A>(to + i, sum) : store_as<A>(to + i, sum);
        }
        if (whole) continue;
        A sums[NV * kLanes<A>];
        std::memcpy(sums, acc[r], sizeof sums);
        for (int64_t i = 0; i < len - at; ++i)
          to[first + i] = from_acc<T>(sums[i] + (from ? to_acc(from[first + i]) * alpha[at + i] : A(0)));
      }
    });
  }
}
// Whether `out` is such a map.
template <class T>
bool in_rows(const Worker<T>& work, const Map& out) {
  return !out.channels_last && work.p.taps() == 1 && out.grid == work.p.coarse;
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

template <class T>
void backward_groups(const Problem& p, const Layout& layout, int64_t groups, int64_t first_group,
                     int64_t last_group) {
  using A = Acc<T>;
  Worker<T> work(p, layout, true);
  const int64_t ld = work.ld, voxels = p.coarse.voxels(), C = p.x.channels, I = p.inter,
                Ip = work.packed.inter, K = p.depth();
  const bool same = p.same_grid(), apply = bool(p.dy);
  const bool x_in_tile = p.uses_x();
  std::optional<Resizer<A>> alpha_resize;
  if (apply && !same && p.dfine) alpha_resize.emplace(p.alpha_resize, p.coarse, p.fine, true);
  const bool direct_dx =
      p.dx && p.uses_x() && in_rows(work, p.dx) && !(apply && (!same || p.dy.channels_last));
  const bool direct_dg = p.dg && in_rows(work, p.dg);
  // Then dy is read where it lies; else a tile of it becomes one of dx.
  const bool dy_in_tile = apply && same && (p.dy.channels_last || (p.dx && !direct_dx));
  Buffer<A> alpha(ld), dlogit(ld), line(p.fine.w), ds(Ip * ld),
      dy(dy_in_tile ? round_up(C, MatrixUnits::kRows) * ld : 0);
  Buffer<A> own_x(apply && same && !x_in_tile ? C * ld : 0);
  const bool weights = p.weight_grads && K > 0, apart = layout.weight_panels > 0, by_units = work.units,
             sums_by_units = weights && by_units && !apart;
  Buffer<A> own_ds_t(weights && !apart ? Ip * ld : 0),
      panel(weights && !apart && !by_units ? kPanel * ld : 0), lane_sums(4 * Ip * kLanes<A>),
      own_ds_g(p.norms ? Ip * ld : 0);
  Buffer<uint16_t> packed_rows(sums_by_units ? kRowsPacked * 3 * ld : 0);
  // Behind batch norms ds of theta and ds of phi differ.
  A* ds_g = p.norms ? own_ds_g : ds;
  A *bias_sums = lane_sums, *psi_sums = lane_sums + Ip * kLanes<A>, *scale_sums = psi_sums + Ip * kLanes<A>;
  A* sums = nullptr;
  A db = 0;
  const int64_t panels = count_weight_panels(p, layout);
  A* x_rows = own_x;
  const Tiles tiles(p, ld);
  const int64_t last = tiles.first_of(last_group, groups);
  NextTile<T> next;
  work.begin(next, tiles[tiles.first_of(first_group, groups)]);

  int64_t group = first_group;
  for (int64_t t = tiles.first_of(group, groups); t < last; ++t) {
    const bool first = t == tiles.first_of(group, groups);
    if (first) {
      std::memset(lane_sums, 0, size_t(4 * Ip * kLanes<A>) * sizeof(A));
      sums = static_cast<A*>(p.partial) + layout.group_at + group * layout.partial_elements;
      db = 0;
    }
    const Voxels tile = tiles[t];
    const int64_t n = tile.n, v = tile.v0, end = tile.v1, len = tile.len(), padded = round_up(len, kLanes<A>);
    work.turn_to(next, tile, t + 1 < last ? tiles[t + 1] : Voxels{n, end, end});
    if (x_in_tile) x_rows = work.rows;
    work.load_given(n, v, end);
    if (by_units && work.makes_s()) {
      work.multiply_by_units(next, len);
      work.mend_tile(tile);
    }

    if (p.ds) {
      for (int64_t i = I; i < Ip; ++i) std::memset(ds + i * ld, 0, size_t(padded) * sizeof(A));
      load_tile<T>(p.ds, work.flat, n, v, end, static_cast<A*>(ds), ld);
    }

    // d_logit, and dy * alpha in place of dy
    for (int64_t i = 0; i < padded; ++i) dlogit[i] = A(0);
    const A* dalpha = static_cast<const A*>(p.dalpha);
    for (int64_t i = 0; dalpha && i < len; ++i) dlogit[i] = dalpha[n * voxels + v + i];
    if (p.alpha) {
      std::memcpy(alpha, static_cast<const A*>(p.alpha) + n * voxels + v, size_t(len) * sizeof(A));
      for (int64_t i = len; i < padded; ++i) alpha[i] = A(0);
    }
    if (apply) {
      if (same) {
        if (!x_in_tile) load_tile<T>(p.x, work.flat, n, v, end, x_rows, ld);
        if (dy_in_tile) load_tile<T>(p.dy, work.flat, n, v, end, static_cast<A*>(dy), ld);
        for (int64_t c = 0; !dy_in_tile && p.through_sigmoid && c < C; ++c) {
          const T* from = sample_of<T>(p.dy, n) + c * voxels + v;
          for (int64_t i = 0; i < len; ++i) dlogit[i] += to_acc(from[i]) * x_rows[c * ld + i];
        }
        for (int64_t i = 0; dy_in_tile && i < padded; i += kLanes<A>) {
          const Vec<A> a = load(alpha + i);
          Vec<A> dot = load(dlogit + i);
          for (int64_t c = 0; c < C; ++c) {
            const Vec<A> d = load(dy + c * ld + i);
            dot += d * load(x_rows + c * ld + i);
            store(dy + c * ld + i, d * a);
          }
          if (p.through_sigmoid) store(dlogit + i, dot);
        }
      } else if (p.dfine) {
        Buffer<A> piece(p.coarse.w);
        const A* dfine = static_cast<const A*>(p.dfine) + n * p.fine.voxels();
        for_row_pieces(same_row_patches(p.coarse), v, end, [&](int64_t first, int64_t count, int64_t offset) {
          const int64_t w0 = offset % p.coarse.w, row = offset / p.coarse.w;
          alpha_resize->adjoint_row(dfine, row / p.coarse.h, row % p.coarse.h, w0, w0 + count,
                                    static_cast<A*>(piece), static_cast<A*>(line));
          for (int64_t i = 0; i < count; ++i) dlogit[first + i] += piece[i];
        });
      }
    }
    if (p.through_sigmoid)
      for (int64_t i = 0; i < padded; ++i) dlogit[i] *= alpha[i] * (A(1) - alpha[i]);
    for (int64_t i = 0; i < len; ++i) db += dlogit[i];

    // s, ds and the sums over voxels
    if (p.norms)
      normed_rows(work, len, static_cast<const A*>(dlogit), static_cast<A*>(ds), ds_g, bias_sums, psi_sums,
                  scale_sums, next);
    for_panels<A>(p.ds || p.norms ? 0 : len, [&](auto nv, int64_t at) {
      constexpr int NV = decltype(nv)::value;
      for (int64_t i = 0; i < I; i += kRows) {
        Vec<A> acc[kRows][NV];
        work.template preactivation<NV>(i, at, acc, next);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          Vec<A> bias_sum = load(bias_sums + (i + r) * kLanes<A>),
                 psi_sum = load(psi_sums + (i + r) * kLanes<A>);
#pragma GCC unroll 3
          for (int j = 0; j < NV; ++j) {
            const Vec<A> d = load(dlogit + at + j * kLanes<A>);
            psi_sum += d * activate<A>(p.activation, acc[r][j]);
            const Vec<A> e = activate_backward<A>(p.activation, acc[r][j], d * work.packed.psi[i + r]);
            bias_sum += e;
            store(ds + (i + r) * ld + at + j * kLanes<A>, e);
          }
          store(bias_sums + (i + r) * kLanes<A>, bias_sum);
          store(psi_sums + (i + r) * kLanes<A>, psi_sum);
        }
      }
    });
    if (p.dtheta) store_tile<false, T>(p.dtheta, work.flat, n, v, end, static_cast<const A*>(ds), ld);

    // dW += ds [x; g]^T
    const A* turned = nullptr;
    auto turn = [&](const A* rows, int64_t of_g) {
      A* to = apart ? static_cast<A*>(p.turned) + of_g + t * Ip * ld : static_cast<A*>(own_ds_t);
      for (int64_t i = 0; i < Ip; i += kBlock<A>)
        transpose<A>(rows + i * ld, ld, kBlock<A>, len, to + i * ld, kBlock<A>);
      turned = rows;
    };
    if (weights && apart) {
      turn(ds, 0);
      if (p.norms) turn(ds_g, layout.turned_g);
    }
    if constexpr (std::is_same_v<A, float>)
      if (sums_by_units) {
        const auto add = [&](const float* rows, int64_t k0, int64_t k1, int64_t column) {
          if (k0 == k1) return;
          if (turned != rows) transpose<A>(rows, ld, Ip, len, static_cast<float*>(own_ds_t), Ip);
          turned = rows;
          add_weights_by_units(work, next, k0, k1, static_cast<const float*>(own_ds_t), len, first,
                               static_cast<uint16_t*>(packed_rows), sums + column * Ip);
        };
        add(ds, 0, p.rows_x(), 0);
        add(ds_g, p.rows_x(), K, layout.columns_x);
      }
    for_weight_panels(p, layout, 0, weights && !apart && !by_units ? panels : 0, [&](const Panel& u) {
      const A* rows = u.of_x ? static_cast<const A*>(ds) : ds_g;
      if (turned != rows) turn(rows, 0);
      turn_panel(work.rows + u.row * ld, ld, u.rows, u.width, len, static_cast<A*>(panel));
      add_weights<A>(p, own_ds_t, ld, static_cast<const A*>(panel), u.width, len, first, sums + u.at * Ip);
    });

    // dg, then dx: the tile's input rows are free now
    if (direct_dg) {
      project_back_to<T, A>(work, ds_g, false, p.dg, Map(), nullptr, n, v, len, next);
    } else if (p.dg) {
      A* out = work.rows;
      project_back<false>(work, static_cast<const A*>(ds_g), false, p.rows_g(), len, out, next);
      store_tile<false, T>(p.dg, work.flat, n, v, end, static_cast<const A*>(out), ld);
    }
    if (direct_dx) {
      project_back_to<T, A>(work, ds, true, p.dx, p.dy, alpha, n, v, len, next);
    } else if (p.dx) {
      if (apply && same) {
        if (p.uses_x())
          project_back<true>(work, static_cast<const A*>(ds), true, C, len, static_cast<A*>(dy), next);
        store_tile<false, T>(p.dx, work.flat, n, v, end, static_cast<const A*>(dy), ld);
      } else if (p.uses_x()) {  // onto dy * resize(alpha), or onto zeros, that is there already
        project_back<false>(work, static_cast<const A*>(ds), true, p.rows_x(), len, work.rows, next);
        store_tile<true, T>(p.dx, work.patches, n, v, end, static_cast<const A*>(work.rows), ld);
      }
    }

    if (t + 1 < tiles.first_of(group + 1, groups)) continue;
    ++group;
    if (p.norms && !p.norm_sums) continue;
    const auto leave = [&](const A* lanes, int64_t at) {
      for (int64_t i = 0; i < I; ++i) sums[at + i] = horizontal_sum<A>(load(lanes + i * kLanes<A>));
    };
    leave(bias_sums, layout.bias_at);
    leave(psi_sums, layout.psi_at);
    sums[layout.psi_bias_at] = db;
    if (!p.norms) continue;
    leave(scale_sums, layout.scale_x_at);
    leave(scale_sums + Ip * kLanes<A>, layout.scale_g_at);
  }
  streams_end();
}

template <class T>
void apply_backward_rows(const Problem& p, int64_t n, int64_t r0, int64_t r1) {
  using A = Acc<T>;
  const Resizer<A> resize(p.alpha_resize, p.coarse, p.fine);
  const int64_t voxels = p.fine.voxels(), C = p.x.channels, step = rows_at_once(p.fine);
  Buffer<A> up(step * p.fine.w), line(p.coarse.w);
  const A* alpha = static_cast<const A*>(p.alpha) + n * p.coarse.voxels();
  const T* x = sample_of<T>(p.x, n);
  const T* dy = sample_of<T>(p.dy, n);
  for (int64_t r = r0; r < r1; r += step) {
    const int64_t end = smaller(r + step, r1), v = r * p.fine.w, len = (end - r) * p.fine.w;
    if (p.dfine) {
      A* sum = static_cast<A*>(p.dfine) + n * voxels + v;
      // x's layout and dy's may differ.
      const int64_t xc = p.x.channels_last ? 1 : voxels, xv = p.x.channels_last ? C : 1;
      const int64_t yc = p.dy.channels_last ? 1 : voxels, yv = p.dy.channels_last ? C : 1;
      if (xv == 1 && yv == 1) {
        for (int64_t i = 0; i < len; ++i) sum[i] = A(0);
        for (int64_t c = 0; c < C; ++c)
          for (int64_t i = 0; i < len; ++i) sum[i] += to_acc(dy[c * yc + v + i]) * to_acc(x[c * xc + v + i]);
      } else {
        // A vector of voxels at a time, the last ones too: no sum depends on which others are made with it.
        for (int64_t i = 0; i < len; i += kLanes<A>) {
          const int64_t some = smaller(kLanes<A>, len - i);
          Vec<A> sums[kLanes<A>] = {};
          for (int64_t k = 0; k < some; ++k) {
            const T *a = x + (v + i + k) * xv, *b = dy + (v + i + k) * yv;
            int64_t c = 0;
            if (xc == 1 && yc == 1)
              for (; c + kLanes<A> <= C; c += kLanes<A>) sums[k] += load_as<A>(b + c) * load_as<A>(a + c);
            for (; c < C; ++c) sums[k][c % kLanes<A>] += to_acc(b[c * yc]) * to_acc(a[c * xc]);
          }
          const Vec<A> totals = horizontal_sums<A>(sums);
          std::memcpy(sum + i, &totals, size_t(some) * sizeof(A));
        }
      }
    }
    if (!p.dx) continue;
    upsample_rows<A>(resize, alpha, r, end, up, line);
    T* dx = sample_of<T>(p.dx, n);
    const bool dx_last = p.dx.channels_last, dy_last = p.dy.channels_last;
    for (int64_t a = 0; a < (dx_last ? len : C); ++a)
      for (int64_t b = 0; b < (dx_last ? C : len); ++b) {
        const int64_t i = dx_last ? a : b, c = dx_last ? b : a;
        dx[dx_last ? (v + i) * C + c : c * voxels + v + i] =
            from_acc<T>(to_acc(dy[dy_last ? (v + i) * C + c : c * voxels + v + i]) * up[i]);
      }
  }
}

template <class T>
void gather_dalpha_voxels(const Problem& p, int64_t n, int64_t v0, int64_t v1) {
  using A = Acc<T>;
  const Resizer<A> resize(p.alpha_resize, p.coarse, p.fine, true);
  Buffer<A> line(p.fine.w);
  const A* dfine = static_cast<const A*>(p.dfine) + n * p.fine.voxels();
  A* out = static_cast<A*>(p.dalpha_out) + n * p.coarse.voxels() + v0;
  for_row_pieces(same_row_patches(p.coarse), v0, v1, [&](int64_t first, int64_t count, int64_t offset) {
    const int64_t w0 = offset % p.coarse.w, row = offset / p.coarse.w;
    resize.adjoint_row(dfine, row / p.coarse.h, row % p.coarse.h, w0, w0 + count, out + first,
                       static_cast<A*>(line));
  });
}

template <class T>
void gather_dphi_rows(const Problem& p, int64_t n, int64_t r0, int64_t r1) {
  using A = Acc<T>;
  const Grid& q = p.dphi.grid;
  const Resizer<A> resize(p.phi_resize, q, p.coarse, true);
  const int64_t I = p.inter, coarse = p.coarse.voxels(), voxels = q.voxels();
  const T* from = sample_of<T>(p.dtheta, n);
  T* to = sample_of<T>(p.dphi, n);
  Buffer<A> line(p.coarse.w), row(q.w), mixed(I);
  for (int64_t r = r0; r < r1; ++r) {
    const int64_t d = r / q.h, h = r % q.h;
    if (!p.dphi.channels_last && !p.dtheta.channels_last) {
      for (int64_t c = 0; c < I; ++c) {
        resize.adjoint_row(from + c * coarse, d, h, 0, q.w, static_cast<A*>(row), static_cast<A*>(line));
        convert_row_back(static_cast<const A*>(row), to + c * voxels + r * q.w, q.w);
      }
      continue;
    }
    const int64_t fc = p.dtheta.channels_last ? 1 : coarse, fv = p.dtheta.channels_last ? I : 1;
    const int64_t tc = p.dphi.channels_last ? 1 : voxels, tv = p.dphi.channels_last ? I : 1;
    for (int64_t w = 0; w < q.w; ++w) {
      for (int64_t c = 0; c < I; ++c) mixed[c] = A(0);
      for (int64_t a = resize.d.start[d]; a < resize.d.start[d + 1]; ++a)
        for (int64_t b = resize.h.start[h]; b < resize.h.start[h + 1]; ++b)
          for (int64_t e = resize.w.start[w]; e < resize.w.start[w + 1]; ++e) {
            const int64_t voxel =
                (resize.d.index[a] * p.coarse.h + resize.h.index[b]) * p.coarse.w + resize.w.index[e];
            const A weight = resize.d.weight[a] * resize.h.weight[b] * resize.w.weight[e];
            for (int64_t c = 0; c < I; ++c) mixed[c] += weight * to_acc(from[c * fc + voxel * fv]);
          }
      for (int64_t c = 0; c < I; ++c) to[c * tc + (r * q.w + w) * tv] = from_acc<T>(mixed[c]);
    }
  }
}

}  // namespace
}  // namespace attn_gate::cpu
