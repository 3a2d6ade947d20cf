// How the CPU kernels of the attacks walk over a batch.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "../common/vectorize.h"
#include "sum_squares.h"

// The iterations of the loop that follows are independent: each reads its elements before it writes the result, which may lie
// on one of the inputs (in-place calls). Without this the check for overlapping memory falls back to a scalar loop.
#if defined(__clang__)
#define SF_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define SF_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace synthfast {

// Calls run(sample, first element in the batch, count) for pieces of samples, in parallel, whatever the size of a sample.
template <typename Run>
void for_pieces(int64_t samples, int64_t elements, Run&& run) {
  torch::stable::parallel_for(0, samples * elements, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t sample = begin / elements; begin < end; ++sample) {
      const int64_t n = std::min(end, (sample + 1) * elements) - begin;
      run(sample, begin, n);
      begin += n;
    }
  });
}

// Calls run(sample, scratch) for every sample, in parallel; scratch has room for `room` floats and up to the end of their tile.
template <typename Run>
void for_samples(int64_t samples, int64_t room, Run&& run) {
  const int64_t floats = (room + kSumTile - 1) / kSumTile * kSumTile;
  const int64_t grain = std::max<int64_t>(1, 16384 / floats);
  torch::stable::parallel_for(0, samples, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[floats]);
    for (int64_t sample = begin; sample < end; ++sample) run(sample, scratch.get());
  });
}

// A whole tile as floats: the memory itself where it holds floats already, else in `buffer`; zeros follow the n elements.
template <typename T>
SF_HD const float* padded_tile(const T* source, float* buffer, int64_t n) {
  if (n == kSumTile) return load_tile(source, buffer, kSumTile);
  for (int64_t i = 0; i < n; ++i) buffer[i] = to_float(source[i]);
  for (int64_t i = n; i < kSumTile; ++i) buffer[i] = 0.0f;
  return buffer;
}

template <typename T>
SF_HD double sum_squares(const T* values, int64_t elements) {
  alignas(64) float buffer[kSumTile];
  SampleSum sum;
  for (int64_t at = 0; at < elements; at += kSumTile)
    sum.add(at / kSumTile, sum_tile(SquareOf{padded_tile(values + at, buffer, std::min(kSumTile, elements - at))}));
  return sum.total();
}

}  // namespace synthfast
