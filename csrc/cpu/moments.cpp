// Mean and covariance of a map's patches, and their gradient: checks, workspace, and the split over threads.

#include <algorithm>
#include <tuple>

#include "../boxing.h"
#include "../tensors.h"
#include "memory.h"
#include "problem.h"

namespace attn_gate::cpu {
namespace {

template <class F>
void parallel(int64_t count, F&& f) {
  if (count > 0) torch::stable::parallel_for(0, count, 1, std::forward<F>(f));
}

struct MomentsCall {
  Moments p;
  Tensor x;
  int64_t batch, tiles_per_sample;

  MomentsCall(const Tensor& x_, const Ints& kernel, const Ints& stride) : x(x_), batch(x_.size(0)) {
    check_map(x, "x", x);
    const size_t dims = size_t(x.dim()) - 2;
    STD_TORCH_CHECK(kernel.size() == dims && stride.size() == dims, "attn_gate: kernel and stride take ",
                    dims, " values, one for each axis of x ", shape_of(x));
    if (storage_of(x) == Storage::other) x = torch::stable::contiguous(x);
    p.dtype = dtype_of(x);
    p.x = map_over(x);
    p.kernel = grid_from(kernel);
    p.stride = grid_from(stride);
    Ints coarse;
    for (size_t i = 0; i < dims; ++i) {
      const int64_t n = x.size(int64_t(i) + 2), k = kernel[i], s = stride[i];
      STD_TORCH_CHECK(k >= 1 && s >= k && n >= k, "attn_gate: kernel (", k,
                      ") must be at least 1 and fit into x (", n, ") and the stride (", s, ")");
      coarse.push_back((n - k) / s + 1);
    }
    p.coarse = grid_from(coarse);
    STD_TORCH_CHECK(count() > 0, "attn_gate: x has no voxels, of which there is no mean: ", shape_of(x));
    kernels(p.dtype).moments_layout(p);
    tiles_per_sample = (p.coarse.voxels() + p.tile - 1) / p.tile;
  }
  static Map map_over(const Tensor& t) {
    return {const_cast<void*>(t.const_data_ptr()), t.size(1), grid_of(t),
            storage_of(t) == Storage::channels_last};
  }
  static Grid grid_from(const Ints& sizes) {
    Grid g;
    g.w = sizes.back();
    g.h = sizes[sizes.size() - 2];
    g.d = sizes.size() == 3 ? sizes[0] : 1;
    return g;
  }
  int64_t count() const { return batch * p.coarse.voxels(); }
  int64_t tiles() const { return batch * tiles_per_sample; }
  // Calls f(n, v0, v1) for the runs of tiles [begin, end), which never cross a sample.
  template <class F>
  void for_runs(int64_t begin, int64_t end, F&& f) const {
    for (int64_t t = begin; t < end;) {
      const int64_t n = t / tiles_per_sample, last = std::min(end, (n + 1) * tiles_per_sample);
      f(n, (t - n * tiles_per_sample) * p.tile,
        std::min((last - n * tiles_per_sample) * p.tile, p.coarse.voxels()));
      t = last;
    }
  }
  Tensor doubles(const Ints& shape) const { return torch::stable::new_empty(x, shape, ScalarType::Double); }
  static double* data(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }
};

std::tuple<Tensor, Tensor> moments_fwd(const Tensor& x, Ints kernel, Ints stride) {
  MomentsCall call(x, kernel, stride);
  Moments& p = call.p;
  const int64_t K = p.rows(), tiles = call.tiles();
  // By the problem alone, never by the number of threads: the same bits from run to run.
  const int64_t most = std::clamp<int64_t>((int64_t(4) << 20) / (8 * p.state_elements()), 8, 64);
  p.groups = std::min(tiles, most);
  Tensor state = call.doubles({p.groups * p.state_elements()}), mean = call.doubles({K}),
         cov = call.doubles({K, K});
  p.state = MomentsCall::data(state);
  p.mean = MomentsCall::data(mean);
  p.cov = MomentsCall::data(cov);
  parallel(p.groups, [&](int64_t b, int64_t e) {
    for (int64_t g = b; g < e; ++g) {
      bool first = true;
      call.for_runs(tiles * g / p.groups, tiles * (g + 1) / p.groups, [&](int64_t n, int64_t v0, int64_t v1) {
        kernels(p.dtype).moments(p, g, first, n, v0, v1);
        first = false;
      });
    }
  });
  const int64_t piece = std::max<int64_t>(1, 65536 / (K + 1));
  parallel((K + piece - 1) / piece, [&](int64_t b, int64_t e) {
    kernels(p.dtype).moments_join(p, b * piece, std::min(e * piece, K));
  });
  return {mean, cov};
}

// slope = (dcov + dcov^T) / n in the micro-kernel's blocks of rows, zeros behind the last; offset = dmean /
// n, less what the rounding of the centre adds.
template <class A>
void pack_slopes(const Moments& p, const double* dmean, const double* dcov, const double* mean, double n,
                 A* slope, A* centre, A* offset) {
  const int64_t K = p.rows(), B = p.block;
  for (int64_t k = 0; k < K; ++k) centre[k] = A(mean[k]);
  for (int64_t i0 = 0; i0 < K; i0 += B)
    for (int64_t r = 0; r < B; ++r) {
      const int64_t i = i0 + r;
      double shift = i < K && dmean ? dmean[i] / n : 0;
      for (int64_t k = 0; k < K; ++k) {
        const double s = i < K && dcov ? (dcov[i * K + k] + dcov[k * K + i]) / n : 0;
        slope[i0 * K + k * B + r] = A(s);
        shift -= s * (mean[k] - double(centre[k]));
      }
      offset[i] = A(shift);
    }
}

void run_backward(MomentsCall& call, const MaybeTensor& dmean, const MaybeTensor& dcov, const Tensor& mean) {
  Moments& p = call.p;
  const int64_t K = p.rows(), padded = (K + p.block - 1) / p.block * p.block;
  auto checked = [&](const Tensor& t, const char* name, int64_t dims) {
    bool fits = t.is_cpu() && t.scalar_type() == ScalarType::Double && t.dim() == dims;
    for (int64_t i = 0; fits && i < dims; ++i) fits = t.size(i) == K;
    STD_TORCH_CHECK(fits, "attn_gate: ", name, " has shape ", shape_of(t), " where ", dims, " times ", K,
                    " in float64 are needed");
    return torch::stable::contiguous(t);
  };
  const Tensor centre = checked(mean, "mean", 1);
  const MaybeTensor dm = dmean ? MaybeTensor(checked(*dmean, "dmean", 1)) : std::nullopt;
  const MaybeTensor dc = dcov ? MaybeTensor(checked(*dcov, "dcov", 2)) : std::nullopt;
  auto values = [](const MaybeTensor& t) { return t ? MomentsCall::data(*t) : nullptr; };
  Tensor packed = torch::stable::new_empty(call.x, Ints{padded * K + K + padded}, acc_dtype(call.x));
  auto pack = [&](auto* slope) {
    pack_slopes(p, values(dm), values(dc), MomentsCall::data(centre), double(call.count()), slope,
                slope + padded * K, slope + padded * K + K);
    p.slope = slope;
    p.centre = slope + padded * K;
    p.offset = slope + padded * K + K;
  };
  void* memory = packed.mutable_data_ptr();
  p.dtype == DType::f64 ? pack(static_cast<double*>(memory)) : pack(static_cast<float*>(memory));
  parallel(call.tiles(), [&](int64_t b, int64_t e) {
    call.for_runs(
        b, e, [&](int64_t n, int64_t v0, int64_t v1) { kernels(p.dtype).moments_backward(p, n, v0, v1); });
  });
}

Tensor moments_bwd(const MaybeTensor& dmean, const MaybeTensor& dcov, const Tensor& x, const Tensor& mean,
                   Ints kernel, Ints stride, int64_t needs) {
  MomentsCall call(x, kernel, stride);
  Moments& p = call.p;
  if (!(needs & 1)) return torch::stable::new_empty(x, Ints{0}, x.scalar_type());
  Tensor dx = new_map(call.x, call.x.size(1), grid_sizes(call.x));
  p.dx = MomentsCall::map_over(dx);
  const bool covered = p.kernel == p.stride && p.coarse.d * p.kernel.d == p.x.grid.d &&
                       p.coarse.h * p.kernel.h == p.x.grid.h && p.coarse.w * p.kernel.w == p.x.grid.w;
  if (!covered) torch::stable::zero_(dx);
  run_backward(call, dmean, dcov, mean);
  return dx;
}

}  // namespace
}  // namespace attn_gate::cpu

STABLE_TORCH_LIBRARY_IMPL(attn_gate, CPU, m) {
  using namespace attn_gate::cpu;
  m.impl("moments_fwd", ATTN_GATE_BOX(moments_fwd));
  m.impl("moments_bwd", ATTN_GATE_BOX(moments_bwd));
}
