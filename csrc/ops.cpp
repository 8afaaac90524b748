// The operators' schemas, for every backend. Maps are 2D or 3D (Python lifts 1D to 2D). Parameters, alpha,
// logits and their gradients are in the accumulation dtype: float32, or float64 for float64 maps.
//
//   gate             y = x * resize(alpha), alpha = sigmoid(psi . activation(theta + resize(phi)) + psi_bias)
//   attention_gate   the same, with theta = theta_weight * x (patches) and phi = phi_weight * g made on the
//   way;
//                    `store` keeps the pre-activation for backward, else backward recomputes it (preact is
//                    empty)
//   *_logits         up to psi . activation(...) + psi_bias
//   gate_apply       y = x * resize(alpha)
//   moments          mean [K] and covariance [K, K] of x's patches, in float64: the statistics of every
//                    projection of x, differentiable. CPU only
//
// *_bwd: gradients of everything that `needs` (a bit for each of the returned tensors) asks for; others come
// empty.
#include <torch/csrc/stable/library.h>

#include "cpu/memory.h"
#include "cpu/problem.h"

namespace {
std::string cpu_isa() {
  if (attn_gate::cpu::has_matrix_units()) return "amx";
  return attn_gate::cpu::dot_products() ? "avx512_bf16" : attn_gate::cpu::instruction_set();
}
bool cpu_is_amd() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}
}  // namespace

STABLE_TORCH_LIBRARY(attn_gate, m) {
  m.def(
      "gate_fwd(Tensor x, Tensor theta, Tensor? phi, Tensor psi_weight, Tensor? psi_bias, str phi_resize, "
      "str alpha_resize, str activation) -> (Tensor y, Tensor alpha)");
  m.def(
      "gate_bwd(Tensor? dy, Tensor? dalpha, Tensor x, Tensor theta, Tensor? phi, Tensor psi_weight, Tensor "
      "alpha, "
      "str phi_resize, str alpha_resize, str activation, int needs) "
      "-> (Tensor dx, Tensor dtheta, Tensor dphi, Tensor dpsi_weight, Tensor dpsi_bias)");
  m.def(
      "gate_logits_fwd(Tensor theta, Tensor? phi, Tensor psi_weight, Tensor? psi_bias, str phi_resize, "
      "str activation) -> Tensor logits");
  m.def(
      "gate_logits_bwd(Tensor dlogits, Tensor theta, Tensor? phi, Tensor psi_weight, str phi_resize, "
      "str activation, int needs) -> (Tensor dtheta, Tensor dphi, Tensor dpsi_weight, Tensor dpsi_bias)");
  m.def(
      "attention_gate_fwd(Tensor x, Tensor g, Tensor theta_weight, Tensor phi_weight, Tensor? bias, "
      "Tensor psi_weight, Tensor? psi_bias, int[] stride, str phi_resize, str alpha_resize, str activation, "
      "bool store) -> (Tensor y, Tensor alpha, Tensor preact)");
  m.def(
      "attention_gate_bwd(Tensor? dy, Tensor? dalpha, Tensor x, Tensor g, Tensor theta_weight, Tensor "
      "phi_weight, "
      "Tensor? bias, Tensor psi_weight, Tensor alpha, Tensor preact, int[] stride, str phi_resize, "
      "str alpha_resize, str activation, int needs) -> (Tensor dx, Tensor dg, Tensor dtheta_weight, "
      "Tensor dphi_weight, Tensor dbias, Tensor dpsi_weight, Tensor dpsi_bias)");
  m.def(
      "attention_logits_fwd(Tensor x, Tensor g, Tensor theta_weight, Tensor phi_weight, Tensor? bias, "
      "Tensor psi_weight, Tensor? psi_bias, int[] stride, str phi_resize, str activation, bool store) "
      "-> (Tensor logits, Tensor preact)");
  m.def(
      "attention_logits_bwd(Tensor dlogits, Tensor x, Tensor g, Tensor theta_weight, Tensor phi_weight, "
      "Tensor? bias, Tensor psi_weight, Tensor preact, int[] stride, str phi_resize, str activation, int "
      "needs) "
      "-> (Tensor dx, Tensor dg, Tensor dtheta_weight, Tensor dphi_weight, Tensor dbias, Tensor dpsi_weight, "
      "Tensor dpsi_bias)");
  m.def("gate_apply_fwd(Tensor x, Tensor alpha, str alpha_resize) -> Tensor y");
  m.def(
      "gate_apply_bwd(Tensor dy, Tensor x, Tensor alpha, str alpha_resize, int needs) "
      "-> (Tensor dx, Tensor dalpha)");
  m.def("moments_fwd(Tensor x, int[] kernel, int[] stride) -> (Tensor mean, Tensor cov)");
  m.def(
      "moments_bwd(Tensor? dmean, Tensor? dcov, Tensor x, Tensor mean, int[] kernel, int[] stride, int "
      "needs) "
      "-> Tensor dx");
  // The gate of batch norms in training mode. Projections of x - centre_x and g - centre_g; mean and variance
  // of one; logits, of weights that the norms are folded into; everything that dlogits give, where dx starts
  // from dy * resize(alpha), of weights divided by the deviation, and theta_norm and phi_norm [2, I], shift
  // and scale, where the projection has a norm.
  m.def(
      "projection_statistics(Tensor x, Tensor theta_weight, Tensor? centre, int[] stride) "
      "-> (Tensor mean, Tensor var)");
  m.def(
      "attention_train_fwd(Tensor x, Tensor g, Tensor? centre_x, Tensor? centre_g, Tensor theta_weight, "
      "Tensor phi_weight, Tensor? bias, Tensor psi_weight, Tensor? psi_bias, int[] stride, str phi_resize, "
      "str activation) -> Tensor logits");
  m.def(
      "attention_train_bwd(Tensor? dy, Tensor dlogits, Tensor x, Tensor g, Tensor? centre_x, Tensor? "
      "centre_g, Tensor theta_weight, Tensor phi_weight, Tensor? theta_norm, Tensor? phi_norm, Tensor? bias, "
      "Tensor psi_weight, Tensor alpha, int[] stride, str phi_resize, str alpha_resize, str activation, "
      "int needs) -> (Tensor dx, Tensor dg, Tensor dtheta_weight, Tensor dphi_weight, Tensor dtheta_scale, "
      "Tensor dphi_scale, Tensor dbias, Tensor dpsi_weight, Tensor dpsi_bias)");
  m.def("cpu_isa() -> str");
  m.def("cpu_is_amd() -> bool");
  m.def("keep_memory(int limit) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(attn_gate, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_is_amd", TORCH_BOX(&cpu_is_amd));
  m.impl("keep_memory", TORCH_BOX(&attn_gate::cpu::keep_memory));
}
