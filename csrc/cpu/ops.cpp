// The operators on the CPU: every input checked, outputs and workspace allocated, the schedule run.
// Checks come before any parallel loop: an exception thrown inside one loses its message.

#include <algorithm>
#include <cstring>
#include <tuple>

#include "../boxing.h"
#include "../tensors.h"
#include "memory.h"
#include "schedule.h"

namespace attn_gate::cpu {
namespace {

// A call under way: the problem, and the tensors that its pointers lie in.
struct Call {
  Problem p;
  Layout layout;
  Tensor like;  // x (or theta): dtype and device of all
  Tensor partial;
  std::vector<Tensor> held;
  Ints coarse;  // R, without the batch and the channels

  Call(const Tensor& x, int64_t inter) : like(x) {
    STD_TORCH_CHECK(x.is_cpu(), "attn_gate: not a CPU tensor");
    p.dtype = dtype_of(x);
    p.batch = x.size(0);
    p.inter = inter;
  }
  const void* hold(const Tensor& t) {
    held.push_back(t);
    return t.const_data_ptr();
  }
  Map map_over(const Tensor& t, void* data) const {
    // Tensors without elements have no memory; a map that is there is not null all the same.
    return {t.numel() ? data : const_cast<Call*>(this), t.size(1), grid_of(t),
            storage_of(t) == Storage::channels_last};
  }
  // As it is where its layout is native, else a contiguous copy.
  Map input(const Tensor& t, const char* name) {
    check_map(t, name, like);
    const Tensor native = storage_of(t) == Storage::other ? torch::stable::contiguous(t) : t;
    return map_over(native, const_cast<void*>(hold(native)));
  }
  Map output(const Tensor& t) {
    void* data = t.mutable_data_ptr();
    held.push_back(t);
    Map map = map_over(t, data);
    map.has_pages = has_pages(t);
    return map;
  }
  Tensor new_acc(const Ints& shape) const { return cpu::new_acc(like, shape); }
  Tensor no_map() const { return torch::stable::new_empty(like, Ints{0}, like.scalar_type()); }
  Tensor no_acc() const { return new_acc({0}); }
  // An output like t (its own layout where native), if wanted.
  Tensor like_if(bool wanted, const Tensor& t) const {
    return wanted ? new_map(t, t.size(1), grid_sizes(t)) : no_map();
  }
  bool empty() const { return p.batch == 0 || p.coarse.voxels() == 0 || (p.x && p.fine.voxels() == 0); }

