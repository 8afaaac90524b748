// Tiles: a run of voxels of a feature map as rows [channels * taps][ld] of the accumulation type, whatever
// the map's dtype and layout. All algorithms work on tiles; only this file, and for the input to come
// incoming.h and pairs.h, know how maps lie in memory.
#pragma once
#include <memory>

#include "half.h"
#include "problem.h"
#include "simd.h"

namespace attn_gate::cpu {
namespace {

// A thread's scratch memory: 64-byte aligned, not initialised.
template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t n)
      : data_(static_cast<A*>(::operator new(size_t(n > 0 ? n : 1) * sizeof(A), std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator A*() const { return data_; }

 private:
  A* data_;
};

// How the voxels of a coarse grid lie on a map: voxel (d, h, w) covers the patch (d, h, w) * stride + tap.
struct Patches {
  Grid map, coarse, kernel, stride;
};

// Same grid, one tap: the whole grid is a single row, and a run of voxels one piece of memory.
inline Patches same_grid_patches(const Grid& grid) {
  Grid row;
  row.w = grid.voxels();
  return {row, row, Grid(), Grid()};
}
inline Patches patches_of(const Grid& map, const Grid& coarse, const Grid& kernel, const Grid& stride) {
  if (map == coarse && kernel.voxels() == 1) return same_grid_patches(map);
  return {map, coarse, kernel, stride};
}

// A grid cut at the ends of its rows.
inline Patches same_row_patches(const Grid& grid) { return {grid, grid, Grid(), Grid()}; }

// Where on the map tap 0 of voxel v lies.
inline int64_t first_voxel(const Patches& p, int64_t v) {
  const int64_t w = v % p.coarse.w, row = v / p.coarse.w;
  return ((row / p.coarse.h * p.stride.d) * p.map.h + row % p.coarse.h * p.stride.h) * p.map.w +
         w * p.stride.w;
}

// Calls f(first, count, offset) for each piece of a grid row in the voxels [v0, v1): count voxels from v0 +
// first on, whose tap 0 lies at voxel `offset` of the map, the next at offset + stride.w, ...
template <class F>
inline void for_row_pieces(const Patches& p, int64_t v0, int64_t v1, F&& f) {
  int64_t w = v0 % p.coarse.w, row = v0 / p.coarse.w, h = row % p.coarse.h, d = row / p.coarse.h;
  for (int64_t v = v0; v < v1; w = 0) {
    const int64_t count = smaller(p.coarse.w - w, v1 - v);
    f(v - v0, count, ((d * p.stride.d) * p.map.h + h * p.stride.h) * p.map.w + w * p.stride.w);
    v += count;
    if (++h == p.coarse.h) h = 0, ++d;
  }
}
template <class F>
inline void for_taps(const Patches& p, F&& f) {
  int64_t tap = 0;
  for (int64_t d = 0; d < p.kernel.d; ++d)
    for (int64_t h = 0; h < p.kernel.h; ++h)
      for (int64_t w = 0; w < p.kernel.w; ++w) f(tap++, (d * p.map.h + h) * p.map.w + w);
}

template <class T>
inline T* sample_of(const Map& m, int64_t n) {
  return static_cast<T*>(m.data) + n * m.channels * m.grid.voxels();
}

template <class T, class A>
inline void load_strided(const T* src, int64_t stride, A* dst, int64_t n) {
  if (stride == 1) return convert_row(src, dst, n);
  if (stride == 2) {
    for (int64_t i = 0; i < n; ++i) dst[i] = to_acc(src[2 * i]);
    return;
  }
  for (int64_t i = 0; i < n; ++i) dst[i] = to_acc(src[i * stride]);
}

// even[i] = src[2 * i], odd[i] = src[2 * i + 1]
template <class T, class A>
inline void split_pairs(const T* src, A* even, A* odd, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) {
    Vec<A> a = load_as<A>(src + 2 * i), b = load_as<A>(src + 2 * i + kLanes<A>);
    split(a, b);
    store(even + i, a);
    store(odd + i, b);
  }
  for (; i < n; ++i) even[i] = to_acc(src[2 * i]), odd[i] = to_acc(src[2 * i + 1]);
}
// dst[2 * i] += even[i], dst[2 * i + 1] += odd[i]
template <class T, class A, size_t... L>
inline void add_pairs(const A* even, const A* odd, T* dst, int64_t n, std::index_sequence<L...>) {
  constexpr int half = kLanes<A> / 2;
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) {
    const Vec<A> a = load(even + i), b = load(odd + i);
    T* to = dst + 2 * i;
    store_as<A>(to, load_as<A>(to) + __builtin_shufflevector(a, b, int(L / 2 + (L & 1) * kLanes<A>)...));
    to += kLanes<A>;
    store_as<A>(to,
                load_as<A>(to) + __builtin_shufflevector(a, b, int(half + L / 2 + (L & 1) * kLanes<A>)...));
  }
  for (; i < n; ++i) {
    dst[2 * i] = from_acc<T>(to_acc(dst[2 * i]) + even[i]);
    dst[2 * i + 1] = from_acc<T>(to_acc(dst[2 * i + 1]) + odd[i]);
  }
}

// rows[((c - c0) * taps + tap) * ld + i] = map[c, patch of voxel v0 + i, tap] for the channels c0 <= c < c1;
// zeros up to the next whole vector.
template <class T, class A>
void load_tile(const Map& m, const Patches& p, int64_t n, int64_t v0, int64_t v1, int64_t c0, int64_t c1,
               A* rows, int64_t ld) {
  const int64_t taps = p.kernel.voxels(), len = v1 - v0, padded = round_up(len, kLanes<A>),
                voxels = m.grid.voxels(), count = c1 - c0;
  const T* base = sample_of<T>(m, n) + c0 * (m.channels_last ? 1 : voxels);
  if (padded > len)
    for (int64_t r = 0; r < count * taps; ++r)
      for (int64_t i = len; i < padded; ++i) rows[r * ld + i] = A(0);
  if (!m.channels_last && p.kernel.w == 2 && p.stride.w == 2) {
    for (int64_t c = 0; c < count; ++c)
      for_row_pieces(p, v0, v1, [&](int64_t first, int64_t some, int64_t offset) {
        for_taps(p, [&](int64_t tap, int64_t step) {
          if (tap % 2) return;
          A* even = rows + (c * taps + tap) * ld + first;
          split_pairs(base + c * voxels + offset + step, even, even + ld, some);
        });
      });
    return;
  }
  if (!m.channels_last) {
    for (int64_t c = 0; c < count; ++c)
      for_row_pieces(p, v0, v1, [&](int64_t first, int64_t some, int64_t offset) {
        for_taps(p, [&](int64_t tap, int64_t step) {
          load_strided(base + c * voxels + offset + step, p.stride.w, rows + (c * taps + tap) * ld + first,
                       some);
        });
      });
    return;
  }
  const int64_t C = m.channels;
  for_row_pieces(p, v0, v1, [&](int64_t first, int64_t some, int64_t offset) {
    for_taps(p, [&](int64_t tap, int64_t step) {
      transpose<A>(base + (offset + step) * C, p.stride.w * C, some, count, rows + tap * ld + first,
                   taps * ld);
    });
  });
}
template <class T, class A>
void load_tile(const Map& m, const Patches& p, int64_t n, int64_t v0, int64_t v1, A* rows, int64_t ld) {
  load_tile<T>(m, p, n, v0, v1, 0, m.channels, rows, ld);
}

template <bool Add, class T, class A>
inline void store_strided(const A* src, T* dst, int64_t stride, int64_t n) {
  if (!Add && stride == 1) return convert_row_back(src, dst, n);
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (Add) {
      dst[i * stride] = from_acc<T>(to_acc(dst[i * stride]) + src[i]);
    } else {
      dst[i * stride] = from_acc<T>(src[i]);
    }
  }
}

