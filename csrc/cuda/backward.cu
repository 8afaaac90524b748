// The backward kernels for every dtype, and their launches.
#include "phi_backward.cuh"
#include "plan.h"

namespace attn_gate::cuda {
namespace {

template <class T>
void launch_as(const Backward& p, int64_t groups, void* stream) {
  launch(gate_backward<T>, groups, shared_bytes(p, sizeof(Acc<T>), kWide<T>), stream, p);
}

template <class T>
void launch_as(const PhiBackward& p, int64_t groups, void* stream) {
  launch(phi_backward<T>, groups * p.slices, shared_bytes(p, sizeof(Acc<T>), kWide<T>), stream, p);
}

}  // namespace

void launch_backward(const Backward& p, DType dtype, int64_t groups, void* stream) {
  switch (dtype) {
    case DType::f32: return launch_as<float>(p, groups, stream);
    case DType::f64: return launch_as<double>(p, groups, stream);
    case DType::bf16: return launch_as<__nv_bfloat16>(p, groups, stream);
    case DType::f16: return launch_as<__half>(p, groups, stream);
  }
}

void launch_phi_backward(const PhiBackward& p, DType dtype, int64_t groups, void* stream) {
  switch (dtype) {
    case DType::f32: return launch_as<float>(p, groups, stream);
    case DType::f64: return launch_as<double>(p, groups, stream);
    case DType::bf16: return launch_as<__nv_bfloat16>(p, groups, stream);
    case DType::f16: return launch_as<__half>(p, groups, stream);
  }
}

void launch_reduce(const void* sums, int64_t groups, int inter, void* dpsi, void* dpsi_bias, DType dtype,
                   void* stream) {
  const Reduce p{sums, groups, inter, dpsi, dpsi_bias};
  const int64_t blocks = inter / 32 + 1;
  if (dtype == DType::f64) {
    launch(reduce_sums<double>, blocks, kThreads * sizeof(double), stream, p);
  } else {
    launch(reduce_sums<float>, blocks, kThreads * sizeof(float), stream, p);
  }
}

}  // namespace attn_gate::cuda