  void take_x(const Tensor& x) {
    p.x = input(x, "x");
    p.fine = p.x.grid;
  }
  // theta's weight, and the coarse grid that its patches make.
  void take_theta(const Tensor& x, const Tensor& theta_weight, const Ints& stride) {
    const int64_t dims = x.dim() - 2;
    STD_TORCH_CHECK(theta_weight.dim() == x.dim() && int64_t(stride.size()) == dims,
                    "attn_gate: theta_weight has shape ", shape_of(theta_weight), " and stride ",
                    stride.size(), " values, which does not fit x ", shape_of(x));
    Ints shape = sizes_of(theta_weight);
    shape[1] = x.size(1);
    p.theta_weight = hold(check_acc(theta_weight, "theta_weight", x, shape));
    for (int64_t i = 0; i < dims; ++i) {
      const int64_t k = theta_weight.size(i + 2), s = stride[size_t(i)], n = x.size(i + 2);
      STD_TORCH_CHECK(k >= 1 && s >= k, "attn_gate: theta's kernel (", k,
                      ") must not be larger than its stride (", s, ")");
      STD_TORCH_CHECK(n >= k, "attn_gate: x has ", n, " voxels along an axis where theta's kernel takes ", k);
      coarse.push_back((n - k) / s + 1);
    }
    auto as_grid = [&](auto&& at) {
      Grid r;
      r.w = at(dims - 1);
      r.h = at(dims - 2);
      r.d = dims == 3 ? at(0) : 1;
      return r;
    };
    p.kernel = as_grid([&](int64_t i) { return theta_weight.size(i + 2); });
    p.stride = as_grid([&](int64_t i) { return stride[size_t(i)]; });
    if (dims == 2) p.stride.d = 1;
    p.coarse = as_grid([&](int64_t i) { return coarse[size_t(i)]; });
    p.project = true;
  }
  void take_psi(const Tensor& weight, const MaybeTensor& bias) {
    p.psi = hold(check_acc(weight, "psi_weight", like, {p.inter}));
    if (bias) p.psi_bias = hold(check_acc(*bias, "psi_bias", like, {1}));
  }
  void take_given(const Tensor& theta, const MaybeTensor& phi, const std::string& phi_resize) {
    p.theta = input(theta, "theta");
    p.coarse = p.theta.grid;
    p.phi_resize = resize_of(phi_resize, "phi_resize");
    if (!phi) return;
    p.phi = input(*phi, "phi");
    STD_TORCH_CHECK(p.phi.channels == p.inter, "attn_gate: phi has ", p.phi.channels, " channels, theta has ",
                    p.inter);
    check_resizable(p.phi.grid, p.coarse, "phi");
  }
  // The output of gate and attention_gate: y and alpha; without a mode, alpha are the logits.
  void take_alpha_mode(const std::string& mode) {
    check_resizable(p.coarse, p.fine, "alpha");
    p.alpha_resize = p.same_grid() ? Resize::identity : resize_of(mode, "alpha_resize");
  }
  void take_alpha(const Tensor& alpha, const Ints& grid) {
    Ints shape{p.batch, 1};
    shape.insert(shape.end(), grid.begin(), grid.end());
    p.alpha = const_cast<void*>(hold(check_acc(alpha, "alpha", like, shape)));
  }
  Tensor new_alpha(const Ints& grid) {
    Ints shape{p.batch, 1};
    shape.insert(shape.end(), grid.begin(), grid.end());
    Tensor alpha = new_acc(shape);
    p.alpha = alpha.mutable_data_ptr();
    held.push_back(alpha);
    return alpha;
  }
  void take_gradients(const MaybeTensor& dy, const MaybeTensor& dalpha, const Tensor& alpha) {
    if (dy) {
      p.dy = input(*dy, "dy");
      STD_TORCH_CHECK(p.dy.channels == p.x.channels && p.dy.grid == p.fine, "attn_gate: dy has shape ",
                      shape_of(*dy));
      if (p.through_sigmoid && !p.same_grid()) {
        Tensor dfine = new_acc({p.batch, p.fine.voxels()});
        p.dfine = dfine.mutable_data_ptr();
        held.push_back(dfine);
      }
    }
    if (dalpha) p.dalpha = hold(check_acc(*dalpha, "dalpha", like, sizes_of(alpha)));
  }

