#include <torch/csrc/stable/library.h>

#include "../common/dispatch.h"
#include "attack_checks.h"
#include "ball_start.cuh"
#include "block_launch.cuh"

namespace synthfast {

namespace {

void ball_start_launch(const StartArguments& a, BallNorm norm) {
  if (a.origin.numel() == 0) return;
  const int64_t samples = a.origin.size(0), elements = a.origin.numel() / samples;
  dispatch_float(a.origin.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kCount = kAttackChunk<T>;
    const BallStartPointers<T> p{const_data<T>(a.origin), mutable_data<T>(a.out), const_data<float>(a.eps),
                                 const_data<int64_t>(a.index)};
    const bool aligned = elements % kCount == 0 && aligned_for(p.origin, 16) && aligned_for(p.out, 16);
    const Box box = make_box<T>(a.lo, a.hi);
    if (norm == BallNorm::kLinf) {
      const Chunks chunks = make_chunks(samples, elements, kCount);
      launch_items(a.origin, chunks.items(), [&](unsigned grid, cudaStream_t stream) {
        if (aligned)
          linf_start_cuda_kernel<T, true><<<grid, kBlockThreads, 0, stream>>>(p, chunks, box, a.draw);
        else
          linf_start_cuda_kernel<T, false><<<grid, kBlockThreads, 0, stream>>>(p, chunks, box, a.draw);
      });
    } else {
      launch_samples(a.origin, samples, elements + kSphereExtra, [&](unsigned grid, unsigned threads, cudaStream_t stream) {
        if (aligned)
          l2_start_cuda_kernel<T, true><<<grid, threads, 0, stream>>>(p, samples, elements, box, a.draw);
        else
          l2_start_cuda_kernel<T, false><<<grid, threads, 0, stream>>>(p, samples, elements, box, a.draw);
      });
    }
  });
}

Tensor ball_start_cuda(Tensor origin, Tensor index, Tensor eps, int64_t norm, int64_t seed, int64_t step, double lo,
                       double hi) {
  return ball_start(origin, index, eps, norm, seed, step, lo, hi, ball_start_launch);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(synthfast, CUDA, m) { m.impl("ball_start", TORCH_BOX(&ball_start_cuda)); }

}  // namespace synthfast
