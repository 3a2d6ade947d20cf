#include <torch/csrc/stable/library.h>

#include "../common/dispatch.h"
#include "attack_checks.h"
#include "block_launch.cuh"
#include "l2_step.cuh"

namespace synthfast {

namespace {

void l2_step_launch(const AttackArguments& a) {
  if (a.x.numel() == 0) return;
  const int64_t samples = a.x.size(0), elements = a.x.numel() / samples;
  dispatch_float(a.x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const L2StepPointers<T> p{const_data<T>(a.x),   const_data<T>(a.gradient), const_data<T>(a.origin),
                              mutable_data<T>(a.out), const_data<float>(a.eps),  const_data<float>(a.step_size)};
    const bool aligned = elements % kAttackChunk<T> == 0 && aligned_for(p.x, 16) && aligned_for(p.gradient, 16) &&
                         aligned_for(p.origin, 16) && aligned_for(p.out, 16);
    const Box box = make_box<T>(a.lo, a.hi);
    launch_samples(a.x, samples, elements, [&](unsigned grid, unsigned threads, cudaStream_t stream) {
      if (aligned)
        l2_step_cuda_kernel<T, true><<<grid, threads, 0, stream>>>(p, samples, elements, box);
      else
        l2_step_cuda_kernel<T, false><<<grid, threads, 0, stream>>>(p, samples, elements, box);
    });
  });
}

Tensor l2_step_cuda(Tensor x, Tensor gradient, Tensor origin, Tensor eps, Tensor step_size, double lo, double hi) {
  return ball_step("l2_step", x, gradient, origin, eps, step_size, lo, hi, l2_step_launch);
}

void l2_step_inplace_cuda(Tensor x, Tensor gradient, Tensor origin, Tensor eps, Tensor step_size, double lo, double hi) {
  ball_step_inplace("l2_step", x, gradient, origin, eps, step_size, lo, hi, l2_step_launch);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(synthfast, CUDA, m) {
  m.impl("l2_step", TORCH_BOX(&l2_step_cuda));
  m.impl("l2_step_", TORCH_BOX(&l2_step_inplace_cuda));
}

}  // namespace synthfast
