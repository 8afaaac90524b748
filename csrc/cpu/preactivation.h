// The pre-activation s = bias + W [patches(x); g] + theta + resize(phi) of one tile, a block of registers at
// a time.
#pragma once
#include <optional>
#include <vector>

#include "incoming.h"
#include "resize.h"

namespace attn_gate::cpu {
namespace {

// A block of the product's depth: the parts that make its rows [k0, k0 + rows).
struct Block {
  int64_t k0, rows;
  int64_t at;  // padded() of the blocks before
  std::vector<Part> parts;

  int64_t padded() const { return round_up(rows, MatrixUnits::kDepth); }  // whole steps of matrix units
};
// All rows at once, or about `most` at a time, whole channels of one part.
inline std::vector<Block> blocks_of(const Problem& p, int64_t most) {
  Block all{0, p.depth(), 0, {}};
  if (p.rows_x()) {
    const Patches patches = patches_of(p.fine, p.coarse, p.kernel, p.stride);
    all.parts.push_back({p.x, patches, true, p.centre_x != nullptr, 0, 0, p.x.channels});
  }
  if (p.rows_g()) {
    const Patches flat = same_grid_patches(p.coarse);
    all.parts.push_back({p.g, flat, false, p.centre_g != nullptr, p.rows_x(), 0, p.g.channels});
  }
  if (all.rows <= most) return {all};
  std::vector<Block> blocks;
  int64_t at = 0;
  for (const Part& part : all.parts) {
    const int64_t channels = part.c1, count = smaller(channels, (part.rows() + most - 1) / most);
    for (int64_t b = 0; b < count; ++b) {
      const Part some = part.some(channels * b / count, channels * (b + 1) / count);
      blocks.push_back({some.k0, some.rows(), at, {some}});
      at += blocks.back().padded();
    }
  }
  return blocks;
}

// Whether the input of bfloat16 can be made of pairs.
inline bool come_in_pairs(const std::vector<Block>& blocks) {
  for (const Block& block : blocks)
    for (const Part& part : block.parts)
      if (!part.pairs() || (part.rows() % 2 && &part != &block.parts.back())) return false;
  return true;
}

// Where the packed pieces of the workspace lie.
template <class A>
struct Packed {
  // W in [I / kRows][K][kRows], W^T in [K / kRows][I][kRows], or both as matrix units take them; [I]; [I]
  A *forward, *backward, *bias, *psi;
  A* wide;  // [I / MatrixUnits::kRows]: whether the rows of W have more bits than bfloat16
  int64_t inter, rows_x, rows_g;  // as packed: whole blocks
  Packed(const Problem& p, const Layout& layout, bool with_backward)
      : inter(round_up(p.inter, kBlock<A>)), rows_x(round_up(p.rows_x(), kBlock<A>)),
        rows_g(round_up(p.rows_g(), kBlock<A>)) {
    forward = static_cast<A*>(p.packed);
    backward = forward + layout.forward_elements;
    bias = backward + (with_backward ? (rows_x + rows_g) * layout.backward_columns : 0);
    psi = bias + inter;
    wide = psi + inter;
  }
  int64_t elements() const { return wide + inter / MatrixUnits::kRows - forward; }
};

// to[r / kRows * pitch + k * kRows + r % kRows] = rows[r * depth + k] for the rows r < count <= kBlock: a
// micro-kernel's rows side by side, so that a pass over them reads whole cache lines.
template <class A>
void pack_rows(const A* rows, int64_t depth, int64_t count, A* to, int64_t pitch) {
  constexpr int B = kBlock<A>;
  if constexpr (B == kRows) return transpose<A>(rows, depth, count, depth, to, B);
  constexpr int64_t step = 4 * B;
  A columns[step * B];
  for (int64_t k = 0; k < depth; k += step) {
    const int64_t some = smaller(step, depth - k);
    transpose<A>(rows + k, depth, count, some, columns, B);
    for (int64_t r = 0; r < count; r += kRows)
      for (int64_t c = 0; c < some; ++c)
        for (int64_t q = 0; q < kRows && r + q < count; ++q)
          to[r / kRows * pitch + (k + c) * kRows + q] = columns[c * B + r + q];
  }
}

// Where matrix units find rows [i, i + kRows) of W's columns of a block.
inline uint16_t* packed_for_units(void* packed, int64_t inter, const Block& block, int64_t i) {
  return static_cast<uint16_t*>(packed) + 3 * (block.at * inter + i * block.padded());
}
// The blocks that they multiply with: those of the input, or where batch norms come between, theta's and
// phi's.
inline std::vector<Block> blocks_for_units(const Problem& p, int64_t most) {
  return blocks_of(p, p.norms ? larger(p.rows_x(), p.rows_g()) : most);
}
// What all of W takes so, in elements of float32, of which each holds two bfloat16.
inline int64_t elements_for_units(const Problem& p, int64_t inter, int64_t most) {
  const Block last = blocks_for_units(p, most).back();
  return 3 * (last.at + last.padded()) * inter / 2;
}
// Packs rows [i0, i0 + kRows) of W for matrix units.
inline void pack_for_units(const Problem& p, const Layout& layout, const Packed<float>& to, int64_t i0) {
  bool narrow = true;
  for (const Block& block : blocks_for_units(p, layout.depth)) {
    const int64_t depth = block.padded();
    Buffer<float> row(depth);
    std::memset(row, 0, size_t(depth) * sizeof(float));
    for (int64_t r = 0; r < MatrixUnits::kRows; ++r) {
      for (const Part& part : block.parts) {
        const int64_t width = part.of_x ? p.rows_x() : p.rows_g(),
                      from = part.k0 - (part.of_x ? 0 : p.rows_x());
        const float* weight = static_cast<const float*>(part.of_x ? p.theta_weight : p.phi_weight);
        float* to = row + (part.k0 - block.k0);
        const size_t bytes = size_t(part.rows()) * sizeof(float);
        i0 + r < p.inter ? std::memcpy(to, weight + (i0 + r) * width + from, bytes)
                         : std::memset(to, 0, bytes);
      }
      narrow &= layout.units->pack(row, r, depth, 3, packed_for_units(p.packed, to.inter, block, i0));
    }
  }
  to.wide[i0 / MatrixUnits::kRows] = !narrow;
}
// Where they find W^T's rows from k on, of theta's and then of phi's, each filled up to whole tiles; and what
// a row takes, in elements of float32.
inline uint16_t* packed_back_for_units(const Packed<float>& packed, int64_t inter, int64_t k) {
  return reinterpret_cast<uint16_t*>(packed.backward) + 3 * k * round_up(inter, MatrixUnits::kDepth);
}
inline int64_t columns_back_for_units(int64_t inter) { return 3 * round_up(inter, MatrixUnits::kDepth) / 2; }
// Packs rows [k0, k0 + kRows) of W^T, W being `weight` [I, width].
inline void pack_back_for_units(const Problem& p, const Layout& layout, const float* weight, int64_t width,
                                int64_t k0, uint16_t* to) {
  const int64_t depth = round_up(p.inter, MatrixUnits::kDepth);
  Buffer<float> row(depth);
  for (int64_t r = 0; r < MatrixUnits::kRows; ++r) {
    for (int64_t i = 0; i < depth; ++i)
      row[i] = k0 + r < width && i < p.inter ? weight[i * width + k0 + r] : 0.f;
    layout.units->pack(row, r, depth, 3, to);
  }
}

// Unit u packs one block of rows: first those of W (for s), then those of W^T (for dx, dg), then bias and
// psi.
template <class A>
void pack_unit(const Problem& p, const Layout& layout, bool backward, int64_t u) {
  Packed<A> to(p, layout, backward);
  constexpr int B = kBlock<A>;
  const int64_t K = p.depth(), I = p.inter, rows_x = p.rows_x();
  const A *theta = static_cast<const A*>(p.theta_weight), *phi = static_cast<const A*>(p.phi_weight);
  if (u < to.inter / B) {
    const int64_t i0 = u * B, rows = smaller(B, I - i0);
    if constexpr (B == MatrixUnits::kRows)
      if (layout.units) return pack_for_units(p, layout, to, i0);
    A* dst = to.forward + i0 * K;
    for (int64_t r = rows; r < B; ++r)
      for (int64_t k = 0; k < K; ++k) dst[(r / kRows * K + k) * kRows + r % kRows] = A(0);
    if (rows_x) pack_rows(theta + i0 * rows_x, rows_x, rows, dst, K * kRows);
    if (K > rows_x) pack_rows(phi + i0 * (K - rows_x), K - rows_x, rows, dst + rows_x * kRows, K * kRows);
    return;
  }
  const int64_t k0 = u * B - to.inter;
  if (backward && k0 < to.rows_x + to.rows_g) {
    const bool of_x = k0 < to.rows_x;
    const A* weight = of_x ? theta : phi;
    const int64_t width = of_x ? rows_x : K - rows_x, first = of_x ? k0 : k0 - to.rows_x;
    if constexpr (B == MatrixUnits::kRows)
      if (layout.units)
        return pack_back_for_units(p, layout, weight, width, first, packed_back_for_units(to, I, k0));
    for (int64_t b = 0; b < B; b += kRows) {
      const int64_t from = first + b, some = smaller(kRows, width - from);
      A* dst = to.backward + (k0 + b) * I;
      for (int64_t i = 0; i < I; ++i)
        for (int64_t r = 0; r < kRows; ++r)
          dst[i * kRows + r] = r < some ? weight[i * width + from + r] : A(0);
    }
    return;
  }
  for (int64_t i = 0; i < to.inter; ++i) {
    to.bias[i] = i < I && p.bias ? static_cast<const A*>(p.bias)[i] : A(0);
    to.psi[i] = i < I ? static_cast<const A*>(p.psi)[i] : A(0);
  }
}

// Depth of the product between two looks aside: a few lines of memory at a time stall nothing.
constexpr int64_t kStep = 16;  // as often as `product` is unrolled

// Takes the centres off rows [k0, k1) of the input, which lie in `rows`.
template <class A>
void centre_rows(const Problem& p, int64_t k0, int64_t k1, int64_t len, int64_t ld, A* rows) {
  for (int64_t k = k0; k < k1; ++k, rows += ld) {
    const bool of_x = k < p.rows_x();
    const A* centres = static_cast<const A*>(of_x ? p.centre_x : p.centre_g);
    if (!centres) continue;
    const A centre = centres[of_x ? k : k - p.rows_x()];
    for (int64_t i = 0; i < len; i += kLanes<A>) store(rows + i, load(rows + i) - centre);
  }
}

// What products do aside for the next tile, or the next block of this one: they copy what can be copied, and
// fetch the rest.
template <class T>
struct NextTile {
  Incoming<T> incoming;
  Ahead ahead;
  inline __attribute__((always_inline)) void step() {
    incoming.step();
    ahead.step();
  }
};

// A look aside, as matrix units take it.
template <class Aside>
void look(void* aside) {
  static_cast<Aside*>(aside)->step();
}

// What a thread holds while it goes through its tiles, and through each in blocks of the product's depth.
template <class T>
struct Worker {
  using A = Acc<T>;
  const Problem& p;
  const MatrixUnits* const units;
  const int64_t ld;  // voxels a tile, the rows' length
  const Packed<A> packed;
  const Patches patches;                 // of x on the coarse grid
  const Patches flat;                    // the coarse grid on itself
  const bool has_given;                  // theta, phi or a stored s
  const bool sums_weights;               // of their gradients, tile by tile
  const std::vector<Block> blocks;       // at least one
  const std::vector<Block> norm_blocks;  // those of matrix units, where batch norms come between
  const int64_t depth;                   // rows of the largest of them
  const bool in_pairs;  // whether the input is as matrix units take it (pairs.h); backward needs the rows too
  const int held;       // inputs: this block's, the next one's, that of the tile before if its y is to come
  Buffer<A> input;      // [held][padded_depth()][ld]: patches of x, then g
  const int parts_w, parts_x;  // bfloat16 that a weight, and a value of the input, is the sum of
  // The same of ds, whose products are rounded to T, or summed with others of such maps.
  const int parts_of_sums;
  A* rows;        // this block's of them
  size_t at = 0;  // which block that is
  // [I][ld], of the blocks before, where there are several; of all for matrix units, and behind batch norms
  // phi's after theta's
  Buffer<A> sums;
  Buffer<A> given;  // [I][ld]
  std::optional<Resizer<A>> phi;

