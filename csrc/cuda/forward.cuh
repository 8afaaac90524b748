// Forward of gate, gate_logits and gate_apply: one kernel.
//
//   alpha = sigmoid(psi . activation(theta + resize(phi)) + psi_bias)       y = x * resize(alpha)
//
// A block owns a tile and a slice of x's channels. First it makes alpha on the coarse voxels that the tile
// needs, in shared memory; then it streams x to y.
//
// Bytes that must move, for a voxel of x (e bytes an element, r coarse voxels for each fine one, alpha in
// float):
//   2 C e   x and y          2 I r e   theta and phi          4 r   alpha
// What a tile adds: coarse voxels that its neighbours need too are read by each, so with linear resizing
// theta and phi are read h times, h = (t + 2) / t for each cut axis of t coarse voxels a tile; and every
// slice reads them again. The paper's gate (C = 2 I, twice finer) moves 4 I + I / 2 (2D) or I / 4 (3D)
// elements, of which theta and phi are a ninth and a seventeenth: h = 1.6 costs 7 % and 4 %. On one grid
// there is no halo, but theta and phi are a third: two slices cost 33 %. So channels are sliced only where
// the tiles alone are too few to keep the multiprocessors busy, in the deep levels, whose maps lie in the L2
// cache: see plan.h.
// phi on a grid of its own goes through shared memory (resized.cuh), a box of it around the tile, some
// channels at a time. The box has a voxel more on each side, so phi is read (u + 2) / u times for each cut
// axis of u of its voxels a tile. A twice coarser phi on x's grid (C = 2 I) is a quarter of I in 2D, an
// eighth in 3D, of 5 I in all: read 1.25 times (16 rows of R a tile) that is 1 % more, and even thrice 10 %
// and 5 %.
//
// Threads: contiguous maps have neighbouring voxels in neighbouring lanes, V voxels (16 bytes) a thread where
// alignment allows, and rows of threads take every rows-th channel. In channels-last maps a few lanes share a
// voxel, V channels a thread.
#pragma once
#include "resized.cuh"

