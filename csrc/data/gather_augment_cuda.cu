#include <torch/csrc/stable/library.h>

#include "../common/dispatch.h"
#include "../common/launch.cuh"
#include "gather_augment.cuh"
#include "gather_augment_checks.h"

namespace synthfast {

namespace {

void gather_augment_launch(const GatherAugmentArguments& a) {
  if (a.out.numel() == 0) return;
  dispatch_float(a.out.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const uint8_t* images = const_data<uint8_t>(a.images);
    const int64_t count = a.images.size(0);
    const int64_t *items = const_data<int64_t>(a.items), *index = const_data<int64_t>(a.index);
    T* out = mutable_data<T>(a.out);
    const Chunks threads = gather_threads<T>(a.items.size(0), a.shape);
    const bool aligned = a.shape.elements() % kGatherChunk<T> == 0 && aligned_for(out, 16);
    launch_items(a.images, threads.items(), [&](unsigned grid, cudaStream_t stream) {
      if (aligned)
        gather_augment_cuda_kernel<T, true><<<grid, kBlockThreads, 0, stream>>>(images, count, items, index, out, threads,
                                                                                a.shape, a.padding, a.flip, a.draw);
      else
        gather_augment_cuda_kernel<T, false><<<grid, kBlockThreads, 0, stream>>>(images, count, items, index, out, threads,
                                                                                 a.shape, a.padding, a.flip, a.draw);
    });
  });
}

Tensor gather_augment_cuda(Tensor images, Tensor items, Tensor index, int64_t seed, int64_t padding, bool flip,
                           ScalarType dtype) {
  return gather_augment(images, items, index, seed, padding, flip, dtype, gather_augment_launch);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(synthfast, CUDA, m) { m.impl("gather_augment", TORCH_BOX(&gather_augment_cuda)); }

}  // namespace synthfast
