#include <torch/csrc/stable/library.h>

#include "../common/dispatch.h"
#include "apgd_step.cuh"
#include "attack_checks.h"
#include "block_launch.cuh"

namespace synthfast {

namespace {

void apgd_step_launch(const AttackArguments& a, BallNorm norm) {
  if (a.x.numel() == 0) return;
  const int64_t samples = a.x.size(0), elements = a.x.numel() / samples;
  dispatch_float(a.x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kCount = kAttackChunk<T>;
    const ApgdStepPointers<T> p{
        const_data<T>(a.x),     const_data<T>(*a.previous), const_data<T>(a.gradient),       const_data<T>(a.origin),
        mutable_data<T>(a.out), const_data<float>(a.eps),   const_data<float>(a.step_size), const_data<float>(*a.momentum)};
    const bool aligned = elements % kCount == 0 && aligned_for(p.x, 16) && aligned_for(p.previous, 16) &&
                         aligned_for(p.gradient, 16) && aligned_for(p.origin, 16) && aligned_for(p.out, 16);
    const Box box = make_box<T>(a.lo, a.hi);
    if (norm == BallNorm::kLinf) {
      const Chunks chunks = make_chunks(samples, elements, kCount);
      launch_items(a.x, chunks.items(), [&](unsigned grid, cudaStream_t stream) {
        if (aligned)
          apgd_linf_cuda_kernel<T, true><<<grid, kBlockThreads, 0, stream>>>(p, chunks, box);
        else
          apgd_linf_cuda_kernel<T, false><<<grid, kBlockThreads, 0, stream>>>(p, chunks, box);
      });
    } else {
      launch_samples(a.x, samples, elements, [&](unsigned grid, unsigned threads, cudaStream_t stream) {
        if (aligned)
          apgd_l2_cuda_kernel<T, true><<<grid, threads, 0, stream>>>(p, samples, elements, box);
        else
          apgd_l2_cuda_kernel<T, false><<<grid, threads, 0, stream>>>(p, samples, elements, box);
      });
    }
  });
}

Tensor apgd_step_cuda(Tensor x, Tensor previous, Tensor gradient, Tensor origin, Tensor eps, Tensor step_size, Tensor momentum,
                      int64_t norm, double lo, double hi) {
  return apgd_step(x, previous, gradient, origin, eps, step_size, momentum, norm, lo, hi, apgd_step_launch);
}

void apgd_step_inplace_cuda(Tensor previous, Tensor x, Tensor gradient, Tensor origin, Tensor eps, Tensor step_size,
                            Tensor momentum, int64_t norm, double lo, double hi) {
  apgd_step_inplace(previous, x, gradient, origin, eps, step_size, momentum, norm, lo, hi, apgd_step_launch);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(synthfast, CUDA, m) {
  m.impl("apgd_step", TORCH_BOX(&apgd_step_cuda));
  m.impl("apgd_step_", TORCH_BOX(&apgd_step_inplace_cuda));
}

}  // namespace synthfast
