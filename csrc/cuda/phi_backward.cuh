// Backward of the chain where phi has a grid Q of its own, in one kernel behind dfine and dalpha:
//
//   dlogit = (dalpha + resize^T(dfine)) * alpha * (1 - alpha)
//   dtheta = dlogit * psi * activation'(theta + resize(phi))          dphi = resize^T(dtheta)
//
// Bytes that must move, for a voxel of theta's grid R (e bytes an element, q voxels of Q and s of x's grid S
// for each):
//   2 I e   theta, dtheta        2 I q e   phi, dphi        4 s + 8   dfine, alpha, dalpha
// A tile owns voxels of Q. Its dphi gathers from the dtheta of all voxels of R around them, so those that
// two tiles share are made twice, and theta is read h times, h = (t + 1) / t for each cut axis of t voxels of
// Q. In three dimensions no box that fits into shared memory would keep that low (t = 4 on two axes: 1.56).
// So a block sweeps its tile along d, plane by plane and each in groups of rows, and holds only what two
// planes of Q need: phi, and the sums of dphi. Whole rows and planes have no halo at all, and the other way
// to make room is to take fewer channels: each slice of them makes dlogit again, 12 bytes (one grid S = R) to
// 40 (twice finer, 3D) a voxel. plan.h weighs one against the other; what is cut along d, to have enough
// blocks, costs a plane of R on each cut. With I = 32, bfloat16 and a twice coarser phi, 2D, a voxel moves
// 172 bytes, and a second slice adds 7 %.
//
// Threads: as in forward. dtheta is rounded to the maps' dtype before dphi is gathered, as in eager PyTorch.
#pragma once
#include "backward.cuh"

