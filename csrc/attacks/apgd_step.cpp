#include "apgd_step.h"

#include <torch/csrc/stable/library.h>

#include "../common/dispatch.h"
#include "attack_checks.h"
#include "l2_tiles.h"
#include "linf_avx512.h"

namespace synthfast {

namespace {

template <typename T>
struct ApgdLinfRun {
  template <CpuCapability kCapability>
  SF_HD static void run(const T* x, const T* previous, const T* gradient, const T* origin, T* out, int64_t n, float eps,
                        float step, float momentum, Box box) {
#if SF_X86
    if constexpr (kCapability == CpuCapability::kAvx512)
      return apgd_linf_avx512(x, previous, gradient, origin, out, n, eps, step, momentum, box);
#endif
    SF_INDEPENDENT
    for (int64_t i = 0; i < n; ++i)
      out[i] = apgd_linf_step<T>(to_float(x[i]), to_float(previous[i]), to_float(gradient[i]), to_float(origin[i]), eps, step,
                                 momentum, box);
  }
};

// The points whose projections are the results, a function of index.
template <typename T>
struct ApgdL2Point {
  const T *x, *previous, *gradient, *origin;
  GradientStep along;
  Shrink shrink;
  float momentum;
  Box box;

  SF_HD float operator()(int64_t i) const {
    const float state = to_float(x[i]);
    const float moved = l2_move(state, to_float(gradient[i]), along);
    return apgd_l2_point(state, to_float(previous[i]), moved, to_float(origin[i]), shrink, momentum, box);
  }
};

template <typename T>
struct ApgdL2Displace {
  ApgdL2Point<T> point;
  float* t;

  SF_HD void operator()(int64_t at, int64_t n) const {
    SF_INDEPENDENT
    for (int64_t i = at; i < at + n; ++i) t[i] = point(i) - to_float(point.origin[i]);
  }
};

template <typename T>
struct ApgdL2Sample {
  template <CpuCapability>
  SF_HD static void run(const T* x, const T* previous, const T* gradient, const T* origin, T* out, float* t,
                        int64_t elements, float eps, float step, float momentum, Box box) {
    const GradientStep along = gradient_step(sum_squares(gradient, elements), step);
    const Shrink first = shrink_sample(t, elements, eps, L2Displace<T>{x, gradient, origin, t, along});
    const ApgdL2Point<T> point{x, previous, gradient, origin, along, first, momentum, box};
    const Shrink last = shrink_sample(t, elements, eps, ApgdL2Displace<T>{point, t});
    if (!last.inside) return pull_in_sample(t, origin, out, elements, last.factor, box);
    SF_INDEPENDENT
    for (int64_t i = 0; i < elements; ++i) out[i] = l2_settle<T>(point(i), to_float(origin[i]), box);
  }
};

void apgd_step_kernel(const AttackArguments& a, BallNorm norm) {
  if (a.x.numel() == 0) return;
  const int64_t samples = a.x.size(0), elements = a.x.numel() / samples;
  const float *eps = const_data<float>(a.eps), *step = const_data<float>(a.step_size);
  const float* momentum = const_data<float>(*a.momentum);
  dispatch_float(a.x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T *x = const_data<T>(a.x), *previous = const_data<T>(*a.previous);
    const T *gradient = const_data<T>(a.gradient), *origin = const_data<T>(a.origin);
    T* out = mutable_data<T>(a.out);
    const Box box = make_box<T>(a.lo, a.hi);
    if (norm == BallNorm::kLinf) {
      for_pieces(samples, elements, [&](int64_t sample, int64_t at, int64_t n) {
        vectorized<ApgdLinfRun<T>>(x + at, previous + at, gradient + at, origin + at, out + at, n, valid_radius(eps[sample]),
                                   step[sample], momentum[sample], box);
      });
    } else {
      for_samples(samples, elements, [&](int64_t sample, float* t) {
        const int64_t at = sample * elements;
        vectorized<ApgdL2Sample<T>>(x + at, previous + at, gradient + at, origin + at, out + at, t, elements,
                                    valid_radius(eps[sample]), step[sample], momentum[sample], box);
      });
    }
  });
}

Tensor apgd_step_cpu(Tensor x, Tensor previous, Tensor gradient, Tensor origin, Tensor eps, Tensor step_size, Tensor momentum,
                     int64_t norm, double lo, double hi) {
  return apgd_step(x, previous, gradient, origin, eps, step_size, momentum, norm, lo, hi, apgd_step_kernel);
}

void apgd_step_inplace_cpu(Tensor previous, Tensor x, Tensor gradient, Tensor origin, Tensor eps, Tensor step_size,
                           Tensor momentum, int64_t norm, double lo, double hi) {
  apgd_step_inplace(previous, x, gradient, origin, eps, step_size, momentum, norm, lo, hi, apgd_step_kernel);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(synthfast, CPU, m) {
  m.impl("apgd_step", TORCH_BOX(&apgd_step_cpu));
  m.impl("apgd_step_", TORCH_BOX(&apgd_step_inplace_cpu));
}

}  // namespace synthfast
