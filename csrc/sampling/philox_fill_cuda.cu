// philox_normal_ and philox_uniform_ on CUDA.
#include <torch/csrc/stable/library.h>

#include "../common/dispatch.h"
#include "../common/launch.cuh"
#include "philox_fill.cuh"
#include "philox_fill.h"

namespace synthfast {

namespace {

template <template <typename> class Convert>
void fill_launch(const Tensor& out, const Tensor& index, PhiloxDraw draw) {
  if (out.numel() == 0) return;
  dispatch_float(out.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kCount = kPhiloxFillChunk<T>;
    T* values = mutable_data<T>(out);
    const int64_t* indices = const_data<int64_t>(index);
    const Chunks chunks = make_chunks(out.size(0), out.numel() / out.size(0), kCount);
    const bool aligned = chunks.elements % kCount == 0 && aligned_for(values, 16);
    launch_items(out, chunks.items(), [&](unsigned grid, cudaStream_t stream) {
      if (aligned)
        philox_fill_cuda_kernel<T, Convert<T>, true><<<grid, kBlockThreads, 0, stream>>>(values, indices, chunks, draw);
      else
        philox_fill_cuda_kernel<T, Convert<T>, false><<<grid, kBlockThreads, 0, stream>>>(values, indices, chunks, draw);
    });
  });
}

void philox_normal_cuda(Tensor out, Tensor index, int64_t seed, int64_t stream, int64_t step) {
  philox_fill("philox_normal_", out, index, seed, stream, step, fill_launch<NormalsOf>);
}

void philox_uniform_cuda(Tensor out, Tensor index, int64_t seed, int64_t stream, int64_t step) {
  philox_fill("philox_uniform_", out, index, seed, stream, step, fill_launch<UniformsOf>);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(synthfast, CUDA, m) {
  m.impl("philox_normal_", TORCH_BOX(&philox_normal_cuda));
  m.impl("philox_uniform_", TORCH_BOX(&philox_uniform_cuda));
}

}  // namespace synthfast
