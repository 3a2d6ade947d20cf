// Sums of squares on the device in the order of sum_squares.h: a warp takes a tile, a block of up to 8 warps a sample.
#pragma once
#include "../common/kernel.cuh"
#include "sum_squares.h"

namespace synthfast {

// Warps that a sample of so many elements keeps busy; with fewer than 8 each has one tile at most.
SF_HD int sample_warps(int64_t elements) {
  const int64_t tiles = (elements + kSumTile - 1) / kSumTile;
  return tiles < kSumClasses ? static_cast<int>(tiles) : kSumClasses;
}

// Where sums of one block meet: two rows that take turns, so that one barrier a sum is enough (whoever still reads the last
// sum has not reached the barrier of the one after).
struct BlockSums {
  double (*rows)[kSumClasses];  // [2], shared
  int turn = 0;

  // Calls squares(offset, values) for the chunks of kCount elements of this thread's tiles: it writes kCount squares, zeros beyond
  // the end of the sample. Every thread of the block calls this and gets the sum.
  template <int kCount, typename Squares>
  __device__ __forceinline__ double sum(int64_t elements, Squares&& squares) {
    constexpr int kChunks = static_cast<int>(kSumTile) / (32 * kCount);
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int warps = static_cast<int>(blockDim.x) / 32;
    double total = 0.0;
    for (int64_t tile = warp; tile * kSumTile < elements; tile += warps) {
      double values[kChunks][kCount];
      SF_UNROLL
      for (int c = 0; c < kChunks; ++c) squares(tile * kSumTile + (c * 32 + lane) * kCount, values[c]);
      SF_UNROLL
      for (int half = kChunks / 2; half > 0; half /= 2) {
        SF_UNROLL
        for (int c = 0; c < half; ++c) {
          SF_UNROLL
          for (int k = 0; k < kCount; ++k) values[c][k] += values[c + half][k];
        }
      }
      SF_UNROLL
      for (int delta = 16; delta > 0; delta /= 2) {
        SF_UNROLL
        for (int k = 0; k < kCount; ++k) values[0][k] += __shfl_down_sync(0xffffffffu, values[0][k], delta);
      }
      total += sum_tree<kCount>(values[0]);  // of use in lane 0
    }
    double* row = rows[turn];
    turn ^= 1;
    if (lane == 0) row[warp] = total;
    __syncthreads();
    double classes[kSumClasses];
    SF_UNROLL
    for (int w = 0; w < kSumClasses; ++w) classes[w] = w < warps ? row[w] : 0.0;
    return sum_tree<kSumClasses>(classes);
  }
};

// Calls visit(offset, valid) for this thread's chunks of a sample, those that BlockSums::sum gives it.
template <int kCount, typename Visit>
__device__ __forceinline__ void for_chunks(int64_t elements, Visit&& visit) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  for (int64_t tile = warp; tile * kSumTile < elements; tile += warps) {
    for (int c = 0; c < static_cast<int>(kSumTile) / (32 * kCount); ++c) {
      const int64_t offset = tile * kSumTile + (c * 32 + lane) * kCount;
      const int64_t left = elements - offset;
      if (left > 0) visit(offset, left < kCount ? static_cast<int>(left) : kCount);
    }
  }
}

template <int kCount>
SF_HD void no_squares(double* values) {
  SF_UNROLL
  for (int k = 0; k < kCount; ++k) values[k] = 0.0;
}

}  // namespace synthfast