  Worker(const Problem& p_, const Layout& layout, bool backward)
      : p(p_), units(layout.units), ld(layout.tile), packed(p_, layout, backward),
        patches(patches_of(p_.fine, p_.coarse, p_.kernel, p_.stride)), flat(same_grid_patches(p_.coarse)),
        has_given(p_.theta || p_.phi || (p_.preact && !p_.project)),
        sums_weights(p_.weight_grads && layout.weight_panels == 0), blocks(blocks_of(p_, layout.depth)),
        norm_blocks(units && p.norms ? blocks_for_units(p, layout.depth) : std::vector<Block>()),
        depth(most_rows(blocks)),
        in_pairs(std::is_same_v<T, bf16> && units && !backward && come_in_pairs(blocks)),
        held(!p.hides_memory() ? 1
             : holds_x()       ? 3
                               : 2),
        input(held * padded_depth() * ld), parts_w(units && narrow_weights() ? 1 : 3),
        parts_x(p.centre_x || p.centre_g  ? 3
                : std::is_same_v<T, bf16> ? 1
                : std::is_same_v<T, f16>  ? 2
                                          : 3),
        parts_of_sums(units ? int(smaller(units->parts, std::is_same_v<T, bf16> ? 2 : 3)) : 0), rows(input),
        sums(units && p.norms             ? 2 * packed.inter * ld
             : units || blocks.size() > 1 ? packed.inter * ld
                                          : 0),
        given((has_given || p_.preact) ? packed.inter * ld : 0) {
    if (p.phi && !(p.phi.grid == p.coarse)) phi.emplace(p.phi_resize, p.phi.grid, p.coarse);
    if (units) units->acquire();
  }
  ~Worker() {
    if (units) units->release();
  }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  // Whether s, or theta and phi, are made of x and g in a tile: not where s is stored, or where ds is given
  // and no norm asks for them.
  bool makes_s() const { return p.project && !(p.ds && !p.norms); }
  // phi's sums, behind batch norms.
  A* sums_g() const { return sums + packed.inter * ld; }
  bool narrow_weights() const {
    for (int64_t i = 0; i < packed.inter; i += MatrixUnits::kRows)
      if (packed.wide[i / MatrixUnits::kRows] != A(0)) return false;
    return true;
  }
  // Where the part's rows go, of a block's that begin at `first`.
  A* rows_of(const Part& part, const Block& block, A* first) const {
    return first + (part.k0 - block.k0) / (in_pairs ? 2 : 1) * ld;
  }
  // Whether the rows of x are at hand while y of the tile is written.
  bool holds_x() const {
    const bool rows = p.y && !p.applies_later() && !p.y.channels_last && !in_pairs;
    return rows && p.uses_x() && !p.centre_x && blocks.size() == 1;
  }
  // As matrix units write over the input in backward.
  int64_t padded_depth() const { return units ? round_up(depth, MatrixUnits::kRows) : depth; }
  // Where the next input goes.
  A* next_rows() const {
    A* next = rows + padded_depth() * ld;
    return next < input + held * padded_depth() * ld ? next : static_cast<A*>(input);
  }