namespace attn_gate::cuda {

// An axis of a tile: what it owns of Q and R, the part of R that its dphi receives from, and what that needs
// of Q and S.
struct PhiSpan {
  int64_t q, own, need, phi, fine;
  int q_count, own_count, need_count, phi_count, fine_count;
};

struct PhiTile {
  int64_t sample;
  PhiSpan d, h, w;
};

// The outputs [begin, end) of an axis that inputs [first, last) receive from.
template <class A>
__device__ void find_receivers(Resize mode, int64_t first, int64_t last, int64_t in, int64_t out,
                               int64_t* begin, int64_t* end) {
  *begin = first_output<A>(mode, mode == Resize::nearest || in == out ? first : first - 1, in, out);
  *end = first_output<A>(mode, last, in, out);
}

// In R, tiles begin and end at multiples of `align`; in Q what they need does, of `phi_align`.
template <class A>
__device__ PhiSpan phi_span(const PhiAxis& axis, Resize mode, Resize alpha_resize, int64_t tile, int align,
                            int phi_align) {
  PhiSpan s{};
  const int64_t q_end = tile + 1 == axis.tiles ? axis.gating : (tile + 1) * axis.tile;
  s.q = tile * axis.tile;
  s.q_count = int(q_end - s.q);
  auto border = [&](int64_t q) { return first_output<A>(mode, q, axis.gating, axis.coarse) / align * align; };
  s.own = tile == 0 ? 0 : border(s.q);
  const int64_t own_end = q_end == axis.gating ? axis.coarse : border(q_end);
  s.own_count = int(own_end - s.own);
  int64_t begin = 0, end = 0;
  find_receivers<A>(mode, s.q, q_end, axis.gating, axis.coarse, &begin, &end);
  begin = (begin < s.own ? begin : s.own) / align * align;
  end = ((end > own_end ? end : own_end) + align - 1) / align * align;
  s.need = begin;
  s.need_count = int((end < axis.coarse ? end : axis.coarse) - begin);
  find_sources<A>(mode, s.need, s.need_count, axis.gating, axis.coarse, phi_align, &s.phi, &s.phi_count);
  find_receivers<A>(alpha_resize, s.need, s.need + s.need_count, axis.coarse, axis.fine, &s.fine, &end);
  s.fine_count = int(end - s.fine);
  return s;
}

template <class T>
__device__ void find_phi_tile(const PhiBackward& p, int64_t index, PhiTile* tile) {
  using A = Acc<T>;
  const int tid = int(threadIdx.x);
  if (tid < 3) {
    const int64_t per_sample = p.tiles(), sample = index / per_sample;
    const int within = int(index - sample * per_sample), row = within / p.w.tiles, d = row / p.h.tiles;
    const bool rows = !p.chain.theta.channels_last();
    const int align = tid == 2 && rows && p.chain.wide ? kWide<T> : 1;
    const int phi_align = tid == 2 && rows && p.chain.phi_wide ? kWide<T> : 1;
    const PhiAxis& axis = tid == 0 ? p.d : tid == 1 ? p.h : p.w;
    const int here = tid == 0 ? d : tid == 1 ? row - d * p.h.tiles : within - row * p.w.tiles;
    (tid == 0   ? tile->d
     : tid == 1 ? tile->h
                : tile->w) = phi_span<A>(axis, p.chain.phi_resize, p.alpha_resize, here, align, phi_align);
    if (tid == 0) tile->sample = sample;
  }
  __syncthreads();
}

// Rows [y, y + rows) of plane d of the tile's part of R; plane and rows are counted in the grid and in it.
struct Group {
  int d, y, rows;
  bool own;  // of the plane
  __device__ bool owns(const PhiTile& tile, int row, int x) const {
    const int64_t h = tile.h.need + y + row - tile.h.own, w = tile.w.need + x - tile.w.own;
    return own && h >= 0 && h < tile.h.own_count && w >= 0 && w < tile.w.own_count;
  }
  __device__ int64_t offset(const PhiTile& tile, const Grid& grid, int row, int x) const {
    return (int64_t(d) * grid.h + tile.h.need + y + row) * grid.w + tile.w.need + x;
  }
};

// take(e, sum) for each voxel e of rows [y, y + rows) of R: resize^T along h and w of a plane of dfine.
// `lines` has room for what of the plane these rows receive from.
template <class A, class Take>
__device__ void gather_plane(const PhiBackward& p, const PhiTile& tile, int64_t plane, int y, int rows,
                             A* lines, Take take) {
  const Grid &coarse = p.chain.coarse, &fine = p.fine;
  const A* dfine = static_cast<const A*>(p.dfine) + tile.sample * fine.voxels();
  const int width = tile.w.need_count, wide = tile.w.fine_count;
  const int64_t h = tile.h.need + y;
  int64_t begin = 0, end = 0;
  find_receivers<A>(p.alpha_resize, h, h + rows, coarse.h, fine.h, &begin, &end);
  for (int e = int(threadIdx.x); e < int(end - begin) * wide; e += kThreads) {
    const int row = e / wide;
    lines[e] = __ldg(dfine + (plane * fine.h + begin + row) * fine.w + tile.w.fine + e - row * wide);
  }
  __syncthreads();
  for (int e = int(threadIdx.x); e < rows * width; e += kThreads) {
    const int row = e / width;
    const Receives<A> from_h(p.alpha_resize, h + row, coarse.h, fine.h),
        from_w(p.alpha_resize, tile.w.need + e - row * width, coarse.w, fine.w);
    A sum = 0;
    for (int64_t oh = from_h.begin; oh < from_h.end; ++oh) {
      const A weight_h = from_h.weight(oh);
      const A* line = lines + int(oh - begin) * wide;
#pragma unroll 1
      for (int64_t ow = from_w.begin; ow < from_w.end; ++ow) {
        const A weight = weight_h * from_w.weight(ow);
        if (weight != A(0)) sum += weight * line[int(ow - tile.w.fine)];
      }
    }
    take(e, sum);
  }
  __syncthreads();
}

// dfine's planes up to the last that plane d of R receives from, each read once: `next` is the first that is
// not yet in the sums of d and d + 1, two planes of the tile.
template <class A>
__device__ void add_planes(const PhiBackward& p, const PhiTile& tile, int d, int* next, A* lines, A* sums) {
  const int end = int(first_output<A>(p.alpha_resize, d + 1, p.chain.coarse.d, p.fine.d));
  const int width = tile.w.need_count, plane = tile.h.need_count * width;
  for (; *next < end; ++*next) {
    const auto tap = tap_in<A>(p.alpha_resize, *next, p.chain.coarse.d, p.fine.d, 0);
    for (int y = 0; y < tile.h.need_count; y += p.rows) {
      const int rows = tile.h.need_count - y < p.rows ? tile.h.need_count - y : p.rows;
      gather_plane(p, tile, *next, y, rows, lines, [&](int e, A sum) {
        A* to = sums + y * width + e;
        if (tap.lower >= d) to[(tap.lower & 1) * plane] += (A(1) - tap.t) * sum;
        if (tap.upper >= d && tap.t != A(0)) to[(tap.upper & 1) * plane] += tap.t * sum;
      });
    }
  }
}

// dlogit of a group. `sums` are those of add_planes, or null where there is no room for them: then each group
// reads the planes that it receives from.
template <class A>
__device__ void make_group_dlogit(const PhiBackward& p, const PhiTile& tile, const Group& group, A* lines,
                                  A* sums, A* dlogit) {
  const Grid &coarse = p.chain.coarse, &fine = p.fine;
  const int width = tile.w.need_count, count = group.rows * width, tid = int(threadIdx.x);
  const A *given = static_cast<const A*>(p.dalpha), *alpha = static_cast<const A*>(p.alpha);
  const A* dfine = p.dfine ? static_cast<const A*>(p.dfine) + tile.sample * fine.voxels() : nullptr;
  const bool resized = dfine && p.alpha_resize != Resize::identity;
  if (resized && !sums) {
    for (int e = tid; e < count; e += kThreads) dlogit[e] = A(0);
    const Receives<A> planes(p.alpha_resize, group.d, coarse.d, fine.d);
    for (int64_t plane = planes.begin; plane < planes.end; ++plane) {
      const A weight = planes.weight(plane);
      if (weight != A(0))
        gather_plane(p, tile, plane, group.y, group.rows, lines,
                     [&](int e, A sum) { dlogit[e] += weight * sum; });
    }
  }
  for (int e = tid; e < count; e += kThreads) {
    const int row = e / width;
    const int64_t offset = group.offset(tile, coarse, row, e - row * width),
                  v = tile.sample * coarse.voxels() + offset;
    A sum = 0;
    if (resized && sums) {
      A& ready = sums[(int(group.d & 1) * tile.h.need_count + group.y) * width + e];
      sum = ready;
      ready = 0;
    } else if (resized) {
      sum = dlogit[e];
    } else if (dfine) {
      sum = __ldg(dfine + offset);
    }
    if (given) sum += given[v];
    if (alpha) sum *= alpha[v] * (A(1) - alpha[v]);
    dlogit[e] = sum;
  }
  __syncthreads();
}

// What the threads of a block share, of the channels that it has; itself in shared memory, for there are not
// registers enough for all these pointers.
template <class T>
struct PhiSlice {
  using A = Acc<T>;
  int first, channels;
  A *psi, *dlogit, *sums;
  Tap<A>*taps_h, *taps_w;  // of R's rows and columns in phi's
  int2 *from_h, *from_w;   // the rows and columns of R that Q's receive from
  PhiBox<T> phi;           // two planes of it
  A* planes;               // two of dphi
  A* fine_sums;            // two of R, of add_planes
  unsigned char* scratch;  // dfine, then ds; sums at last
  int ds_stride;
  // Of a group: [channel][voxel] in contiguous maps, [voxel][channel] in channels-last ones.
  __device__ __forceinline__ T* ds() const { return reinterpret_cast<T*>(scratch); }
};

// dtheta of a group, ds in shared memory, and sums[i] += dpsi; contiguous maps, a warp or a part of one for
// each channel. `lower` and `upper` are where the planes of phi around it lie.
template <int V, class T>
__device__ void phi_rows(const PhiBackward& p, const PhiTile& tile, const Group& group, int lower, int upper,
                         Acc<T> td, const PhiSlice<T>& slice) {
  using A = Acc<T>;
  const Chain& chain = p.chain;
  const int width = tile.w.need_count, count = group.rows * width / V;
  const Split split = split_threads(count, kThreads, 32);
  for (int begin = 0; begin < count; begin += split.units) {
    const int u = begin + split.unit;
    const bool inside = u < count;
    const int row = inside ? u * V / width : 0, x = inside ? u * V - row * width : 0;
    const bool own = inside && group.owns(tile, row, x);
    const int64_t offset = group.offset(tile, chain.coarse, row, x);
    const int first = slice.first + split.row;
    Cursor<T> cursor(chain, tile.sample, first, offset, split.rows);
    T* dtheta = own && chain.dtheta ? at<T>(chain.dtheta, tile.sample, first, offset) : nullptr;
    const auto around = PhiBox<T>::row_of(lower, upper, td, slice.taps_h[group.y + row], tile.w.phi_count);
    Values<A, V> dlogit = {};
    if (inside) dlogit = load_run<V>(slice.dlogit + u * V);
#pragma unroll 1
    for (int step = 0; step < slice.channels; step += split.rows) {  // all lanes: they exchange
      const int i = step + split.row;
      A sum = 0;
      if (inside && i < slice.channels) {
        Values<A, V> psi;
#pragma unroll
        for (int k = 0; k < V; ++k) psi.v[k] = slice.psi[i];
        const auto s = add(cursor.template read<V>(), slice.phi.template along_row<V>(around, x, i));
        const auto ds = slope_of(chain.activation, s, psi, dlogit);
        if (dtheta) store<V>(dtheta, ds);
        store<V>(slice.ds() + i * slice.ds_stride + u * V, ds);
        const auto q = activated(chain.activation, s);
#pragma unroll
        for (int k = 0; k < V; ++k) sum += own ? dlogit.v[k] * q.v[k] : A(0);
      }
      cursor.advance();
      dtheta += dtheta ? cursor.theta_step : 0;
      sum = sum_over_lanes(sum, 1, split.units);
      if (split.unit == 0 && i < slice.channels) slice.sums[i] += sum;
    }
  }
}

// The same for channels-last maps: a lane keeps its V channels, and their sums, for the whole sweep.
template <int V, class T, int W>
__device__ void phi_voxels(const PhiBackward& p, const PhiTile& tile, const Group& group, int lower,
                           int upper, Acc<T> td, const PhiSlice<T>& slice, Values<Acc<T>, W>* sums) {
  using A = Acc<T>;
  const Chain& chain = p.chain;
  const int width = tile.w.need_count, count = group.rows * width;
  const int lanes = lanes_for((slice.channels + V - 1) / V), groups = kThreads / lanes;
  const int i = (int(threadIdx.x) & (lanes - 1)) * V;
  if (i >= slice.channels) return;
  Values<A, V> psi;
#pragma unroll
  for (int k = 0; k < V; ++k) psi.v[k] = slice.psi[i + k];
#pragma unroll 1
  for (int v = int(threadIdx.x) / lanes; v < count; v += groups) {
    const int row = v / width, x = v - row * width;
    const int64_t offset = group.offset(tile, chain.coarse, row, x);
    const Cursor<T> cursor(chain, tile.sample, slice.first + i, offset, 0);
    const auto around = PhiBox<T>::row_of(lower, upper, td, slice.taps_h[group.y + row], tile.w.phi_count);
    const auto s = add(cursor.template read<V>(), slice.phi.template along_channels<V>(around, x, i));
    Values<A, V> dlogit;
#pragma unroll
    for (int k = 0; k < V; ++k) dlogit.v[k] = slice.dlogit[v];
    const auto ds = slope_of(chain.activation, s, psi, dlogit);
    const bool own = group.owns(tile, row, x);
    if (own && chain.dtheta) store<V>(at<T>(chain.dtheta, tile.sample, slice.first + i, offset), ds);
    store<V>(slice.ds() + v * slice.ds_stride + i, ds);
    const auto q = activated(chain.activation, s);
#pragma unroll
    for (int k = 0; k < V; ++k) sums->v[k] += own ? dlogit.v[k] * q.v[k] : A(0);
  }
}

// An element of two planes of dphi is one thread's alone, from its first addition to memory.
struct PhiElements {
  int channels, plane;  // in a plane of the tile
  bool last;
  __device__ int count() const { return channels * plane; }
  __device__ int channel(int e) const { return last ? e % channels : e / plane; }
  __device__ int voxel(int e) const { return last ? e / channels : e % plane; }
};

// planes += what the group's ds give to dphi: `lower` and `upper` planes of Q by 1 - t and t.
template <class T>
__device__ void add_to_dphi(const PhiTile& tile, const Group& group, const PhiElements& all, int lower,
                            int upper, Acc<T> t, const PhiSlice<T>& slice) {
  using A = Acc<T>;
  const int width = tile.w.need_count;
  const int l = lower - int(tile.d.q), u = upper - int(tile.d.q);
#pragma unroll 1
  for (int e = int(threadIdx.x); e < all.count(); e += kThreads) {
    const int c = all.channel(e), v = all.voxel(e), h = v / tile.w.q_count, w = v - h * tile.w.q_count;
    const int at_h = h + int(tile.h.q - tile.h.phi), at_w = w + int(tile.w.q - tile.w.phi);
    const int2 from_h = slice.from_h[h], from_w = slice.from_w[w];
    const int begin = from_h.x > group.y ? from_h.x : group.y,
              end = from_h.y < group.y + group.rows ? from_h.y : group.y + group.rows;
    A sum = 0;
    for (int y = begin; y < end; ++y) {
      const Tap<A> tap_h = slice.taps_h[y];
      const A weight_h =
          (tap_h.lower == at_h ? A(1) - tap_h.t : A(0)) + (tap_h.upper == at_h ? tap_h.t : A(0));
#pragma unroll 1
      for (int x = from_w.x; x < from_w.y; ++x) {
        const Tap<A> tap = slice.phi.w[x];
        const A weight =
            weight_h * ((tap.lower == at_w ? A(1) - tap.t : A(0)) + (tap.upper == at_w ? tap.t : A(0)));
        const int voxel = (y - group.y) * width + x;
        const int from = all.last ? voxel * slice.ds_stride + c : c * slice.ds_stride + voxel;
        if (weight != A(0)) sum += weight * to_acc(slice.ds()[from]);  // NaN where it has no part stays out
      }
    }
    if (l >= 0 && l < tile.d.q_count) slice.planes[(l & 1) * all.count() + e] += (A(1) - t) * sum;
    if (t != A(0) && u >= 0 && u < tile.d.q_count) slice.planes[(u & 1) * all.count() + e] += t * sum;
  }
}

// Plane `d` of the tile's dphi is complete.
template <class T>
__device__ void finish_plane(const PhiBackward& p, const PhiTile& tile, const PhiElements& all, int d,
                             int first, Acc<T>* planes) {
  const Grid& grid = p.chain.gating;
#pragma unroll 1
  for (int e = int(threadIdx.x); e < all.count(); e += kThreads) {
    const int v = all.voxel(e), h = v / tile.w.q_count;
    const int64_t offset =
        ((tile.d.q + d) * grid.h + tile.h.q + h) * grid.w + tile.w.q + v - h * tile.w.q_count;
    Acc<T>& sum = planes[(d & 1) * all.count() + e];
    *at<T>(p.chain.dphi, tile.sample, first + all.channel(e), offset) = from_acc<T>(sum);
    sum = 0;
  }
}

template <class A>
__device__ void find_ranges(Resize mode, const PhiSpan& span, int64_t in, int64_t out, int2* ranges) {
  for (int i = int(threadIdx.x); i < span.q_count; i += kThreads) {
    const Receives<A> from(mode, span.q + i, in, out);
    ranges[i] = make_int2(int(from.begin - span.need), int(from.end - span.need));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) phi_backward(const PhiBackward p) {
  using A = Acc<T>;
  constexpr int W = kWide<T>;
  const Chain& chain = p.chain;
  const Resize mode = chain.phi_resize;
  const Grid &Q = chain.gating, &R = chain.coarse;
  const bool last = chain.theta.channels_last();
  const int tid = int(threadIdx.x);
  const int row_of_sums = int(blockIdx.x) / p.slices, number = int(blockIdx.x) - row_of_sums * p.slices;
  Shared shared;
  PhiTile& tile = *shared.take<PhiTile>(1);
  PhiSlice<T>& slice = *shared.take<PhiSlice<T>>(1);
  {
    PhiSlice<T> taken{};
    taken.first = number * p.slice;
    taken.channels = chain.inter - taken.first < p.slice ? chain.inter - taken.first : p.slice;
    taken.taps_h = shared.take<Tap<A>>(p.h.need);
    taken.taps_w = shared.take<Tap<A>>(p.w.need);
    taken.from_h = shared.take<int2>(p.h.tile);
    taken.from_w = shared.take<int2>(p.w.tile);
    taken.dlogit = shared.take<A>(p.rows * p.w.need);
    taken.scratch = shared.take<unsigned char>(p.scratch);
    taken.fine_sums = p.keeps_planes ? shared.take<A>(2 * p.h.need * p.w.need) : nullptr;
    taken.phi.values = shared.take<T>(2 * p.phi_plane() * p.slice);
    taken.phi.w = taken.taps_w;
    taken.planes = chain.dphi ? shared.take<A>(2 * p.own_plane() * p.slice) : nullptr;
    taken.psi = shared.take<A>(p.slice);
    taken.sums = shared.take<A>(p.slice + 1);
    if (tid == 0) slice = taken;
  }
  __syncthreads();
  for (int i = tid; i <= slice.channels; i += kThreads) {
    if (i < slice.channels) slice.psi[i] = static_cast<const A*>(chain.psi)[slice.first + i];
    slice.sums[i] = A(0);
  }
  Values<A, W> lane_sums = {};

  const int tiles = int(p.batch * p.tiles());
#pragma unroll 1
  for (int index = row_of_sums; index < tiles; index += int(gridDim.x) / p.slices) {
    find_phi_tile<T>(p, index, &tile);
    find_taps(mode, tile.h.need, tile.h.need_count, Q.h, R.h, tile.h.phi, slice.taps_h);
    find_taps(mode, tile.w.need, tile.w.need_count, Q.w, R.w, tile.w.phi, slice.taps_w);
    find_ranges<A>(mode, tile.h, Q.h, R.h, slice.from_h);
    find_ranges<A>(mode, tile.w, Q.w, R.w, slice.from_w);
    const PhiElements all{slice.channels, tile.h.q_count * tile.w.q_count, last};
    if (chain.dphi)
      for (int e = tid; e < 2 * all.count(); e += kThreads) slice.planes[e] = A(0);
    if (p.keeps_planes)
      for (int e = tid; e < 2 * tile.h.need_count * tile.w.need_count; e += kThreads)
        slice.fine_sums[e] = A(0);
    const int phi_plane = tile.h.phi_count * tile.w.phi_count;
    if (tid == 0) {
      slice.phi.stride = last ? slice.channels : 2 * phi_plane;
      slice.ds_stride = last ? slice.channels : p.rows * tile.w.need_count;
    }
    __syncthreads();
    int next = int(tile.d.fine);  // plane of dfine
    int done = 0;                 // planes of dphi
    int even = -1, odd = -1;      // planes of phi in shared memory
    auto stage = [&](int d) {
      if ((d & 1 ? odd : even) == d) return;
      (d & 1 ? odd : even) = d;
      const Box box{d, tile.h.phi, tile.w.phi, 1, tile.h.phi_count, tile.w.phi_count};
      T* to = slice.phi.values + int(d & 1) * phi_plane * (last ? slice.channels : 1);
      if (chain.phi_wide) {
        stage_box<W>(chain, tile.sample, box, slice.first, slice.channels, slice.phi.stride, to);
      } else {
        stage_box<1>(chain, tile.sample, box, slice.first, slice.channels, slice.phi.stride, to);
      }
    };

    const int end = int(tile.d.need) + tile.d.need_count;
#pragma unroll 1
    for (int d = int(tile.d.need); d < end; ++d) {
      const auto tap = tap_in<A>(mode, d, Q.d, R.d, 0);
      const int lower = (tap.lower & 1) * phi_plane, upper = (tap.upper & 1) * phi_plane;
      stage(tap.lower);
      if (tap.t != A(0)) stage(tap.upper);
      if (chain.dphi)
        for (; done < tap.lower - int(tile.d.q); ++done)
          finish_plane<T>(p, tile, all, done, slice.first, slice.planes);
      A* lines = reinterpret_cast<A*>(slice.scratch);
      if (p.keeps_planes) add_planes(p, tile, d, &next, lines, slice.fine_sums);
      Group group{d, 0, 0, d >= tile.d.own && d < tile.d.own + tile.d.own_count};
      for (; group.y < tile.h.need_count; group.y += p.rows) {
        group.rows = tile.h.need_count - group.y < p.rows ? tile.h.need_count - group.y : p.rows;
        make_group_dlogit(p, tile, group, lines, slice.fine_sums, slice.dlogit);
        if (number == 0 && tid < 32) {
          A sum = 0;
          for (int e = tid; e < group.rows * tile.w.need_count; e += 32) {
            const int row = e / tile.w.need_count;
            if (group.owns(tile, row, e - row * tile.w.need_count)) sum += slice.dlogit[e];
          }
          sum = sum_over_lanes(sum, 1, 32);
          if (tid == 0) slice.sums[slice.channels] += sum;
        }
        if (!last) {
          if (chain.wide) {
            phi_rows<W>(p, tile, group, lower, upper, tap.t, slice);
          } else {
            phi_rows<1>(p, tile, group, lower, upper, tap.t, slice);
          }
        } else if (chain.wide) {
          phi_voxels<W>(p, tile, group, lower, upper, tap.t, slice, &lane_sums);
        } else {
          phi_voxels<1>(p, tile, group, lower, upper, tap.t, slice, &lane_sums);
        }
        __syncthreads();
        if (chain.dphi) add_to_dphi(tile, group, all, tap.lower, tap.upper, tap.t, slice);
        __syncthreads();  // before the next group
      }
    }
    if (chain.dphi)
      for (; done < tile.d.q_count; ++done) finish_plane<T>(p, tile, all, done, slice.first, slice.planes);
    __syncthreads();  // before the next tile
  }

  if (last) {
    const int V = chain.wide ? W : 1, lanes = lanes_for((slice.channels + V - 1) / V), span = lanes * V;
    A* part = reinterpret_cast<A*>(slice.scratch);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      if (k >= V) break;
      const A total = sum_over_lanes(lane_sums.v[k], lanes, 32);
      if ((tid & 31) < lanes) part[tid / 32 * span + (tid & 31) * V + k] = total;
    }
    __syncthreads();
    for (int i = tid; i < slice.channels; i += kThreads)
      for (int w = 0; w < kThreads / 32; ++w) slice.sums[i] += part[w * span + i];
  }
  __syncthreads();
  A* row = static_cast<A*>(p.sums) + int64_t(row_of_sums) * (chain.inter + 1);
  for (int i = tid; i < slice.channels; i += kThreads) row[slice.first + i] = slice.sums[i];
  if (number == 0 && tid == 0) row[chain.inter] = slice.sums[slice.channels];
}

}  // namespace attn_gate::cuda
