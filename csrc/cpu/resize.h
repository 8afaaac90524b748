// Linear and nearest resizing of a grid, one row at a time, and its exact adjoint in gather form (no scatter,
// so no order of additions that depends on threads). Axis by axis: out[o] = sum over taps of weight *
// in[index].
#pragma once
#include "tiles.h"

namespace attn_gate::cpu {
namespace {

template <class A>
struct Axis {
  Buffer<ResizeTap<A>> taps;  // for each output index
  // The adjoint: input index i receives weight[k] * out[index[k]] for k in [start[i], start[i + 1]).
  Buffer<int64_t> start, index;
  Buffer<A> weight;

  Axis(Resize mode, int64_t in, int64_t out, bool adjoint)
      : taps(out), start(adjoint ? in + 1 : 0), index(adjoint ? 2 * out : 0), weight(adjoint ? 2 * out : 0) {
    for (int64_t o = 0; o < out; ++o) taps[o] = resize_tap<A>(mode, o, in, out);
    if (!adjoint) return;
    auto each = [&](auto&& f) {
      for (int64_t o = 0; o < out; ++o) {
        const auto& tap = taps[o];
        const bool both = tap.t != A(0) && tap.upper != tap.lower;
        f(tap.lower, o, both ? A(1) - tap.t : A(1));
        if (both) f(tap.upper, o, tap.t);
      }
    };
    for (int64_t i = 0; i <= in; ++i) start[i] = 0;
    each([&](int64_t i, int64_t, A) { ++start[i + 1]; });
    for (int64_t i = 0; i < in; ++i) start[i + 1] += start[i];
    Buffer<int64_t> next(in);
    for (int64_t i = 0; i < in; ++i) next[i] = start[i];
    each([&](int64_t i, int64_t o, A w) {
      index[next[i]] = o;
      weight[next[i]++] = w;
    });
  }
};

template <class A>
struct Resizer {
  Grid in, out;
  Axis<A> d, h, w;
  Resizer(Resize mode, const Grid& in_, const Grid& out_, bool adjoint = false)
      : in(in_), out(out_), d(mode, in_.d, out_.d, adjoint), h(mode, in_.h, out_.h, adjoint),
        w(mode, in_.w, out_.w, adjoint) {}

  // The output row (od, oh), columns [w0, w1), of one channel in src[in]. `line` holds in.w values.
  template <class T>
  void row(const T* src, int64_t od, int64_t oh, int64_t w0, int64_t w1, A* dst, A* line) const {
    const auto &td = d.taps[od], &th = h.taps[oh];
    const int64_t first = w.taps[w0].lower, last = w.taps[w1 - 1].upper + 1;
    bool begun = false;
    auto add = [&](int64_t id, int64_t ih, A weight) {
      if (weight == A(0)) return;  // NaN or inf in a line that is not part of the result stays out of it
      const T* from = src + (id * in.h + ih) * in.w;
      if (begun) {
        for (int64_t i = first; i < last; ++i) line[i] += weight * to_acc(from[i]);
      } else {
        for (int64_t i = first; i < last; ++i) line[i] = weight * to_acc(from[i]);
      }
      begun = true;
    };
    const A d1 = td.lower == td.upper ? A(0) : td.t, h1 = th.lower == th.upper ? A(0) : th.t;
    add(td.lower, th.lower, (A(1) - d1) * (A(1) - h1));
    add(td.lower, th.upper, (A(1) - d1) * h1);
    add(td.upper, th.lower, d1 * (A(1) - h1));
    add(td.upper, th.upper, d1 * h1);
    for (int64_t o = w0; o < w1; ++o) {
      const auto& tap = w.taps[o];
      dst[o - w0] =
          tap.t == A(0) ? line[tap.lower] : (A(1) - tap.t) * line[tap.lower] + tap.t * line[tap.upper];
    }
  }

  // The adjoint: input row (id, ih), columns [w0, w1), gathered from src[out]. `line` holds out.w values.
  template <class T>
  void adjoint_row(const T* src, int64_t id, int64_t ih, int64_t w0, int64_t w1, A* dst, A* line) const {
    for (int64_t i = w0; i < w1; ++i) dst[i - w0] = A(0);
    if (w.start[w0] == w.start[w1]) return;
    // Output columns that these input columns feed: index is increasing inside each input's list and across
    // them.
    int64_t first = out.w, last = 0;
    for (int64_t k = w.start[w0]; k < w.start[w1]; ++k) {
      first = smaller(first, w.index[k]);
      last = last > w.index[k] + 1 ? last : w.index[k] + 1;
    }
    for (int64_t o = first; o < last; ++o) line[o] = A(0);
    for (int64_t a = d.start[id]; a < d.start[id + 1]; ++a)
      for (int64_t b = h.start[ih]; b < h.start[ih + 1]; ++b) {
        const T* from = src + (d.index[a] * out.h + h.index[b]) * out.w;
        const A weight = d.weight[a] * h.weight[b];
        for (int64_t o = first; o < last; ++o) line[o] += weight * to_acc(from[o]);
      }
    for (int64_t i = w0; i < w1; ++i)
      for (int64_t k = w.start[i]; k < w.start[i + 1]; ++k) dst[i - w0] += w.weight[k] * line[w.index[k]];
  }
};

// rows[c * ld + i] += resize(map)[c, voxel v0 + i of the output grid], all channels, both layouts.
template <class T, class A>
void add_resized_tile(const Map& m, const Resizer<A>& resize, int64_t n, int64_t v0, int64_t v1, A* rows,
                      int64_t ld) {
  const int64_t C = m.channels, voxels = m.grid.voxels();
  const T* base = sample_of<T>(m, n);
  Buffer<A> line(resize.in.w), piece(resize.out.w), mixed(C);
  for_row_pieces(same_row_patches(resize.out), v0, v1, [&](int64_t first, int64_t count, int64_t offset) {
    const int64_t w0 = offset % resize.out.w, row = offset / resize.out.w, oh = row % resize.out.h,
                  od = row / resize.out.h;
    if (!m.channels_last) {
      for (int64_t c = 0; c < C; ++c) {
        resize.row(base + c * voxels, od, oh, w0, w0 + count, static_cast<A*>(piece), static_cast<A*>(line));
        A* dst = rows + c * ld + first;
        for (int64_t i = 0; i < count; ++i) dst[i] += piece[i];
      }
      return;
    }
    const auto &td = resize.d.taps[od], &th = resize.h.taps[oh];
    for (int64_t i = 0; i < count; ++i) {
      const auto& tw = resize.w.taps[w0 + i];
      for (int64_t c = 0; c < C; ++c) mixed[c] = A(0);
      for (int corner = 0; corner < 8; ++corner) {
        const bool ud = corner & 4, uh = corner & 2, uw = corner & 1;
        const A weight = (ud ? td.t : A(1) - td.t) * (uh ? th.t : A(1) - th.t) * (uw ? tw.t : A(1) - tw.t);
        if (weight == A(0)) continue;
        const T* from =
            base + (((ud ? td.upper : td.lower) * resize.in.h + (uh ? th.upper : th.lower)) * resize.in.w +
                    (uw ? tw.upper : tw.lower)) *
                       C;
        for (int64_t c = 0; c < C; ++c) mixed[c] += weight * to_acc(from[c]);
      }
      for (int64_t c = 0; c < C; ++c) rows[c * ld + first + i] += mixed[c];
    }
  });
}

}  // namespace
}  // namespace attn_gate::cpu
