// Backward of gate, gate_logits and gate_apply.
//
//   stream:   dx = dy * resize(alpha)          dfine = sum_c dy_c * x_c          (one channel of x's grid)
//   chain:    dalpha += resize^T(dfine)        dlogit = dalpha * alpha * (1 - alpha)
//             dtheta = dphi = dlogit * psi * activation'(s)                      dpsi = sum dlogit *
//             activation(s)
//
// One kernel does both where the grids are equal or the resize is nearest: a tile then holds all fine voxels
// that its coarse ones receive from. With a linear resize a coarse voxel receives from the tiles around it,
// so the kernel runs twice, and dfine lies in memory between: one channel, against the 3 C of stream. (A halo
// instead would read x and dy of C channels again.) Where phi has a grid of its own, the second kernel is
// that of phi_backward.cuh.
//
// Bytes that must move, for a voxel of x (e bytes an element, r coarse voxels for each fine one, dfine in
// float):
//   3 C e   dy, x, dx        3 I r e   theta, phi, dtheta (4 with dphi)        4 + 4   dfine out and in
// The adjoint gathers dfine with the fine voxels' own weights, nearly all of it from the L1 cache: up to 4
// (2D: 16, 3D: 64) values of one channel for each coarse voxel of 3 I channels.
//
// dpsi and dpsi_bias: every block adds up its tiles, in order, and leaves one row of sums; a small kernel
// adds the rows, in order. No atomics, and which block takes which tile follows from the sizes alone: the
// same bits on every run. Threads: as in forward.
#pragma once
#include "forward.cuh"

