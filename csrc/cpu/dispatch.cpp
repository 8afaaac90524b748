// Picks the instruction set once, at first use. ATEN_CPU_CAPABILITY (default, avx2, avx512), which PyTorch
// itself honours, forces a lower one.
#include <cstdlib>
#include <cstring>

#include "problem.h"

namespace attn_gate::cpu {
namespace {

const Kernels& pick() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  const bool at_most_default = wanted && !std::strcmp(wanted, "default");
  const bool at_most_avx2 = at_most_default || (wanted && !std::strcmp(wanted, "avx2"));
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && !at_most_avx2) return kernels_avx512;
  if (avx2 && !at_most_default) return kernels_avx2;
#endif
  return kernels_default;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = pick();
  return chosen;
}

}  // namespace attn_gate::cpu
