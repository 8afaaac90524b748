// Backward of what is resized: of y = x * resize(alpha), on x's grid, and of alpha and phi, on their own.
#pragma once
#include "forward.h"

namespace attn_gate::cpu {
namespace {

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
