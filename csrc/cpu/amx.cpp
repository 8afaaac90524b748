// Matrix units: Intel's AMX, eight registers of 16 rows of 64 bytes.
#if defined(__AMX_BF16__)
#include <immintrin.h>

#include "matrix_units.h"
#include "simd.h"

namespace attn_gate::cpu {
namespace {

constexpr int64_t kTileRows = MatrixUnits::kRows, kDepth = MatrixUnits::kDepth,
                  kVoxels = MatrixUnits::kVoxels;
constexpr int64_t kTile = kTileRows * kDepth;  // elements of a tile of W

// One for each step of each block of registers.
int64_t asides_of(int64_t inter, int64_t depth, int64_t len) {
  const int64_t blocks =
      (inter + 2 * kTileRows - 1) / (2 * kTileRows) * ((len + 2 * kVoxels - 1) / (2 * kVoxels));
  return blocks * ((depth + kDepth - 1) / kDepth);
}

struct Config {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
// In static memory: GCC tells its optimiser that the instruction reads only the first 8 bytes.
const Config config = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
void acquire() { _tile_loadconfig(&config); }
void release() { _tile_release(); }

// Takes off x its leading 16 bits. Cut, not rounded: what is left keeps NaN a NaN, and makes infinity one.
inline void take_off(Vec<float>& x) { x -= (Vec<float>)((Words)x & 0xffff0000u); }

// The leading 16 bits of each element of a and of b, in turn.
template <size_t... L>
inline AllHalves leading_bits(Vec<float> a, Vec<float> b, std::index_sequence<L...>) {
  return __builtin_shufflevector((AllHalves)a, (AllHalves)b, int(L / 2 * 2 + 1 + L % 2 * sizeof...(L))...);
}
inline AllHalves leading_bits(Vec<float> a, Vec<float> b) {
  return leading_bits(a, b, std::make_index_sequence<2 * kLanes<float>>{});
}
inline Halves leading_bits(Vec<float> a) { return __builtin_convertvector((Words)a >> 16, Halves); }

bool pack(const float* row, int64_t r, int64_t depth, int parts, uint16_t* to) {
  Words rest = {};
  for (int64_t k = 0; k < depth; k += kDepth, to += 3 * kTile) {
    Vec<float> low = load(row + k), high = load(row + k + kLanes<float>);
    for (int part = 0; part < parts; ++part) {
      uint16_t* dst = to + part * kTile + r * kDepth;
      const Halves a = leading_bits(low), b = leading_bits(high);
      std::memcpy(dst, &a, sizeof a);
      std::memcpy(dst + kDepth / 2, &b, sizeof b);
      take_off(low);
      take_off(high);
      rest |= (Words)low | (Words)high;
    }
  }
  uint32_t any = 0;
  for (int l = 0; l < kLanes<float>; ++l) any |= rest[l];
  return any == 0;
}

constexpr int64_t kSteps = 4;  // of the depth at a time, whose input stays in the first-level cache
constexpr int64_t kPairs = kSteps * kDepth / 2, kColumns = 2 * kVoxels;

// The input of one block of registers over kSteps: the parts of each value, two rows side by side.
template <int PartsX>
struct Input {
  static constexpr int kParts = PartsX;
  alignas(64) uint32_t planes[PartsX][kPairs][kColumns];
  const void* at(int part, int64_t step) const { return planes[part][step * (kDepth / 2)]; }
  static constexpr int64_t pitch() { return kColumns * int64_t(sizeof(uint32_t)); }
};
// The same of an input that is pairs already.
struct Pairs {
  static constexpr int kParts = 1;
  const float* first;
  int64_t ld;
  const void* at(int, int64_t step) const { return first + step * (kDepth / 2) * ld; }
  int64_t pitch() const { return ld * int64_t(sizeof(float)); }
};

// Splits rows [k0, k0 + 2 * kPairs) of the input's rows [depth][ld], some pairs of them at a time; zeros
// where there are none.
template <int PartsX>
class Splitter {
 public:
  void begin(const float* rows, int64_t depth, int64_t ld, int64_t k0, int64_t v, bool both,
             Input<PartsX>& to, int64_t calls) {
    row_ = rows + k0 * ld + v, left_ = depth - k0, ld_ = ld, both_ = both, to_ = &to, pair_ = 0;
    const int64_t pairs = (left_ + kDepth - 1) / kDepth * kDepth / 2;
    end_ = smaller(pairs, kPairs);
    some_ = (end_ + calls - 1) / calls;
  }
  inline __attribute__((always_inline)) void step() {
    for (int64_t n = smaller(some_, end_ - pair_); n > 0; --n) split_pair();
  }
  void finish() {
    while (pair_ < end_) split_pair();
    asm volatile("" : : : "memory");  // GCC doesn't tell its optimiser that registers are loaded from memory
  }

