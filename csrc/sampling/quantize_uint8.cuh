// The CUDA kernel of quantize_uint8. A thread writes 16 consecutive bytes of one image; from planes it gathers them.
#pragma once
#include "../common/kernel.cuh"
#include "quantize_uint8.h"

namespace synthfast {

constexpr int kQuantizeChunk = 16;

// kPlanar: x is [N, C, pixels], else it is already in the order of the output, [N, pixels, C].
template <typename T, bool kPlanar, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads)
    quantize_uint8_cuda_kernel(const T* x, uint8_t* out, Chunks chunks, uint32_t channels) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t plane = chunks.elements / channels;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < chunks.items(); item += stride) {
    const int64_t sample = chunks.sample_of(item);
    const int64_t offset = (item - sample * chunks.per_sample) * kQuantizeChunk;
    const int64_t base = sample * chunks.elements;
    const int64_t left = chunks.elements - offset;
    const int valid = left < kQuantizeChunk ? static_cast<int>(left) : kQuantizeChunk;
    Pack<uint8_t, kQuantizeChunk> bytes;
    if constexpr (kPlanar) {
      int64_t pixel = offset / channels;
      uint32_t channel = static_cast<uint32_t>(offset - pixel * channels);
      SF_UNROLL
      for (int k = 0; k < kQuantizeChunk; ++k) {
        bytes.value[k] = k < valid ? quantize(to_float(x[base + channel * plane + pixel])) : uint8_t{0};
        if (++channel == channels) {
          channel = 0;
          ++pixel;
        }
      }
    } else {
      constexpr int kCount = 16 / sizeof(T);
      SF_UNROLL
      for (int k = 0; k < kQuantizeChunk; k += kCount) {
        float values[kCount];
        load_pack<kAligned, kCount>(x + base + offset + k, valid - k, values);
        SF_UNROLL
        for (int j = 0; j < kCount; ++j) bytes.value[k + j] = quantize(values[j]);
      }
    }
    uint8_t* target = out + base + offset;
    if constexpr (kAligned) {
      *reinterpret_cast<Pack<uint8_t, kQuantizeChunk>*>(target) = bytes;
    } else {
      SF_UNROLL
      for (int k = 0; k < kQuantizeChunk; ++k)
        if (k < valid) target[k] = bytes.value[k];
    }
  }
}

}  // namespace synthfast