  static int64_t most_rows(const std::vector<Block>& blocks) {
    int64_t most = 0;
    for (const Block& block : blocks) most = block.rows > most ? block.rows : most;
    return most;
  }

  // How often the products of a whole tile with this block look aside.
  int64_t looks_aside() const {
    if (units) {
      int64_t looks = 0;
      if (makes_s() && p.norms) {
        for (const Block& block : norm_blocks) looks += units->asides_of(p.inter, block.rows, ld);
      } else if (makes_s()) {
        looks += units->asides_of(p.inter, blocks[at].rows, ld);
      }
      if (p.dx && p.uses_x()) looks += units->asides_of(p.rows_x(), p.inter, ld);
      if (p.dg) looks += units->asides_of(p.rows_g(), p.inter, ld);
      if (sums_weights)
        looks +=
            units->asides_of(p.rows_x(), ld, packed.inter) + units->asides_of(p.rows_g(), ld, packed.inter);
      return looks;
    }
    const int64_t panels = (ld + kCols * kLanes<A> - 1) / (kCols * kLanes<A>),
                  K = p.project ? blocks[at].rows : 0;
    return panels * ((p.inter + kRows - 1) / kRows) * (K > 0 ? (K + kStep - 1) / kStep : 1);
  }
  // Begins with the voxels [v0, v1) of sample n: what can be loaded aside is on its way into next_rows().
  void begin(NextTile<T>& next, const Voxels& first) { expect(next, first, 0); }
  // Goes through the blocks of a tile and keeps their sums: of all but the last one, which is at hand then;
  // of all with matrix units.
  template <class Aside>
  void go_through(NextTile<T>& next, Aside& aside, const Voxels& tile, const Voxels& after) {
    add_blocks(next, aside, tile);
    turn_to(next, tile, after);
    if (units) multiply_by_units(aside, tile.len());
  }
  template <class Aside>
  void add_blocks(NextTile<T>& next, Aside& aside, const Voxels& tile) {
    for (size_t b = 0; b + 1 < blocks.size(); ++b) {
      go_on(next, tile, b);
      expect(next, tile, b + 1);
      if (units) {
        multiply_by_units(aside, tile.len());
        continue;
      }
      for_panels<A>(tile.len(), [&](auto nv, int64_t v) {
        constexpr int NV = decltype(nv)::value;
        for (int64_t i = 0; i < p.inter; i += kRows) {
          Vec<A> acc[kRows][NV];
          add_block<NV>(i, v, acc, aside);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
            for (int j = 0; j < NV; ++j) store(sums + (i + r) * ld + v + j * kLanes<A>, acc[r][j]);
        }
      });
    }
  }
  // Goes on to the last block of a tile.
  void turn_to(NextTile<T>& next, const Voxels& tile, const Voxels& after) {
    go_on(next, tile, blocks.size() - 1);
    expect(next, after, 0);
    expect_outputs(next, tile);
  }
  void go_on(NextTile<T>& next, const Voxels& tile, size_t block) {
    next.incoming.finish();
    rows = next_rows();
    at = block;
    for (const Part& part : blocks[at].parts) {
      if (loads(part)) continue;
      A* to = rows_of(part, blocks[at], rows);
      if constexpr (std::is_same_v<T, bf16>) {
        if (in_pairs) {
          load_pairs(part.map, part.patches, tile.n, tile.v0, tile.v1, part.c0, part.c1, to, ld);
          continue;
        }
      }
      load_tile<T>(part.map, part.patches, tile.n, tile.v0, tile.v1, part.c0, part.c1, to, ld);
      if (part.centred) centre_rows(p, part.k0, part.k0 + part.rows(), tile.len(), ld, to);
    }
    if (in_pairs) {  // what fills up a step of the units
      const int64_t pairs = (blocks[at].rows + 1) / 2, padded = blocks[at].padded() / 2;
      std::memset(rows + pairs * ld, 0, size_t((padded - pairs) * ld) * sizeof(A));
    }
  }
  void expect(NextTile<T>& next, const Voxels& tile, size_t block) const {
    const auto [n, v0, v1] = tile;
    // Measured on a Zen 4, pairs for dot products: 0.82 to 0.94 of the time, in channels last 0.96 to 0.99.
    next.incoming.begin(ld, in_pairs, in_pairs && units->parts == 1);
    for (const Part& part : blocks[block].parts)
      if (loads(part)) next.incoming.add(part, n, v0, v1, rows_of(part, blocks[block], next_rows()));
    next.incoming.over(looks_aside());
    next.ahead = Ahead();
    if (p.dy && p.same_grid()) next.ahead.template add<T>(p.dy, flat, n, v0, v1);
    for (const Part& part : blocks[block].parts)
      if (!loads(part)) next.ahead.template add<T>(part.map, part.patches, n, v0, v1, part.c0, part.c1);
    next.ahead.over(looks_aside());
  }
  // Has what this tile will be written to fetched as well, where that is whole lines: channels last.
  // Measured, training steps: 0.94 to 1.0 of the time.
  void expect_outputs(NextTile<T>& next, const Voxels& tile) const {
    const auto [n, v0, v1] = tile;
    if (p.dx && p.same_grid() && p.dx.channels_last) next.ahead.template add_output<T>(p.dx, flat, n, v0, v1);
    if (p.dg && p.dg.channels_last) next.ahead.template add_output<T>(p.dg, flat, n, v0, v1);
    next.ahead.over(looks_aside());
  }

