// The pre-activation s = bias + W [patches(x); g] + theta + resize(phi) of one tile, a block of registers at
// a time.
#pragma once
#include <optional>

#include "resize.h"

namespace attn_gate::cpu {
namespace {

// Where the packed pieces of the workspace lie.
template <class A>
struct Packed {
  A *forward, *backward, *bias, *psi;
  int64_t inter, depth;  // I and K, as packed: whole blocks
  Packed(const Problem& p, bool with_backward)
      : inter(round_up(p.inter, kBlock<A>)), depth(round_up(p.depth(), kBlock<A>)) {
    forward = static_cast<A*>(p.packed);
    backward = forward + inter * p.depth();
    bias = backward + (with_backward ? depth * p.inter : 0);
    psi = bias + inter;
  }
  int64_t elements() const { return psi + inter - forward; }
};

// Unit u packs one block of rows: first those of W (for s), then those of W^T (for dx, dg), then bias and
// psi.
template <class A>
void pack_unit(const Problem& p, bool backward, int64_t u) {
  Packed<A> to(p, backward);
  constexpr int B = kBlock<A>;
  const int64_t K = p.depth(), I = p.inter, forward_units = to.inter / B, rows_x = p.rows_x();
  auto source = [&](int64_t i, int64_t k) {
    return k < rows_x ? static_cast<const A*>(p.theta_weight)[i * rows_x + k]
                      : static_cast<const A*>(p.phi_weight)[i * (K - rows_x) + k - rows_x];
  };
  if (u < forward_units) {
    const int64_t i0 = u * B, rows = smaller(B, I - i0);
    A* dst = to.forward + i0 * K;
    for (int64_t k = 0; rows < B && k < K; ++k)
      for (int64_t r = rows; r < B; ++r) dst[k * B + r] = A(0);
    if (rows_x) transpose(static_cast<const A*>(p.theta_weight) + i0 * rows_x, rows_x, rows, rows_x, dst, B);
    if (K > rows_x)
      transpose(static_cast<const A*>(p.phi_weight) + i0 * (K - rows_x), K - rows_x, rows, K - rows_x,
                dst + rows_x * B, B);
    return;
  }
  u -= forward_units;
  if (backward && u < to.depth / B) {
    const int64_t k0 = u * B;
    A* dst = to.backward + k0 * I;
    const int64_t width = k0 < rows_x ? rows_x : K - rows_x, from = k0 < rows_x ? k0 : k0 - rows_x;
    const A* rows = static_cast<const A*>(k0 < rows_x ? p.theta_weight : p.phi_weight);
    const bool whole = from + B <= width;  // all of one weight
    for (int64_t i = 0; i < I; ++i) {
      if (whole) {
        std::memcpy(dst + i * B, rows + i * width + from, B * sizeof(A));
        continue;
      }
      for (int64_t r = 0; r < B; ++r) dst[i * B + r] = k0 + r < K ? source(i, k0 + r) : A(0);
    }
    return;
  }
  for (int64_t i = 0; i < to.inter; ++i) {
    to.bias[i] = i < I && p.bias ? static_cast<const A*>(p.bias)[i] : A(0);
    to.psi[i] = i < I ? static_cast<const A*>(p.psi)[i] : A(0);
  }
}

constexpr int64_t kStep =
    16;  // depth of the product between two looks ahead: a few lines at a time stall nothing

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

// A part of the product's depth: channels [c0, c1) of x or g, which are its rows from k0 on.
struct DepthBlock {
  bool of_x;
  int64_t c0, c1, k0, rows;
};

// What a thread holds while it goes through its tiles.
template <class T>
struct Worker {
  using A = Acc<T>;
  const Problem& p;
  const int64_t ld;  // voxels a tile, the rows' length
  const Packed<A> packed;
  const Patches patches;  // of x on the coarse grid
  const Patches flat;     // the coarse grid on itself
  const bool has_given;   // theta, phi or a stored s
  Buffer<A> input;        // [rows][ld]: patches of x, then g, or one block of them
  Buffer<A> given;        // [I][ld]
  std::optional<Resizer<A>> phi;

  Worker(const Problem& p_, const Layout& layout, bool backward)
      : p(p_), ld(layout.tile), packed(p_, backward),
        patches(patches_of(p_.fine, p_.coarse, p_.kernel, p_.stride)), flat(same_grid_patches(p_.coarse)),
        has_given(p_.theta || p_.phi || (p_.preact && !p_.project)),
        input(smaller(p_.depth(), layout.depth_block) * layout.tile),
        given((has_given || p_.preact) ? packed.inter * layout.tile : 0) {
    if (p.phi && !(p.phi.grid == p.coarse)) phi.emplace(p.phi_resize, p.phi.grid, p.coarse);
  }

