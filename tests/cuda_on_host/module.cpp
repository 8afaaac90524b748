// The test extension: CUDA kernels and operators of csrc/cuda compiled for the host, and the handles that
// tests turn. Importing it registers the operators as torch.ops.attn_gate_cuda_host_kernels.*.
#include <pybind11/pybind11.h>

#include <algorithm>

#include "cuda/plan.h"
#include "cuda_on_host.h"

namespace py = pybind11;

namespace {

using attn_gate::Resize;

// Outputs of an axis that inputs [first, last) receive from, in the kernels' own arithmetic.
template <class A>
int64_t receivers(Resize mode, int64_t first, int64_t last, int64_t in, int64_t out) {
  const int64_t before = mode == Resize::nearest || in == out ? first : first - 1;
  return attn_gate::first_output<A>(mode, last, in, out) - attn_gate::first_output<A>(mode, before, in, out);
}

}  // namespace

PYBIND11_MODULE(ON_HOST_MODULE, m) {
  m.def(
      "set_order", [](uint64_t order) { on_host::order = order; },
      "0: threads run in order, 1: in reverse; else in an order drawn from this seed");
  m.def("set_processors", [](int count) { on_host::processors = count; });
  m.def(
      "set_far", [](int element) { on_host::far = element; },
      "bytes of an element: kernels get maps with strides beyond 32 bits; 0: as they are");
  m.def(
      "set_last_blocks", [](int64_t count) { on_host::last_blocks = count; },
      "only the last blocks of each launch run");
  m.def("receivers", [](int mode, int64_t first, int64_t last, int64_t in, int64_t out) {
    const auto resize = Resize(mode);
    return std::max(receivers<float>(resize, first, last, in, out),
                    receivers<double>(resize, first, last, in, out));
  });
  m.def("most_receivers", [](int mode, int64_t count, int64_t every, int64_t in, int64_t out) {
    return attn_gate::cuda::most_receivers(Resize(mode), count, every, in, out);
  });
  m.def(
      "take_launches",
      [] {
        py::list taken;
        for (const auto& launch : on_host::launches)
          taken.append(py::make_tuple(launch.params, launch.blocks, launch.shared, launch.sectors,
                                      launch.waves, launch.least));
        on_host::launches.clear();
        return taken;
      },
      "of each kernel launched since the last call: type of the parameters, blocks, bytes of shared memory; "
      "and in the build that counts them, sectors of global memory, passes of shared memory, and the least");
}
