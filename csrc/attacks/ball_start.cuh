// The CUDA kernels of ball_start: elementwise for l-infinity, a block a sample for l2, with the normals drawn twice.
#pragma once
#include "ball_start.h"
#include "chunk.cuh"
#include "sum_squares.cuh"

namespace synthfast {

template <typename T>
struct BallStartPointers {
  const T* origin;
  T* out;
  const float* eps;
  const int64_t* index;
};

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads)
    linf_start_cuda_kernel(BallStartPointers<T> p, Chunks chunks, Box box, PhiloxDraw draw) {
  constexpr int kCount = kAttackChunk<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < chunks.items(); item += stride) {
    const int64_t sample = chunks.sample_of(item);
    const int64_t offset = (item - sample * chunks.per_sample) * kCount;
    const int64_t at = sample * chunks.elements + offset;
    const int64_t left = chunks.elements - offset;
    const int valid = left < kCount ? static_cast<int>(left) : kCount;
    const float eps = valid_radius(p.eps[sample]);
    float origin[kCount], u[kCount];
    T result[kCount];
    load_pack<kAligned, kCount>(p.origin + at, valid, origin);
    SF_UNROLL
    for (int k = 0; k < kCount; k += 4)
      BallUniforms::convert(draw.words(p.index[sample], static_cast<uint32_t>((offset + k) / 4)), u + k);
    SF_UNROLL
    for (int k = 0; k < kCount; ++k) result[k] = linf_start<T>(origin[k], u[k], eps, box);
    store_values<kAligned, kCount>(p.out + at, valid, result);
  }
}

template <int kCount>
SF_HD void draw_normals(PhiloxDraw draw, int64_t index, int64_t offset, float* z) {
  SF_UNROLL
  for (int k = 0; k < kCount; k += 4)
    PhiloxNormals::convert(draw.words(index, static_cast<uint32_t>((offset + k) / 4)), z + k);
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads)
    l2_start_cuda_kernel(BallStartPointers<T> p, int64_t samples, int64_t elements, Box box, PhiloxDraw draw) {
  constexpr int kCount = kAttackChunk<T>;
  __shared__ double rows[2][kSumClasses];
  BlockSums sums{rows};
  for (int64_t sample = blockIdx.x; sample < samples; sample += gridDim.x) {
    const int64_t at = sample * elements, index = p.index[sample], normals = elements + kSphereExtra;
    const double squares = sums.sum<kCount>(normals, [&](int64_t offset, double* values) {
      const int64_t left = normals - offset;
      if (left <= 0) return no_squares<kCount>(values);
      float z[kCount];
      draw_normals<kCount>(draw, index, offset, z);
      SF_UNROLL
      for (int k = 0; k < kCount; ++k) values[k] = k < left ? static_cast<double>(z[k]) * static_cast<double>(z[k]) : 0.0;
    });
    const float factor = start_factor(squares, valid_radius(p.eps[sample]));
    for_chunks<kCount>(elements, [&](int64_t offset, int valid) {
      float z[kCount], origin[kCount];
      T result[kCount];
      draw_normals<kCount>(draw, index, offset, z);
      load_pack<kAligned, kCount>(p.origin + at + offset, valid, origin);
      SF_UNROLL
      for (int k = 0; k < kCount; ++k) result[k] = l2_start<T>(origin[k], z[k], factor, box);
      store_values<kAligned, kCount>(p.out + at + offset, valid, result);
    });
  }
}

}  // namespace synthfast