// The reverse of load_tile; Add: map += tile.
template <bool Add, class T, class A>
void store_tile(const Map& m, const Patches& p, int64_t n, int64_t v0, int64_t v1, const A* rows,
                int64_t ld) {
  const int64_t taps = p.kernel.voxels(), voxels = m.grid.voxels();
  T* base = sample_of<T>(m, n);
  if constexpr (Add) {
    if (!m.channels_last && p.kernel.w == 2 && p.stride.w == 2) {
      for (int64_t c = 0; c < m.channels; ++c)
        for_row_pieces(p, v0, v1, [&](int64_t first, int64_t count, int64_t offset) {
          for_taps(p, [&](int64_t tap, int64_t step) {
            if (tap % 2) return;
            const A* even = rows + (c * taps + tap) * ld + first;
            add_pairs(even, even + ld, base + c * voxels + offset + step, count,
                      std::make_index_sequence<kLanes<A>>{});
          });
        });
      return;
    }
  }
  if (!m.channels_last) {
    for (int64_t c = 0; c < m.channels; ++c)
      for_row_pieces(p, v0, v1, [&](int64_t first, int64_t count, int64_t offset) {
        for_taps(p, [&](int64_t tap, int64_t step) {
          store_strided<Add>(rows + (c * taps + tap) * ld + first, base + c * voxels + offset + step,
                             p.stride.w, count);
        });
      });
    return;
  }
  const int64_t C = m.channels;
  for_row_pieces(p, v0, v1, [&](int64_t first, int64_t count, int64_t offset) {
    for_taps(p, [&](int64_t tap, int64_t step) {
      for (int64_t i = 0; i < count; i += kLanes<A>)  // whole voxels, one after the other
        transpose<A, Add>(rows + tap * ld + first + i, taps * ld, C, smaller(kLanes<A>, count - i),
                          base + (offset + step + i * p.stride.w) * C, p.stride.w * C);
    });
  });
}

