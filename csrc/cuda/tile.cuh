// Where a tile lies in both grids, and the work of its threads.
#pragma once
#include "device.h"

namespace attn_gate::cuda {

// A box of voxels of a grid, counted from its first in rows along w.
struct Box {
  int64_t d0, h0, w0;
  int d, h, w;
  __device__ int voxels() const { return d * h * w; }
  // The offset in the grid of the box's voxel i.
  __device__ int64_t offset(const Grid& grid, int i) const {
    if (d * h == 1) return (d0 * grid.h + h0) * grid.w + w0 + i;
    const int row = i / w, z = row / h;
    return ((d0 + z) * grid.h + h0 + (row - z * h)) * grid.w + w0 + (i - row * w);
  }
};

// A tile: the fine voxels that are its own, the coarse ones that are its own (every voxel of either grid
// belongs to exactly one tile), and the coarse ones that its fine ones are interpolated from.
struct Tile {
  int64_t sample;
  Box fine, own, need;
};

struct Span {
  int64_t fine, own, need;
  int fine_count, own_count, need_count;
};

template <class A>
__device__ Span span_of(const Axis& axis, Resize mode, int64_t tile, int align, bool receives) {
  const int64_t first = tile * axis.tile, last = first + axis.tile;
  const bool ends = tile + 1 == axis.tiles;
  if (mode == Resize::identity || axis.coarse == axis.fine) {
    const int64_t end = ends ? axis.fine : last, begin = first / align * align;
    const int64_t stop = (end + align - 1) / align * align;
    return {first,
            first,
            begin,
            int(end - first),
            int(end - first),
            int((stop < axis.coarse ? stop : axis.coarse) - begin)};
  }
  int64_t fine = first, fine_end = ends ? axis.fine : last, own = first, own_end = ends ? axis.coarse : last;
  if (axis.by_coarse) {
    fine = first_output<A>(mode, first, axis.coarse, axis.fine);
    if (!ends) fine_end = first_output<A>(mode, last, axis.coarse, axis.fine);
  } else {
    own = tile == 0 ? 0 : resize_tap<A>(mode, first, axis.coarse, axis.fine).lower;
    if (!ends) own_end = resize_tap<A>(mode, last, axis.coarse, axis.fine).lower;
  }
  if (receives) {
    const int64_t before = mode == Resize::nearest || axis.coarse == axis.fine ? own : own - 1;
    fine = first_output<A>(mode, before, axis.coarse, axis.fine);
    fine_end = first_output<A>(mode, own_end, axis.coarse, axis.fine);
    return {fine, own, own, int(fine_end - fine), int(own_end - own), int(own_end - own)};
  }
  int64_t need_end = own_end;
  if (fine_end > fine) {
    const int64_t upper = resize_tap<A>(mode, fine_end - 1, axis.coarse, axis.fine).upper;
    need_end = upper + 1 > need_end ? upper + 1 : need_end;
  }
  const int64_t need = own / align * align;
  need_end = (need_end + align - 1) / align * align;
  need_end = need_end < axis.coarse ? need_end : axis.coarse;
  return {fine, own, need, int(fine_end - fine), int(own_end - own), int(need_end - need)};
}

// The tile of this index, in shared memory: each axis is the work of one thread, the others wait for it.
template <class A>
__device__ void find_tile(const Tiling& tiling, int64_t index, Tile* tile) {
  const int tid = int(threadIdx.x);
  if (tid < 3) {
    const int64_t per_sample = tiling.tiles(), sample = index / per_sample;
    const int within = int(index - sample * per_sample), row = within / tiling.w.tiles;
    const int d = row / tiling.h.tiles;
    const Axis& axis = tid == 0 ? tiling.d : tid == 1 ? tiling.h : tiling.w;
    const int here = tid == 0 ? d : tid == 1 ? row - d * tiling.h.tiles : within - row * tiling.w.tiles;
    const Span span = span_of<A>(axis, tiling.mode, here, tid == 2 ? tiling.align : 1, tiling.receives);
    if (tid == 0) tile->sample = sample;
    for (int part = 0; part < 3; ++part) {
      Box& box = part == 0 ? tile->fine : part == 1 ? tile->own : tile->need;
      const int64_t begin = part == 0 ? span.fine : part == 1 ? span.own : span.need;
      const int count = part == 0 ? span.fine_count : part == 1 ? span.own_count : span.need_count;
      (tid == 0 ? box.d0 : tid == 1 ? box.h0 : box.w0) = begin;
      (tid == 0 ? box.d : tid == 1 ? box.h : box.w) = count;
    }
  }
  __syncthreads();
}

// A block's threads as `units` x `rows`, both powers of two: threads of one row work on neighbouring units.
struct Split {
  int units, rows, unit, row;
};

// For `count` units of `channels` channels each: whole warps along the units where there are that many, and
// four channels a thread where there are more units than that.
__device__ __forceinline__ Split split_threads(int count, int channels, int most_units) {
  int rows = 1;
  while (rows < 8 && rows * 8 <= channels) rows *= 2;
  int units = kThreads / rows;
  while (units > most_units || (units > 8 && units / 2 >= count)) units /= 2;
  const int tid = int(threadIdx.x);
  return {units, kThreads / units, tid & (units - 1), tid / units};
}

// In channels-last maps a few lanes of a warp, a power of two, share a voxel.
__device__ __forceinline__ int lanes_for(int vectors) {
  int lanes = 1;
  while (lanes < 32 && lanes < vectors) lanes *= 2;
  return lanes;
}

// Where voxels of one grid take their values in another: linear interpolation, axis by axis.
template <class A>
struct Corners {
  int64_t base, step_d, step_h, step_w;
  A td, th, tw;

  template <class Fetch>
  __device__ __forceinline__ auto mix(Fetch fetch) const {
    auto line = [&](int64_t offset) {
      auto a = fetch(offset);
      return tw == A(0) ? a : blend(a, fetch(offset + step_w), tw);
    };
    auto plane = [&](int64_t offset) {
      auto a = line(offset);
      return th == A(0) ? a : blend(a, line(offset + step_h), th);
    };
    auto a = plane(base);
    return td == A(0) ? a : blend(a, plane(base + step_d), td);
  }

  template <int V>
  static __device__ __forceinline__ Values<A, V> blend(Values<A, V> a, const Values<A, V>& b, A t) {
#pragma unroll
    for (int k = 0; k < V; ++k) a.v[k] = (A(1) - t) * a.v[k] + t * b.v[k];
    return a;
  }
};

// Of the output voxel (d, h, w): offsets in a grid whose voxel (from.d0, from.h0, from.w0) is at 0, rows of
// `row` voxels, planes of `rows` rows.
template <class A>
__device__ Corners<A> corners_at(Resize mode, const Grid& in, const Grid& out, int64_t d, int64_t h,
                                 int64_t w, const Box& from, int64_t rows, int64_t row) {
  const auto td = resize_tap<A>(mode, d, in.d, out.d), th = resize_tap<A>(mode, h, in.h, out.h),
             tw = resize_tap<A>(mode, w, in.w, out.w);
  return {((td.lower - from.d0) * rows + th.lower - from.h0) * row + tw.lower - from.w0,
          (td.upper - td.lower) * rows * row,
          (th.upper - th.lower) * row,
          tw.upper - tw.lower,
          td.t,
          th.t,
          tw.t};
}

}  // namespace attn_gate::cuda
