// Mean and covariance of x's patches. Bytes that must move: x read once; backward reads x and writes dx.
//
//   mean = sum_v x_v / n        cov = sum_v (x_v - mean) (x_v - mean)^T / n
//   dx_v = (dcov + dcov^T) (x_v - mean) / n + dmean / n
//
// A tile is centred on its own mean, turned so that voxels are the depth of the product, and multiplied by
// itself in blocks of registers; only blocks that touch the upper triangle are made. Tiles are joined by
// Chan's formula in double: no sum ever holds mean^2, so a mean far from zero costs no digits.
#pragma once
#include "forward.h"

namespace attn_gate::cpu {
namespace {

constexpr int64_t kMomentsPanel = 48;  // columns of a panel: whole blocks of kCols vectors everywhere

// A group's sums so far: the number of voxels, the mean [K] and the centred products [K, K] (upper triangle).
struct MomentsState {
  double *count, *mean, *products;
  MomentsState(const Moments& p, int64_t group)
      : count(p.state + group * p.state_elements()), mean(count + 1), products(mean + p.rows()) {}
};

// Subtracts a row's own mean from its first `len` values; returns it, and what the rounding of it left over.
template <class A>
inline double centre_row(A* row, int64_t len, double& left) {
  constexpr int n = kLanes<A>;
  const int64_t whole = len - len % n;
  Vec<A> sums = {};
  for (int64_t i = 0; i < whole; i += n) sums += load(row + i);
  A sum = horizontal_sum<A>(sums);
  for (int64_t i = whole; i < len; ++i) sum += row[i];
  const A mean = sum / A(len);
  sums = Vec<A>{};
  for (int64_t i = 0; i < whole; i += n) {
    const Vec<A> centred = load(row + i) - mean;
    store(row + i, centred);
    sums += centred;
  }
  sum = horizontal_sum<A>(sums);
  for (int64_t i = whole; i < len; ++i) sum += row[i] -= mean;
  left = double(sum);
  return double(mean) + left / double(len);
}

// Coarse voxels [v0, v1) of sample n join the sums of `group`, or begin them.
template <class T>
void moments_tiles(const Moments& p, int64_t group, bool begin, int64_t n, int64_t v0, int64_t v1) {
  using A = Acc<T>;
  const int64_t K = p.rows(), Kp = round_up(K, 16), ld = p.tile, pitch = smaller(Kp, kMomentsPanel);
  const Patches patches = patches_of(p.x.grid, p.coarse, p.kernel, p.stride);
  Buffer<A> rows(Kp * ld), turned(round_up(Kp, pitch) * ld);
  Buffer<double> mean(Kp), left(Kp), shift(Kp);
  MomentsState sums(p, group);
  std::memset(rows + K * ld, 0, size_t((Kp - K) * ld) * sizeof(A));
  for (int64_t k = 0; k < Kp; ++k) mean[k] = left[k] = shift[k] = 0;
  for (int64_t v = v0; v < v1; v += ld) {
    const int64_t end = smaller(v + ld, v1), len = end - v, padded = round_up(len, kLanes<A>);
    const bool first = begin && v == v0;
    load_tile<T>(p.x, patches, n, v, end, static_cast<A*>(rows), ld);
    Ahead ahead;
    ahead.add<T>(p.x, patches, n, end, smaller(end + ld, v1));
    ahead.over((Kp / pitch + 1) * (Kp / kRows) / 2 * ((len + kStep - 1) / kStep));
    for (int64_t k = 0; k < K; ++k) mean[k] = centre_row(rows + k * ld, len, left[k]);
    for (int64_t k = 0; k < Kp; k += pitch)
      transpose<A>(rows + k * ld, ld, smaller(pitch, Kp - k), padded, turned + k * ld, pitch);

    // Chan: products += tile's products + shift shift^T n_a n_b / (n_a + n_b); the tile's products are about
    // its rounded mean, hence `left`.
    const double before = first ? 0 : *sums.count, total = before + double(len);
    const double between = before * double(len) / total, inside = -1 / double(len);
    for (int64_t k = 0; k < K; ++k) shift[k] = first ? 0 : mean[k] - sums.mean[k];
    for (int64_t q = 0; q < Kp; q += pitch) {
      const int64_t width = smaller(pitch, Kp - q);
      for_panels<A>(width, [&](auto nv, int64_t at) {
        constexpr int NV = decltype(nv)::value;
        const int64_t column = q + at, stop = smaller(K, column + NV * kLanes<A>);
        for (int64_t i = 0; i < stop; i += kRows) {
          Vec<A> acc[kRows][NV] = {};
          const A *a = turned + i / pitch * pitch * ld + i % pitch, *b = turned + q * ld + at;
          for (int64_t d = 0; d < len; d += kStep) {
            multiply<A, NV>(a + d * pitch, pitch, b + d * pitch, pitch, smaller(kStep, len - d), acc);
            ahead.step();
          }
          A block[kRows][NV * kLanes<A>];
          std::memcpy(block, acc, sizeof block);
          for (int64_t r = i; r < smaller(i + kRows, K); ++r) {
            double* to = sums.products + r * K;
            const double outer = between * shift[r], inner = inside * left[r];
            for (int64_t c = column; c < stop; ++c) {
              const double tile = double(block[r - i][c - column]) + outer * shift[c] + inner * left[c];
              to[c] = first ? tile : to[c] + tile;
            }
          }
        }
      });
    }
    for (int64_t k = 0; k < K; ++k)
      sums.mean[k] = first ? mean[k] : sums.mean[k] + shift[k] * (double(len) / total);
    *sums.count = total;
  }
}

// Rows [begin, end) of the results: the groups' sums joined, in order.
inline void moments_join_rows(const Moments& p, int64_t begin, int64_t end) {
  const int64_t K = p.rows();
  Buffer<double> mean(K);
  double total = 0;
  for (int64_t g = 0; g < p.groups; ++g) total += *MomentsState(p, g).count;
  const MomentsState pivot(p, 0);
  for (int64_t k = 0; k < K; ++k) {
    double shift = 0;
    for (int64_t g = 1; g < p.groups; ++g) {
      const MomentsState sums(p, g);
      shift += *sums.count * (sums.mean[k] - pivot.mean[k]);
    }
    mean[k] = pivot.mean[k] + shift / total;
  }
  for (int64_t i = begin; i < end; ++i) {
    double* row = p.cov + i * K;
    p.mean[i] = mean[i];
    for (int64_t k = i; k < K; ++k) row[k] = 0;
    for (int64_t g = 0; g < p.groups; ++g) {
      const MomentsState sums(p, g);
      const double shift = *sums.count * (sums.mean[i] - mean[i]);
      for (int64_t k = i; k < K; ++k) row[k] += sums.products[i * K + k] + shift * (sums.mean[k] - mean[k]);
    }
    for (int64_t k = i; k < K; ++k) p.cov[k * K + i] = row[k] /= total;
  }
}

// dx = slope (x - mean) + offset on coarse voxels [v0, v1) of sample n; slope in the micro-kernel's
// blocks.
template <class T>
void moments_backward_tiles(const Moments& p, int64_t n, int64_t v0, int64_t v1) {
  using A = Acc<T>;
  const int64_t K = p.rows(), ld = p.tile;
  const Patches patches = patches_of(p.x.grid, p.coarse, p.kernel, p.stride);
  const A *slope = static_cast<const A*>(p.slope), *offset = static_cast<const A*>(p.offset),
          *mean = static_cast<const A*>(p.centre);
  Buffer<A> rows(K * ld), out(round_up(K, kBlock<A>) * ld);
  for (int64_t v = v0; v < v1; v += ld) {
    const int64_t end = smaller(v + ld, v1), len = end - v, padded = round_up(len, kLanes<A>);
    load_tile<T>(p.x, patches, n, v, end, static_cast<A*>(rows), ld);
    Ahead ahead;
    ahead.add<T>(p.x, patches, n, end, smaller(end + ld, v1));
    const int64_t panels = (len + kCols * kLanes<A> - 1) / (kCols * kLanes<A>);
    ahead.over(panels * ((K + kRows - 1) / kRows) * ((K + kStep - 1) / kStep));
    for (int64_t k = 0; k < K; ++k)
      for (int64_t i = 0; i < padded; i += kLanes<A>)
        store(rows + k * ld + i, load(rows + k * ld + i) - mean[k]);
    for_panels<A>(len, [&](auto nv, int64_t at) {
      constexpr int NV = decltype(nv)::value;
      for (int64_t i = 0; i < K; i += kRows) {
        Vec<A> acc[kRows][NV];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
          for (int j = 0; j < NV; ++j) acc[r][j] = splat(offset[i + r]);
        const A *w = slope + i / kBlock<A> * kBlock<A> * K + i % kBlock<A>, *x = rows + at;
        for (int64_t k = 0; k < K; k += kStep) {
          multiply<A, NV>(w + k * kBlock<A>, kBlock<A>, x + k * ld, ld, smaller(kStep, K - k), acc);
          ahead.step();
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
          for (int j = 0; j < NV; ++j) store(out + (i + r) * ld + at + j * kLanes<A>, acc[r][j]);
      }
    });
    store_tile<false, T>(p.dx, patches, n, v, end, static_cast<const A*>(out), ld);
  }
}

}  // namespace
}  // namespace attn_gate::cpu
