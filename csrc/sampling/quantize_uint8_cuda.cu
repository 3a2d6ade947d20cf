#include <torch/csrc/stable/library.h>

#include "../common/dispatch.h"
#include "../common/launch.cuh"
#include "quantize_uint8.cuh"
#include "quantize_uint8_checks.h"

namespace synthfast {

namespace {

void quantize_launch(const Tensor& x, const Tensor& out) {
  if (x.numel() == 0) return;
  dispatch_float(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* values = const_data<T>(x);
    uint8_t* bytes = mutable_data<uint8_t>(out);
    const Chunks chunks = make_chunks(x.size(0), x.numel() / x.size(0), kQuantizeChunk);
    const uint32_t channels = static_cast<uint32_t>(x.size(1));
    const bool planar = !is_channels_last(x);
    const bool aligned = chunks.elements % kQuantizeChunk == 0 && aligned_for(bytes, 16) && aligned_for(values, 16);
    launch_items(x, chunks.items(), [&](unsigned grid, cudaStream_t stream) {
      if (planar && aligned)
        quantize_uint8_cuda_kernel<T, true, true><<<grid, kBlockThreads, 0, stream>>>(values, bytes, chunks, channels);
      else if (planar)
        quantize_uint8_cuda_kernel<T, true, false><<<grid, kBlockThreads, 0, stream>>>(values, bytes, chunks, channels);
      else if (aligned)
        quantize_uint8_cuda_kernel<T, false, true><<<grid, kBlockThreads, 0, stream>>>(values, bytes, chunks, channels);
      else
        quantize_uint8_cuda_kernel<T, false, false><<<grid, kBlockThreads, 0, stream>>>(values, bytes, chunks, channels);
    });
  });
}

Tensor quantize_uint8_cuda(Tensor x) { return quantize_uint8(x, quantize_launch); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(synthfast, CUDA, m) { m.impl("quantize_uint8", TORCH_BOX(&quantize_uint8_cuda)); }

}  // namespace synthfast
