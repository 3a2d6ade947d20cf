#include <cstdlib>
#include <cstring>

#include "vectorize.h"

namespace synthfast {

namespace {
CpuCapability detect() {
#if SF_X86
  CpuCapability best = CpuCapability::kDefault;
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v3")) best = CpuCapability::kAvx2;
  if (__builtin_cpu_supports("x86-64-v4")) best = CpuCapability::kAvx512;
  const char* wanted = std::getenv("SYNTHFAST_CPU_CAPABILITY");
  if (wanted != nullptr) {
    if (std::strcmp(wanted, "default") == 0) return CpuCapability::kDefault;
    if (std::strcmp(wanted, "avx2") == 0 && best > CpuCapability::kAvx2) return CpuCapability::kAvx2;
  }
  return best;
#else
  return CpuCapability::kDefault;
#endif
}
}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability capability = detect();
  return capability;
}

const char* cpu_capability_name() {
  switch (cpu_capability()) {
    case CpuCapability::kAvx512:
      return "avx512";
    case CpuCapability::kAvx2:
      return "avx2";
    default:
      return "default";
  }
}

}  // namespace synthfast
