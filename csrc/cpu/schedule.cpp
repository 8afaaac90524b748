// Which thread does what, and in which order.
//
// On one grid a tile is independent: one parallel loop, and one more for y where its channels fit on a page
// (Problem::applies_later). Where alpha is resized to x's grid, the multiply
// needs the neighbouring coarse rows and backward needs dfine of the neighbouring fine rows; so the work goes
// in bands of tiles whose share of x stays in the last-level cache between the two phases of a band, and x
// comes from memory once.
#include "schedule.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

namespace attn_gate::cpu {
namespace {

constexpr int64_t kBandBytes = int64_t(2) << 20;  // of x, for each thread

// Pieces of `size` coarse voxels, counted through all samples, that the work is divided into. Backward's are
// tiles, because sums are taken over them; forward's are smaller, so that threads get equal shares.
struct Pieces : Tiles {
  using Tiles::Tiles;

  // Calls f(n, v0, v1) for the runs of pieces [begin, end), which never cross a sample.
  template <class F>
  void for_runs(int64_t begin, int64_t end, F&& f) const {
    for (int64_t t = begin; t < end;) {
      const int64_t n = t / per_sample, last = std::min(end, (n + 1) * per_sample);
      f(n, (t - n * per_sample) * size, std::min((last - n * per_sample) * size, voxels));
      t = last;
    }
  }
};
constexpr int64_t kForwardPiece = 48;  // whole panels of the micro-kernel, for every vector length

template <class F>
void parallel(int64_t begin, int64_t end, F&& f) {
  if (begin < end) torch::stable::parallel_for(begin, end, 1, std::forward<F>(f));
}

// Fine rows [begin, end), counted through all samples.
template <class F>
void parallel_rows(const Problem& p, int64_t begin, int64_t end, F&& f) {
  const int64_t rows = p.fine.d * p.fine.h;
  // Pieces of rows, so that short rows are taken many at a time.
  const int64_t piece = std::max<int64_t>(1, 1024 / std::max<int64_t>(1, p.fine.w));
  parallel(0, (end - begin + piece - 1) / piece, [&](int64_t b, int64_t e) {
    const int64_t last = std::min(begin + e * piece, end);
    for (int64_t r = begin + b * piece; r < last;) {
      const int64_t n = r / rows, stop = std::min(last, (n + 1) * rows);
      f(n, r - n * rows, stop - n * rows);
      r = stop;
    }
  });
}

// The slowest axis that both grids have: depth, or height for 2D maps.
struct OuterAxis {
  bool depth;
  int64_t fine, coarse, coarse_voxels, fine_rows, stride;
  explicit OuterAxis(const Problem& p)
      : depth(p.fine.d > 1), fine(depth ? p.fine.d : p.fine.h), coarse(depth ? p.coarse.d : p.coarse.h),
        coarse_voxels(p.coarse.voxels() / (coarse > 0 ? coarse : 1)), fine_rows(depth ? p.fine.h : 1),
        stride(depth ? p.stride.d : p.stride.h) {}
};

// Fine rows (through all samples) whose alpha rows are all done once `count` pieces are. One index of margin:
// the kernels compute source positions in their own precision.
int64_t rows_ready(const Problem& p, const Pieces& pieces, int64_t count) {
  const OuterAxis axis(p);
  const int64_t per = pieces.per_sample, n = count / per;
  const int64_t slabs = (count - n * per) * pieces.size / axis.coarse_voxels;
  int64_t done = 0;
  while (done < axis.fine &&
         resize_tap<double>(p.alpha_resize, done, axis.coarse, axis.fine).upper + 1 < slabs)
    ++done;
  return (n * axis.fine + done) * axis.fine_rows;
}

// Fine rows that backward of the first `count` pieces reads (dfine) or adds to (dx).
int64_t rows_needed(const Problem& p, const Pieces& pieces, int64_t count) {
  const OuterAxis axis(p);
  const int64_t per = pieces.per_sample, n = count / per, rest = count - n * per;
  if (rest == 0) return n * axis.fine * axis.fine_rows;
  const int64_t slabs =
      std::min(axis.coarse, (rest * pieces.size + axis.coarse_voxels - 1) / axis.coarse_voxels);
  int64_t need = std::min(axis.fine, slabs * axis.stride);
  while (need < axis.fine && resize_tap<double>(p.alpha_resize, need, axis.coarse, axis.fine).lower <= slabs)
    ++need;
  return (n * axis.fine + (slabs == axis.coarse ? axis.fine : need)) * axis.fine_rows;
}

// Units (tiles, or groups of them) a band takes, of `units` in all.
int64_t units_per_band(const Problem& p, int64_t units) {
  const double bytes =
      double(p.batch) * double(p.x.channels) * double(p.fine.voxels()) * double(p.element_size());
  const double bands = bytes / double(kBandBytes * int64_t(torch::stable::get_num_threads()));
  return std::max<int64_t>(1, bands > 1 ? int64_t(double(units) / bands) : units);
}

}  // namespace

int64_t tiles_of(const Problem& p, const Layout& layout) { return Tiles(p, layout.tile).count; }

int64_t groups_of(const Problem& p, const Layout& layout) {
  const int64_t bytes = layout.partial_elements * (p.dtype == DType::f64 ? 8 : 4);
  const int64_t most = std::clamp<int64_t>((int64_t(8) << 20) / std::max<int64_t>(1, bytes), 8, 64);
  return std::max<int64_t>(1, std::min(most, tiles_of(p, layout)));
}

void run_forward(Problem p, const Layout& layout) {
  const Kernels& k = kernels(p.dtype);
  parallel(0, layout.pack_units, [&](int64_t b, int64_t e) { k.pack(p, layout, false, b, e); });
  const Pieces pieces(p, kForwardPiece);
  const int64_t count = pieces.count;
  const bool two_phases = p.applies_later();
  const int64_t threads = torch::stable::get_num_threads();
  // A band is a whole number of pieces for every thread.
  const int64_t step = two_phases ? (units_per_band(p, count) + threads - 1) / threads * threads : count;
  int64_t rows_done = 0;
  for (int64_t begin = 0; begin < count; begin += step) {
    const int64_t end = std::min(begin + step, count);
    parallel(begin, end, [&](int64_t b, int64_t e) {
      pieces.for_runs(b, e, [&](int64_t n, int64_t v0, int64_t v1) { k.forward(p, layout, n, v0, v1); });
    });
    if (!two_phases) continue;
    const int64_t ready = end == count ? p.batch * p.fine.d * p.fine.h : rows_ready(p, pieces, end);
    parallel_rows(p, rows_done, ready, [&](int64_t n, int64_t r0, int64_t r1) { k.apply(p, n, r0, r1); });
    rows_done = std::max(rows_done, ready);
  }
}

void run_apply(const Problem& p) {
  parallel_rows(p, 0, p.batch * p.fine.d * p.fine.h,
                [&](int64_t n, int64_t r0, int64_t r1) { kernels(p.dtype).apply(p, n, r0, r1); });
}

void run_backward(Problem p, const Layout& layout, int64_t groups) {
  const Kernels& k = kernels(p.dtype);
  parallel(0, layout.pack_units, [&](int64_t b, int64_t e) { k.pack(p, layout, true, b, e); });
  const Pieces pieces(p, layout.tile);
  const int64_t all_rows = p.batch * p.fine.d * p.fine.h;
  const bool two_phases = p.dy && !p.same_grid();
  const int64_t step = two_phases ? units_per_band(p, groups) : groups;
  int64_t rows_done = 0;
  for (int64_t begin = 0; begin < groups; begin += step) {
    const int64_t end = std::min(begin + step, groups);
    if (two_phases) {
      const int64_t need = end == groups ? all_rows : rows_needed(p, pieces, pieces.first_of(end, groups));
      parallel_rows(p, rows_done, need,
                    [&](int64_t n, int64_t r0, int64_t r1) { k.apply_backward(p, n, r0, r1); });
      rows_done = std::max(rows_done, need);
    }
    parallel(begin, end, [&](int64_t b, int64_t e) { k.backward(p, layout, groups, b, e); });
  }
  if (p.weight_grads)
    parallel(0, layout.weight_panels, [&](int64_t b, int64_t e) { k.weights(p, layout, b, e); });
  // Of batch norms the first pass leaves all sums but those of the weights, the second one these.
  constexpr int64_t piece = 4096;
  const int64_t first = p.norm_sums ? layout.bias_at : 0,
                last = p.norms && !p.norm_sums ? layout.bias_at : layout.partial_elements;
  parallel(0, (last - first + piece - 1) / piece, [&](int64_t b, int64_t e) {
    k.reduce(p, layout, groups, first + b * piece, std::min(first + e * piece, last));
  });
}

void run_statistics(const Problem& p, const Layout& layout, const Statistics& to) {
  const Kernels& k = kernels(p.dtype);
  parallel(0, layout.pack_units, [&](int64_t b, int64_t e) { k.pack(p, layout, false, b, e); });
  const Pieces pieces(p, layout.tile);
  parallel(0, to.groups, [&](int64_t b, int64_t e) {
    for (int64_t g = b; g < e; ++g) {
      bool first = true;
      pieces.for_runs(pieces.first_of(g, to.groups), pieces.first_of(g + 1, to.groups),
                      [&](int64_t n, int64_t v0, int64_t v1) {
                        k.statistics(p, layout, to, g, first, n, v0, v1);
                        first = false;
                      });
    }
  });
}

void run_apply_backward(const Problem& p) {
  const Kernels& k = kernels(p.dtype);
  parallel_rows(p, 0, p.batch * p.fine.d * p.fine.h,
                [&](int64_t n, int64_t r0, int64_t r1) { k.apply_backward(p, n, r0, r1); });
  if (!p.dalpha_out || p.dalpha_out == p.dfine) return;
  parallel(0, p.batch, [&](int64_t b, int64_t e) {
    for (int64_t n = b; n < e; ++n) k.gather_dalpha(p, n, 0, p.coarse.voxels());
  });
}

void run_gather_dphi(const Problem& p) {
  const int64_t rows = p.dphi.grid.d * p.dphi.grid.h;
  parallel(0, p.batch * rows, [&](int64_t b, int64_t e) {
    for (int64_t r = b; r < e;) {
      const int64_t n = r / rows, stop = std::min(e, (n + 1) * rows);
      kernels(p.dtype).gather_dphi(p, n, r - n * rows, stop - n * rows);
      r = stop;
    }
  });
}

}  // namespace attn_gate::cpu
