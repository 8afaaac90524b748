// phi on a grid of its own: a box of it in shared memory, read once, and interpolated from there.
//
// Straight from memory every element of theta would ask for the four (3D: eight) of phi around it, and a
// twice coarser phi would be requested 8 (3D: 16) times.
#pragma once
#include "chain.cuh"

namespace attn_gate::cuda {

// Where a row, column or plane of theta's box lies in phi's.
template <class A>
struct Tap {
  int lower, upper;
  A t;
};

template <class A>
__device__ Tap<A> tap_in(Resize mode, int64_t o, int64_t in, int64_t out, int64_t from) {
  const auto tap = resize_tap<A>(mode, o, in, out);
  return {int(tap.lower - from), int(tap.upper - from), tap.t};
}

// The taps of `count` voxels of an axis from `first` on, by all threads.
template <class A>
__device__ void find_taps(Resize mode, int64_t first, int count, int64_t in, int64_t out, int64_t from,
                          Tap<A>* taps) {
  for (int i = int(threadIdx.x); i < count; i += kThreads)
    taps[i] = tap_in<A>(mode, first + i, in, out, from);
}

// The voxels [first, first + count) of phi's axis that `need` ones of theta's are interpolated from. Along w
// they begin and end at multiples of `align`, where the axis does.
template <class A>
__device__ void find_sources(Resize mode, int64_t need, int need_count, int64_t in, int64_t out, int align,
                             int64_t* first, int* count) {
  *first = *count = 0;
  if (need_count == 0) return;
  const int64_t begin = resize_tap<A>(mode, need, in, out).lower / align * align;
  int64_t end = resize_tap<A>(mode, need + need_count - 1, in, out).upper + 1;
  end = (end + align - 1) / align * align;
  *first = begin;
  *count = int((end < in ? end : in) - begin);
}

// Zero weights take no part: what lies there may be NaN.
template <class A>
__device__ __forceinline__ A blend(A a, A b, A t) {
  return t == A(0) ? a : (A(1) - t) * a + t * b;
}
template <int V, class A>
__device__ __forceinline__ Values<A, V> blend(Values<A, V> a, const Values<A, V>& b, A t) {
#pragma unroll
  for (int k = 0; k < V; ++k) a.v[k] = blend(a.v[k], b.v[k], t);
  return a;
}

// Some channels of a box: [channel][voxel] of contiguous maps, [voxel][channel] of channels-last ones.
template <class T>
struct PhiBox {
  using A = Acc<T>;
  T* values;
  int stride;       // of the first of both
  const Tap<A>* w;  // of theta's box

  // A row of theta's box: the four rows of this one around it, and its place between them.
  struct Row {
    int at[2][2];  // [plane][row]
    A td, th;
  };
  static __device__ __forceinline__ Row row_of(int lower_plane, int upper_plane, A td, const Tap<A>& h,
                                               int w) {
    return {{{lower_plane + h.lower * w, lower_plane + h.upper * w},
             {upper_plane + h.lower * w, upper_plane + h.upper * w}},
            td,
            h.t};
  }

  template <class Line>
  static __device__ __forceinline__ auto mix(const Row& row, Line line) {
    auto a = line(row.at[0][0]);
    if (row.th != A(0)) a = blend(a, line(row.at[0][1]), row.th);
    if (row.td == A(0)) return a;
    auto b = line(row.at[1][0]);
    if (row.th != A(0)) b = blend(b, line(row.at[1][1]), row.th);
    return blend(a, b, row.td);
  }

  // V voxels of channel c from column x on, contiguous maps.
  template <int V>
  __device__ __forceinline__ Values<A, V> along_row(const Row& row, int x, int c) const {
    const T* from = values + c * stride;
    Values<A, V> phi;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const Tap<A> tap = w[x + k];
      phi.v[k] = mix(row, [&](int at) {
        return blend(to_acc(from[at + tap.lower]), to_acc(from[at + tap.upper]), tap.t);
      });
    }
    return phi;
  }

  // V channels from c on of column x, channels-last maps; eight two by two, for the sake of registers.
  template <int V>
  __device__ __forceinline__ Values<A, V> along_channels(const Row& row, int x, int c) const {
    constexpr int kPart = V > 4 ? 2 : V;
    const Tap<A> tap = w[x];
    Values<A, V> phi;
#pragma unroll
    for (int k = 0; k < V; k += kPart) {
      const auto part = mix(row, [&](int at) {
        const T* from = values + at * stride + c + k;
        return blend(load_shared<kPart>(from + tap.lower * stride),
                     load_shared<kPart>(from + tap.upper * stride), tap.t);
      });
#pragma unroll
      for (int j = 0; j < kPart; ++j) phi.v[k + j] = part.v[j];
    }
    return phi;
  }
};

// Channels [first, first + channels) of a box of phi to shared memory, by all threads, V elements at a time;
// in theta's layout, which one voxel or channel lets phi's strides not say.
template <int V, class T>
__device__ void stage_box(const Chain& chain, int64_t n, const Box& box, int first, int channels, int stride,
                          T* to) {
  const Map& map = chain.phi;
  const int voxels = box.voxels();
  if (!chain.theta.channels_last()) {
    const int per = voxels / V;
    for (int e = int(threadIdx.x); e < per * channels; e += kThreads) {
      const int c = e / per, v = (e - c * per) * V;
      store<V>(to + c * stride + v, load<V>(at<const T>(map, n, first + c, box.offset(chain.gating, v))));
    }
  } else {
    const int per = channels / V;
    for (int e = int(threadIdx.x); e < per * voxels; e += kThreads) {
      const int v = e / per, c = (e - v * per) * V;
      store<V>(to + v * stride + c, load<V>(at<const T>(map, n, first + c, box.offset(chain.gating, v))));
    }
  }
}

}  // namespace attn_gate::cuda
