#include "l2_step.h"

#include <torch/csrc/stable/library.h>

#include "../common/dispatch.h"
#include "attack_checks.h"
#include "l2_tiles.h"

namespace synthfast {

namespace {

template <typename T>
struct L2StepSample {
  template <CpuCapability>
  SF_HD static void run(const T* x, const T* gradient, const T* origin, T* out, float* t, int64_t elements, float eps,
                        float step, Box box) {
    const GradientStep along = gradient_step(sum_squares(gradient, elements), step);
    const Shrink shrink = shrink_sample(t, elements, eps, L2Displace<T>{x, gradient, origin, t, along});
    if (!shrink.inside) return pull_in_sample(t, origin, out, elements, shrink.factor, box);
    SF_INDEPENDENT
    for (int64_t i = 0; i < elements; ++i)
      out[i] = l2_settle<T>(l2_move(to_float(x[i]), to_float(gradient[i]), along), to_float(origin[i]), box);
  }
};

void l2_step_kernel(const AttackArguments& a) {
  if (a.x.numel() == 0) return;
  const int64_t samples = a.x.size(0), elements = a.x.numel() / samples;
  const float *eps = const_data<float>(a.eps), *step = const_data<float>(a.step_size);
  dispatch_float(a.x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T *x = const_data<T>(a.x), *gradient = const_data<T>(a.gradient), *origin = const_data<T>(a.origin);
    T* out = mutable_data<T>(a.out);
    const Box box = make_box<T>(a.lo, a.hi);
    for_samples(samples, elements, [&](int64_t sample, float* t) {
      const int64_t at = sample * elements;
      vectorized<L2StepSample<T>>(x + at, gradient + at, origin + at, out + at, t, elements, valid_radius(eps[sample]),
                                  step[sample], box);
    });
  });
}

Tensor l2_step_cpu(Tensor x, Tensor gradient, Tensor origin, Tensor eps, Tensor step_size, double lo, double hi) {
  return ball_step("l2_step", x, gradient, origin, eps, step_size, lo, hi, l2_step_kernel);
}

void l2_step_inplace_cpu(Tensor x, Tensor gradient, Tensor origin, Tensor eps, Tensor step_size, double lo, double hi) {
  ball_step_inplace("l2_step", x, gradient, origin, eps, step_size, lo, hi, l2_step_kernel);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(synthfast, CPU, m) {
  m.impl("l2_step", TORCH_BOX(&l2_step_cpu));
  m.impl("l2_step_", TORCH_BOX(&l2_step_inplace_cpu));
}

}  // namespace synthfast
