// The test extension: CUDA kernels and operators of csrc/cuda compiled for the host, and the handles that
// tests turn. Importing it registers the operators as torch.ops.attn_gate_cuda_host_kernels.*.
#include <pybind11/pybind11.h>

#include "cuda_on_host.h"

PYBIND11_MODULE(ON_HOST_MODULE, m) {
  m.def(
      "set_order", [](uint64_t order) { on_host::order = order; },
      "0: threads run in order, 1: in reverse; else in an order drawn from this seed");
  m.def("set_processors", [](int count) { on_host::processors = count; });
  m.def("launches", [] { return on_host::launches; }, "kernels launched so far");
}
