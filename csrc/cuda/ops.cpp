// The operators on CUDA: inputs checked, outputs and workspace allocated, kernels launched on the current
// stream.
//
// Nothing here waits for the device, and all memory comes from PyTorch's allocator, so calls can be captured
// in a CUDA graph. attention_gate and attention_logits are compositions, in attn_gate/composed.py.
#include <torch/csrc/stable/accelerator.h>

#include <tuple>

#include "../boxing.h"
#include "../tensors.h"
#include "plan.h"

namespace attn_gate::cuda {
namespace {

Map map_over(const Tensor& t, void* data) {
  // Tensors without elements have no memory; a map that is there is not null all the same.
  alignas(16) static char nothing[16];
  if (t.numel() == 0) data = nothing;
  const int64_t channels = t.size(1), voxels = grid_of(t).voxels();
  if (storage_of(t) == Storage::channels_last) return {data, channels, channels * voxels, 1, channels};
  return {data, channels, channels * voxels, voxels, 1};
}

Tensor new_map(const Tensor& like, int64_t channels, const Ints& grid) {
  return torch::stable::empty(map_shape(like, channels, grid), like.scalar_type(), std::nullopt,
                              like.device(), std::nullopt, map_format(like));
}

// A call under way: the device and stream, and the tensors that kernels' pointers lie in.
struct Call {
  Tensor like;  // x (or theta): dtype and device of all
  DType dtype;
  int element, wide;  // bytes of an element, elements of 16 bytes
  std::vector<Tensor> held;
#if defined(ATTN_GATE_CUDA_ON_HOST)
  void* stream = nullptr;
#else
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
#endif

  explicit Call(const Tensor& x)
      : like(x), dtype(dtype_of(x)), element(int(x.element_size())), wide(16 / element)
#if !defined(ATTN_GATE_CUDA_ON_HOST)
        ,
        guard(x.get_device_index())
#endif
  {
    STD_TORCH_CHECK(x.dim() == 4 || x.dim() == 5,
                    "attn_gate: maps are [N, channels, H, W] or [N, channels, D, H, W], got ", shape_of(x));
#if !defined(ATTN_GATE_CUDA_ON_HOST)
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
#endif
  }

  const void* hold(const Tensor& t) {
    held.push_back(t);
    return t.const_data_ptr();
  }
  void* hold_out(const Tensor& t) {
    held.push_back(t);
    return t.mutable_data_ptr();
  }
  // As it is where its layout is native, else a contiguous copy.
  Tensor native(const Tensor& t, const char* name) const {
    check_map(t, name, like);
    return storage_of(t) == Storage::other ? torch::stable::contiguous(t) : t;
  }
  Tensor in_layout_of(const Tensor& t, const Tensor& wanted) const {
    if (storage_of(t) == storage_of(wanted) || t.size(1) == 1 || grid_of(t).voxels() == 1) return t;
    Tensor copy = new_map(wanted, t.size(1), grid_sizes(t));
    return torch::stable::copy_(copy, t);
  }
  Map input(const Tensor& t) { return map_over(t, const_cast<void*>(hold(t))); }
  Map output(const Tensor& t) { return map_over(t, hold_out(t)); }

  Tensor new_acc(const Ints& shape) const { return torch::stable::new_empty(like, shape, acc_dtype(like)); }
  Tensor no_map() const { return torch::stable::new_empty(like, Ints{0}, like.scalar_type()); }
  Tensor no_acc() const { return new_acc({0}); }
  Tensor like_if(bool wanted, const Tensor& t) const {
    return wanted ? new_map(t, t.size(1), grid_sizes(t)) : no_map();
  }

  // Whether a map can be read and written 16 bytes at a time: along the channels of a voxel in channels-last
  // maps, else along rows, or (whole) along all voxels.
  bool allows_wide(const Map& m, bool channels_last, const Grid& grid, bool whole) const {
    if (!m) return true;
    const int64_t run = channels_last ? m.channels : whole ? grid.voxels() : grid.w;
    return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && run % wide == 0 && m.sample % wide == 0;
  }
};

// theta, phi and psi, checked, in one layout.
struct Given {
  Chain chain;
  Tensor theta;
  MaybeTensor phi, phi_as_given;

