// The input to come, of the next tile or block, copied a few rows at a time during the products before it.
#pragma once
#include "pairs.h"

namespace attn_gate::cpu {
namespace {

// Channels [c0, c1) of one factor of the input, x's patches or g: rows of the product's depth from k0 on.
struct Part {
  const Map& map;
  Patches patches;
  bool of_x, centred;
  int64_t k0, c0, c1;

  int64_t rows() const { return (c1 - c0) * patches.kernel.voxels(); }
  // The channels [from, to) alone.
  Part some(int64_t from, int64_t to) const {
    return {map, patches, of_x, centred, k0 + (from - c0) * patches.kernel.voxels(), from, to};
  }

  // What Incoming can copy: voxels of a map that lie side by side as in a tile, or pairs of them (patches two
  // voxels wide) in rows of whole vectors.
  bool in_rows() const {
    return !map.channels_last && !centred && patches.coarse == patches.map &&
           patches.map.voxels() == patches.map.w;
  }
  template <class A>
  bool in_patches() const {
    return !map.channels_last && !centred && patches.kernel.w == 2 && patches.stride.w == 2 &&
           patches.coarse.w % kLanes<A> == 0;
  }
  // Whether load_pairs() takes it, of bfloat16.
  bool pairs() const {
    if (centred) return false;
    if (map.channels_last)
      return patches.kernel.voxels() == 1 && map.channels % 2 == 0 && c0 % 2 == 0 && c1 % 2 == 0 &&
             reinterpret_cast<uintptr_t>(map.data) % 4 == 0;
    return in_rows() || (patches.kernel.w == 2 && patches.stride.w == 2);
  }
};

// The memory works while the arithmetic does. A prefetch of the whole tile would not do: a map's channels
// mostly lie a power of two apart, and lines that lie so displace one another in every cache. So a row is
// fetched kLead rows before it is copied, into the first-level cache, or kFarLead rows before, into the
// second.
template <class T>
class Incoming {
  using A = Acc<T>;

 public:
  // Forgets what there was; the tile's rows will be `ld` apart, or pairs of them as load_pairs() makes them.
  void begin(int64_t ld, bool in_pairs, bool far) {
    parts_ = 0, rows_ = 0, ld_ = ld, in_pairs_ = in_pairs, far_ = far;
    copied_ = fetched_ = Cursor();
  }
  // Adds the voxels [v0, v1) of sample n, at most kVoxels, of a part that is in rows or in patches.
  void add(const Part& part, int64_t n, int64_t v0, int64_t v1, A* to) {
    if (v0 >= v1 || part.rows() == 0) return;
    Source& source = sources_[parts_];
    source.from = sample_of<T>(part.map, n) + part.c0 * part.map.grid.voxels();
    source.to = to;
    source.channels = part.c1 - part.c0;
    source.pitch = part.map.grid.voxels();
    source.map = part.patches.map;
    source.kernel = part.patches.kernel;
    source.patches = !part.in_rows();
    source.len = v1 - v0;
    source.plain = !source.patches && !in_pairs_ && source.len % kLanes<A> == 0;
    source.second = 0, source.odd = false;
    if (in_pairs_ && part.in_rows()) {
      source.second = source.pitch;
      source.odd = source.channels % 2 != 0;
      source.channels = (source.channels + 1) / 2;
      source.pitch *= 2;
    }
    for (int64_t j = 0; j * kLanes<A> < source.len; ++j)
      at_[parts_][j] = first_voxel(part.patches, v0 + j * kLanes<A>);
    ++parts_;
    rows_ += source.channels * source.kernel.d * source.kernel.h;
  }
  // Divides the work by the number of times that step() will be called.
  void over(int64_t calls) {
    some_ = calls > 0 ? (rows_ + calls - 1) / calls : rows_;
    for (int64_t i = smaller(far_ ? kFarLead : kLead, rows_); i > 0; --i) fetch();
  }
  inline __attribute__((always_inline)) void step() {
    for (int64_t left = some_; left > 0 && copied_.part < parts_; --left) row();
  }
  void finish() {
    while (copied_.part < parts_) row();
  }

  static constexpr int64_t kVoxels = 384;

