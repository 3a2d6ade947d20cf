// The CUDA kernel of philox_normal_ and philox_uniform_.
#pragma once
#include "../common/kernel.cuh"
#include "philox_convert.h"

namespace synthfast {

template <typename T>
constexpr int kPhiloxFillChunk = 16 / sizeof(T);

template <typename T, typename Convert, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads)
    philox_fill_cuda_kernel(T* out, const int64_t* index, Chunks chunks, PhiloxDraw draw) {
  constexpr int kCount = kPhiloxFillChunk<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < chunks.items(); item += stride) {
    const int64_t sample = chunks.sample_of(item);
    const int64_t offset = (item - sample * chunks.per_sample) * kCount;
    const int64_t left = chunks.elements - offset;
    float values[kCount];
    SF_UNROLL
    for (int k = 0; k < kCount; k += 4)
      Convert::convert(draw.words(index[sample], static_cast<uint32_t>((offset + k) / 4)), values + k);
    store_pack<kAligned, kCount>(out + sample * chunks.elements + offset, left < kCount ? static_cast<int>(left) : kCount,
                                 values);
  }
}

}  // namespace synthfast
