// Batch norms on the statistics of this batch behind the projections: the statistics, and the rows of
// backward.
//
//   theta = shift_x + theta_weight (x - centre_x)      of mean 0 and variance 1 (weights come divided by the
//   s     = bias + scale_x theta + scale_g phi         deviation), and phi of g likewise
//   ds_x  = scale_x (ds - mean(ds) - theta mean(ds theta))     the gradient of theta, and ds_g of phi
//
// The two means take a pass of their own, before the one that makes dx, dg and the weight gradients: each
// makes theta and phi again, which no pass keeps. Bytes that must move: x and g read once by each pass.
#pragma once
#include "forward.h"

namespace attn_gate::cpu {
namespace {

// [8][I, padded to 16], in Problem::norms. Without a norm shift is 0, scale 1, slope and offset 0.
template <class A>
struct Norms {
  const A *shift_x, *scale_x, *shift_g, *scale_g;
  const A *slope_x, *offset_x, *slope_g, *offset_g;  // ds_x = scale_x ds + slope_x theta + offset_x
  explicit Norms(const Problem& p) {
    const A* at = static_cast<const A*>(p.norms);
    const int64_t inter = round_up(p.inter, 16);
    for (const A** member :
         {&shift_x, &scale_x, &shift_g, &scale_g, &slope_x, &offset_x, &slope_g, &offset_g})
      *member = at, at += inter;
  }
};

// theta and phi of a tile's voxels, and from them what the pass wants. norm_sums: ds into `ds`, and sums by
// lanes of ds, of dlogit * q, and of ds * theta and ds * phi. Else ds_x over ds, and ds_g.
template <class T, class A>
void normed_rows(const Worker<T>& work, int64_t len, const A* dlogit, A* ds, A* ds_g, A* bias_sums,
                 A* psi_sums, A* scale_sums, NextTile<T>& next) {
  const Problem& p = work.p;
  const int64_t ld = work.ld;
  const Norms<A> norms(p);
  A* scale_g_sums = scale_sums + work.packed.inter * kLanes<A>;
  for_panels<A>(len, [&](auto nv, int64_t at) {
    constexpr int NV = decltype(nv)::value;
    for (int64_t i = 0; i < p.inter; i += kRows) {
      Vec<A> theta[kRows][NV], phi[kRows][NV];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) {
          theta[r][j] = splat(norms.shift_x[i + r]);
          phi[r][j] = work.has_given ? load(work.given + (i + r) * ld + at + j * kLanes<A>)
                                     : splat(norms.shift_g[i + r]);
        }
      for (const Part& part : work.blocks[0].parts) {
        Vec<A>(&to)[kRows][NV] = part.of_x ? theta : phi;
        if (work.units) {
          const A* sums = (part.of_x ? static_cast<const A*>(work.sums) : work.sums_g()) + i * ld + at;
          for (int r = 0; r < kRows; ++r)
            for (int j = 0; j < NV; ++j) to[r][j] += load(sums + r * ld + j * kLanes<A>);
        } else {
          work.template product<NV>(i, at, part.k0, part.rows(), to, next);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = i + r;
        Vec<A> sums[4] = {};
        for (int j = 0; j < NV; ++j) {
          const int64_t to = row * ld + at + j * kLanes<A>;
          const Vec<A> t = theta[r][j], f = phi[r][j];
          Vec<A> e;
          if (p.ds) {
            e = load(ds + to);
          } else {
            const Vec<A> s = work.packed.bias[row] + norms.scale_x[row] * t + norms.scale_g[row] * f,
                         d = load(dlogit + at + j * kLanes<A>);
            sums[1] += d * activate<A>(p.activation, s);
            e = activate_backward<A>(p.activation, s, d * work.packed.psi[row]);
          }
          if (p.norm_sums) {
            sums[0] += e;
            sums[2] += e * t;
            sums[3] += e * f;
            store(ds + to, e);
          } else {
            store(ds + to, norms.scale_x[row] * e + norms.slope_x[row] * t + norms.offset_x[row]);
            store(ds_g + to, norms.scale_g[row] * e + norms.slope_g[row] * f + norms.offset_g[row]);
          }
        }
        if (!p.norm_sums) continue;
        A* to[4] = {bias_sums, psi_sums, scale_sums, scale_g_sums};
        for (int k = 0; k < 4; ++k) store(to[k] + row * kLanes<A>, load(to[k] + row * kLanes<A>) + sums[k]);
      }
    }
  });
}

// Coarse voxels [v0, v1) of sample n join theta's statistics of `group`, or begin them: sums of a few hundred
// voxels in A, about what theta is at the first of them, joined by Chan's formula in double. So no sum ever
// holds the square of a mean that is far from zero.
template <class T>
void statistics_tiles(const Problem& p, const Layout& layout, const Statistics& to, int64_t group, bool begin,
                      int64_t n, int64_t v0, int64_t v1) {
  using A = Acc<T>;
  constexpr int64_t kJoin = 384;
  Worker<T> work(p, layout, false);
  const int64_t ld = work.ld, I = p.inter, Ip = work.packed.inter;
  Buffer<A> pivot(Ip), sums(2 * Ip * kLanes<A>), inside(ld);
  double* count = to.state + group * (1 + 2 * I);
  double *mean = count + 1, *squares = mean + I;
  int64_t held = 0;  // voxels in `sums`
  auto join = [&] {
    const double before = begin ? 0 : *count, total = before + double(held);
    for (int64_t i = 0; i < I; ++i) {
      const double sum = double(horizontal_sum<A>(load(sums + 2 * i * kLanes<A>))),
                   square = double(horizontal_sum<A>(load(sums + (2 * i + 1) * kLanes<A>)));
      const double m = double(pivot[i]) + sum / double(held), s = square - sum * sum / double(held);
      const double shift = begin ? 0 : m - mean[i];
      mean[i] = begin ? m : mean[i] + shift * (double(held) / total);
      squares[i] = begin ? s : squares[i] + s + shift * shift * (before * double(held) / total);
    }
    *count = total;
    begin = false;
    held = 0;
  };
  NextTile<T> next;
  work.begin(next, {n, v0, smaller(v0 + ld, v1)});
  for (int64_t v = v0; v < v1; v += ld) {
    const int64_t end = smaller(v + ld, v1), len = end - v;
    for (int64_t i = 0; i < ld; ++i) inside[i] = A(i < len);
    work.go_through(next, next, {n, v, end}, {n, end, smaller(end + ld, v1)});
    for_panels<A>(len, [&](auto nv, int64_t at) {
      constexpr int NV = decltype(nv)::value;
      const bool first = held == 0 && at == 0;
      for (int64_t i = 0; i < I; i += kRows) {
        Vec<A> acc[kRows][NV];
        work.template add_block<NV>(i, at, acc, next);
        for (int r = 0; r < kRows; ++r) {
          A* sum = sums + 2 * (i + r) * kLanes<A>;
          if (first) {
            pivot[i + r] = horizontal_sum<A>(acc[r][0] * load(inside + at)) / A(smaller(len, kLanes<A>));
            store(sum, Vec<A>{});
            store(sum + kLanes<A>, Vec<A>{});
          }
          Vec<A> total = load(sum), square = load(sum + kLanes<A>);
          for (int j = 0; j < NV; ++j) {
            const Vec<A> d = (acc[r][j] - pivot[i + r]) * load(inside + at + j * kLanes<A>);
            total += d;
            square += d * d;
          }
          store(sum, total);
          store(sum + kLanes<A>, square);
        }
      }
    });
    held += len;
    if (held >= kJoin || end == v1) join();
  }
}

}  // namespace
}  // namespace attn_gate::cpu
