// Forward. Bytes that must move on one grid: x and g read once, y written once, alpha written (1 channel).
//
// A tile is a run of coarse voxels with all channels, held in cache. Registers hold kRows inter channels x
// kCols vectors of voxels; psi's dot product is taken from them, so neither theta, phi nor q ever reaches
// memory. Where the projections hide the memory's work, a tile is one to three panels of the product, and all
// else is done aside, a few lines between two steps of the arithmetic: the input to come is loaded, and y of
// the tile before is written. Large weights are gone through in blocks of the depth: then partial sums of q
// go to a buffer in between. Where y applies_later(), alpha goes to memory (it is an output), and `apply`
// multiplies the fine rows in a second phase that the schedule runs while x is still in the last-level cache.
#pragma once
#include "preactivation.h"

namespace attn_gate::cpu {
namespace {

// y = x * alpha of n voxels that lie side by side, streaming where a line begins.
template <class A, class X, class T>
inline __attribute__((always_inline)) void weigh_row(const X* x, const A* alpha, T* y, int64_t n,
                                                     bool streams) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, bf16>) {
    const bool past = streams && begins_line(y);
    for (constexpr int lanes = kLanes<A>; i + 2 * lanes <= n; i += 2 * lanes) {
      const AllHalves both = rounded_to_bf16(load_as<A>(x + i) * load(alpha + i),
                                             load_as<A>(x + i + lanes) * load(alpha + i + lanes));
      past ? stream(y + i, both) : void(std::memcpy(y + i, &both, sizeof both));
    }
  }
  if (streams && begins_line(y))
    for (; i + kLanes<A> <= n; i += kLanes<A>) stream_as<A>(y + i, load_as<A>(x + i) * load(alpha + i));
  for (; i + kLanes<A> <= n; i += kLanes<A>) store_as<A>(y + i, load_as<A>(x + i) * load(alpha + i));
  for (; i < n; ++i) y[i] = from_acc<T>(to_acc(x[i]) * alpha[i]);
}
// The same of n voxels of C channels each, channels last.
template <class A, class T>
inline __attribute__((always_inline)) void weigh_voxels(const T* x, const A* alpha, T* y, int64_t n,
                                                        int64_t C, bool streams) {
  const bool past = streams && begins_line(y) && C * int64_t(sizeof(T)) % 64 == 0;
  for (int64_t v = 0; v < n; ++v, x += C, y += C) {
    const Vec<A> all = splat(alpha[v]);
    int64_t c = 0;
    if (past)
      for (; c + kLanes<A> <= C; c += kLanes<A>) stream_as<A>(y + c, load_as<A>(x + c) * all);
    for (; c + kLanes<A> <= C; c += kLanes<A>) store_as<A>(y + c, load_as<A>(x + c) * all);
    for (; c < C; ++c) y[c] = from_acc<T>(to_acc(x[c]) * alpha[v]);
  }
}

// y = x * alpha on one grid for a tile's voxels of sample n, some rows at a time. x comes from the tile where
// that holds it as rows, else from memory.
template <class T>
class Weigh {
  using A = Acc<T>;

 public:
  Weigh(const Problem& p, int64_t n)
      : x_(sample_of<T>(p.x, n)), y_(sample_of<T>(p.y, n)),
        alpha_(static_cast<const A*>(p.alpha) + n * p.coarse.voxels()), channels_(p.x.channels),
        voxels_(p.x.grid.voxels()), channels_last_(p.y.channels_last),
        streams_(kStreams<A, T> && p.streams(p.y)) {}

  // Finishes what it was at, and takes on the voxels [v, v + len) for as many calls of step(); tile: x's
  // rows, `ld` apart, or null.
  void begin(int64_t v, int64_t len, int64_t calls, const A* tile, int64_t ld) {
    finish();
    v_ = v, len_ = len, tile_ = tile, ld_ = ld;
    rows_ = channels_last_ ? (len + kVoxels - 1) / kVoxels : channels_;
    some_ = calls > 0 ? (rows_ + calls - 1) / calls : rows_;
  }
  inline __attribute__((always_inline)) void step() {
    for (int64_t left = smaller(some_, rows_ - row_); left > 0; --left) {
      // Stores to lines that are still on their way would hold up the arithmetic.
      if (!channels_last_) own(smaller(row_ + 2 * some_, rows_ - 1));
      row(row_++);
    }
  }
  void finish() {
    while (row_ < rows_) row(row_++);
    row_ = rows_ = 0;
  }

 private:
  inline __attribute__((always_inline)) void own(int64_t r) {
    const T* to = y_ + r * voxels_ + v_;
    if (streams_ && begins_line(to)) return;
    for (int64_t i = 0; i < len_; i += int64_t(64 / sizeof(T))) __builtin_prefetch(to + i, 1, 3);
  }
  inline __attribute__((always_inline)) void row(int64_t r) {
    if (__builtin_expect(!tile_ || !streams_ || len_ % kLanes<A> != 0, 0)) return row_other(r);
    T* y = y_ + r * voxels_ + v_;
    if (__builtin_expect(!begins_line(y), 0)) return row_other(r);
    const A *alpha = alpha_ + v_, *x = tile_ + r * ld_;
    for (int64_t i = 0; i < len_; i += kLanes<A>) stream_as<A>(y + i, load(x + i) * load(alpha + i));
  }
  // Out of line as Incoming's other rows are.
  __attribute__((noinline, cold)) void row_other(int64_t r) {
    const A* alpha = alpha_ + v_;
    if (channels_last_) {
      const int64_t first = r * kVoxels, at = (v_ + first) * channels_;
      return weigh_voxels<A>(x_ + at, alpha + first, y_ + at, smaller(kVoxels, len_ - first), channels_,
                             streams_);
    }
    T* y = y_ + r * voxels_ + v_;
    tile_ ? weigh_row(tile_ + r * ld_, alpha, y, len_, streams_)
          : weigh_row(x_ + r * voxels_ + v_, alpha, y, len_, streams_);
  }
  static constexpr int64_t kVoxels = 16;  // a row in channels last
  const T* x_;
  T* y_;
  const A* alpha_;
  const int64_t channels_, voxels_;
  const bool channels_last_, streams_;
  const A* tile_ = nullptr;
  int64_t ld_ = 0, v_ = 0, len_ = 0, rows_ = 0, row_ = 0, some_ = 0;
};