  void load_given(int64_t n, int64_t v0, int64_t v1) {
    if (!has_given) return;
    const int64_t padded = round_up(v1 - v0, kLanes<A>);
    for (int64_t i = p.inter; i < packed.inter; ++i)
      std::memset(given + i * ld, 0, size_t(padded) * sizeof(A));
    bool begun = false;
    if (p.theta || (p.preact && !p.project)) {
      load_tile<T>(p.theta ? p.theta : p.preact, flat, n, v0, v1, static_cast<A*>(given), ld);
      begun = true;
    }
    if (!p.phi) return;
    if (!phi && !begun) return load_tile<T>(p.phi, flat, n, v0, v1, static_cast<A*>(given), ld);
    if (!begun)
      for (int64_t i = 0; i < p.inter; ++i) std::memset(given + i * ld, 0, size_t(padded) * sizeof(A));
    if (phi) return add_resized_tile<T>(p.phi, *phi, n, v0, v1, static_cast<A*>(given), ld);
    Buffer<A> other(p.inter * ld);
    load_tile<T>(p.phi, flat, n, v0, v1, static_cast<A*>(other), ld);
    for (int64_t i = 0; i < p.inter; ++i)
      for (int64_t v = 0; v < padded; ++v) given[i * ld + v] += other[i * ld + v];
  }