  // Calls f(first, count, k0) for blocks of at most `rows` rows of x, then of g: whole channels.
  template <class F>
  void for_blocks(int64_t rows, F&& f) const {
    const int64_t taps = p.taps(), at_once = rows / taps > 0 ? rows / taps : 1;
    for (int64_t c = 0; p.uses_x() && c < p.x.channels; c += at_once) {
      const int64_t end = smaller(c + at_once, p.x.channels);
      f(DepthBlock{true, c, end, c * taps, (end - c) * taps});
    }
    for (int64_t c = 0; c < p.rows_g(); c += rows) {
      const int64_t end = smaller(c + rows, p.rows_g());
      f(DepthBlock{false, c, end, p.rows_x() + c, end - c});
    }
  }
  // Rows of a block into the tile's from `to` on.
  void load_block(const DepthBlock& b, int64_t n, int64_t v0, int64_t v1, A* to) {
    const Map& m = b.of_x ? p.x : p.g;
    load_tile<T>(m, b.of_x ? patches : flat, n, v0, v1, b.c0, b.c1, to, ld);
    centre_rows(p, b.k0, b.k0 + b.rows, v1 - v0, ld, to);
  }
  void fetch_block(const DepthBlock& b, int64_t n, int64_t v0, int64_t v1, Ahead& ahead) const {
    ahead.add<T>(b.of_x ? p.x : p.g, b.of_x ? patches : flat, n, v0, v1, b.c0, b.c1);
  }
  void load_input(int64_t n, int64_t v0, int64_t v1) {
    for_blocks(p.depth(), [&](const DepthBlock& b) { load_block(b, n, v0, v1, input + b.k0 * ld); });
  }

  // How often preactivation() fetches ahead in a tile of `len` voxels.
  int64_t fetches(int64_t len, int64_t rows) const {
    const int64_t panels = (len + kCols * kLanes<A> - 1) / (kCols * kLanes<A>);
    return panels * ((p.inter + kRows - 1) / kRows) * (rows > 0 ? (rows + kStep - 1) / kStep : 1);
  }
  // What the voxels [v0, v1) will read, to be fetched during the panels of a tile of `len` voxels.
  Ahead next_tile(int64_t n, int64_t v0, int64_t v1, int64_t len) const {
    Ahead ahead;
    if (p.dy && p.same_grid()) ahead.add<T>(p.dy, flat, n, v0, v1);
    for_blocks(p.depth(), [&](const DepthBlock& b) { fetch_block(b, n, v0, v1, ahead); });
    ahead.over(fetches(len, p.project ? p.depth() : 0));
    return ahead;
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

  // acc += W's rows [i, i + kRows), columns [k0, k0 + depth), times `depth` rows of the tile, NV vectors of
  // voxels from v on.
  template <int NV>
  inline __attribute__((always_inline)) void product(int64_t i, int64_t v, int64_t k0, int64_t depth,
                                                     Vec<A> (&acc)[kRows][NV], Ahead& ahead) const {
    const int64_t block = i / kBlock<A> * kBlock<A>;
    const A *w = packed.forward + block * p.depth() + (i - block) + k0 * kBlock<A>, *x = input + v;
    for (int64_t k = 0; k < depth; k += kStep) {
      multiply<A, NV>(w + k * kBlock<A>, kBlock<A>, x + k * ld, ld, smaller(kStep, depth - k), acc);
      ahead.fetch();
    }
  }
  template <int NV>
  inline __attribute__((always_inline)) void begin_with_bias(int64_t i, Vec<A> (&acc)[kRows][NV]) const {
    const bool stored = p.preact && !p.project;  // a stored s holds the bias already
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int j = 0; j < NV; ++j) acc[r][j] = splat(stored ? A(0) : packed.bias[i + r]);
  }
  template <int NV>
  inline __attribute__((always_inline)) void add_given(int64_t i, int64_t v, Vec<A> (&acc)[kRows][NV]) const {
    if (has_given)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) acc[r][j] += load(given + (i + r) * ld + v + j * kLanes<A>);
  }

  // s of rows [i, i + kRows), NV vectors of voxels from v on, of a tile that holds all of the input.
  template <int NV>
  inline __attribute__((always_inline)) void preactivation(int64_t i, int64_t v, Vec<A> (&acc)[kRows][NV],
                                                           Ahead& ahead) const {
    begin_with_bias<NV>(i, acc);
    if (p.project) {
      product<NV>(i, v, 0, p.depth(), acc, ahead);
    } else {
      ahead.fetch();
    }
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
