// The test extension: CUDA kernels and operators of csrc/cuda compiled for the host, and the handles that
// tests turn. Importing it registers the operators as torch.ops.attn_gate_cuda_host_kernels.*.
#include <pybind11/pybind11.h>

#include <utility>

#include "cuda_on_host.h"
#include "trace.h"

namespace py = pybind11;

PYBIND11_MODULE(ON_HOST_MODULE, m) {
  m.def(
      "set_order", [](uint64_t order) { on_host::order = order; },
      "0: threads run in order, 1: in reverse; else in an order drawn from this seed");
  m.def("set_processors", [](int count) { on_host::processors = count; });
#if defined(ON_HOST_TRACE)
  m.def(
      "take_sectors",
      [] {
        const auto sectors = std::make_pair(on_host::traced_loads, on_host::traced_stores);
        on_host::traced_loads = on_host::traced_stores = 0;
        return sectors;
      },
      "sectors of global memory that were loaded and stored since the last call");
#endif
  m.def(
      "take_launches",
      [] {
        py::list taken;
        for (const auto& launch : on_host::launches)
          taken.append(py::make_tuple(launch.params, launch.blocks, launch.shared));
        on_host::launches.clear();
        return taken;
      },
      "(type of the parameters, blocks, bytes of shared memory) of each kernel launched since the last call");
}