  // W's rows [i, i + kRows) from column k on.
  const A* weights(int64_t i, int64_t k) const { return packed.forward + i * p.depth() + k * kRows; }
  // W^T's rows [k, k + kRows) of those of x or of g.
  const A* weights_back(bool of_x, int64_t k) const {
    return packed.backward + ((of_x ? 0 : packed.rows_x) + k) * p.inter;
  }
  // acc += W's rows [i, i + kRows), `count` columns from `first` on, times these rows of the tile, NV vectors
  // of voxels from v on. Between steps of the depth, `aside` does a little of something else.
  template <int NV, class Aside>
  inline __attribute__((always_inline)) void product(int64_t i, int64_t v, int64_t first, int64_t count,
                                                     Vec<A> (&acc)[kRows][NV], Aside& aside) const {
    const A *w = weights(i, first), *x = rows + (first - blocks[at].k0) * ld + v;
    Vec<A> sums[kRows][NV];
    copy<A, NV>(acc, sums);
    int64_t k = 0;
    for (; k + kStep <= count; k += kStep) {
      // Without a loop, whose end is mispredicted each time: 0.92 of the time where arithmetic binds.
#pragma GCC unroll 16
      for (int64_t q = k; q < k + kStep; ++q) multiply_once<A, NV>(w + q * kRows, x + q * ld, sums);
      aside.step();
    }
    if (k < count) {
      multiply<A, NV>(w + k * kRows, kRows, x + k * ld, ld, count - k, sums);
      aside.step();
    }
    copy<A, NV>(sums, acc);
  }

