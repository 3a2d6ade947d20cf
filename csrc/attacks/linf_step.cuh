// The CUDA kernel of linf_step: a thread takes one chunk of a sample at a time.
#pragma once
#include "chunk.cuh"
#include "linf_step.h"

namespace synthfast {

template <typename T>
struct LinfStepPointers {
  const T *x, *gradient, *origin;
  T* out;
  const float *eps, *step_size;
};

// `out` may lie on an input, so no pointer is __restrict__; each thread reads its elements before it writes them.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads) linf_step_cuda_kernel(LinfStepPointers<T> p, Chunks chunks, Box box) {
  constexpr int kCount = kAttackChunk<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < chunks.items(); item += stride) {
    const int64_t sample = chunks.sample_of(item);
    const int64_t offset = (item - sample * chunks.per_sample) * kCount;
    const int64_t at = sample * chunks.elements + offset;
    const int64_t left = chunks.elements - offset;
    const int valid = left < kCount ? static_cast<int>(left) : kCount;
    const float eps = valid_radius(p.eps[sample]), step = p.step_size[sample];
    float x[kCount], gradient[kCount], origin[kCount];
    T result[kCount];
    load_pack<kAligned, kCount>(p.x + at, valid, x);
    load_pack<kAligned, kCount>(p.gradient + at, valid, gradient);
    load_pack<kAligned, kCount>(p.origin + at, valid, origin);
    SF_UNROLL
    for (int k = 0; k < kCount; ++k) result[k] = linf_step<T>(x[k], gradient[k], origin[k], eps, step, box);
    store_values<kAligned, kCount>(p.out + at, valid, result);
  }
}

}  // namespace synthfast
