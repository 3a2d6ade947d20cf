#include <torch/csrc/stable/library.h>

#include "../common/dispatch.h"
#include "../common/launch.cuh"
#include "attack_checks.h"
#include "linf_step.cuh"

namespace synthfast {

namespace {

void linf_step_launch(const AttackArguments& a) {
  if (a.x.numel() == 0) return;
  dispatch_float(a.x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kCount = kAttackChunk<T>;
    const LinfStepPointers<T> p{const_data<T>(a.x),   const_data<T>(a.gradient), const_data<T>(a.origin),
                                mutable_data<T>(a.out), const_data<float>(a.eps),  const_data<float>(a.step_size)};
    const Chunks chunks = make_chunks(a.x.size(0), a.x.numel() / a.x.size(0), kCount);
    const bool aligned = chunks.elements % kCount == 0 && aligned_for(p.x, 16) && aligned_for(p.gradient, 16) &&
                         aligned_for(p.origin, 16) && aligned_for(p.out, 16);
    const Box box = make_box<T>(a.lo, a.hi);
    launch_items(a.x, chunks.items(), [&](unsigned grid, cudaStream_t stream) {
      if (aligned)
        linf_step_cuda_kernel<T, true><<<grid, kBlockThreads, 0, stream>>>(p, chunks, box);
      else
        linf_step_cuda_kernel<T, false><<<grid, kBlockThreads, 0, stream>>>(p, chunks, box);
    });
  });
}

Tensor linf_step_cuda(Tensor x, Tensor gradient, Tensor origin, Tensor eps, Tensor step_size, double lo, double hi) {
  return ball_step("linf_step", x, gradient, origin, eps, step_size, lo, hi, linf_step_launch);
}

void linf_step_inplace_cuda(Tensor x, Tensor gradient, Tensor origin, Tensor eps, Tensor step_size, double lo, double hi) {
  ball_step_inplace("linf_step", x, gradient, origin, eps, step_size, lo, hi, linf_step_launch);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(synthfast, CUDA, m) {
  m.impl("linf_step", TORCH_BOX(&linf_step_cuda));
  m.impl("linf_step_", TORCH_BOX(&linf_step_inplace_cuda));
}

}  // namespace synthfast
