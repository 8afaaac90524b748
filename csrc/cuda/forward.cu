// The forward kernel for every dtype, and its launch.
#include "forward.cuh"
#include "plan.h"

namespace attn_gate::cuda {
namespace {

template <class T>
void launch_as(const Forward& p, void* stream) {
  launch(gate_forward<T>, p.batch * p.tiling.tiles() * p.slices, shared_bytes(p, sizeof(Acc<T>), kWide<T>),
         stream, p);
}

}  // namespace

void launch_forward(const Forward& p, DType dtype, void* stream) {
  switch (dtype) {
    case DType::f32: return launch_as<float>(p, stream);
    case DType::f64: return launch_as<double>(p, stream);
    case DType::bf16: return launch_as<__nv_bfloat16>(p, stream);
    case DType::f16: return launch_as<__half>(p, stream);
  }
}

int processors() {
#if defined(ATTN_GATE_CUDA_ON_HOST)
  return on_host::processors;
#else
  int device = 0, count = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
#endif
}

}  // namespace attn_gate::cuda