  // out = or += the first `rows` rows of W^T, theta's or phi's, times ds.
  template <class Aside>
  void multiply_back_by_units(Aside& aside, bool of_x, int64_t rows, const A* ds, int64_t len, bool add,
                              A* out) const {
    if constexpr (std::is_same_v<A, float>)
      units->multiply(packed_back_for_units(packed, p.inter, of_x ? 0 : packed.rows_x), parts_w, rows, ds,
                      parts_of_sums, p.inter, len, ld, add, out, look<Aside>, &aside);
  }

  // sums = or += W's columns times this block's rows; behind batch norms of theta and of phi apart.
  template <class Aside>
  void multiply_by_units(Aside& aside, int64_t len) const {
    if (!p.norms) return multiply_block_by_units(aside, blocks[at], rows, len, at > 0, sums);
    for (const Block& block : norm_blocks)
      multiply_block_by_units(aside, block, rows + block.k0 * ld, len, false,
                              block.parts[0].of_x ? static_cast<A*>(sums) : sums_g());
  }
  template <class Aside>
  void multiply_block_by_units(Aside& aside, const Block& block, const A* input_rows, int64_t len, bool add,
                               A* to) const {
    if constexpr (std::is_same_v<A, float>) {
      if (in_pairs)
        return units->multiply_pairs(packed_for_units(p.packed, packed.inter, block, 0), parts_w, p.inter,
                                     input_rows, block.rows, len, ld, add, to, look<Aside>, &aside);
      units->multiply(packed_for_units(p.packed, packed.inter, block, 0), parts_w, p.inter, input_rows,
                      parts_x, block.rows, len, ld, add, to, look<Aside>, &aside);
    }
  }

