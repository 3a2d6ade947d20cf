// One source loop, several instruction sets, chosen at run time.
//
// A loop is a struct with a static, always-inlined `run`. `vectorized<Loop>(arguments...)` compiles it for the baseline, for
// AVX2 and for AVX-512, and calls the best that the processor has, so one binary is fast everywhere. The build turns
// contraction off (-ffp-contract=off), so all variants give the same bits; tests compare them through
// SYNTHFAST_CPU_CAPABILITY=default|avx2|avx512.
#pragma once
#include "host_device.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define SF_X86 1
#else
#define SF_X86 0
#endif

namespace synthfast {

enum class CpuCapability { kDefault, kAvx2, kAvx512 };

// The best instruction set that the processor and the environment variable allow; decided once.
CpuCapability cpu_capability();
const char* cpu_capability_name();

namespace detail {
template <typename Loop, typename... Arguments>
void run_default(Arguments... arguments) {
  Loop::template run<CpuCapability::kDefault>(arguments...);
}
#if SF_X86
template <typename Loop, typename... Arguments>
__attribute__((target("arch=x86-64-v3"))) void run_avx2(Arguments... arguments) {
  Loop::template run<CpuCapability::kAvx2>(arguments...);
}
template <typename Loop, typename... Arguments>
__attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))) void run_avx512(Arguments... arguments) {
  Loop::template run<CpuCapability::kAvx512>(arguments...);
}
#endif
}  // namespace detail

template <typename Loop, typename... Arguments>
void vectorized(Arguments... arguments) {
#if SF_X86
  switch (cpu_capability()) {
    case CpuCapability::kAvx512:
      return detail::run_avx512<Loop>(arguments...);
    case CpuCapability::kAvx2:
      return detail::run_avx2<Loop>(arguments...);
    case CpuCapability::kDefault:
      break;
  }
#endif
  detail::run_default<Loop>(arguments...);
}

// Elements that a CPU loop keeps in buffers of the first-level cache between its passes.
constexpr int64_t kTile = 512;

// A tile as floats: the memory itself where it holds floats already, else converted into `buffer`.
SF_HD const float* load_tile(const float* source, float*, int64_t) { return source; }

template <typename T>
SF_HD const float* load_tile(const T* source, float* buffer, int64_t n) {
  for (int64_t i = 0; i < n; ++i) buffer[i] = to_float(source[i]);
  return buffer;
}

// Where a tile of floats is to be computed: in place for floats, else in `buffer`, which store_tile then rounds.
SF_HD float* tile_target(float* destination, float*) { return destination; }

template <typename T>
SF_HD float* tile_target(T*, float* buffer) {
  return buffer;
}

SF_HD void store_tile(float*, const float*, int64_t) {}

template <typename T>
SF_HD void store_tile(T* destination, const float* buffer, int64_t n) {
  for (int64_t i = 0; i < n; ++i) destination[i] = from_float<T>(buffer[i]);
}

}  // namespace synthfast