// The next tile's cache lines, and those that this one will be written to, fetched a few at a time while it
// is computed: the memory then works while the arithmetic does, where hardware prefetchers see only short
// runs, each on another page.
class Ahead {
 public:
  // Adds the voxels [v0, v1) of the channels [c0, c1), of all of them by default.
  template <class T>
  void add(const Map& m, const Patches& p, int64_t n, int64_t v0, int64_t v1) {
    add<T>(m, p, n, v0, v1, 0, m.channels);
  }
  // Adds lines that will be written.
  template <class T>
  void add_output(const Map& m, const Patches& p, int64_t n, int64_t v0, int64_t v1) {
    const int first = runs_;
    add<T>(m, p, n, v0, v1);
    for (int r = first; r < runs_; ++r) run_[r].written = true;
  }
  template <class T>
  void add(const Map& m, const Patches& p, int64_t n, int64_t v0, int64_t v1, int64_t c0, int64_t c1) {
    if (v0 >= v1 || runs_ == kMost) return;
    const int64_t first = first_voxel(p, v0),
                  last = first_voxel(p, v1 - 1) + p.map.w * (p.kernel.h - 1) + p.kernel.w;
    const int64_t voxels = m.grid.voxels(), end = last < voxels ? last : voxels;
    const bool whole = m.channels_last && c1 - c0 == m.channels;  // one piece of memory
    const T* base = sample_of<T>(m, n) + (m.channels_last ? first * m.channels + c0 : c0 * voxels + first);
    Run& r = run_[runs_++];
    r.at = reinterpret_cast<const char*>(base);
    r.stride = (m.channels_last ? m.channels : voxels) * int64_t(sizeof(T));
    r.rows = whole ? 1 : m.channels_last ? end - first : c1 - c0;
    const int64_t run = whole ? (end - first) * m.channels : m.channels_last ? c1 - c0 : end - first;
    r.lines = (run * int64_t(sizeof(T)) + 63) / 64;
    r.written = false;
    total_ += r.rows * r.lines;
  }
  // Divides the work by the number of times that step() will be called.
  void over(int64_t calls) { some_ = calls > 0 ? (total_ + calls - 1) / calls : 0; }
  inline __attribute__((always_inline)) void step() {
    for (int64_t left = some_; left > 0 && now_ < runs_;) {
      Run& r = run_[now_];
      const int64_t count = smaller(left, r.lines - line_);
      const char* at = r.at + line_ * 64;
      if (r.written) {
        for (int64_t i = 0; i < count; ++i) __builtin_prefetch(at + i * 64, 1, 3);
      } else {
        for (int64_t i = 0; i < count; ++i) __builtin_prefetch(at + i * 64, 0, 2);
      }
      left -= count;
      line_ += count;
      if (line_ < r.lines) continue;
      line_ = 0;
      r.at += r.stride;
      if (--r.rows == 0) ++now_;
    }
  }

 private:
  struct Run {
    const char* at;
    int64_t stride, rows, lines;
    bool written;
  };
  static constexpr int kMost = 5;  // x, g and dy; dx and dg
  Run run_[kMost];
  int runs_ = 0, now_ = 0;
  int64_t line_ = 0, total_ = 0, some_ = 0;
};

}  // namespace
}  // namespace attn_gate::cpu
