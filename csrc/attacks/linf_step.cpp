#include "linf_step.h"

#include <torch/csrc/stable/library.h>

#include "../common/dispatch.h"
#include "attack_checks.h"
#include "linf_avx512.h"
#include "sample_loops.h"

namespace synthfast {

namespace {

template <typename T>
struct LinfStepRun {
  template <CpuCapability kCapability>
  SF_HD static void run(const T* x, const T* gradient, const T* origin, T* out, int64_t n, float eps, float step, Box box) {
#if SF_X86
    if constexpr (kCapability == CpuCapability::kAvx512)
      return linf_step_avx512(x, gradient, origin, out, n, eps, step, box);
#endif
    SF_INDEPENDENT
    for (int64_t i = 0; i < n; ++i)
      out[i] = linf_step<T>(to_float(x[i]), to_float(gradient[i]), to_float(origin[i]), eps, step, box);
  }
};

void linf_step_kernel(const AttackArguments& a) {
  if (a.x.numel() == 0) return;
  const int64_t samples = a.x.size(0);
  const float *eps = const_data<float>(a.eps), *step = const_data<float>(a.step_size);
  dispatch_float(a.x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T *x = const_data<T>(a.x), *gradient = const_data<T>(a.gradient), *origin = const_data<T>(a.origin);
    T* out = mutable_data<T>(a.out);
    const Box box = make_box<T>(a.lo, a.hi);
    for_pieces(samples, a.x.numel() / samples, [&](int64_t sample, int64_t at, int64_t n) {
      vectorized<LinfStepRun<T>>(x + at, gradient + at, origin + at, out + at, n, valid_radius(eps[sample]), step[sample],
                                 box);
    });
  });
}

Tensor linf_step_cpu(Tensor x, Tensor gradient, Tensor origin, Tensor eps, Tensor step_size, double lo, double hi) {
  return ball_step("linf_step", x, gradient, origin, eps, step_size, lo, hi, linf_step_kernel);
}

void linf_step_inplace_cpu(Tensor x, Tensor gradient, Tensor origin, Tensor eps, Tensor step_size, double lo, double hi) {
  ball_step_inplace("linf_step", x, gradient, origin, eps, step_size, lo, hi, linf_step_kernel);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(synthfast, CPU, m) {
  m.impl("linf_step", TORCH_BOX(&linf_step_cpu));
  m.impl("linf_step_", TORCH_BOX(&linf_step_inplace_cpu));
}

}  // namespace synthfast
