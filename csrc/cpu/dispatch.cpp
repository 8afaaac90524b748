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

#define ATTN_GATE_DECLARE(isa) \
  extern const Kernels kernels_##isa##_f32, kernels_##isa##_f64, kernels_##isa##_bf16, kernels_##isa##_f16;
ATTN_GATE_DECLARE(default)
ATTN_GATE_DECLARE(avx2)
ATTN_GATE_DECLARE(avx512)

namespace {

// The tables of one instruction set, in DType's order.
struct Set {
  const char* name;
  const Kernels* of[4];
};
#define ATTN_GATE_SET_(isa)                                                                           \
  {                                                                                                   \
    #isa, { &kernels_##isa##_f32, &kernels_##isa##_f64, &kernels_##isa##_bf16, &kernels_##isa##_f16 } \
  }
#define ATTN_GATE_SET(isa) ATTN_GATE_SET_(isa)

const Set& pick() {
  static constexpr Set any = ATTN_GATE_SET(ATTN_GATE_BASELINE);
#if defined(ATTN_GATE_AVX512)
  static constexpr Set with_avx512 = ATTN_GATE_SET(avx512);
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  const bool at_most_default = wanted && !std::strcmp(wanted, "default");
  const bool at_most_avx2 = at_most_default || (wanted && !std::strcmp(wanted, "avx2"));
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && !at_most_avx2) return with_avx512;
#if defined(ATTN_GATE_AVX2)
  static constexpr Set with_avx2 = ATTN_GATE_SET(avx2);
  if (avx2 && !at_most_default) return with_avx2;
#endif
#endif
  return any;
}

// Whether ATEN_CPU_CAPABILITY leaves what goes beyond AVX-512.
[[maybe_unused]] bool beyond_avx512() {
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  static constexpr const char* without[] = {"default", "avx2", "avx512"};
  for (const char* set : without)
    if (wanted && !std::strcmp(wanted, set)) return false;
  return !std::strcmp(instruction_set(), "avx512");
}

#if defined(ATTN_GATE_AMX)
// Linux lends the units' registers to a process that asks for them (Documentation/arch/x86/xstate.rst).
constexpr int kSupported = 0x1021, kAsk = 0x1023;  // ARCH_GET_XCOMP_SUPP, ARCH_REQ_XCOMP_PERM
constexpr int kTileData = 18;                      // XFEATURE_XTILEDATA

bool find_units() {
  if (!beyond_avx512()) return false;
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

const Set& chosen() {
  static const Set& set = pick();
  return set;
}

}  // namespace

bool has_matrix_units() {
  static const bool found = find_units();
  return found;
}
const MatrixUnits* matrix_units() {
  static const MatrixUnits* const lent = ask_for_units();
  return lent;
}
const MatrixUnits* dot_products() {
#if defined(ATTN_GATE_DOTS)
  static const bool found = beyond_avx512() && __builtin_cpu_supports("avx512bf16");
  return found ? &dots : nullptr;
#else
  return nullptr;
#endif
}
const Kernels& kernels(DType dtype) { return *chosen().of[int(dtype)]; }
const char* instruction_set() { return chosen().name; }

}  // namespace attn_gate::cpu
