// The kernels of one instruction set for maps of one dtype: compiled once for each pair, with
// -DATTN_GATE_ISA=<name>, -DATTN_GATE_DTYPE=<name> and the matching -m flags. All else has internal linkage,
// so that the linker can't pick one set's code for another.
#include <tuple>

#include "backward.h"
#include "moments.h"
#include "resized_gradient.h"

#define ATTN_GATE_TABLE_(isa, dtype) kernels_##isa##_##dtype
#define ATTN_GATE_TABLE(isa, dtype) ATTN_GATE_TABLE_(isa, dtype)

namespace attn_gate::cpu {
namespace {

// Of a map's elements, in DType's order.
using T = std::tuple_element_t<int(DType::ATTN_GATE_DTYPE), std::tuple<float, double, bf16, f16>>;
using A = Acc<T>;

// Whether matrix units make forward's product. They take six products of float32, five of float16 and three
// of bfloat16 maps, a third where weights are bfloat16, and slow the core's clock. Measured, time against
// that of the vectors: float32 0.83 to 0.92 from 2^14 weights on, 1.1 to 1.2 below; float16 0.85 at
// 2^16, 1.13 to 1.3 at 2^14 and below; bfloat16 0.55 to 0.8 where the vectors would go by panels, else 1.15.
// In pairs 0.63 to 0.96 from a depth of 32 on, 1.05 to 1.16 at 16.
bool units_pay(const Problem& p, bool in_pairs) {
  if (in_pairs) return p.depth() >= MatrixUnits::kDepth;
  const int64_t least = p.dtype == DType::f32 ? 1 << 14 : p.dtype == DType::f16 ? 1 << 16 : 0;
  return p.hides_memory() && p.inter * p.depth() >= least;
}
// Whether they would get forward's input in pairs.
bool pairs_of(const Problem& p, int64_t depth) {
  return std::is_same_v<T, bf16> && p.project && come_in_pairs(blocks_of(p, depth));
}

// Whether they make backward's. Measured, time of backward against that of the vectors: float32 0.6 to 0.95
// from 2^10 weights on, 1.15 to 1.25 at 2^8; bfloat16 0.5 to 0.9. Steps with batch norms 0.8 to 0.98.
bool units_pay_back(const Problem& p) {
  if (p.dtype == DType::f16 || p.dtype == DType::f64) return false;
  return p.inter * p.depth() >= (p.dtype == DType::f32 ? 1 << 10 : 1 << 8);
}

// Whether dot products make either where there are no units: of bfloat16 alone, and in backward from 2^12
// weights on. Measured on a Zen 5, time against that of the vectors: forward 0.56 to 0.68, at depths of 32
// and 64 0.8 to 0.86; a step 0.71 to 0.84, with backward's at 2^11 weights as without, at 2^10 and below 1.06
// to 1.16. To look at 2^20 weights takes 0.035 ms, a tenth of forward on 4 x 4 voxels.
bool dots_pay(const Problem& p) {
  if (!std::is_same_v<T, bf16> || p.depth() < MatrixUnits::kDepth || p.centre_x || p.centre_g) return false;
  const auto narrow = [](const void* weights, int64_t n) {
    const A* at = static_cast<const A*>(weights);
    for (int64_t i = 0; i < n; i += 4096) {
      uint32_t rest = 0;
      for (int64_t k = i; k < smaller(i + 4096, n); ++k) rest |= as_bits(float(at[k])) << 16;
      if (rest) return false;
    }
    return true;
  };
  return narrow(p.theta_weight, p.inter * p.rows_x()) && narrow(p.phi_weight, p.inter * p.rows_g());
}
// What makes the products, or null: the vectors.
const MatrixUnits* units_for(const Problem& p, bool backward, bool in_pairs) {
  // s takes the place of what Worker::mend would need.
  if (!backward && p.preact && (p.theta || p.phi)) return nullptr;
  if (backward ? units_pay_back(p) : units_pay(p, in_pairs))
    if (const MatrixUnits* units = matrix_units()) return units;
  const MatrixUnits* products = dot_products();
  const bool wanted = backward ? p.inter * p.depth() >= 1 << 12 : in_pairs;
  return products && wanted && dots_pay(p) ? products : nullptr;
}

Layout layout(const Problem& p, bool backward) {
  Layout l;
  // Large projections go by panels of the micro-kernel, which stay in a core's caches; shallow ones by two at
  // a time, for longer runs of memory. Elsewhere long rows make long runs of memory, and in backward deep
  // products of the weight gradient, while what a tile goes through should stay in L2.
  constexpr int64_t panel = 48, size = sizeof(A);
  const int64_t rows = p.depth() + p.x.channels + 2 * p.inter, voxels = p.coarse.voxels();
  const int64_t fits = (int64_t(1536) << 10) / size / (rows > 0 ? rows : 1);
  const int64_t most = fits < 96 ? 96 : fits > 384 ? 384 : fits;
  const int64_t tiles = voxels > 0 ? (voxels + most - 1) / most : 1;
  const bool by_panels = !backward && p.hides_memory();
  l.tile = by_panels ? (p.depth() <= 256 ? 2 : 1) * panel
                     : round_up(voxels > 0 ? (voxels + tiles - 1) / tiles : 1, panel);
  l.depth = p.depth();
  // Weights that a core's L2 can't hold beside the tile come from further away, for each tile. So tiles are
  // wider there, and go through the depth a block at a time. Measured: 0.87 to 0.92 of the time at 3 and 4
  // MiB of weights, no difference up to 1 MiB.
  if (by_panels && p.inter * p.depth() * size > (1 << 20)) l.tile = 3 * panel, l.depth = 256;
  const int64_t inter = round_up(p.inter, kBlock<A>);
  l.forward_elements = inter * p.depth();
  l.backward_columns = p.inter;
  if constexpr (kBlock<A> == MatrixUnits::kRows) {
    const int64_t depth = by_panels ? 256 : l.depth;
    const bool in_pairs = !backward && pairs_of(p, depth);
    l.units = units_for(p, backward, in_pairs);
    if (l.units && backward) {
      // Whole steps of the weight gradient's depth, which voxels are. Measured: an input of 96 KiB took 0.75
      // to 0.9 of the time of long tiles at depths of 128 to 768, which at 64 took 0.7 of that of short ones.
      const int64_t wanted = 24576 / p.depth() / (2 * panel) * (2 * panel);
      const int64_t least = p.taps() > 1 && sizeof(T) == 2 ? 192 : 96;
      l.tile = smaller(round_up(l.tile, 2 * panel), wanted < least ? least : wanted);
      l.forward_elements = elements_for_units(p, inter, l.depth);
      l.backward_columns = columns_back_for_units(p.inter);
    } else if (l.units) {
      // Measured: inputs of 256 rows, and with large weights twice the voxels, took 0.83 to 0.95 of the time
      // of what the vectors take best. Pairs are half as large: twice the voxels took 0.9 to 0.98 of the time
      // up to 2^14 weights, 1.1 at 2^16.
      const int64_t weights = p.inter * p.depth();
      if (by_panels)
        l.tile = weights > (1 << 16) || (in_pairs && weights <= (1 << 14)) ? 4 * panel : 2 * panel;
      l.depth = depth;
      l.forward_elements = elements_for_units(p, inter, l.depth);
    }
  }
  const Packed<A> packed(p, l, backward);
  l.packed_elements = packed.elements();
  l.pack_units = packed.inter / kBlock<A> + (backward ? (packed.rows_x + packed.rows_g) / kBlock<A> : 0) + 1;
  l.weight_rows = packed.inter;
  l.panel_x = panel_width(p.rows_x());
  l.panel_g = panel_width(p.rows_g());
  l.columns_x = round_up(p.rows_x(), l.panel_x);
  const int64_t columns = l.columns_x + round_up(p.rows_g(), l.panel_g);
  int64_t weight_elements = p.weight_grads ? packed.inter * columns : 0;
  const int64_t all_tiles = p.batch * ((voxels + l.tile - 1) / l.tile);
  l.turned_g = p.norms ? all_tiles * packed.inter * l.tile : 0;
  l.turned_elements = all_tiles * packed.inter * l.tile + l.turned_g;
  // Eight groups, the least there are, unless there are fewer tiles.
  const bool apart = backward && l.panel_x % p.taps() == 0 &&
                     l.turned_elements < (smaller(8, all_tiles) - 1) * weight_elements;
  if (apart) {
    l.weight_panels = count_weight_panels(p, l);
    l.group_at = weight_elements;
  } else {
    l.turned_elements = 0;
  }
  if (p.weight_grads && l.units && !apart) {  // which leave these sums turned, [columns, whole tiles][I]
    l.panel_x = l.panel_g = 1;
    l.columns_x = round_up(p.rows_x(), MatrixUnits::kRows);
    weight_elements = packed.inter * (l.columns_x + round_up(p.rows_g(), MatrixUnits::kRows));
  }
  l.bias_at = apart ? 0 : weight_elements;
  l.psi_at = l.bias_at + packed.inter;
  l.psi_bias_at = l.psi_at + packed.inter;
  l.scale_x_at = l.psi_bias_at + 1;
  l.scale_g_at = l.scale_x_at + packed.inter;
  l.partial_elements = round_up(p.norms ? l.scale_g_at + packed.inter : l.scale_x_at, 16);
  return l;
}

void pack(const Problem& p, const Layout& l, bool backward, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) pack_unit<A>(p, l, backward, u);
}
void reduce(const Problem& p, const Layout& l, int64_t groups, int64_t begin, int64_t end) {
  A* sum = static_cast<A*>(p.partial) + l.group_at;
  for (int64_t g = 1; g < groups; ++g)
    for (int64_t i = begin; i < end; ++i) sum[i] += sum[g * l.partial_elements + i];
}

// The tile, turned too, should stay in a core's L2; long tiles spread the cost of joining K * K sums.
void moments_layout(Moments& p) {
  const int64_t size = sizeof(A), rows = p.rows() > 0 ? p.rows() : 1;
  const int64_t fits = (int64_t(768) << 10) / size / (2 * rows);
  p.tile = fits < 96 ? 96 : fits > 384 ? 384 : fits / 48 * 48;
  p.block = kBlock<A>;
}

}  // namespace

extern const Kernels ATTN_GATE_TABLE(ATTN_GATE_ISA, ATTN_GATE_DTYPE) = {layout,
                                                                        pack,
                                                                        forward_tiles<T>,
                                                                        apply_rows<T>,
                                                                        apply_backward_rows<T>,
                                                                        backward_groups<T>,
                                                                        gather_dalpha_voxels<T>,
                                                                        gather_dphi_rows<T>,
                                                                        weight_panels<T>,
                                                                        reduce,
                                                                        statistics_tiles<T>,
                                                                        moments_layout,
                                                                        moments_tiles<T>,
                                                                        moments_join_rows,
                                                                        moments_backward_tiles<T>};

}  // namespace attn_gate::cpu
