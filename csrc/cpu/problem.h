// What the kernels are asked to do, as plain data: the interface between the operators (which know torch) and
// the kernels (compiled per instruction set and dtype, which know only pointers and sizes).
#pragma once
#include <cstdint>

#include "../grid.h"
#include "matrix_units.h"

// Members that every instruction set's objects use leave no copy of their own for the linker to choose among.
#define ATTN_GATE_INLINE __attribute__((always_inline)) inline

namespace attn_gate::cpu {

constexpr int64_t kLarge = int64_t(8) << 20;  // bytes: see Problem::streams

// A feature map [N, channels, grid] in memory: contiguous, or channels last. Null data: absent.
struct Map {
  void* data = nullptr;
  int64_t channels = 0;
  Grid grid;
  bool channels_last = false;
  bool has_pages = false;  // of large outputs
  ATTN_GATE_INLINE explicit operator bool() const { return data != nullptr; }
};

// Coarse voxels [v0, v1) of sample n.
struct Voxels {
  int64_t n, v0, v1;
  ATTN_GATE_INLINE int64_t len() const { return v1 - v0; }
};

// One call, forward or backward. Parameters, alpha and sums are in the accumulation type A: float, or double
// for float64 maps. The pre-activation s[I, R] is the sum of what is present:
//   bias + theta_weight * patches(x) + phi_weight * g          (the projections; x_projected says so)
//   + theta + resize(phi, R)                                   (given maps)
struct Problem {
  DType dtype = DType::f32;
  int64_t batch = 0;
  int64_t inter = 0;  // I
  Grid fine, coarse;  // S, R
  Resize alpha_resize = Resize::identity, phi_resize = Resize::identity;
  Activation activation = Activation::relu;

  // the projections
  bool project = false;  // compute the pre-activation from x and g (else it is given)
  Grid kernel, stride;   // theta's, on x; kernel <= stride: patches do not overlap
  const void *theta_weight = nullptr, *phi_weight = nullptr;  // [I, C * taps], [I, G]
  const void *bias = nullptr, *psi = nullptr;                 // [I] (bias may be null), [I]
  const void* psi_bias = nullptr;                             // [1] or null

  Map x, g;  // grids S and R
  // What is taken off the rows of [patches(x); g] before they are multiplied, or null: [C * taps], [G]
  const void *centre_x = nullptr, *centre_g = nullptr;
  // Backward of batch norms on batch statistics behind the projections: what norms.h says, or null
  void* norms = nullptr;
  bool norm_sums = false;  // the first of the two passes, which only sums
  Map theta, phi;          // grids R and Q
  Map preact;              // forward: where to store s (or absent); backward: s as stored
  Map y;                   // forward out; absent: stop at the logits
  void* alpha = nullptr;   // [N, R]: sigmoid(logit), or the logits where y is absent

  // backward
  Map dy, dx, dg, dtheta;  // dtheta holds ds: also what dphi is resized from
  Map dphi;
  Map ds;                        // ds as given: only the projections are differentiated
  const void* dalpha = nullptr;  // [N, R] gradient of alpha, or of the logits, or null
  void* dalpha_out = nullptr;    // [N, R] where only x * resize(alpha) is differentiated
  void* dfine = nullptr;         // [N, S] sum over channels of dy * x, where S != R
  bool through_sigmoid = false;  // alpha is sigmoid(logit); else dalpha is the whole gradient of the logits
  bool weight_grads = false;

  // workspace, laid out by Layout below
  void* packed = nullptr;   // weights in the micro-kernel's order
  void* partial = nullptr;  // per group sums of the parameter gradients
  void* turned = nullptr;   // ds of all tiles, turned, where the weight gradient is a pass of its own