  // Makes the sums in `column`, of the voxels [v0, v1) that a vector holds, as float32 does where they are
  // not finite, which matrix units may have made them: sums over x's rows, over g's, or over both.
  void mend(int64_t n, int64_t v0, int64_t v1, bool of_x, bool of_g, A* column) const {
    Vec<A> zeros = {};  // or NaN
    for (int64_t i = 0; i < p.inter; ++i) zeros += load(column + i * ld) * A(0);
    if (horizontal_sum<A>(zeros) == A(0)) return;  // it was the bias, or what was given
    Buffer<A> x(p.depth() * kLanes<A>);
    for (const Block& block : blocks)
      for (const Part& part : block.parts) {
        if (part.of_x ? !of_x : !of_g) continue;
        A* to = x + part.k0 * kLanes<A>;
        load_tile<T>(part.map, part.patches, n, v0, v1, part.c0, part.c1, to, kLanes<A>);
        if (part.centred) centre_rows(p, part.k0, part.k0 + part.rows(), kLanes<A>, kLanes<A>, to);
      }
    for (int64_t i = 0; i < p.inter; i += kRows) {
      Vec<A> sum[kRows] = {};
      if (of_x) add_products(p.theta_weight, p.rows_x(), i, x, sum);
      if (of_g) add_products(p.phi_weight, p.rows_g(), i, x + p.rows_x() * kLanes<A>, sum);
      for (int r = 0; r < kRows && i + r < p.inter; ++r) {
        A* to = column + (i + r) * ld;
        store(to, zeros == A(0) ? load(to) : sum[r]);
      }
    }
  }
  // The same of a whole tile.
  void mend_tile(const Voxels& tile) const {
    for (int64_t v = tile.v0; v < tile.v1; v += kLanes<A>) {
      const int64_t v1 = smaller(v + kLanes<A>, tile.v1), at_v = v - tile.v0;
      if (!p.norms) {
        mend(tile.n, v, v1, true, true, sums + at_v);
        continue;
      }
      if (p.rows_x()) mend(tile.n, v, v1, true, false, sums + at_v);
      if (p.rows_g()) mend(tile.n, v, v1, false, true, sums_g() + at_v);
    }
  }
  // sum += rows [i, i + kRows) of weight [I, depth], times a vector's rows of the input.
  void add_products(const void* weight, int64_t depth, int64_t i, const A* x, Vec<A> (&sum)[kRows]) const {
    const A* row[kRows];
    for (int r = 0; r < kRows; ++r)
      row[r] = static_cast<const A*>(weight) + smaller(i + r, p.inter - 1) * depth;
    for (int64_t k = 0; k < depth; ++k) {
      const Vec<A> v = load(x + k * kLanes<A>);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r] += row[r][k] * v;
    }
  }

