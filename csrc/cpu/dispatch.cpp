// Picks the instruction set once, at first use, and whether there are matrix units beside it.
// ATEN_CPU_CAPABILITY (default, avx2, avx512), which PyTorch itself honours, forces a lower one.
#include <cstdlib>
#include <cstring>

#if defined(ATTN_GATE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

#if defined(ATTN_GATE_AMX)
// Linux lends the units' registers to a process that asks for them (Documentation/arch/x86/xstate.rst).
constexpr int kSupported = 0x1021, kAsk = 0x1023;  // ARCH_GET_XCOMP_SUPP, ARCH_REQ_XCOMP_PERM
constexpr int kTileData = 18;                      // XFEATURE_XTILEDATA

bool find_units() {
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  if (&kernels() != &kernels_avx512 || (wanted && !std::strcmp(wanted, "avx512"))) return false;
  unsigned a, b, c, d;
  constexpr unsigned tile = 1u << 24, bf16 = 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & tile) || !(d & bf16)) return false;
  unsigned long long features = 0;
  return syscall(SYS_arch_prctl, kSupported, &features) == 0 && (features >> kTileData & 1);
}
const MatrixUnits* ask_for_units() {
  return has_matrix_units() && syscall(SYS_arch_prctl, kAsk, kTileData) == 0 ? &amx : nullptr;
}
#else
bool find_units() { return false; }
const MatrixUnits* ask_for_units() { return nullptr; }
#endif

}  // namespace

bool has_matrix_units() {
  static const bool found = find_units();
  return found;
}
const MatrixUnits* matrix_units() {
  static const MatrixUnits* const lent = ask_for_units();
  return lent;
}
const Kernels& kernels() {
  static const Kernels& chosen = pick();
  return chosen;
}

}  // namespace attn_gate::cpu
