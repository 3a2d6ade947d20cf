// The CUDA kernels of apgd_step: elementwise for l-infinity, a block a sample for l2.
#pragma once
#include "apgd_step.h"
#include "l2_step.cuh"

namespace synthfast {

template <typename T>
struct ApgdStepPointers {
  const T *x, *previous, *gradient, *origin;
  T* out;
  const float *eps, *step_size, *momentum;
};

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads) apgd_linf_cuda_kernel(ApgdStepPointers<T> p, Chunks chunks, Box box) {
  constexpr int kCount = kAttackChunk<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < chunks.items(); item += stride) {
    const int64_t sample = chunks.sample_of(item);
    const int64_t offset = (item - sample * chunks.per_sample) * kCount;
    const int64_t at = sample * chunks.elements + offset;
    const int64_t left = chunks.elements - offset;
    const int valid = left < kCount ? static_cast<int>(left) : kCount;
    const float eps = valid_radius(p.eps[sample]), step = p.step_size[sample], momentum = p.momentum[sample];
    float x[kCount], previous[kCount], gradient[kCount], origin[kCount];
    T result[kCount];
    load_pack<kAligned, kCount>(p.x + at, valid, x);
    load_pack<kAligned, kCount>(p.previous + at, valid, previous);
    load_pack<kAligned, kCount>(p.gradient + at, valid, gradient);
    load_pack<kAligned, kCount>(p.origin + at, valid, origin);
    SF_UNROLL
    for (int k = 0; k < kCount; ++k)
      result[k] = apgd_linf_step<T>(x[k], previous[k], gradient[k], origin[k], eps, step, momentum, box);
    store_values<kAligned, kCount>(p.out + at, valid, result);
  }
}

// A chunk of the points whose projections are the results.
template <typename T, bool kAligned>
struct ApgdL2Points {
  static constexpr int kCount = kAttackChunk<T>;
  L2Moved<T, kAligned> images;
  const T* previous;
  Shrink shrink;
  float momentum;
  Box box;

  __device__ __forceinline__ void load(int64_t offset, int valid, float* point, float* center) const {
    float x[kCount], before[kCount];
    images.load(offset, valid, point, center);
    load_pack<kAligned, kCount>(images.x + offset, valid, x);
    load_pack<kAligned, kCount>(previous + offset, valid, before);
    SF_UNROLL
    for (int k = 0; k < kCount; ++k) point[k] = apgd_l2_point(x[k], before[k], point[k], center[k], shrink, momentum, box);
  }
};

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads)
    apgd_l2_cuda_kernel(ApgdStepPointers<T> p, int64_t samples, int64_t elements, Box box) {
  constexpr int kCount = kAttackChunk<T>;
  __shared__ double rows[2][kSumClasses];
  BlockSums sums{rows};
  for (int64_t sample = blockIdx.x; sample < samples; sample += gridDim.x) {
    const int64_t at = sample * elements;
    const float eps = valid_radius(p.eps[sample]);
    const T* gradient = p.gradient + at;
    const double squares = block_sum_squares<kAligned, kCount>(sums, gradient, elements);
    const L2Moved<T, kAligned> images{p.x + at, gradient, p.origin + at, gradient_step(squares, p.step_size[sample])};
    const Shrink first = images.shrink(sums, elements, eps);
    const ApgdL2Points<T, kAligned> points{images, p.previous + at, first, p.momentum[sample], box};
    const double distance = sums.sum<kCount>(elements, [&](int64_t offset, double* values) {
      const int64_t left = elements - offset;
      if (left <= 0) return no_squares<kCount>(values);
      const int valid = left < kCount ? static_cast<int>(left) : kCount;
      float point[kCount], center[kCount];
      points.load(offset, valid, point, center);
      SF_UNROLL
      for (int k = 0; k < kCount; ++k) values[k] = k < valid ? squared_distance(point[k], center[k]) : 0.0;
    });
    const Shrink last = shrink_to(distance, eps);
    for_chunks<kCount>(elements, [&](int64_t offset, int valid) {
      float point[kCount], center[kCount];
      T result[kCount];
      points.load(offset, valid, point, center);
      SF_UNROLL
      for (int k = 0; k < kCount; ++k) result[k] = l2_settle<T>(l2_project(point[k], center[k], last), center[k], box);
      store_values<kAligned, kCount>(p.out + at + offset, valid, result);
    });
  }
}

}  // namespace synthfast