namespace attn_gate::cuda {

template <class A>
__device__ __forceinline__ A finished(const Forward& p, A logit) {
  const A* bias = static_cast<const A*>(p.chain.psi_bias);
  logit = bias ? logit + *bias : logit;
  return p.x ? sigmoid(logit) : logit;
}

// What the channels of a chunk add to the logits of alpha[need], which the last of them finishes.
struct Chunk {
  int first, end;
  bool last;
};
template <class A>
__device__ __forceinline__ void add_logit(const Forward& p, const Chunk& chunk, A logit, A* alpha) {
  if (chunk.first > 0) logit += *alpha;
  *alpha = chunk.last ? finished(p, logit) : logit;
}

// phi where it has a grid of its own: the box of it around a tile.
template <class T>
struct TilePhi {
  using A = Acc<T>;
  Box box;
  PhiBox<T> staged;
  const Tap<A>*d, *h;
  __device__ __forceinline__ typename PhiBox<T>::Row row_of(const Box& need, int row) const {
    const int z = row / need.h, plane = box.h * box.w;
    return PhiBox<T>::row_of(d[z].lower * plane, d[z].upper * plane, d[z].t, h[row - z * need.h], box.w);
  }
};

template <class T>
__device__ TilePhi<T>& find_phi(const Chain& chain, const Box& need, int chunk, Shared& shared) {
  using A = Acc<T>;
  TilePhi<T>& phi = *shared.take<TilePhi<T>>(1);
  const Resize mode = chain.phi_resize;
  const Grid &in = chain.gating, &out = chain.coarse;
  const int align = chain.phi_wide && !chain.theta.channels_last() ? kWide<T> : 1;
  if (threadIdx.x == 0) find_sources<A>(mode, need.d0, need.d, in.d, out.d, 1, &phi.box.d0, &phi.box.d);
  if (threadIdx.x == 1) find_sources<A>(mode, need.h0, need.h, in.h, out.h, 1, &phi.box.h0, &phi.box.h);
  if (threadIdx.x == 2) find_sources<A>(mode, need.w0, need.w, in.w, out.w, align, &phi.box.w0, &phi.box.w);
  __syncthreads();
  Tap<A>*d = shared.take<Tap<A>>(need.d), *h = shared.take<Tap<A>>(need.h), *w = shared.take<Tap<A>>(need.w);
  find_taps(mode, need.d0, need.d, in.d, out.d, phi.box.d0, d);
  find_taps(mode, need.h0, need.h, in.h, out.h, phi.box.h0, h);
  find_taps(mode, need.w0, need.w, in.w, out.w, phi.box.w0, w);
  T* values = shared.take<T>(chunk * phi.box.voxels());
  if (threadIdx.x == 0) {
    phi.d = d;
    phi.h = h;
    phi.staged.w = w;
    phi.staged.values = values;
  }
  __syncthreads();
  return phi;
}

// A chunk of alpha[need] from contiguous theta and phi; `phi` is null where phi lies on theta's grid.
template <int V, class T, class A>
__device__ void make_alpha_rows(const Forward& p, const Tile& tile, const Chunk& chunk, const TilePhi<T>* phi,
                                const A* psi, A* part, A* alpha) {
  const Chain& chain = p.chain;
  const int count = tile.need.voxels() / V;
  const Split split = split_threads(count, chunk.end - chunk.first, kThreads);
  for (int first = 0; first < count; first += split.units) {
    const int u = first + split.unit;
    Values<A, V> sum = {};
    if (u < count) {
      const int begin = chunk.first + split.row;
      const int64_t offset = tile.need.offset(chain.coarse, u * V);
      auto add_channel = [&](int i, const Values<A, V>& s) {
        const auto q = activated(chain.activation, s);
        const A weight = psi[i];
#pragma unroll
        for (int k = 0; k < V; ++k) sum.v[k] += weight * q.v[k];
      };
      if (phi) {
        const int row = u * V / tile.need.w, x = u * V - row * tile.need.w;
        const auto around = phi->row_of(tile.need, row);
        const T* theta = at<const T>(chain.theta, tile.sample, begin, offset);
#pragma unroll 1
        for (int i = begin; i < chunk.end; i += split.rows) {
          add_channel(i, add(load<V>(theta), phi->staged.template along_row<V>(around, x, i - chunk.first)));
          theta += split.rows * chain.theta.channel;
        }
      } else {
        Cursor<T> cursor(chain, tile.sample, begin, offset, split.rows);
#pragma unroll 2
        for (int i = begin; i < chunk.end; i += split.rows) {
          add_channel(i, cursor.template read<V>());
          cursor.advance();
        }
      }
    }
    store_run(part + int(threadIdx.x) * V, sum);
    __syncthreads();
    const int voxels = split.units * V, left = (count - first) * V;
    for (int e = int(threadIdx.x); e < voxels && e < left; e += kThreads) {
      A logit = 0;
      for (int row = 0; row < split.rows; ++row) logit += part[row * voxels + e];
      add_logit(p, chunk, logit, alpha + first * V + e);
    }
    __syncthreads();
  }
}

// The same from channels-last theta and phi.
template <int V, class T, class A>
__device__ void make_alpha_voxels(const Forward& p, const Tile& tile, const Chunk& chunk,
                                  const TilePhi<T>* phi, const A* psi, A* alpha) {
  const Chain& chain = p.chain;
  const int lanes = lanes_for((chunk.end - chunk.first + V - 1) / V);
  const int lane = int(threadIdx.x) & (lanes - 1), group = int(threadIdx.x) / lanes,
            groups = kThreads / lanes;
  const int begin = chunk.first + lane * V, once = chunk.first + lanes * V;
  Values<A, V> weight = {};  // of the first channels; in all but wide gates there are no others
  if (begin < chunk.end) {
#pragma unroll
    for (int k = 0; k < V; ++k) weight.v[k] = psi[begin + k];
  }
  const int count = tile.need.voxels();
  for (int first = 0; first < count;
       first += groups) {  // all lanes of a warp go round as often: they exchange
    const int v = first + group;
    A sum = 0;
    if (v < count) {
      Cursor<T> cursor(chain, tile.sample, begin, tile.need.offset(chain.coarse, v), lanes * V);
      const int row = v / tile.need.w, x = v - row * tile.need.w;
      typename PhiBox<T>::Row at{};
      if (phi) at = phi->row_of(tile.need, row);
#pragma unroll 1
      for (int i = begin; i < chunk.end; i += lanes * V) {
        auto s = cursor.template read<V>();
        if (phi) s = add(s, phi->staged.template along_channels<V>(at, x, i - chunk.first));
        const auto q = activated(chain.activation, s);
#pragma unroll
        for (int k = 0; k < V; ++k) sum += (i < once ? weight.v[k] : psi[i + k]) * q.v[k];
        cursor.advance();
      }
    }
    sum = sum_over_lanes(sum, 1, lanes);
    if (v < count && lane == 0) add_logit(p, chunk, sum, alpha + v);
  }
  __syncthreads();
}

// alpha[need] from theta and phi: of all channels at once, or, where phi is resized, of as many at a time as
// shared memory has room for phi's box.
template <class T, class A>
__device__ void make_alpha(const Forward& p, const Tile& tile, TilePhi<T>* phi, const A* psi, A* part,
                           A* alpha) {
  constexpr int W = kWide<T>;
  const Chain& chain = p.chain;
  const bool last = chain.theta.channels_last();
  const int step = phi ? p.chunk : chain.inter;
  Chunk chunk{0, 0, false};
  do {
    chunk.end = chain.inter - chunk.first < step ? chain.inter : chunk.first + step;
    chunk.last = chunk.end == chain.inter;
    if (phi) {
      const int channels = chunk.end - chunk.first, stride = last ? channels : phi->box.voxels();
      if (threadIdx.x == 0) phi->staged.stride = stride;
      if (chain.phi_wide) {
        stage_box<W>(chain, tile.sample, phi->box, chunk.first, channels, stride, phi->staged.values);
      } else {
        stage_box<1>(chain, tile.sample, phi->box, chunk.first, channels, stride, phi->staged.values);
      }
      __syncthreads();
    }
    if (!last) {
      if (chain.wide) {
        make_alpha_rows<W, T>(p, tile, chunk, phi, psi, part, alpha);
      } else {
        make_alpha_rows<1, T>(p, tile, chunk, phi, psi, part, alpha);
      }
    } else if (chain.wide) {
      make_alpha_voxels<W, T>(p, tile, chunk, phi, psi, alpha);
    } else {
      make_alpha_voxels<1, T>(p, tile, chunk, phi, psi, alpha);
    }
    chunk.first = chunk.end;
  } while (!chunk.last);
}

// alpha of fine voxels [first, first + count) of the tile, interpolated once each.
template <class A>
__device__ void interpolate_alpha(const Tiling& tiling, const Grid& coarse, const Grid& fine,
                                  const Tile& tile, const A* alpha, int first, int count, A* line) {
  const Box &box = tile.fine, &need = tile.need;
  for (int e = int(threadIdx.x); e < count; e += kThreads) {
    const int row = (first + e) / box.w, z = row / box.h;
    const auto corners = corners_at<A>(tiling.mode, coarse, fine, box.d0 + z, box.h0 + row - z * box.h,
                                       box.w0 + first + e - row * box.w, need, need.h, need.w);
    line[e] = corners.mix([&](int64_t i) { return Values<A, 1>{{alpha[i]}}; }).v[0];
  }
}

// y = x * resize(alpha) for channels [c0, c1) of the tile, contiguous maps.
template <int V, class T, class A>
__device__ void weigh_rows(const Forward& p, const Tile& tile, int c0, int c1, const A* alpha, A* line) {
  const bool resized = p.tiling.mode != Resize::identity;
  const int count = tile.fine.voxels() / V;
  const Split split = split_threads(count, c1 - c0, kThreads);
  for (int first = 0; first < count; first += split.units) {
    const int here = count - first < split.units ? count - first : split.units;
    if (resized) {
      interpolate_alpha(p.tiling, p.coarse, p.fine, tile, alpha, first * V, here * V, line);
      __syncthreads();
    }
    if (split.unit < here) {
      const auto a = load_run<V>(resized ? line + split.unit * V : alpha + (first + split.unit) * V);
      const int64_t offset = tile.fine.offset(p.fine, (first + split.unit) * V);
      const T* from_x = at<const T>(p.x, tile.sample, c0 + split.row, offset);
      T* to_y = at<T>(p.y, tile.sample, c0 + split.row, offset);
      const int64_t step = split.rows * p.x.channel;
#pragma unroll 4
      for (int c = c0 + split.row; c < c1; c += split.rows) {
        auto x = load<V>(from_x);
#pragma unroll
        for (int k = 0; k < V; ++k) x.v[k] *= a.v[k];
        store<V>(to_y, x);
        from_x += step;
        to_y += step;
      }
    }
    if (resized) __syncthreads();  // before the next alphas overwrite these
  }
}

// The same for channels-last maps.
template <int V, class T, class A>
__device__ void weigh_voxels(const Forward& p, const Tile& tile, int c0, int c1, const A* alpha, A* line) {
  const bool resized = p.tiling.mode != Resize::identity;
  const int lanes = lanes_for((c1 - c0 + V - 1) / V);
  const int lane = int(threadIdx.x) & (lanes - 1), group = int(threadIdx.x) / lanes,
            groups = kThreads / lanes;
  const int count = tile.fine.voxels();
  for (int first = 0; first < count; first += kThreads) {
    const int here = count - first < kThreads ? count - first : kThreads;
    if (resized) {
      interpolate_alpha(p.tiling, p.coarse, p.fine, tile, alpha, first, here, line);
      __syncthreads();
    }
    for (int v = group; v < here; v += groups) {
      const A a = resized ? line[v] : alpha[first + v];
      const int64_t offset = tile.fine.offset(p.fine, first + v);
      const T* from_x = at<const T>(p.x, tile.sample, 0, offset);
      T* to_y = at<T>(p.y, tile.sample, 0, offset);
#pragma unroll 2
      for (int c = c0 + lane * V; c < c1; c += lanes * V) {
        auto x = load<V>(from_x + c);
#pragma unroll
        for (int k = 0; k < V; ++k) x.v[k] *= a;
        store<V>(to_y + c, x);
      }
    }
    if (resized) __syncthreads();
  }
}

// alpha[need] from memory. `map` is [N, coarse].
template <class A>
__device__ void load_alpha(const A* map, const Grid& coarse, const Tile& tile, A* alpha) {
  const A* from = map + tile.sample * coarse.voxels();
  for (int v = int(threadIdx.x); v < tile.need.voxels(); v += kThreads)
    alpha[v] = __ldg(from + tile.need.offset(coarse, v));
  __syncthreads();
}

template <class A>
__device__ void store_alpha(const Forward& p, const Tile& tile, const A* alpha) {
  A* to = static_cast<A*>(p.alpha) + tile.sample * p.coarse.voxels();
  const Box &own = tile.own, &need = tile.need;
  for (int e = int(threadIdx.x); e < own.voxels(); e += kThreads) {
    const int row = e / own.w, z = row / own.h, y = row - z * own.h, x = e - row * own.w;
    const int from = ((int(own.d0 - need.d0) + z) * need.h + int(own.h0 - need.h0) + y) * need.w +
                     int(own.w0 - need.w0) + x;
    to[own.offset(p.coarse, e)] = alpha[from];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>) gate_forward(const Forward p) {
  using A = Acc<T>;
  constexpr int W = kWide<T>;
  const Chain& chain = p.chain;
  Shared shared;
  Tile& tile = *shared.take<Tile>(1);
  A* alpha = shared.take<A>(p.tiling.box);
  A* part = shared.take<A>(kThreads * W);
  A* cache = shared.take<A>(chain.inter < kCachedPsi ? chain.inter : kCachedPsi);
  const int64_t index = int64_t(blockIdx.x) / p.slices;
  const int slice = int(int64_t(blockIdx.x) - index * p.slices);
  find_tile<A>(p.tiling, index, &tile);

  if (chain.theta) {
    const A* psi = cached_psi(chain, cache);
    TilePhi<T>* phi = chain.phi_resized() ? &find_phi<T>(chain, tile.need, p.chunk, shared) : nullptr;
    __syncthreads();
    make_alpha(p, tile, phi, psi, part, alpha);
    if (slice == 0) store_alpha(p, tile, alpha);
  } else {
    load_alpha(static_cast<const A*>(p.alpha), p.coarse, tile, alpha);
  }

  if (!p.x) return;
  const int c0 = slice * p.slice, channels = int(p.x.channels);
  const int c1 = c0 + p.slice < channels ? c0 + p.slice : channels;
  if (!p.x.channels_last()) {
    if (p.wide) {
      weigh_rows<W, T>(p, tile, c0, c1, alpha, part);
    } else {
      weigh_rows<1, T>(p, tile, c0, c1, alpha, part);
    }
  } else if (p.wide) {
    weigh_voxels<W, T>(p, tile, c0, c1, alpha, part);
  } else {
    weigh_voxels<1, T>(p, tile, c0, c1, alpha, part);
  }
}

}  // namespace attn_gate::cuda