namespace attn_gate::cuda {

// Channels first, first + every, ... of a voxel, from element `begin` on in steps of `step`: dx = dy *
// alpha(k), add(k, dy * x). The maps x, dy and dx have the same strides.
template <int V, class T, class Alpha, class Add>
__device__ __forceinline__ void stream_channels(const Backward& p, int64_t begin, int64_t step, int first,
                                                int every, bool wants_dots, Alpha alpha, Add add) {
  const T *from_x = static_cast<const T*>(p.x.data) + begin,
          *from_dy = static_cast<const T*>(p.dy.data) + begin;
  T* to = p.dx ? static_cast<T*>(p.dx.data) + begin : nullptr;
  const int channels = int(p.x.channels);
#pragma unroll 2
  for (int c = first; c < channels; c += every) {
    auto dy = load<V>(from_dy);
    if (wants_dots) {
      const auto x = load<V>(from_x);
#pragma unroll
      for (int k = 0; k < V; ++k) add(k, dy.v[k] * x.v[k]);
    }
    if (to) {
#pragma unroll
      for (int k = 0; k < V; ++k) dy.v[k] *= alpha(k);
      store<V>(to, dy);
      to += step;
    }
    from_x += step;
    from_dy += step;
  }
}

// dx, and dots[fine voxel of the tile] where dots isn't null, or else p.dfine; contiguous maps.
template <int V, class T, class A>
__device__ void stream_rows(const Backward& p, const Tile& tile, const A* alpha, A* line, A* part, A* dots) {
  const bool resized = p.tiling.mode != Resize::identity, wants_dots = p.wants_dots();
  const int count = tile.fine.voxels() / V;
  const Split split = split_threads(count, int(p.x.channels), kThreads);
  A* dfine = p.dfine ? static_cast<A*>(p.dfine) + tile.sample * p.fine.voxels() : nullptr;
  for (int first = 0; first < count; first += split.units) {
    const int here = count - first < split.units ? count - first : split.units;
    if (resized) {
      interpolate_alpha(p.tiling, p.coarse, p.fine, tile, alpha, first * V, here * V, line);
      __syncthreads();
    }
    Values<A, V> dot = {};
    if (split.unit < here) {
      const auto a = load_run<V>(resized ? line + split.unit * V : alpha + (first + split.unit) * V);
      const int64_t offset = tile.fine.offset(p.fine, (first + split.unit) * V);
      const int64_t begin = tile.sample * p.x.sample + split.row * p.x.channel + offset * p.x.voxel;
      stream_channels<V, T>(
          p, begin, split.rows * p.x.channel, split.row, split.rows, wants_dots,
          [&](int k) { return a.v[k]; }, [&](int k, A product) { dot.v[k] += product; });
    }
    if (wants_dots) {
      store_run(part + int(threadIdx.x) * V, dot);
      __syncthreads();
      for (int e = int(threadIdx.x); e < here * V; e += kThreads) {
        A sum = 0;
        for (int row = 0; row < split.rows; ++row) sum += part[row * split.units * V + e];
        if (dots) {
          dots[first * V + e] = sum;
        } else {
          dfine[tile.fine.offset(p.fine, first * V + e)] = sum;
        }
      }
    }
    __syncthreads();
  }
}

// The same for channels-last maps.
template <int V, class T, class A>
__device__ void stream_voxels(const Backward& p, const Tile& tile, const A* alpha, A* line, A* dots) {
  const bool resized = p.tiling.mode != Resize::identity, wants_dots = p.wants_dots();
  const int lanes = lanes_for((int(p.x.channels) + V - 1) / V);
  const int lane = int(threadIdx.x) & (lanes - 1), group = int(threadIdx.x) / lanes,
            groups = kThreads / lanes;
  const int count = tile.fine.voxels();
  A* dfine = p.dfine ? static_cast<A*>(p.dfine) + tile.sample * p.fine.voxels() : nullptr;
  for (int first = 0; first < count; first += kThreads) {
    const int here = count - first < kThreads ? count - first : kThreads;
    if (resized) {
      interpolate_alpha(p.tiling, p.coarse, p.fine, tile, alpha, first, here, line);
      __syncthreads();
    }
    for (int step = 0; step < here; step += groups) {  // all lanes of a warp go round as often
      const int v = step + group;
      A dot = 0;
      if (v < here) {
        const A a = resized ? line[v] : alpha[first + v];
        const int64_t offset = tile.fine.offset(p.fine, first + v);
        const int64_t begin = tile.sample * p.x.sample + lane * V + offset * p.x.voxel;
        stream_channels<V, T>(
            p, begin, lanes * V, lane * V, lanes * V, wants_dots, [&](int) { return a; },
            [&](int, A product) { dot += product; });
      }
      if (!wants_dots) continue;
      dot = sum_over_lanes(dot, 1, lanes);
      if (v < here && lane == 0) {
        if (dots) {
          dots[first + v] = dot;
        } else {
          dfine[tile.fine.offset(p.fine, first + v)] = dot;
        }
      }
    }
    __syncthreads();
  }
}

// The outputs of an axis that input i receives from, and their weights.
template <class A>
struct Receives {
  int64_t begin, end;
  Resize mode;
  int64_t i, in, out;
  __device__ Receives(Resize mode_, int64_t i_, int64_t in_, int64_t out_)
      : mode(mode_), i(i_), in(in_), out(out_) {
    begin = first_output<A>(mode, mode == Resize::nearest || in == out ? i : i - 1, in, out);
    end = first_output<A>(mode, i + 1, in, out);
  }
  __device__ A weight(int64_t o) const {
    const auto tap = resize_tap<A>(mode, o, in, out);
    return (tap.lower == i ? A(1) - tap.t : A(0)) + (tap.upper == i ? tap.t : A(0));
  }
};

// resize^T at input voxel (d, h, w): the sum of weight * fetch(output's d, h, w).
template <class A, class Fetch>
__device__ A adjoint(Resize mode, const Grid& in, const Grid& out, int64_t d, int64_t h, int64_t w,
                     Fetch fetch) {
  const Receives<A> rd(mode, d, in.d, out.d), rh(mode, h, in.h, out.h), rw(mode, w, in.w, out.w);
  A sum = 0;
  for (int64_t od = rd.begin; od < rd.end; ++od) {
    const A wd = rd.weight(od);
    for (int64_t oh = rh.begin; oh < rh.end; ++oh) {
      const A wdh = wd * rh.weight(oh);
      for (int64_t ow = rw.begin; ow < rw.end; ++ow) {
        const A weight = wdh * rw.weight(ow);
        if (weight != A(0)) sum += weight * fetch(od, oh, ow);  // NaN where it has no part stays out
      }
    }
  }
  return sum;
}

// dlogit of the tile's own coarse voxels. `dots` is null where this kernel did not stream.
template <class A>
__device__ void make_dlogit(const Backward& p, const Tile& tile, const A* dots, A* dlogit) {
  const int64_t base = tile.sample * p.coarse.voxels();
  const A* dfine = p.dfine ? static_cast<const A*>(p.dfine) + tile.sample * p.fine.voxels() : nullptr;
  const A *given = static_cast<const A*>(p.dalpha), *alpha = static_cast<const A*>(p.alpha);
  for (int e = int(threadIdx.x); e < tile.own.voxels(); e += kThreads) {
    const int64_t v = tile.own.offset(p.coarse, e);
    A sum = 0;
    if (dots && p.alpha_resize == Resize::identity) {
      sum = dots[e];
    } else if (dots || p.dfine) {
      const int64_t row = v / p.coarse.w, d = row / p.coarse.h, h = row - d * p.coarse.h,
                    w = v - row * p.coarse.w;
      sum = adjoint<A>(p.alpha_resize, p.coarse, p.fine, d, h, w, [&](int64_t od, int64_t oh, int64_t ow) {
        if (!dots) return __ldg(dfine + (od * p.fine.h + oh) * p.fine.w + ow);
        const Box& box = tile.fine;
        return dots[(int(od - box.d0) * box.h + int(oh - box.h0)) * box.w + int(ow - box.w0)];
      });
    }
    if (given) sum += given[base + v];
    if (p.dalpha_out) static_cast<A*>(p.dalpha_out)[base + v] = sum;
    if (alpha) sum *= alpha[base + v] * (A(1) - alpha[base + v]);
    dlogit[e] = sum;
  }
  __syncthreads();
}

// ds of V elements, stored where it is wanted; dlogit * q is returned.
template <int V, class T>
__device__ __forceinline__ Values<Acc<T>, V> chain_element(const Chain& chain, const Values<Acc<T>, V>& s,
                                                           T* dtheta, T* dphi, const Values<Acc<T>, V>& psi,
                                                           const Values<Acc<T>, V>& dlogit) {
  if (dtheta) {
    const auto ds = slope_of(chain.activation, s, psi, dlogit);
    store<V>(dtheta, ds);
    if (dphi) store<V>(dphi, ds);
  }
  auto dpsi = activated(chain.activation, s);
#pragma unroll
  for (int k = 0; k < V; ++k) dpsi.v[k] *= dlogit.v[k];
  return dpsi;
}

// dtheta, and sums[i] += dpsi of the tile; contiguous maps. A warp or a part of one has the channel to
// itself.
template <int V, class T, class A>
__device__ void chain_rows(const Backward& p, const Tile& tile, const A* psi, const A* dlogit, A* sums) {
  const Chain& chain = p.chain;
  const int count = tile.own.voxels() / V;
  const Split split = split_threads(count, kThreads, 32);
  for (int first = 0; first < count; first += split.units) {
    const int u = first + split.unit;
    const bool inside = u < count;
    const int64_t offset = inside ? tile.own.offset(chain.coarse, u * V) : 0;
    Cursor<T> cursor(chain, tile.sample, split.row, offset, split.rows);
    T* dtheta = chain.dtheta ? at<T>(chain.dtheta, tile.sample, split.row, offset) : nullptr;
    T* dphi = chain.dphi ? at<T>(chain.dphi, tile.sample, split.row, offset) : nullptr;
    Values<A, V> slope = {};
    if (inside) slope = load_run<V>(dlogit + u * V);
#pragma unroll 1
    for (int step = 0; step < chain.inter;
         step += split.rows) {  // all lanes go round as often: they exchange
      const int i = step + split.row;
      A sum = 0;
      if (inside && i < chain.inter) {
        Values<A, V> weight;
#pragma unroll
        for (int k = 0; k < V; ++k) weight.v[k] = psi[i];
        const auto dpsi = chain_element<V>(chain, cursor.template read<V>(), dtheta, dphi, weight, slope);
#pragma unroll
        for (int k = 0; k < V; ++k) sum += dpsi.v[k];
      }
      cursor.advance();
      dtheta += dtheta ? cursor.theta_step : 0;
      dphi += dphi ? cursor.theta_step : 0;
      sum = sum_over_lanes(sum, 1, split.units);
      if (split.unit == 0 && i < chain.inter) sums[i] += sum;
    }
  }
}

// The same for channels-last maps.
template <int V, class T, class A>
__device__ void chain_voxels(const Backward& p, const Tile& tile, const A* psi, const A* dlogit, A* part,
                             A* sums) {
  const Chain& chain = p.chain;
  const int inter = chain.inter, lanes = lanes_for((inter + V - 1) / V);
  const int lane = int(threadIdx.x) & (lanes - 1), group = int(threadIdx.x) / lanes,
            groups = kThreads / lanes;
  const int warp = int(threadIdx.x) / 32, span = lanes * V;
  for (int first = 0; first < inter; first += span) {
    const int i = first + lane * V;
    Values<A, V> sum = {};
    if (i < inter) {
      Values<A, V> weight;
#pragma unroll
      for (int k = 0; k < V; ++k) weight.v[k] = psi[i + k];
      for (int v = group; v < tile.own.voxels(); v += groups) {
        const int64_t offset = tile.own.offset(chain.coarse, v);
        const Cursor<T> cursor(chain, tile.sample, i, offset, 0);
        Values<A, V> slope;
#pragma unroll
        for (int k = 0; k < V; ++k) slope.v[k] = dlogit[v];
        const auto dpsi =
            chain_element<V>(chain, cursor.template read<V>(),
                             chain.dtheta ? at<T>(chain.dtheta, tile.sample, i, offset) : nullptr,
                             chain.dphi ? at<T>(chain.dphi, tile.sample, i, offset) : nullptr, weight, slope);
#pragma unroll
        for (int k = 0; k < V; ++k) sum.v[k] += dpsi.v[k];
      }
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A total = sum_over_lanes(sum.v[k], lanes, 32);
      if ((int(threadIdx.x) & 31) < lanes) part[warp * span + lane * V + k] = total;
    }
    __syncthreads();
    for (int e = int(threadIdx.x); e < span && first + e < inter; e += kThreads) {
      A total = 0;
      for (int w = 0; w < kThreads / 32; ++w) total += part[w * span + e];
      sums[first + e] += total;
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>) gate_backward(const Backward p) {
  using A = Acc<T>;
  constexpr int W = kWide<T>;
  const Chain& chain = p.chain;
  const int inter = chain.inter;
  const bool dlogits = p.sums || p.dalpha_out;
  Shared shared;
  Tile& tile = *shared.take<Tile>(1);
  A* alpha = shared.take<A>(p.tiling.box);
  A* dots = p.keeps_dots() ? shared.take<A>(p.tiling.fine_box) : nullptr;
  A* dlogit = alpha;  // by then alpha has been used
  A* part = shared.take<A>(kThreads * W);
  A* line = shared.take<A>(p.dy && p.tiling.mode != Resize::identity ? kThreads * W : 0);
  A* cache = shared.take<A>(inter < kCachedPsi ? inter : kCachedPsi);
  A* sums = shared.take<A>(inter < kCachedPsi ? inter + 1 : 0);  // dpsi, dpsi_bias
  A* row = p.sums ? static_cast<A*>(p.sums) + int64_t(blockIdx.x) * (inter + 1) : nullptr;
  if (inter >= kCachedPsi) sums = row;
  const A* psi = nullptr;
  if (p.sums) {
    psi = cached_psi(chain, cache);
    for (int i = int(threadIdx.x); i <= inter; i += kThreads) sums[i] = A(0);
    __syncthreads();
  }

  const int64_t tiles = p.batch * p.tiling.tiles();
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    find_tile<A>(p.tiling, index, &tile);
    if (p.dy) {
      load_alpha(static_cast<const A*>(p.alpha), p.coarse, tile, alpha);
      if (!p.dy.channels_last()) {
        if (p.wide) {
          stream_rows<W, T>(p, tile, alpha, line, part, dots);
        } else {
          stream_rows<1, T>(p, tile, alpha, line, part, dots);
        }
      } else if (p.wide) {
        stream_voxels<W, T>(p, tile, alpha, line, dots);
      } else {
        stream_voxels<1, T>(p, tile, alpha, line, dots);
      }
    }
    if (!p.dy && dots) {
      const A* from = static_cast<const A*>(p.dfine) + tile.sample * p.fine.voxels();
      for (int v = int(threadIdx.x); v < tile.fine.voxels(); v += kThreads)
        dots[v] = __ldg(from + tile.fine.offset(p.fine, v));
      __syncthreads();
    }
    if (dlogits) make_dlogit(p, tile, dots, dlogit);
    if (!p.sums) {
      __syncthreads();  // before the next tile
      continue;
    }
    if (threadIdx.x < 32) {
      A sum = 0;
      for (int e = int(threadIdx.x); e < tile.own.voxels(); e += 32) sum += dlogit[e];
      sum = sum_over_lanes(sum, 1, 32);
      if (threadIdx.x == 0) sums[inter] += sum;
    }
    if (!chain.theta.channels_last()) {
      if (chain.wide) {
        chain_rows<W, T>(p, tile, psi, dlogit, sums);
      } else {
        chain_rows<1, T>(p, tile, psi, dlogit, sums);
      }
    } else if (chain.wide) {
      chain_voxels<W, T>(p, tile, psi, dlogit, part, sums);
    } else {
      chain_voxels<1, T>(p, tile, psi, dlogit, part, sums);
    }
    __syncthreads();  // before the next tile
  }
  if (p.sums && inter < kCachedPsi)
    for (int i = int(threadIdx.x); i <= inter; i += kThreads) row[i] = sums[i];
}

struct Reduce {
  const void* sums;
  int64_t groups;
  int inter;
  void *dpsi, *dpsi_bias;
};

// A column of sums a lane: eight warps add every eighth row, the first adds their results.
template <class A>
__global__ void __launch_bounds__(kThreads) reduce_sums(const Reduce p) {
  Shared shared;
  A* part = shared.take<A>(kThreads);
  const int lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) / 32, warps = kThreads / 32;
  const int column = int(blockIdx.x) * 32 + lane, columns = p.inter + 1;
  A sum = 0;
  if (column < columns) {
#pragma unroll 8
    for (int64_t row = warp; row < p.groups; row += warps)
      sum += static_cast<const A*>(p.sums)[row * columns + column];
  }
  part[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || column >= columns) return;
  for (int w = 1; w < warps; ++w) sum += part[w * 32 + lane];
  A* to = static_cast<A*>(column < p.inter ? p.dpsi : p.dpsi_bias);
  if (to) to[column < p.inter ? column : 0] = sum;
}

}  // namespace attn_gate::cuda