  void allocate_packed() {
    Tensor packed = new_acc({layout.packed_elements});
    p.packed = packed.mutable_data_ptr();
    held.push_back(packed);
  }
  void forward() {
    if (empty()) return;
    layout = kernels(p.dtype).layout(p, false);
    allocate_packed();
    run_forward(p, layout);
  }
  // Parameter gradients are then read by sum().
  void backward(bool weight_grads) {
    with_workspace(weight_grads, [&](int64_t groups) { run_backward(p, layout, groups); });
  }
  template <class F>
  void with_workspace(bool weight_grads, F&& run) {
    p.weight_grads = weight_grads;
    layout = kernels(p.dtype).layout(p, true);
    const int64_t groups = empty() ? 1 : groups_of(p, layout);
    partial = new_acc({layout.group_at + groups * layout.partial_elements});
    p.partial = partial.mutable_data_ptr();
    if (empty()) {
      torch::stable::zero_(partial);
      return;
    }
    allocate_packed();
    Tensor turned = new_acc({layout.turned_elements});
    p.turned = turned.mutable_data_ptr();
    run(groups);
    p.turned = nullptr;
  }
  // `count` elements of the sums from `at` on; empty where they aren't wanted.
  Tensor sum(bool wanted, int64_t at, int64_t count) const {
    if (!wanted) return no_acc();
    Tensor out = new_acc({count});
    copy_sums(out, 0, layout.group_at + at, count);
    return out;
  }
  // The gradient of theta's weight, `columns` to a row, or of phi's.
  Tensor weight_sum(bool wanted, bool of_x, int64_t columns, const Ints& shape) const {
    if (!wanted) return no_acc();
    Tensor out = new_acc(shape);
    const int64_t first = of_x ? 0 : layout.columns_x, panel = of_x ? layout.panel_x : layout.panel_g;
    if (panel == 1) {  // of float32 then
      const int64_t rows = layout.weight_rows, block = 16;
      const float* from = static_cast<const float*>(p.partial) + first * rows;
      float* to = static_cast<float*>(out.mutable_data_ptr());
      for (int64_t b = 0; b < p.inter; b += block)
        for (int64_t k = 0; k < columns; ++k)
          for (int64_t i = b; i < std::min(b + block, p.inter); ++i) to[i * columns + k] = from[k * rows + i];
      return out;
    }
    for (int64_t i = 0; i < p.inter; ++i)
      for (int64_t k = 0; k < columns; k += panel)
        copy_sums(out, i * columns + k, (first + k) * layout.weight_rows + i * panel,
                  std::min(panel, columns - k));
    return out;
  }
  void copy_sums(const Tensor& out, int64_t to, int64_t from, int64_t count) const {
    const int64_t size = p.dtype == DType::f64 ? 8 : 4;
    std::memcpy(static_cast<char*>(out.mutable_data_ptr()) + to * size,
                static_cast<const char*>(p.partial) + from * size, size_t(count * size));
  }
};

// ---------------------------------------------------------------------------------------------------- gate

std::tuple<Tensor, Tensor> gate_fwd(const Tensor& x, const Tensor& theta, const MaybeTensor& phi,
                                    const Tensor& psi_weight, const MaybeTensor& psi_bias,
                                    std::string phi_resize, std::string alpha_resize,
                                    std::string activation) {
  Call call(x, theta.size(1));
  Problem& p = call.p;
  call.take_x(x);
  call.take_given(theta, phi, phi_resize);
  call.take_psi(psi_weight, psi_bias);
  call.take_alpha_mode(alpha_resize);
  p.activation = activation_of(activation);
  Tensor y = new_map(x, x.size(1), grid_sizes(x)), alpha = call.new_alpha(grid_sizes(theta));
  p.y = call.output(y);
  call.forward();
  return {y, alpha};
}

// theta, phi and psi's gradients of gate and gate_logits.
std::tuple<Tensor, Tensor, Tensor, Tensor> given_bwd(Call& call, const Tensor& theta, const MaybeTensor& phi,
                                                     int64_t needs) {
  Problem& p = call.p;
  const bool need_phi = phi && wants(needs, 1), resized = phi && !(p.phi.grid == p.coarse);
  Tensor dtheta = call.like_if(wants(needs, 0) || need_phi, theta),
         dphi = call.like_if(need_phi && resized, need_phi ? *phi : theta);
  if (wants(needs, 0) || need_phi) p.dtheta = call.output(dtheta);
  call.backward(false);
  if (need_phi && resized && !call.empty()) {
    p.dphi = call.output(dphi);
    run_gather_dphi(p);
  }
  if (need_phi && !resized) dphi = wants(needs, 0) ? torch::stable::clone(dtheta) : dtheta;
  return {wants(needs, 0) ? dtheta : call.no_map(), dphi,
          call.sum(wants(needs, 2), call.layout.psi_at, p.inter),
          call.sum(wants(needs, 3), call.layout.psi_bias_at, 1)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gate_bwd(const MaybeTensor& dy, const MaybeTensor& dalpha,
                                                            const Tensor& x, const Tensor& theta,
                                                            const MaybeTensor& phi, const Tensor& psi_weight,
                                                            const Tensor& alpha, std::string phi_resize,
                                                            std::string alpha_resize, std::string activation,
                                                            int64_t needs) {
  Call call(x, theta.size(1));
  Problem& p = call.p;
  call.take_x(x);
  call.take_given(theta, phi, phi_resize);
  call.take_psi(psi_weight, std::nullopt);
  call.take_alpha_mode(alpha_resize);
  call.take_alpha(alpha, grid_sizes(theta));
  p.through_sigmoid = true;
  call.take_gradients(dy, dalpha, alpha);
  p.activation = activation_of(activation);
  Tensor dx = call.like_if(wants(needs, 0), x);
  if (wants(needs, 0)) p.dx = call.output(dx);
  if (wants(needs, 0) && !dy) torch::stable::zero_(dx);
  auto [dtheta, dphi, dpsi, dpsi_bias] = given_bwd(call, theta, phi, needs >> 1);
  return {dx, dtheta, dphi, dpsi, dpsi_bias};
}

Tensor gate_logits_fwd(const Tensor& theta, const MaybeTensor& phi, const Tensor& psi_weight,
                       const MaybeTensor& psi_bias, std::string phi_resize, std::string activation) {
  Call call(theta, theta.size(1));
  call.take_given(theta, phi, phi_resize);
  call.p.fine = call.p.coarse;
  call.take_psi(psi_weight, psi_bias);
  call.p.activation = activation_of(activation);
  Tensor logits = call.new_alpha(grid_sizes(theta));
  call.forward();
  return logits;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gate_logits_bwd(const Tensor& dlogits, const Tensor& theta,
                                                           const MaybeTensor& phi, const Tensor& psi_weight,
                                                           std::string phi_resize, std::string activation,
                                                           int64_t needs) {
  Call call(theta, theta.size(1));
  call.take_given(theta, phi, phi_resize);
  call.p.fine = call.p.coarse;
  call.take_psi(psi_weight, std::nullopt);
  call.p.activation = activation_of(activation);
  call.take_alpha(dlogits, grid_sizes(theta));  // its shape and dtype are what d_logits must have
  call.p.dalpha = call.p.alpha;
  return given_bwd(call, theta, phi, needs);
}

// ----------------------------------------------------------------------------------------- attention_gate

// Both projections; where g's grid is not theta's, phi is made on g's grid first (I channels, not kept).
struct Attention : Call {
  Tensor g, phi_weight, phi;
  const void *centre_of_g = nullptr, *shift_of_g = nullptr;

  Attention(const Tensor& x, const Tensor& g_, const Tensor& theta_weight, const Tensor& phi_weight_,
            const MaybeTensor& bias, const Ints& stride, const std::string& phi_resize,
            const std::string& activation)
      : Call(x, theta_weight.size(0)), g(g_), phi_weight(phi_weight_) {
    const int64_t dims = x.dim() - 2;
    take_x(x);
    check_map(g, "g", x);
    take_theta(x, theta_weight, stride);
    Ints phi_shape{p.inter, g.size(1)};
    phi_shape.resize(size_t(dims) + 2, 1);
    phi_weight = check_acc(phi_weight, "phi_weight", x, phi_shape);
    if (bias) p.bias = hold(check_acc(*bias, "bias", x, {p.inter}));
    p.activation = activation_of(activation);
    p.phi_resize = resize_of(phi_resize, "phi_resize");
    check_resizable(grid_of(g), p.coarse, "g");
  }
  bool phi_apart() const { return !(grid_of(g) == p.coarse); }

  void take_centres(const MaybeTensor& centre_x, const MaybeTensor& centre_g) {
    if (centre_x) p.centre_x = hold(check_acc(*centre_x, "centre_x", like, {p.rows_x()}));
    if (centre_g) centre_of_g = hold(check_acc(*centre_g, "centre_g", like, {g.size(1)}));
  }

  // phi = phi_weight * g on g's own grid, by the same kernels: a problem whose pre-activation is phi.
  void take_g() {
    if (!phi_apart()) {
      p.phi_weight = hold(phi_weight);
      p.g = input(g, "g");
      p.centre_g = centre_of_g;
      return;
    }
    phi = new_map(g, p.inter, grid_sizes(g));
    Attention apart = only_phi();
    apart.p.norms = nullptr;  // backward's
    apart.p.preact = apart.output(phi);
    Tensor unused = apart.new_alpha(grid_sizes(g));
    apart.forward();
    p.phi = input(phi, "phi");
  }
  Attention only_phi() const {
    Attention apart(*this);
    Problem& q = apart.p;
    q = Problem();
    q.dtype = p.dtype;
    q.batch = p.batch;
    q.inter = p.inter;
    q.project = true;
    q.fine = q.coarse = grid_of(g);
    q.psi = p.psi;
    q.phi_weight = apart.hold(phi_weight);
    q.g = apart.input(g, "g");
    q.centre_g = centre_of_g;
    q.bias = shift_of_g;
    q.norms = p.norms;
    return apart;
  }
  // Stored pre-activation, in x's dtype and layout; empty where it is recomputed.
  Tensor new_preact(bool store) {
    if (!store) return no_map();
    Tensor t = new_map(like, p.inter, coarse);
    p.preact = output(t);
    return t;
  }
  void take_preact(const Tensor& preact) {
    if (preact.numel() == 0) return;
    p.preact = input(preact, "preact");
    STD_TORCH_CHECK(p.preact.channels == p.inter && p.preact.grid == p.coarse, "attn_gate: preact has shape ",
                    shape_of(preact));
    p.project = false;
    p.phi = Map();
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gradients(int64_t needs) {
    const bool apart = phi_apart(), need_g = wants(needs, 1), need_phi = wants(needs, 3);
    Tensor dx = like_if(wants(needs, 0), like), dg = like_if(need_g, g), dphi_weight = no_acc();
    if (wants(needs, 0)) {
      p.dx = output(dx);
      if (!p.dy) torch::stable::zero_(dx);
    }
    if (need_g && !apart) p.dg = output(dg);
    const bool through_phi = apart && (need_g || need_phi);
    if (through_phi) {
      Tensor ds = new_map(like, p.inter, coarse);
      p.dtheta = output(ds);
    }
    backward(wants(needs, 2) || (need_phi && !apart));
    const int64_t G = g.size(1);
    Tensor dtheta_weight = weight_sum(wants(needs, 2), true, p.rows_x(), weight_shape());
    Ints phi_shape = sizes_of(phi_weight);
    if (through_phi) {
      Tensor dphi = new_map(g, p.inter, grid_sizes(g));
      Attention other = only_phi();
      if (!empty()) {
        p.dphi = output(dphi);
        run_gather_dphi(p);
      } else {
        torch::stable::zero_(dphi);
      }
      other.p.ds = other.input(dphi, "dphi");
      if (need_g) other.p.dg = other.output(dg);
      other.backward(need_phi);
      dphi_weight = other.weight_sum(need_phi, false, G, phi_shape);
    } else if (!apart) {
      dphi_weight = weight_sum(need_phi, false, G, phi_shape);
    }
    return {dx,
            dg,
            dtheta_weight,
            dphi_weight,
            sum(wants(needs, 4), layout.bias_at, p.inter),
            sum(wants(needs, 5), layout.psi_at, p.inter),
            sum(wants(needs, 6), layout.psi_bias_at, 1)};
  }
  Ints weight_shape() const {
    Ints shape{p.inter, like.size(1)};
    if (like.dim() == 5) shape.push_back(p.kernel.d);
    shape.push_back(p.kernel.h);
    shape.push_back(p.kernel.w);
    return shape;
  }
};

std::tuple<Tensor, Tensor, Tensor> attention_gate_fwd(const Tensor& x, const Tensor& g,
                                                      const Tensor& theta_weight, const Tensor& phi_weight,
                                                      const MaybeTensor& bias, const Tensor& psi_weight,
                                                      const MaybeTensor& psi_bias, Ints stride,
                                                      std::string phi_resize, std::string alpha_resize,
                                                      std::string activation, bool store) {
  Attention call(x, g, theta_weight, phi_weight, bias, stride, phi_resize, activation);
  call.take_psi(psi_weight, psi_bias);
  call.take_g();
  call.take_alpha_mode(alpha_resize);
  Tensor y = new_map(x, x.size(1), grid_sizes(x)), alpha = call.new_alpha(call.coarse),
         preact = call.new_preact(store);
  call.p.y = call.output(y);
  call.forward();
  return {y, alpha, preact};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_gate_bwd(
    const MaybeTensor& dy, const MaybeTensor& dalpha, const Tensor& x, const Tensor& g,
    const Tensor& theta_weight, const Tensor& phi_weight, const MaybeTensor& bias, const Tensor& psi_weight,
    const Tensor& alpha, const Tensor& preact, Ints stride, std::string phi_resize, std::string alpha_resize,
    std::string activation, int64_t needs) {
  Attention call(x, g, theta_weight, phi_weight, bias, stride, phi_resize, activation);
  call.take_psi(psi_weight, std::nullopt);
  call.take_g();
  call.take_alpha_mode(alpha_resize);
  call.take_preact(preact);
  call.take_alpha(alpha, call.coarse);
  call.p.through_sigmoid = true;
  call.take_gradients(dy, dalpha, alpha);
  return call.gradients(needs);
}

std::tuple<Tensor, Tensor> attention_logits_fwd(const Tensor& x, const Tensor& g, const Tensor& theta_weight,
                                                const Tensor& phi_weight, const MaybeTensor& bias,
                                                const Tensor& psi_weight, const MaybeTensor& psi_bias,
                                                Ints stride, std::string phi_resize, std::string activation,
                                                bool store) {
  Attention call(x, g, theta_weight, phi_weight, bias, stride, phi_resize, activation);
  call.take_psi(psi_weight, psi_bias);
  call.take_g();
  Tensor logits = call.new_alpha(call.coarse), preact = call.new_preact(store);
  call.forward();
  return {logits, preact};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_logits_bwd(
    const Tensor& dlogits, const Tensor& x, const Tensor& g, const Tensor& theta_weight,
    const Tensor& phi_weight, const MaybeTensor& bias, const Tensor& psi_weight, const Tensor& preact,
    Ints stride, std::string phi_resize, std::string activation, int64_t needs) {
  Attention call(x, g, theta_weight, phi_weight, bias, stride, phi_resize, activation);
  call.take_psi(psi_weight, std::nullopt);
  call.take_g();
  call.take_preact(preact);
  call.take_alpha(dlogits, call.coarse);  // its shape and dtype are what d_logits must have
  call.p.dalpha = call.p.alpha;
  return call.gradients(needs);
}

Tensor attention_train_fwd(const Tensor& x, const Tensor& g, const MaybeTensor& centre_x,
                           const MaybeTensor& centre_g, const Tensor& theta_weight, const Tensor& phi_weight,
                           const MaybeTensor& bias, const Tensor& psi_weight, const MaybeTensor& psi_bias,
                           Ints stride, std::string phi_resize, std::string activation) {
  Attention call(x, g, theta_weight, phi_weight, bias, stride, phi_resize, activation);
  call.take_psi(psi_weight, psi_bias);
  call.take_centres(centre_x, centre_g);
  call.take_g();
  Tensor logits = call.new_alpha(call.coarse);
  call.forward();
  return logits;
}

// The backward pass of a gate with batch norms on batch statistics behind its projections: norms.h.
struct NormedAttention : Attention {
  using Attention::Attention;
  Tensor norms;
  bool norm_x = false, norm_g = false;

  int64_t pitch() const { return (p.inter + 15) / 16 * 16; }
  // shift and scale [2, I] of each norm; without a norm the identity.
  void take_norms(const MaybeTensor& theta_norm, const MaybeTensor& phi_norm) {
    norm_x = theta_norm.has_value();
    norm_g = phi_norm.has_value();
    norms = new_acc({8, pitch()});
    torch::stable::zero_(norms);
    p.norms = norms.mutable_data_ptr();
    const void* x = norm_x ? hold(check_acc(*theta_norm, "theta_norm", like, {2, p.inter})) : nullptr;
    const void* g = norm_g ? hold(check_acc(*phi_norm, "phi_norm", like, {2, p.inter})) : nullptr;
    p.dtype == DType::f64 ? copy_norms<double>(x, g) : copy_norms<float>(x, g);
    const int64_t size = p.dtype == DType::f64 ? 8 : 4;
    shift_of_g = static_cast<const char*>(p.norms) + 2 * pitch() * size;
  }
  template <class A>
  void copy_norms(const void* x, const void* g) {
    A* at = static_cast<A*>(p.norms);
    for (const void* norm : {x, g}) {
      const A* from = static_cast<const A*>(norm);
      for (int64_t i = 0; i < p.inter; ++i) {
        if (from) at[i] = from[i];
        at[pitch() + i] = from ? from[p.inter + i] : A(1);
      }
      at += 2 * pitch();
    }
  }
  // What the means of the first pass take off ds of the second.
  template <class A>
  void leave_slopes() {
    A* at = static_cast<A*>(p.norms);
    const A* sums = static_cast<const A*>(p.partial) + layout.group_at;
    const A voxels = A(p.batch * p.coarse.voxels());
    auto leave = [&](const A* scale, int64_t products, A* slope) {
      for (int64_t i = 0; i < p.inter; ++i) {
        slope[i] = -scale[i] * sums[products + i] / voxels;
        slope[pitch() + i] = -scale[i] * sums[layout.bias_at + i] / voxels;
      }
    };
    if (norm_x && p.uses_x()) leave(at + pitch(), layout.scale_x_at, at + 4 * pitch());
    if (norm_g && p.g) leave(at + 3 * pitch(), layout.scale_g_at, at + 6 * pitch());
  }
  void two_passes(bool weight_grads) {
    with_workspace(weight_grads, [&](int64_t groups) {
      Problem sums = p;
      sums.norm_sums = true;
      sums.weight_grads = false;
      sums.dy = sums.dx = sums.dg = Map();
      sums.alpha = nullptr;
      run_backward(sums, layout, groups);
      p.dtheta = Map();
      if (!p.dx && !p.dg && !p.weight_grads) return;
      p.dtype == DType::f64 ? leave_slopes<double>() : leave_slopes<float>();
      run_backward(p, layout, groups);
    });
  }

  std::vector<Tensor> normed_gradients(int64_t needs) {
    const bool apart = phi_apart(), need_x = wants(needs, 0), need_g = wants(needs, 1),
               need_theta = wants(needs, 2), need_phi = wants(needs, 3);
    const bool through_phi = apart && (need_g || need_phi || wants(needs, 5));
    Tensor dx = like_if(need_x, like), dg = like_if(need_g, g);
    if (need_x) {
      p.dx = output(dx);
      if (!p.dy) torch::stable::zero_(dx);
    }
    if (need_g && !apart) p.dg = output(dg);
    if (through_phi) p.dtheta = output(new_map(like, p.inter, coarse));
    const Map ds = p.dtheta;
    two_passes(need_theta || (need_phi && !apart));
    Ints phi_shape = sizes_of(phi_weight);
    Tensor dphi_weight = no_acc(), dphi_scale = no_acc();
    if (through_phi) {
      NormedAttention other(*this);
      static_cast<Attention&>(other) = only_phi();
      Tensor dphi = new_map(g, p.inter, grid_sizes(g));
      if (!empty()) {
        p.dtheta = ds;
        p.dphi = output(dphi);
        run_gather_dphi(p);
      } else {
        torch::stable::zero_(dphi);
      }
      other.p.ds = other.input(dphi, "dphi");
      if (need_g) other.p.dg = other.output(dg);
      other.two_passes(need_phi);
      dphi_weight = other.weight_sum(need_phi, false, g.size(1), phi_shape);
      dphi_scale = other.sum(wants(needs, 5), other.layout.scale_g_at, p.inter);
    } else if (!apart) {
      dphi_weight = weight_sum(need_phi, false, g.size(1), phi_shape);
      dphi_scale = sum(wants(needs, 5), layout.scale_g_at, p.inter);
    }
    return {dx,
            dg,
            weight_sum(need_theta, true, p.rows_x(), weight_shape()),
            dphi_weight,
            sum(wants(needs, 4), layout.scale_x_at, p.inter),
            dphi_scale,
            sum(wants(needs, 6), layout.bias_at, p.inter),
            sum(wants(needs, 7), layout.psi_at, p.inter),
            sum(wants(needs, 8), layout.psi_bias_at, 1)};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_train_bwd(
    const MaybeTensor& dy, const Tensor& dlogits, const Tensor& x, const Tensor& g,
    const MaybeTensor& centre_x, const MaybeTensor& centre_g, const Tensor& theta_weight,
    const Tensor& phi_weight, const MaybeTensor& theta_norm, const MaybeTensor& phi_norm,
    const MaybeTensor& bias, const Tensor& psi_weight, const Tensor& alpha, Ints stride,
    std::string phi_resize, std::string alpha_resize, std::string activation, int64_t needs) {
  NormedAttention call(x, g, theta_weight, phi_weight, bias, stride, phi_resize, activation);
  call.take_psi(psi_weight, std::nullopt);
  call.take_centres(centre_x, centre_g);
  call.take_norms(theta_norm, phi_norm);
  call.take_g();
  call.take_alpha_mode(alpha_resize);
  call.take_alpha(alpha, call.coarse);
  call.take_gradients(dy, dlogits, alpha);
  auto d = call.normed_gradients(needs);
  return {d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7], d[8]};
}

// Mean and biased variance of theta_weight (x - centre), in float64.
std::tuple<Tensor, Tensor> projection_statistics(const Tensor& x, const Tensor& theta_weight,
                                                 const MaybeTensor& centre, Ints stride) {
  Call call(x, theta_weight.size(0));
  Problem& p = call.p;
  call.take_x(x);
  call.take_theta(x, theta_weight, stride);
  if (centre) p.centre_x = call.hold(check_acc(*centre, "centre", x, {p.rows_x()}));
  STD_TORCH_CHECK(p.batch * p.coarse.voxels() > 0,
                  "attn_gate: x has no voxels, of which there is no mean: ", shape_of(x));
  Tensor zeros = call.new_acc({p.inter});
  torch::stable::zero_(zeros);
  p.psi = call.hold(zeros);  // packed, but not read
  call.layout = kernels(p.dtype).layout(p, false);
  call.allocate_packed();
  const int64_t I = p.inter, tiles = tiles_of(p, call.layout);
  Statistics to;
  // By the problem alone, never by the number of threads: the same bits from run to run.
  to.groups = std::min<int64_t>(tiles, 64);
  auto doubles = [&](int64_t n) { return torch::stable::new_empty(x, Ints{n}, ScalarType::Double); };
  Tensor state = doubles(to.groups * (1 + 2 * I)), mean = doubles(I), var = doubles(I);
  to.state = static_cast<double*>(state.mutable_data_ptr());
  run_statistics(p, call.layout, to);
  double *m = static_cast<double*>(mean.mutable_data_ptr()),
         *s = static_cast<double*>(var.mutable_data_ptr());
  for (int64_t i = 0; i < I; ++i) {
    double count = 0;
    for (int64_t g = 0; g < to.groups; ++g) {  // joined in order, by Chan's formula
      const double *group = to.state + g * (1 + 2 * I), total = count + *group,
                   shift = g ? group[1 + i] - m[i] : 0;
      m[i] = g ? m[i] + shift * (*group / total) : group[1 + i];
      s[i] = (g ? s[i] : 0) + group[1 + I + i] + shift * shift * (count * *group / total);
      count = total;
    }
    s[i] = std::max(s[i], 0.0) / count;
  }
  return {mean, var};
}

// -------------------------------------------------------------------------------------------- gate_apply

Call apply_call(const Tensor& x, const Tensor& alpha, const std::string& alpha_resize) {
  Call call(x, 0);
  call.take_x(x);
  STD_TORCH_CHECK(alpha.dim() == x.dim(), "attn_gate: alpha has shape ", shape_of(alpha),
                  ", which does not fit x ", shape_of(x));
  call.p.coarse = grid_of(alpha);
  call.take_alpha(alpha, grid_sizes(alpha));
  call.take_alpha_mode(alpha_resize);
  return call;
}

Tensor gate_apply_fwd(const Tensor& x, const Tensor& alpha, std::string alpha_resize) {
  Call call = apply_call(x, alpha, alpha_resize);
  Tensor y = new_map(x, x.size(1), grid_sizes(x));
  call.p.y = call.output(y);
  if (!call.empty()) run_apply(call.p);
  return y;
}

std::tuple<Tensor, Tensor> gate_apply_bwd(const Tensor& dy, const Tensor& x, const Tensor& alpha,
                                          std::string alpha_resize, int64_t needs) {
  Call call = apply_call(x, alpha, alpha_resize);
  Problem& p = call.p;
  p.through_sigmoid = true;
  call.take_gradients(dy, std::nullopt, alpha);
  Tensor dx = call.like_if(wants(needs, 0), x), dalpha = call.no_acc();
  if (wants(needs, 0)) p.dx = call.output(dx);
  if (wants(needs, 1)) {
    dalpha = call.new_acc(sizes_of(alpha));
    p.dalpha_out = dalpha.mutable_data_ptr();
    if (p.same_grid()) p.dfine = p.dalpha_out;
  } else {
    p.dfine = nullptr;
  }
  if (!call.empty()) run_apply_backward(p);
  return {dx, dalpha};
}

}  // namespace
}  // namespace attn_gate::cpu

STABLE_TORCH_LIBRARY_IMPL(attn_gate, CPU, m) {
  using namespace attn_gate::cpu;
  m.impl("gate_fwd", ATTN_GATE_BOX(gate_fwd));
  m.impl("gate_bwd", ATTN_GATE_BOX(gate_bwd));
  m.impl("gate_logits_fwd", ATTN_GATE_BOX(gate_logits_fwd));
  m.impl("gate_logits_bwd", ATTN_GATE_BOX(gate_logits_bwd));
  m.impl("attention_gate_fwd", ATTN_GATE_BOX(attention_gate_fwd));
  m.impl("attention_gate_bwd", ATTN_GATE_BOX(attention_gate_bwd));
  m.impl("attention_train_fwd", ATTN_GATE_BOX(attention_train_fwd));
  m.impl("attention_train_bwd", ATTN_GATE_BOX(attention_train_bwd));
  m.impl("projection_statistics", ATTN_GATE_BOX(projection_statistics));
  m.impl("attention_logits_fwd", ATTN_GATE_BOX(attention_logits_fwd));
  m.impl("attention_logits_bwd", ATTN_GATE_BOX(attention_logits_bwd));
  m.impl("gate_apply_fwd", ATTN_GATE_BOX(gate_apply_fwd));
  m.impl("gate_apply_bwd", ATTN_GATE_BOX(gate_apply_bwd));
}