 private:
  static constexpr int64_t kLead = 16, kFarLead = 64;
  struct Source {
    const T* from;
    A* to;
    int64_t channels, pitch, len;
    int64_t second;  // how far away the row is that is paired with one, or 0
    Grid map, kernel;
    bool plain;    // rows of whole vectors
    bool patches;  // two voxels wide
    bool odd;      // the last channel is alone
  };
  struct Cursor {
    int part = 0;
    int64_t c = 0, d = 0, h = 0;
  };
  // Where the row (or pair of rows) at a cursor lies, from `at` on; and on to the next one.
  inline __attribute__((always_inline)) const T* take(Cursor& cursor) const {
    const Source& source = sources_[cursor.part];
    const T* from =
        source.from + cursor.c * source.pitch + (cursor.d * source.map.h + cursor.h) * source.map.w;
    if (++cursor.h < source.kernel.h) return from;
    cursor.h = 0;
    if (++cursor.d < source.kernel.d) return from;
    cursor.d = 0;
    if (++cursor.c < source.channels) return from;
    cursor.c = 0;
    ++cursor.part;
    return from;
  }
  inline __attribute__((always_inline)) void row() {
    if (fetched_.part < parts_) fetch();
    copy();
  }
  inline __attribute__((always_inline)) void fetch_line(const T* at) const {
    if (std::is_same_v<T, bf16> && far_) {
      __builtin_prefetch(at, 0, 2);
    } else {
      __builtin_prefetch(at, 0, 3);
    }
  }
  inline __attribute__((always_inline)) void fetch() {
    const Source& source = sources_[fetched_.part];
    const int64_t* at = at_[fetched_.part];
    const T* from = take(fetched_);
    constexpr int64_t line = 64 / sizeof(T);
    if (!source.patches) {
      from += at[0];
      for (const T* row : {from, from + source.second}) {
        for (int64_t i = 0; i < source.len; i += line) fetch_line(row + i);
        fetch_line(row + source.len - 1);  // where it doesn't begin with a line
        if (!source.second) break;
      }
      return;
    }
    for (int64_t j = 0; j * kLanes<A> < source.len; ++j)
      for (int64_t i = 0; i < 2 * kLanes<A>; i += line) fetch_line(from + at[j] + i);
  }
  inline __attribute__((always_inline)) void copy() {
    Source& source = sources_[copied_.part];
    if (__builtin_expect(!source.plain, 0)) return copy_other();
    const int64_t first = at_[copied_.part][0];
    const T* from = take(copied_) + first;
    for (int64_t i = 0; i < source.len; i += kLanes<A>) store(source.to + i, load_as<A>(from + i));
    source.to += ld_;
  }
  // Out of line: the constants and tails of this, inlined, take so many registers that the products' sums are
  // kept in memory at each step. Measured: 0.91 to 0.98 of the time where rows are plain, 1.0 in pairs and
  // patches, which always come this way (`cold`, for which they are no faster or slower, keeps them apart).
  __attribute__((noinline, cold)) void copy_other() {
    Source& source = sources_[copied_.part];
    const int64_t* at = at_[copied_.part];
    if constexpr (std::is_same_v<T, bf16>)
      if (in_pairs_) return copy_pairs(source, at);
    const T* from = take(copied_);
    A* to = source.to;
    if (source.patches) {
      for (int64_t j = 0; j * kLanes<A> < source.len; ++j, to += kLanes<A>) {
        Vec<A> even = load_as<A>(from + at[j]), odd = load_as<A>(from + at[j] + kLanes<A>);
        split(even, odd);
        store(to, even);
        store(to + ld_, odd);
      }
      source.to += 2 * ld_;
      return;
    }
    from += at[0];
    int64_t i = 0;
    for (; i + kLanes<A> <= source.len; i += kLanes<A>) store(to + i, load_as<A>(from + i));
    if (i < source.len) {
      for (int64_t l = 0; l < kLanes<A>; ++l) to[i + l] = i + l < source.len ? to_acc(from[i + l]) : A(0);
    }
    source.to += ld_;
  }
  void copy_pairs(Source& source, const int64_t* at) {
    const bool alone = source.odd && copied_.c + 1 == source.channels;
    const T* from = take(copied_);
    if (source.second) {
      pair_rows(from + at[0], alone ? nullptr : from + at[0] + source.second, source.to, source.len);
    } else {
      for (int64_t j = 0; j * kLanes<A> < source.len; ++j)
        std::memcpy(source.to + j * kLanes<A>, from + at[j], kLanes<A> * sizeof(A));
    }
    source.to += ld_;
  }

  Source sources_[2];
  int parts_ = 0;
  bool in_pairs_ = false, far_ = false;
  Cursor copied_, fetched_;
  int64_t ld_ = 0, rows_ = 0, some_ = 0;
  int64_t at_[2][kVoxels / kLanes<A>];  // where each vector's first voxel lies
};

}  // namespace
}  // namespace attn_gate::cpu
