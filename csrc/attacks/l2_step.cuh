// The CUDA kernel of l2_step: a block takes a sample at a time. It reads the sample three times (twice the images), of which the
// first is from memory and the others from the caches.
#pragma once
#include "chunk.cuh"
#include "l2_step.h"
#include "sum_squares.cuh"

namespace synthfast {

template <typename T>
struct L2StepPointers {
  const T *x, *gradient, *origin;
  T* out;
  const float *eps, *step_size;
};

// The sum of the squares of a sample's values.
template <bool kAligned, int kCount, typename T>
__device__ __forceinline__ double block_sum_squares(BlockSums& sums, const T* values, int64_t elements) {
  return sums.sum<kCount>(elements, [&](int64_t offset, double* squares) {
    const int64_t left = elements - offset;
    if (left <= 0) return no_squares<kCount>(squares);
    float v[kCount];
    load_pack<kAligned, kCount>(values + offset, left < kCount ? static_cast<int>(left) : kCount, v);
    SF_UNROLL
    for (int k = 0; k < kCount; ++k) squares[k] = static_cast<double>(v[k]) * static_cast<double>(v[k]);
  });
}

SF_HD double squared_distance(float a, float b) {
  const double t = a - b;
  return t * t;
}

// A sample's images after the gradient step, a chunk at a time.
template <typename T, bool kAligned>
struct L2Moved {
  static constexpr int kCount = kAttackChunk<T>;
  const T *x, *gradient, *origin;  // of the sample
  GradientStep along;

  __device__ __forceinline__ void load(int64_t offset, int valid, float* moved, float* center) const {
    float g[kCount];
    load_pack<kAligned, kCount>(x + offset, valid, moved);
    load_pack<kAligned, kCount>(gradient + offset, valid, g);
    load_pack<kAligned, kCount>(origin + offset, valid, center);
    SF_UNROLL
    for (int k = 0; k < kCount; ++k) moved[k] = l2_move(moved[k], g[k], along);
  }

  __device__ __forceinline__ Shrink shrink(BlockSums& sums, int64_t elements, float eps) const {
    const double squares = sums.sum<kCount>(elements, [&](int64_t offset, double* values) {
      const int64_t left = elements - offset;
      if (left <= 0) return no_squares<kCount>(values);
      const int valid = left < kCount ? static_cast<int>(left) : kCount;
      float moved[kCount], center[kCount];
      load(offset, valid, moved, center);
      SF_UNROLL
      for (int k = 0; k < kCount; ++k) values[k] = k < valid ? squared_distance(moved[k], center[k]) : 0.0;
    });
    return shrink_to(squares, eps);
  }
};

// `out` may lie on an input: a thread writes an element after it has read it for the last time.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads)
    l2_step_cuda_kernel(L2StepPointers<T> p, int64_t samples, int64_t elements, Box box) {
  constexpr int kCount = kAttackChunk<T>;
  __shared__ double rows[2][kSumClasses];
  BlockSums sums{rows};
  for (int64_t sample = blockIdx.x; sample < samples; sample += gridDim.x) {
    const int64_t at = sample * elements;
    const T* gradient = p.gradient + at;
    const double squares = block_sum_squares<kAligned, kCount>(sums, gradient, elements);
    const L2Moved<T, kAligned> images{p.x + at, gradient, p.origin + at, gradient_step(squares, p.step_size[sample])};
    const Shrink shrink = images.shrink(sums, elements, valid_radius(p.eps[sample]));
    for_chunks<kCount>(elements, [&](int64_t offset, int valid) {
      float moved[kCount], center[kCount];
      T result[kCount];
      images.load(offset, valid, moved, center);
      SF_UNROLL
      for (int k = 0; k < kCount; ++k) result[k] = l2_settle<T>(l2_project(moved[k], center[k], shrink), center[k], box);
      store_values<kAligned, kCount>(p.out + at + offset, valid, result);
    });
  }
}

}  // namespace synthfast
