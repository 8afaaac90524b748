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
  Buffer<A> input;        // [K][ld]: patches of x, then g
  Buffer<A> given;        // [I][ld]
  std::optional<Resizer<A>> phi;

  Worker(const Problem& p_, const Layout& layout, bool backward)
      : p(p_), ld(layout.tile), packed(p_, backward),
        patches(patches_of(p_.fine, p_.coarse, p_.kernel, p_.stride)), flat(same_grid_patches(p_.coarse)),
        has_given(p_.theta || p_.phi || (p_.preact && !p_.project)), input(p_.depth() * layout.tile),
        given((has_given || p_.preact) ? packed.inter * layout.tile : 0) {
    if (p.phi && !(p.phi.grid == p.coarse)) phi.emplace(p.phi_resize, p.phi.grid, p.coarse);
  }

  void load_input(int64_t n, int64_t v0, int64_t v1) {
    if (p.uses_x()) load_tile<T>(p.x, patches, n, v0, v1, static_cast<A*>(input), ld);
    if (p.g) load_tile<T>(p.g, flat, n, v0, v1, input + p.rows_x() * ld, ld);
    if (p.centre_x) subtract(static_cast<const A*>(p.centre_x), p.rows_x(), v1 - v0, input);
    if (p.centre_g) subtract(static_cast<const A*>(p.centre_g), p.rows_g(), v1 - v0, input + p.rows_x() * ld);
  }
  void subtract(const A* centre, int64_t count, int64_t len, A* rows) const {
    for (int64_t k = 0; k < count; ++k)
      for (int64_t i = 0; i < len; i += kLanes<A>)
        store(rows + k * ld + i, load(rows + k * ld + i) - centre[k]);
  }

  // What the voxels [v0, v1) will read, to be fetched during the panels of a tile of `len` voxels.
  Ahead next_tile(int64_t n, int64_t v0, int64_t v1, int64_t len) const {
    Ahead ahead;
    if (p.dy && p.same_grid()) ahead.add<T>(p.dy, flat, n, v0, v1);
    if (p.uses_x()) ahead.add<T>(p.x, patches, n, v0, v1);
    if (p.g) ahead.add<T>(p.g, flat, n, v0, v1);
    const int64_t panels = (len + kCols * kLanes<A> - 1) / (kCols * kLanes<A>);
    ahead.over(panels * ((p.inter + kRows - 1) / kRows) * (p.project ? (p.depth() + kStep - 1) / kStep : 1));
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

  // s of rows [i, i + kRows), NV vectors of voxels from v on.
  template <int NV>
  inline __attribute__((always_inline)) void preactivation(int64_t i, int64_t v, Vec<A> (&acc)[kRows][NV],
                                                           Ahead& ahead) const {
    const bool stored = p.preact && !p.project;  // a stored s holds the bias already
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int j = 0; j < NV; ++j) acc[r][j] = splat(stored ? A(0) : packed.bias[i + r]);
    if (p.project) {
      const int64_t block = i / kBlock<A> * kBlock<A>, depth = p.depth();
      const A *w = packed.forward + block * depth + (i - block), *x = input + v;
      for (int64_t k = 0; k < depth; k += kStep) {
        multiply<A, NV>(w + k * kBlock<A>, kBlock<A>, x + k * ld, ld, smaller(kStep, depth - k), acc);
        ahead.fetch();
      }
    } else {
      ahead.fetch();
    }
    if (has_given)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) acc[r][j] += load(given + (i + r) * ld + v + j * kLanes<A>);
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
