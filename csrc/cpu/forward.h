// Forward. Bytes that must move on one grid: x and g read once, y written once, alpha written (1 channel).
//
// A tile is a run of coarse voxels with all channels, held in cache. Registers hold kRows inter channels x
// kCols vectors of voxels; psi's dot product is taken from them, so neither theta, phi nor q ever reaches
// memory. On one grid y is written from the tile while it is in cache; otherwise alpha goes to memory (it is
// an output), and `apply` multiplies the fine rows in a second phase that the schedule runs while x is still
// in the last-level cache.
#pragma once
#include "preactivation.h"

namespace attn_gate::cpu {
namespace {

// y = x * alpha for voxels [v, v + len) of sample n, from x as it lies in memory.
template <class T, class A>
void weigh_voxels(const Problem& p, int64_t n, int64_t v, int64_t len, const A* alpha) {
  const int64_t C = p.x.channels, voxels = p.x.grid.voxels();
  if (p.y.channels_last) {
    const T* from = sample_of<T>(p.x, n) + v * C;
    T* to = sample_of<T>(p.y, n) + v * C;
    for (int64_t i = 0; i < len; ++i)
      for (int64_t c = 0; c < C; ++c) to[i * C + c] = from_acc<T>(to_acc(from[i * C + c]) * alpha[i]);
    return;
  }
  for (int64_t c = 0; c < C; ++c) {
    const T* from = sample_of<T>(p.x, n) + c * voxels + v;
    T* to = sample_of<T>(p.y, n) + c * voxels + v;
    for (int64_t i = 0; i < len; ++i) to[i] = from_acc<T>(to_acc(from[i]) * alpha[i]);
  }
}

template <class T>
void forward_tiles(const Problem& p, const Layout& layout, int64_t n, int64_t v0, int64_t v1) {
  using A = Acc<T>;
  Worker<T> work(p, layout, false);
  const int64_t ld = work.ld, voxels = p.coarse.voxels(), K = p.depth();
  const A psi_bias = p.psi_bias ? *static_cast<const A*>(p.psi_bias) : A(0);
  const bool write_y = p.y && p.same_grid(), blocked = K > layout.depth_block;
  // On one grid the tile's first C rows are x itself.
  const bool x_in_tile = p.uses_x() && !blocked && !p.y.channels_last;
  Buffer<A> alpha(ld), partial(blocked ? work.packed.inter * ld : 0);
  const int64_t tiles = (v1 - v0 + ld - 1) / ld, step = round_up((v1 - v0 + tiles - 1) / tiles, 48);
  for (int64_t v = v0; v < v1; v += step) {
    const int64_t end = smaller(v + step, v1), len = end - v, next = smaller(end + step, v1);
    work.load_given(n, v, end);

    // All but the last block of the depth leave their sums in `partial`.
    DepthBlock last{};
    bool begun = false;
    auto add_block = [&](const DepthBlock& b, const DepthBlock& after) {
      work.load_block(b, n, v, end, work.input);
      Ahead ahead;
      work.fetch_block(after, n, v, end, ahead);
      ahead.over(work.fetches(len, b.rows));
      for_panels<A>(len, [&](auto nv, int64_t at) {
        constexpr int NV = decltype(nv)::value;
        for (int64_t i = 0; i < p.inter; i += kRows) {
          Vec<A> acc[kRows][NV];
          A* sums = partial + i * ld + at;
          work.template begin_with_bias<NV>(i, acc);
          if (begun)
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
              for (int j = 0; j < NV; ++j) acc[r][j] = load(sums + r * ld + j * kLanes<A>);
          work.template product<NV>(i, at, b.k0, b.rows, acc, ahead);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
            for (int j = 0; j < NV; ++j) store(sums + r * ld + j * kLanes<A>, acc[r][j]);
        }
      });
      begun = true;
    };
    if (blocked) {
      work.for_blocks(layout.depth_block, [&](const DepthBlock& b) {
        if (last.rows) add_block(last, b);
        last = b;
      });
      work.load_block(last, n, v, end, work.input);
    } else {
      last = {true, 0, 0, 0, p.project ? K : 0};
      work.load_input(n, v, end);
    }

    Ahead ahead;
    if (blocked) {
      bool first = true;
      work.for_blocks(layout.depth_block, [&](const DepthBlock& b) {
        if (first) work.fetch_block(b, n, end, next, ahead);
        first = false;
      });
      ahead.over(work.fetches(len, last.rows));
    } else {
      ahead = work.next_tile(n, end, next, len);
    }
    for_panels<A>(len, [&](auto nv, int64_t at) {
      constexpr int NV = decltype(nv)::value;
      Vec<A> logit[NV];
      for (int j = 0; j < NV; ++j) logit[j] = splat(psi_bias);
      for (int64_t i = 0; i < p.inter; i += kRows) {
        Vec<A> acc[kRows][NV];
        work.template begin_with_bias<NV>(i, acc);
        if (blocked)
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
            for (int j = 0; j < NV; ++j) acc[r][j] = load(partial + (i + r) * ld + at + j * kLanes<A>);
        work.template product<NV>(i, at, last.k0, last.rows, acc, ahead);
        if (!last.rows) ahead.fetch();
        work.template add_given<NV>(i, at, acc);
        if (p.preact)
          for (int r = 0; r < kRows; ++r)
            for (int j = 0; j < NV; ++j) store(work.given + (i + r) * ld + at + j * kLanes<A>, acc[r][j]);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
          for (int j = 0; j < NV; ++j)
            logit[j] += work.packed.psi[i + r] * activate<A>(p.activation, acc[r][j]);
      }
      for (int j = 0; j < NV; ++j) store(alpha + at + j * kLanes<A>, p.y ? sigmoid<A>(logit[j]) : logit[j]);
    });
    std::memcpy(static_cast<A*>(p.alpha) + n * voxels + v, alpha, size_t(len) * sizeof(A));
    if (p.preact) store_tile<false, T>(p.preact, work.flat, n, v, end, static_cast<const A*>(work.given), ld);
    if (!write_y) continue;
    if (!x_in_tile) {
      weigh_voxels<T>(p, n, v, len, static_cast<const A*>(alpha));
      continue;
    }
    T* to = sample_of<T>(p.y, n) + v;
    for (int64_t c = 0; c < p.x.channels; ++c)
      for (int64_t i = 0; i < len; ++i) to[c * voxels + i] = from_acc<T>(work.input[c * ld + i] * alpha[i]);
  }
}

// Fine rows a piece of work takes at a time: enough voxels for whole vectors and long runs of memory.
inline int64_t rows_at_once(const Grid& fine) { return fine.w >= 256 ? 1 : (256 + fine.w - 1) / fine.w; }

// up[i] = resize(alpha)[voxel r0 * w + i] of sample n, for rows [r0, r1).
template <class A>
void upsample_rows(const Resizer<A>& resize, const A* alpha, int64_t r0, int64_t r1, A* up, A* line) {
  const Grid& fine = resize.out;
  for (int64_t r = r0; r < r1; ++r)
    resize.row(alpha, r / fine.h, r % fine.h, 0, fine.w, up + (r - r0) * fine.w, line);
}

template <class T>
void apply_rows(const Problem& p, int64_t n, int64_t r0, int64_t r1) {
  using A = Acc<T>;
  const Resizer<A> resize(p.alpha_resize, p.coarse, p.fine);
  const int64_t voxels = p.fine.voxels(), C = p.x.channels, step = rows_at_once(p.fine);
  Buffer<A> up(step * p.fine.w), line(p.coarse.w);
  const A* alpha = static_cast<const A*>(p.alpha) + n * p.coarse.voxels();
  for (int64_t r = r0; r < r1; r += step) {
    const int64_t end = smaller(r + step, r1), v = r * p.fine.w, len = (end - r) * p.fine.w;
    upsample_rows<A>(resize, alpha, r, end, up, line);
    const T* from = sample_of<T>(p.x, n);
    T* to = sample_of<T>(p.y, n);
    if (p.x.channels_last) {
      for (int64_t i = 0; i < len; ++i)
        for (int64_t c = 0; c < C; ++c)
          to[(v + i) * C + c] = from_acc<T>(to_acc(from[(v + i) * C + c]) * up[i]);
    } else {
      for (int64_t c = 0; c < C; ++c)
        for (int64_t i = 0; i < len; ++i)
          to[c * voxels + v + i] = from_acc<T>(to_acc(from[c * voxels + v + i]) * up[i]);
    }
  }
}

}  // namespace
}  // namespace attn_gate::cpu