// What the products of a tile do aside: the tile before is written, the next one loaded.
template <class T>
struct Aside {
  std::optional<Weigh<T>> behind;
  NextTile<T> next;
  inline __attribute__((always_inline)) void step() {
    if (behind) behind->step();
    next.step();
  }
};

// logit = psi_bias + psi . activation(s), NV vectors of voxels from `at` on. Whether all of s is finite,
// which only products of matrix units are asked.
template <int NV, class T>
inline __attribute__((always_inline)) bool sum_logits(const Worker<T>& work, int64_t at,
                                                      Vec<Acc<T>> (&logit)[NV], Aside<T>& aside) {
  using A = Acc<T>;
  const Problem& p = work.p;
  const A psi_bias = p.psi_bias ? *static_cast<const A*>(p.psi_bias) : A(0);
  Vec<A> zeros = {};  // or NaN
  for (int j = 0; j < NV; ++j) logit[j] = splat(psi_bias);
  for (int64_t i = 0; i < p.inter; i += kRows) {
    Vec<A> acc[kRows][NV];
    work.template preactivation<NV>(i, at, acc, aside);
    if (p.preact)
      for (int r = 0; r < kRows; ++r)
        for (int j = 0; j < NV; ++j) store(work.given + (i + r) * work.ld + at + j * kLanes<A>, acc[r][j]);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      if (i + r >= p.inter) break;  // rows that fill up a block: 0 weights of an infinite input are NaN
#pragma GCC unroll 3
      for (int j = 0; j < NV; ++j) {
        logit[j] += work.packed.psi[i + r] * activate<A>(p.activation, acc[r][j]);
        if (work.units) zeros += acc[r][j] * A(0);
      }
    }
  }
  return horizontal_sum<A>(zeros) == A(0);
}

template <class T>
void forward_tiles(const Problem& p, const Layout& layout, int64_t n, int64_t v0, int64_t v1) {
  using A = Acc<T>;
  Worker<T> work(p, layout, false);
  const int64_t ld = work.ld, voxels = p.coarse.voxels();
  Buffer<A> alpha(ld);
  Aside<T> aside;
  if (p.y && !p.applies_later()) aside.behind.emplace(p, n);
  work.begin(aside.next, {n, v0, smaller(v0 + ld, v1)});
  for (int64_t v = v0; v < v1; v += ld) {
    const int64_t end = smaller(v + ld, v1), len = end - v;
    work.go_through(aside.next, aside, {n, v, end}, {n, end, smaller(end + ld, v1)});
    work.load_given(n, v, end);

    for_panels<A>(len, [&](auto nv, int64_t at) {
      constexpr int NV = decltype(nv)::value;
      Vec<A> logit[NV];
      if (!sum_logits<NV>(work, at, logit, aside)) {
        for (int64_t u = at; u < smaller(at + NV * kLanes<A>, len); u += kLanes<A>)
          work.mend(n, v + u, smaller(v + u + kLanes<A>, end), true, true, work.sums + u);
        sum_logits<NV>(work, at, logit, aside);
      }
      for (int j = 0; j < NV; ++j) store(alpha + at + j * kLanes<A>, p.y ? sigmoid<A>(logit[j]) : logit[j]);
    });
    std::memcpy(static_cast<A*>(p.alpha) + n * voxels + v, alpha, size_t(len) * sizeof(A));
    if (p.preact) store_tile<false, T>(p.preact, work.flat, n, v, end, static_cast<const A*>(work.given), ld);
    if (!aside.behind) continue;
    aside.behind->begin(v, len, work.looks_aside(), work.holds_x() ? work.rows : nullptr, ld);
    if (!p.hides_memory()) aside.behind->finish();
  }
  if (aside.behind) aside.behind->finish();
  streams_end();
}

// Fine rows a piece of work takes at a time: enough voxels for whole vectors and long runs of memory.
inline int64_t rows_at_once(const Grid& fine) { return fine.w >= 1024 ? 1 : (1024 + fine.w - 1) / fine.w; }

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
  const bool streams = kStreams<A, T> && p.streams(p.y);
  Buffer<A> up(step * p.fine.w), line(p.coarse.w);
  const A* alpha = static_cast<const A*>(p.alpha) + n * p.coarse.voxels();
  for (int64_t r = r0; r < r1; r += step) {
    const int64_t end = smaller(r + step, r1), v = r * p.fine.w, len = (end - r) * p.fine.w;
    upsample_rows<A>(resize, alpha, r, end, up, line);
    const T* from = sample_of<T>(p.x, n);
    T* to = sample_of<T>(p.y, n);
    if (p.x.channels_last) {
      weigh_voxels<A>(from + v * C, up, to + v * C, len, C, streams);
    } else {
      for (int64_t c = 0, i = v; c < C; ++c, i += voxels) weigh_row<A>(from + i, up, to + i, len, streams);
    }
  }
  streams_end();
}

}  // namespace
}  // namespace attn_gate::cpu
