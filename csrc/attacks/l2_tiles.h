// Passes over one sample on the CPU that l2_step and apgd_step share.
#pragma once
#include "l2_step.h"
#include "sample_loops.h"

namespace synthfast {

// Writes displacements from the origin to `t` [elements, filled up with zeros to a whole tile], tile by tile through
// displace(offset, count), and returns how far they must shrink.
template <typename Displace>
SF_HD Shrink shrink_sample(float* t, int64_t elements, float eps, Displace displace) {
  SampleSum sum;
  for (int64_t at = 0; at < elements; at += kSumTile) {
    const int64_t n = std::min(kSumTile, elements - at);
    displace(at, n);
    for (int64_t i = n; i < kSumTile; ++i) t[at + i] = 0.0f;
    sum.add(at / kSumTile, sum_tile(SquareOf{t + at}));
  }
  return shrink_to(sum.total(), eps);
}

// Displacements of the images after the gradient step.
template <typename T>
struct L2Displace {
  const T *x, *gradient, *origin;
  float* t;
  GradientStep along;

  SF_HD void operator()(int64_t at, int64_t n) const {
    SF_INDEPENDENT
    for (int64_t i = at; i < at + n; ++i)
      t[i] = l2_move(to_float(x[i]), to_float(gradient[i]), along) - to_float(origin[i]);
  }
};

// The points of T at the shrunk displacements. `out` may lie on any input.
template <typename T>
SF_HD void pull_in_sample(const float* t, const T* origin, T* out, int64_t elements, float factor, Box box) {
  SF_INDEPENDENT
  for (int64_t i = 0; i < elements; ++i) {
    const float center = to_float(origin[i]);
    out[i] = l2_settle<T>(pulled_in(center, t[i], factor), center, box);
  }
}

}  // namespace synthfast