  ATTN_GATE_INLINE int64_t taps() const { return kernel.voxels(); }
  ATTN_GATE_INLINE int64_t rows_x() const { return uses_x() ? x.channels * taps() : 0; }
  ATTN_GATE_INLINE int64_t rows_g() const { return g ? g.channels : 0; }
  ATTN_GATE_INLINE int64_t depth() const {
    return rows_x() + rows_g();
  }  // K of the projections' matrix product
  // Whether the projections are arithmetic enough to hide the memory's work behind. Measured: at a depth of
  // 32 and 8 inter channels panels took up to twice the time of long tiles, at 128 and 32 they take less.
  ATTN_GATE_INLINE bool hides_memory() const { return project && depth() * inter >= 2048; }
  ATTN_GATE_INLINE bool uses_x() const { return theta_weight != nullptr; }
  ATTN_GATE_INLINE bool same_grid() const { return fine == coarse; }
  ATTN_GATE_INLINE int64_t element_size() const {
    return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
  }
  // Whether y, or dx or dg on one grid, is written past the caches where rows begin with cache lines: where
  // it is larger than what two cores have of their own, and its pages don't come cleared by way of them.
  // Measured at 16 and 32 MiB, inference: 0.75 to 0.9 of the time, 0.93 with the torch.cat that reads y; at 8
  // MiB no gain; with fresh pages 1.0 to 1.25.
  ATTN_GATE_INLINE bool streams(const Map& m) const {
    return m.has_pages && batch * m.channels * m.grid.voxels() * element_size() > kLarge;
  }
  // Whether y is written in a second phase: on two grids, and where a channel of y fits on a page, of which
  // each tile would touch as many as y has channels.
  ATTN_GATE_INLINE bool applies_later() const {
    return y && (!same_grid() || (project && !y.channels_last && y.grid.voxels() * element_size() <= 4096));
  }
};

// Tiles of `size` coarse voxels, counted through all samples, and groups of them.
struct Tiles {
  int64_t size, voxels, per_sample, count;
  ATTN_GATE_INLINE Tiles(const Problem& p, int64_t size_)
      : size(size_), voxels(p.coarse.voxels()), per_sample((voxels + size - 1) / size),
        count(p.batch * per_sample) {}
  ATTN_GATE_INLINE Voxels operator[](int64_t t) const {
    const int64_t n = t / per_sample, v0 = t % per_sample * size, v1 = v0 + size;
    return {n, v0, v1 < voxels ? v1 : voxels};
  }
  // The first tile of one of so many groups.
  ATTN_GATE_INLINE int64_t first_of(int64_t group, int64_t groups) const { return count * group / groups; }
};

// Mean and variance of what a projection makes of x's patches, in double.
struct Statistics {
  int64_t groups = 0;       // independent partial sums
  double* state = nullptr;  // [groups][1 + 2 * I]: the number of voxels, means, sums of squares about them
};

// Mean and covariance of x's patches (K = channels * taps), in double whatever the map.
struct Moments {
  DType dtype = DType::f32;
  Map x;
  Grid coarse, kernel, stride;
  int64_t tile = 0;                                          // coarse voxels a tile
  int64_t block = 0;                                         // rows of a packed block of `slope`
  int64_t groups = 0;                                        // independent partial sums
  double *state = nullptr, *mean = nullptr, *cov = nullptr;  // [groups, state_elements], [K], [K, K]

  // backward: dx = slope (x - centre) + offset
  const void *slope = nullptr, *centre = nullptr,
             *offset = nullptr;  // [blocks][K][block], [K], [blocks * block]
  Map dx;

