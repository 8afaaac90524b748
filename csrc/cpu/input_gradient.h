// The gradients of the inputs, dx = dy * alpha + W_theta^T ds and dg = W_phi^T ds, of one tile.
#pragma once
#include "preactivation.h"

namespace attn_gate::cpu {
namespace {

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

}  // namespace
}  // namespace attn_gate::cpu