  // Whether a part's rows can be loaded between the steps of a product.
  bool loads(const Part& part) const {
    return p.hides_memory() && (part.in_rows() || part.template in_patches<A>());
  }
  // The sum over the blocks up to this one: bias + W's columns times these rows.
  template <int NV, class Aside>
  inline __attribute__((always_inline)) void add_block(int64_t i, int64_t v, Vec<A> (&acc)[kRows][NV],
                                                       Aside& aside) const {
    if (units && p.project) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j)
          acc[r][j] = packed.bias[i + r] + load(sums + (i + r) * ld + v + j * kLanes<A>);
      return;
    }
    const bool stored = p.preact && !p.project;  // a stored s holds the bias already
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int j = 0; j < NV; ++j)
        acc[r][j] = at > 0 ? load(sums + (i + r) * ld + v + j * kLanes<A>)
                           : splat(stored ? A(0) : packed.bias[i + r]);
    if (p.project) {
      product<NV>(i, v, blocks[at].k0, blocks[at].rows, acc, aside);
    } else {
      aside.step();
    }
  }
  template <int NV>
  inline __attribute__((always_inline)) void add_given(int64_t i, int64_t v, Vec<A> (&acc)[kRows][NV]) const {
    if (has_given)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) acc[r][j] += load(given + (i + r) * ld + v + j * kLanes<A>);
  }

  // s of rows [i, i + kRows), NV vectors of voxels from v on, of a tile whose last block is at hand.
  template <int NV, class Aside>
  inline __attribute__((always_inline)) void preactivation(int64_t i, int64_t v, Vec<A> (&acc)[kRows][NV],
                                                           Aside& aside) const {
    add_block<NV>(i, v, acc, aside);
    add_given<NV>(i, v, acc);
  }
};

template <class A>
inline Vec<A> activate(Activation kind, Vec<A> s) {
  if (kind == Activation::relu) return s <= A(0) ? Vec<A>{} : s;  // NaN stays NaN
  for (int l = 0; l < kLanes<A>; ++l) s[l] = attn_gate::activate(kind, A(s[l]));
  return s;
}
// d * activation'(s)
template <class A>
inline Vec<A> activate_backward(Activation kind, Vec<A> s, Vec<A> d) {
  if (kind == Activation::relu) return s <= A(0) ? Vec<A>{} : d;
  for (int l = 0; l < kLanes<A>; ++l) d[l] *= attn_gate::activate_grad(kind, A(s[l]));
  return d;
}

}  // namespace
}  // namespace attn_gate::cpu