  ATTN_GATE_INLINE int64_t rows() const { return x.channels * kernel.voxels(); }
  ATTN_GATE_INLINE int64_t state_elements() const { return 1 + rows() + rows() * rows(); }
};

// Sizes that operators and kernels must agree on; the kernels fill it in for their vector length.
struct Layout {
  int64_t tile = 0;   // coarse voxels a tile
  int64_t depth = 0;  // rows of the product's depth that forward goes through at a time, about
  const MatrixUnits* units = nullptr;  // what makes the products, or null: the vectors
  int64_t forward_elements = 0;        // of `packed`, the weights that forward multiplies with
  int64_t backward_columns = 0;        // what a row of those takes that backward multiplies with
  int64_t packed_elements = 0;         // of `packed`
  int64_t pack_units = 0;              // independent pieces of the packing
  // A group's sums: theta's weight gradient [I, C * taps] in panels of panel_x columns, [panels][weight_rows]
  // [panel_x], then phi's, from column columns_x on, then d_bias [I], d_psi [I], d_psi_bias [1], and of batch
  // norms the gradients of theta's scale [I] and of phi's.
  int64_t panel_x = 0, panel_g = 0, columns_x = 0, weight_rows = 0;
  // Where the sums of all groups would outgrow ds: it is kept, [tiles][I][tile] turned, and the weight
  // gradient is a pass of its own over `weight_panels` independent panels, after the tiles; its only sums
  // then come first in `partial`, before group 0.
  // Batch norms have two of them, theta's and, turned_g behind it, phi's.
  int64_t weight_panels = 0, turned_elements = 0, turned_g = 0, group_at = 0;
  int64_t bias_at = 0, psi_at = 0, psi_bias_at = 0, scale_x_at = 0, scale_g_at = 0;
  int64_t partial_elements = 0;
};

// One table per instruction set and dtype of the maps. [begin, end) are ranges of independent units, so any
// split gives the same bits.
struct Kernels {
  Layout (*layout)(const Problem&, bool backward);
  void (*pack)(const Problem&, const Layout&, bool backward, int64_t begin, int64_t end);
  // Coarse voxels [v0, v1) of sample n: logits -> alpha, and y too unless it applies_later().
  void (*forward)(const Problem&, const Layout&, int64_t n, int64_t v0, int64_t v1);
  // Fine rows [r0, r1) (row = (d, h)) of sample n: y = x * resize(alpha).
  void (*apply)(const Problem&, int64_t n, int64_t r0, int64_t r1);
  // Fine rows: dfine = sum_c dy * x, dx = dy * resize(alpha).
  void (*apply_backward)(const Problem&, int64_t n, int64_t r0, int64_t r1);
  // The tiles of groups [begin, end) of `groups`, with the sums of each.
  void (*backward)(const Problem&, const Layout&, int64_t groups, int64_t begin, int64_t end);
  // Coarse voxels: dalpha_out = resize^T(dfine).
  void (*gather_dalpha)(const Problem&, int64_t n, int64_t v0, int64_t v1);
  // Rows of the gating grid: dphi = resize^T(dtheta), all channels.
  void (*gather_dphi)(const Problem&, int64_t n, int64_t r0, int64_t r1);
  // Panels [begin, end) of the weight gradients.
  void (*weights)(const Problem&, const Layout&, int64_t begin, int64_t end);
  // Elements [begin, end) of a group: the sum over groups, in order, left in group 0.
  void (*reduce)(const Problem&, const Layout&, int64_t groups, int64_t begin, int64_t end);

  // Coarse voxels [v0, v1) of sample n: theta's mean and variance join those of `group`, or begin them.
  void (*statistics)(const Problem&, const Layout&, const Statistics&, int64_t group, bool begin, int64_t n,
                     int64_t v0, int64_t v1);

  // Fills in tile and block.
  void (*moments_layout)(Moments&);
  // Coarse voxels [v0, v1) of sample n join the sums of `group`, or begin them.
  void (*moments)(const Moments&, int64_t group, bool begin, int64_t n, int64_t v0, int64_t v1);
  // Rows [begin, end) of mean and cov.
  void (*moments_join)(const Moments&, int64_t begin, int64_t end);
  void (*moments_backward)(const Moments&, int64_t n, int64_t v0, int64_t v1);
};

const Kernels& kernels(DType);
// "default", "avx2" or "avx512": picked once, at first use; honours ATEN_CPU_CAPABILITY
const char* instruction_set();

}  // namespace attn_gate::cpu
