// Passes over one sample on the CPU that l2_step and apgd_step share.
#pragma once
#include "l2_step.h"
#include "sample_loops.h"

namespace synthfast {

// x after the gradient step, into `moved` [elements, filled up with zeros to a whole tile]; returns how far that must shrink.
template <typename T>
SF_HD Shrink l2_move_sample(const T* x, const T* gradient, const T* origin, float* moved, int64_t elements, float eps,
                            GradientStep step) {
  alignas(64) float origin_buffer[kSumTile];
  SampleSum sum;
  for (int64_t at = 0; at < elements; at += kSumTile) {
    const int64_t n = std::min(kSumTile, elements - at);
    for (int64_t i = 0; i < n; ++i) moved[at + i] = l2_move(to_float(x[at + i]), to_float(gradient[at + i]), step);
    for (int64_t i = n; i < kSumTile; ++i) moved[at + i] = 0.0f;
    sum.add(at / kSumTile, sum_tile(SquareOfDifference{moved + at, padded_tile(origin + at, origin_buffer, n)}));
  }
  return shrink_to(sum.total(), eps);
}

// `out` may lie on any input but `point`.
template <typename T>
SF_HD void l2_finish_sample(const float* point, const T* origin, T* out, int64_t elements, Shrink shrink, Box box) {
  if (shrink.inside) {
    SF_INDEPENDENT
    for (int64_t i = 0; i < elements; ++i) out[i] = l2_settle<T>(point[i], to_float(origin[i]), box);
  } else {
    SF_INDEPENDENT
    for (int64_t i = 0; i < elements; ++i) {
      const float center = to_float(origin[i]);
      out[i] = l2_settle<T>(pulled_in(center, point[i] - center, shrink.factor), center, box);
    }
  }
}

}  // namespace synthfast