  Given(Call& call, const Tensor& theta_, const MaybeTensor& phi_, const Tensor& psi_weight,
        const MaybeTensor& psi_bias, const std::string& phi_resize, const std::string& activation)
      : theta(call.native(theta_, "theta")) {
    chain.inter = int(theta.size(1));
    chain.coarse = chain.gating = grid_of(theta);
    chain.theta = call.input(theta);
    chain.activation = activation_of(activation);
    const Resize mode = resize_of(phi_resize, "phi_resize");
    if (phi_) {
      phi_as_given = call.native(*phi_, "phi");
      STD_TORCH_CHECK(phi_->size(1) == chain.inter, "attn_gate: phi has ", phi_->size(1),
                      " channels, theta has ", chain.inter);
      chain.gating = grid_of(*phi_as_given);
      check_resizable(chain.gating, chain.coarse, "phi");
      if (!(chain.gating == chain.coarse)) chain.phi_resize = mode;
      phi = call.in_layout_of(*phi_as_given, theta);
      chain.phi = call.input(*phi);
    }
    chain.psi = call.hold(check_acc(psi_weight, "psi_weight", call.like, {chain.inter}));
    if (psi_bias) chain.psi_bias = call.hold(check_acc(*psi_bias, "psi_bias", call.like, {1}));
  }
  // Maps on theta's grid.
  bool allows_wide(const Call& call, bool whole) const {
    const bool last = chain.theta.channels_last(), resized = chain.phi_resized();
    for (const Map* m : {&chain.theta, &chain.dtheta, resized ? &chain.theta : &chain.phi,
                         resized ? &chain.theta : &chain.dphi})
      if (!call.allows_wide(*m, last, chain.coarse, whole)) return false;
    return true;
  }
  bool allows_wide_phi(const Call& call) const {
    return chain.phi_resized() &&
           call.allows_wide(chain.phi, chain.theta.channels_last(), chain.gating, false);
  }
};

Ints channel_shape(const Tensor& t) {
  Ints shape{t.size(0), 1}, grid = grid_sizes(t);
  shape.insert(shape.end(), grid.begin(), grid.end());
  return shape;
}

// ------------------------------------------------------------------------------------------------- forward

void run(Call& call, Forward& p, Resize mode, bool chain_wide) {
  p.batch = call.like.size(0);
  if (p.batch == 0 || p.coarse.voxels() == 0) return;
  const bool whole = p.coarse == p.fine && !p.chain.phi_resized(), last = p.x.channels_last();
  const bool stream_wide =
      call.allows_wide(p.x, last, p.fine, whole) && call.allows_wide(p.y, last, p.fine, whole);
  plan_forward(p, mode, call.element, call.wide, chain_wide, stream_wide, processors());
  STD_TORCH_CHECK(p.tiling.box > 0, "attn_gate: no tile of these grids fits into shared memory",
                  p.chain.phi_resized() ? ": phi is much finer than theta; resize it first" : "");
  launch_forward(p, call.dtype, call.stream);
}

std::tuple<Tensor, Tensor> gate_fwd(const Tensor& x, const Tensor& theta, const MaybeTensor& phi,
                                    const Tensor& psi_weight, const MaybeTensor& psi_bias,
                                    std::string phi_resize, std::string alpha_resize,
                                    std::string activation) {
  Call call(x);
  const Tensor x_ = call.native(x, "x");
  const Given given(call, theta, phi, psi_weight, psi_bias, phi_resize, activation);
  Forward p;
  p.chain = given.chain;
  p.coarse = given.chain.coarse;
  p.fine = grid_of(x);
  const Resize mode = resize_of(alpha_resize, "alpha_resize");
  check_resizable(p.coarse, p.fine, "theta");
  Tensor y = new_map(x_, x.size(1), grid_sizes(x)), alpha = call.new_acc(channel_shape(given.theta));
  p.x = call.input(x_);
  p.y = call.output(y);
  p.alpha = call.hold_out(alpha);
  p.chain.phi_wide = given.allows_wide_phi(call);
  run(call, p, mode, given.allows_wide(call, p.coarse == p.fine && !p.chain.phi_resized()));
  return {y, alpha};
}

Tensor gate_logits_fwd(const Tensor& theta, const MaybeTensor& phi, const Tensor& psi_weight,
                       const MaybeTensor& psi_bias, std::string phi_resize, std::string activation) {
  Call call(theta);
  const Given given(call, theta, phi, psi_weight, psi_bias, phi_resize, activation);
  Forward p;
  p.chain = given.chain;
  p.coarse = p.fine = given.chain.coarse;
  Tensor logits = call.new_acc(channel_shape(given.theta));
  p.alpha = call.hold_out(logits);
  p.chain.phi_wide = given.allows_wide_phi(call);
  run(call, p, Resize::identity, given.allows_wide(call, !p.chain.phi_resized()));
  return logits;
}

Tensor checked_alpha(const Call& call, const Tensor& alpha, const Tensor& x) {
  STD_TORCH_CHECK(alpha.dim() == x.dim() && alpha.size(0) == x.size(0), "attn_gate: alpha has shape ",
                  shape_of(alpha), ", which does not fit x ", shape_of(x));
  check_resizable(grid_of(alpha), grid_of(x), "alpha");
  return check_acc(alpha, "alpha", call.like, channel_shape(alpha));
}

Tensor gate_apply_fwd(const Tensor& x, const Tensor& alpha, std::string alpha_resize) {
  Call call(x);
  const Tensor x_ = call.native(x, "x"), alpha_ = checked_alpha(call, alpha, x);
  Forward p;
  p.coarse = grid_of(alpha);
  p.fine = grid_of(x);
  Tensor y = new_map(x_, x.size(1), grid_sizes(x));
  p.x = call.input(x_);
  p.y = call.output(y);
  p.alpha = const_cast<void*>(call.hold(alpha_));
  run(call, p, resize_of(alpha_resize, "alpha_resize"), true);
  return y;
}

// ------------------------------------------------------------------------------------------------ backward

bool streams_wide(const Call& call, const Backward& p) {
  const bool last = p.x.channels_last();
  for (const Map* m : {&p.x, &p.dy, &p.dx})
    if (!call.allows_wide(*m, last, p.fine, p.coarse == p.fine)) return false;
  return true;
}

// Blocks, or groups of them, that leave a row of sums each.
int64_t groups_of(int64_t tiles) { return std::min<int64_t>(tiles, kMaxGroups); }

// dx, and if another kernel comes behind, dfine for it.
void run_stream(Call& call, Backward& p, bool behind) {
  Backward stream = p;
  stream.chain = Chain();
  stream.dalpha_out = nullptr;
  if (behind) {
    Tensor dfine = call.new_acc({p.batch, p.fine.voxels()});
    p.dfine = stream.dfine = call.hold_out(dfine);
  }
  STD_TORCH_CHECK(plan_backward(stream, p.coarse, p.fine, p.alpha_resize, false, call.element, call.wide,
                                streams_wide(call, p), processors()),
                  "attn_gate: no tile fits into shared memory");
  launch_backward(stream, call.dtype, stream.batch * stream.tiling.tiles(), call.stream);
}

// Launches what has been asked for: one kernel if it can do all, else one for each grid. Returns how many
// blocks left sums.
int64_t run(Call& call, Backward& p, bool needs_sums, const Given* given, Tensor& sums) {
  const bool same = p.coarse == p.fine, behind = needs_sums || p.dalpha_out;
  const int sm = processors();
  auto launch_chain = [&](Backward& q) {
    const int64_t groups = groups_of(q.batch * q.tiling.tiles());
    if (needs_sums) {
      sums = call.new_acc({groups * (q.chain.inter + 1)});
      q.sums = call.hold_out(sums);
    }
    launch_backward(q, call.dtype, groups, call.stream);
    return groups;
  };
  if (p.dy && behind && (same || p.alpha_resize == Resize::nearest)) {
    Backward q = p;
    if (needs_sums) q.sums = &q;  // what it takes of shared memory depends on whether there are any
    q.chain.wide = given && given->allows_wide(call, same);
    if (plan_backward(q, p.coarse, p.fine, p.alpha_resize, true, call.element, call.wide,
                      streams_wide(call, p), sm))
      return launch_chain(q);
  }
  if (p.dy) run_stream(call, p, behind);
  if (!behind) return 0;
  Backward chain = p;
  chain.dy = chain.x = chain.dx = Map();
  if (needs_sums) chain.sums = &chain;
  auto plan = [&](const Grid& fine) {
    chain.chain.wide = given && given->allows_wide(call, fine == p.coarse);
    return plan_backward(chain, p.coarse, fine, p.alpha_resize, true, call.element, call.wide, false, sm);
  };
  STD_TORCH_CHECK((p.dfine && plan(p.fine)) || plan(p.coarse), "attn_gate: no tile fits into shared memory");
  return launch_chain(chain);
}

// The same where phi has a grid of its own: at most two kernels.
int64_t run_resized(Call& call, Backward& p, const Given& given, bool needs_chain, Tensor& sums) {
  if (p.dy) run_stream(call, p, needs_chain);
  if (!needs_chain) return 0;
  PhiBackward q;
  q.chain = given.chain;
  q.chain.wide = given.allows_wide(call, false);
  q.chain.phi_wide = given.allows_wide_phi(call);
  q.fine = p.fine;
  if (q.fine.d * q.chain.coarse.d * q.chain.gating.d == 1)  // swept along H
    for (Grid* grid : {&q.fine, &q.chain.coarse, &q.chain.gating}) std::swap(grid->d, grid->h);
  const Grid &S = q.fine, &R = q.chain.coarse, &Q = q.chain.gating;
  q.d = {S.d, R.d, Q.d};
  q.h = {S.h, R.h, Q.h};
  q.w = {S.w, R.w, Q.w};
  q.alpha_resize = p.alpha_resize;
  q.alpha = p.alpha;
  q.dalpha = p.dalpha;
  q.dfine = p.dfine;
  q.batch = p.batch;
  STD_TORCH_CHECK(plan_phi_backward(q, call.element, call.wide, processors()),
                  "attn_gate: no tile of these grids fits into shared memory");
  STD_TORCH_CHECK(q.batch * q.tiles() <= 0x7fffffff, "attn_gate: phi has too many voxels");
  const int64_t groups = groups_of(q.batch * q.tiles());
  sums = call.new_acc({groups * (q.chain.inter + 1)});
  q.sums = call.hold_out(sums);
  launch_phi_backward(q, call.dtype, groups, call.stream);
  return groups;
}

// theta's, phi's and psi's gradients of gate and gate_logits; p holds the rest of the problem.
std::tuple<Tensor, Tensor, Tensor, Tensor> given_bwd(Call& call, Given& given, Backward& p, int64_t needs) {
  Chain& chain = given.chain;
  const bool need_theta = wants(needs, 0), need_phi = given.phi && wants(needs, 1),
             need_psi = wants(needs, 2), need_bias = wants(needs, 3), resized = chain.phi_resized();
  const bool needs_chain = need_theta || need_phi || need_psi || need_bias;
  p.batch = call.like.size(0);
  // On theta's grid phi's gradient is theta's.
  Tensor dtheta = call.like_if(need_theta, given.theta),
         dphi = call.like_if(need_phi, resized ? *given.phi_as_given : given.theta);
  Tensor dpsi = need_psi ? call.new_acc({chain.inter}) : call.no_acc(),
         dpsi_bias = need_bias ? call.new_acc({1}) : call.no_acc();
  const bool empty = p.batch == 0 || p.coarse.voxels() == 0;
  if (empty || chain.inter == 0) {  // sums over nothing
    if (need_psi) torch::stable::zero_(dpsi);
    if (empty && need_bias) torch::stable::zero_(dpsi_bias);
  }
  if (!empty && (needs_chain || p.dy)) {
    if (need_theta) chain.dtheta = call.output(dtheta);
    if (need_phi) (need_theta || resized ? chain.dphi : chain.dtheta) = call.output(dphi);
    p.chain = chain;
    Tensor sums;
    const int64_t groups =
        resized ? run_resized(call, p, given, needs_chain, sums) : run(call, p, needs_chain, &given, sums);
    if (need_psi || need_bias)
      launch_reduce(sums.const_data_ptr(), groups, chain.inter, need_psi ? dpsi.mutable_data_ptr() : nullptr,
                    need_bias ? dpsi_bias.mutable_data_ptr() : nullptr, call.dtype, call.stream);
  }
  return {dtheta, dphi, dpsi, dpsi_bias};
}

void take_gradients(Call& call, Backward& p, const MaybeTensor& dy, const Tensor& x, bool need_x,
                    Tensor& dx) {
  p.fine = grid_of(x);
  dx = call.like_if(need_x, x);
  if (!dy) {
    if (need_x) torch::stable::zero_(dx);
    return;
  }
  Tensor dy_ = call.native(*dy, "dy");
  STD_TORCH_CHECK(dy_.size(1) == x.size(1) && grid_of(dy_) == p.fine, "attn_gate: dy has shape ",
                  shape_of(*dy), " where x has ", shape_of(x));
  dy_ = call.in_layout_of(dy_, x);
  p.x = call.input(x);
  p.dy = call.input(dy_);
  // dy has x's elements in x's order, also where one voxel or channel lets its strides say otherwise.
  p.dy = {p.dy.data, p.x.channels, p.x.sample, p.x.channel, p.x.voxel};
  if (need_x) {
    p.dx = call.output(dx);
    p.dx = {p.dx.data, p.x.channels, p.x.sample, p.x.channel, p.x.voxel};
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gate_bwd(const MaybeTensor& dy, const MaybeTensor& dalpha,
                                                            const Tensor& x, const Tensor& theta,
                                                            const MaybeTensor& phi, const Tensor& psi_weight,
                                                            const Tensor& alpha, std::string phi_resize,
                                                            std::string alpha_resize, std::string activation,
                                                            int64_t needs) {
  Call call(x);
  const Tensor x_ = call.native(x, "x");
  Given given(call, theta, phi, psi_weight, std::nullopt, phi_resize, activation);
  Backward p;
  p.coarse = given.chain.coarse;
  const Ints shape = channel_shape(given.theta);
  p.alpha = call.hold(check_acc(alpha, "alpha", x, shape));
  if (dalpha) p.dalpha = call.hold(check_acc(*dalpha, "dalpha", x, shape));
  const Resize mode = resize_of(alpha_resize, "alpha_resize");
  Tensor dx;
  take_gradients(call, p, dy, x_, wants(needs, 0), dx);
  check_resizable(p.coarse, p.fine, "theta");
  if (!(p.coarse == p.fine)) p.alpha_resize = mode;
  auto [dtheta, dphi, dpsi, dpsi_bias] = given_bwd(call, given, p, needs >> 1);
  return {dx, dtheta, dphi, dpsi, dpsi_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gate_logits_bwd(const Tensor& dlogits, const Tensor& theta,
                                                           const MaybeTensor& phi, const Tensor& psi_weight,
                                                           std::string phi_resize, std::string activation,
                                                           int64_t needs) {
  Call call(theta);
  Given given(call, theta, phi, psi_weight, std::nullopt, phi_resize, activation);
  Backward p;
  p.coarse = p.fine = given.chain.coarse;
  p.dalpha = call.hold(check_acc(dlogits, "dlogits", theta, channel_shape(given.theta)));
  return given_bwd(call, given, p, needs);
}

std::tuple<Tensor, Tensor> gate_apply_bwd(const Tensor& dy, const Tensor& x, const Tensor& alpha,
                                          std::string alpha_resize, int64_t needs) {
  Call call(x);
  const Tensor x_ = call.native(x, "x"), alpha_ = checked_alpha(call, alpha, x);
  Backward p;
  p.batch = x.size(0);
  p.coarse = grid_of(alpha);
  p.alpha = call.hold(alpha_);
  const Resize mode = resize_of(alpha_resize, "alpha_resize");
  Tensor dx, dalpha = call.no_acc(), sums;
  take_gradients(call, p, dy, x_, wants(needs, 0), dx);
  if (!(p.coarse == p.fine)) p.alpha_resize = mode;
  if (wants(needs, 1)) {
    dalpha = call.new_acc(sizes_of(alpha));
    p.dalpha_out = call.hold_out(dalpha);
  }
  if (p.batch > 0 && p.coarse.voxels() > 0) run(call, p, false, nullptr, sums);
  return {dx, dalpha};
}

}  // namespace
}  // namespace attn_gate::cuda

#if defined(ATTN_GATE_CUDA_ON_HOST)
STABLE_TORCH_LIBRARY_IMPL(attn_gate_cuda_host_kernels, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(attn_gate, CUDA, m) {
#endif
  using namespace attn_gate::cuda;
  m.impl("gate_fwd", ATTN_GATE_BOX(gate_fwd));
  m.impl("gate_bwd", ATTN_GATE_BOX(gate_bwd));
  m.impl("gate_logits_fwd", ATTN_GATE_BOX(gate_logits_fwd));
  m.impl("gate_logits_bwd", ATTN_GATE_BOX(gate_logits_bwd));
  m.impl("gate_apply_fwd", ATTN_GATE_BOX(gate_apply_fwd));
  m.impl("gate_apply_bwd", ATTN_GATE_BOX(gate_apply_bwd));
}