 private:
  inline __attribute__((always_inline)) void split_pair() {
    split_vectors(0);
    if (both_) split_vectors(kVoxels);
    row_ += 2 * ld_, left_ -= 2, ++pair_;
  }
  inline __attribute__((always_inline)) void split_vectors(int64_t v) {
    Vec<float> a = left_ > 0 ? load(row_ + v) : Vec<float>{},
               b = left_ > 1 ? load(row_ + ld_ + v) : Vec<float>{};
#pragma GCC unroll 3
    for (int part = 0; part < PartsX; ++part) {
      const AllHalves pair = leading_bits(a, b);
      std::memcpy(&to_->planes[part][pair_][v], &pair, sizeof pair);
      take_off(a);
      take_off(b);
    }
  }
  const float* row_;
  Input<PartsX>* to_;
  int64_t left_, ld_, pair_ = 0, end_ = 0, some_;
  bool both_;
};

// There is nothing to split beside products of pairs.
struct NothingNext {
  void step() {}
};

struct Operands {
  const uint16_t* w;
  int64_t w_pitch;  // from one tile of rows to the next
  float* sums;
  int64_t ld, steps;
  bool add;
  void (*aside)(void*);
  void* context;
};

// Registers 0 to 3 hold the sums of two tiles of W's rows times two of voxels; 4 and 5 are of W, 6 and 7 of
// the input. Each instruction names its registers, so these are numbers and no arrays.
template <int Tiles>
inline __attribute__((always_inline)) void load_w(const uint16_t* at, int64_t pitch) {
  _tile_loadd(4, at, 64);
  if constexpr (Tiles == 2) _tile_loadd(5, at + pitch, 64);
}
template <int Columns>
inline __attribute__((always_inline)) void load_x(const void* at, int64_t pitch) {
  _tile_loadd(6, at, pitch);
  if constexpr (Columns == 2)
    _tile_loadd(7, static_cast<const char*>(at) + kVoxels * sizeof(uint32_t), pitch);
}
template <int Tiles, int Columns>
inline __attribute__((always_inline)) void multiply_add() {
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (Tiles == 2) _tile_dpbf16ps(1, 5, 6);
  if constexpr (Columns == 2) _tile_dpbf16ps(2, 4, 7);
  if constexpr (Tiles == 2 && Columns == 2) _tile_dpbf16ps(3, 5, 7);
}

// sums = (add: +=) the product of one block of registers, over some steps.
template <int PartsW, int Tiles, int Columns, class X, class Next>
void multiply_block(const Operands& o, const uint16_t* w, const X& x, int64_t steps, bool add, float* sums,
                    Next& next) {
  constexpr int PartsX = X::kParts;
  float* below = sums + kTileRows * o.ld;
  const int64_t pitch = o.ld * int64_t(sizeof(float));
  if (add) {
    _tile_loadd(0, sums, pitch);
    if constexpr (Tiles == 2) _tile_loadd(1, below, pitch);
    if constexpr (Columns == 2) _tile_loadd(2, sums + kVoxels, pitch);
    if constexpr (Tiles == 2 && Columns == 2) _tile_loadd(3, below + kVoxels, pitch);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step, w += 3 * kTile) {
    const auto input = [&](int part) { load_x<Columns>(x.at(part, step), x.pitch()); };
    const auto weights = [&](int part) { load_w<Tiles>(w + part * kTile, o.w_pitch); };
    // From one product to the next one operand changes.
    input(0);
    if constexpr (PartsW == 3) {
      weights(2);
      multiply_add<Tiles, Columns>();
      weights(1);
      multiply_add<Tiles, Columns>();
      if constexpr (PartsX > 1) {
        input(1);
        multiply_add<Tiles, Columns>();
        weights(0);
        multiply_add<Tiles, Columns>();
        input(0);
        multiply_add<Tiles, Columns>();
      } else {
        weights(0);
        multiply_add<Tiles, Columns>();
      }
    } else {
      weights(0);
      multiply_add<Tiles, Columns>();
      if constexpr (PartsX > 1) {
        input(1);
        multiply_add<Tiles, Columns>();
      }
    }
    if constexpr (PartsX > 2) {
      input(2);
      multiply_add<Tiles, Columns>();
    }
    next.step();
    o.aside(o.context);
  }
  _tile_stored(0, sums, pitch);
  if constexpr (Tiles == 2) _tile_stored(1, below, pitch);
  if constexpr (Columns == 2) _tile_stored(2, sums + kVoxels, pitch);
  if constexpr (Tiles == 2 && Columns == 2) _tile_stored(3, below + kVoxels, pitch);
}

// Of as many tiles of rows and of voxels as there are.
template <int PartsW, class X, class Next>
inline __attribute__((always_inline)) void multiply_block(const Operands& o, const uint16_t* w, const X& x,
                                                          int64_t steps, bool add, float* sums, Next& next,
                                                          bool two, bool both) {
  if (two && both) {
    multiply_block<PartsW, 2, 2>(o, w, x, steps, add, sums, next);
  } else if (two) {
    multiply_block<PartsW, 2, 1>(o, w, x, steps, add, sums, next);
  } else if (both) {
    multiply_block<PartsW, 1, 2>(o, w, x, steps, add, sums, next);
  } else {
    multiply_block<PartsW, 1, 1>(o, w, x, steps, add, sums, next);
  }
}

template <int PartsW, int PartsX>
void multiply_parts(const Operands& o, const float* rows, int64_t depth, int64_t inter, int64_t len) {
  Input<PartsX> inputs[2];
  Splitter<PartsX> next;
  const int64_t panels = (inter + 2 * kTileRows - 1) / (2 * kTileRows);
  const auto split = [&](int64_t step, int64_t v, int which) {
    const int64_t steps = smaller(kSteps, o.steps - step);
    next.begin(rows, depth, o.ld, step * kDepth, v, v + kVoxels < len, inputs[which], panels * steps);
  };
  split(0, 0, 0);
  int which = 0;
  for (int64_t step = 0; step < o.steps; step += kSteps) {
    const int64_t steps = smaller(kSteps, o.steps - step);
    for (int64_t v = 0; v < len; v += kColumns, which ^= 1) {
      next.finish();
      if (v + kColumns < len) {
        split(step, v + kColumns, which ^ 1);
      } else if (step + kSteps < o.steps) {
        split(step + kSteps, 0, which ^ 1);
      }
      const Input<PartsX>& x = inputs[which];
      for (int64_t i = 0; i < inter; i += 2 * kTileRows) {
        const uint16_t* w = o.w + i / kTileRows * o.w_pitch + step * 3 * kTile;
        const bool two = i + kTileRows < inter, both = v + kVoxels < len, add = o.add || step > 0;
        multiply_block<PartsW>(o, w, x, steps, add, o.sums + i * o.ld + v, next, two, both);
      }
    }
  }
}

template <int PartsW>
void multiply_by(const Operands& o, const float* rows, int parts_x, int64_t depth, int64_t inter,
                 int64_t len) {
  if (parts_x == 1) return multiply_parts<PartsW, 1>(o, rows, depth, inter, len);
  if (parts_x == 2) return multiply_parts<PartsW, 2>(o, rows, depth, inter, len);
  multiply_parts<PartsW, 3>(o, rows, depth, inter, len);
}
void multiply(const uint16_t* w, int parts_w, int64_t inter, const float* rows, int parts_x, int64_t depth,
              int64_t len, int64_t ld, bool add, float* sums, void (*aside)(void*), void* context) {
  if (inter == 0) return;
  const int64_t steps = (depth + kDepth - 1) / kDepth;
  const Operands o = {w, 3 * steps * kTile, sums, ld, steps, add, aside, context};
  if (parts_w == 1) return multiply_by<1>(o, rows, parts_x, depth, inter, len);
  multiply_by<3>(o, rows, parts_x, depth, inter, len);
}

template <int PartsW>
void multiply_all_pairs(const Operands& o, const float* pairs, int64_t inter, int64_t len) {
  asm volatile("" : : : "memory");  // as Splitter::finish()
  NothingNext next;
  for (int64_t v = 0; v < len; v += kColumns)
    for (int64_t i = 0; i < inter; i += 2 * kTileRows)
      multiply_block<PartsW>(o, o.w + i / kTileRows * o.w_pitch, Pairs{pairs + v, o.ld}, o.steps, o.add,
                             o.sums + i * o.ld + v, next, i + kTileRows < inter, v + kVoxels < len);
}
void multiply_pairs(const uint16_t* w, int parts_w, int64_t inter, const float* pairs, int64_t depth,
                    int64_t len, int64_t ld, bool add, float* sums, void (*aside)(void*), void* context) {
  const int64_t steps = (depth + kDepth - 1) / kDepth;
  const Operands o = {w, 3 * steps * kTile, sums, ld, steps, add, aside, context};
  parts_w == 1 ? multiply_all_pairs<1>(o, pairs, inter, len) : multiply_all_pairs<3>(o, pairs, inter, len);
}

}  // namespace

const MatrixUnits amx = {3, acquire, release, asides_of, pack, multiply, multiply_pairs};

}  // namespace attn_gate::cpu
#endif
