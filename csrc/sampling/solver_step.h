// The element-wise math of one solver stage, host and device.
//
//   m  = mu + w (m - mu)                   classifier-free guidance, where an unconditional output is given
//   D  = clamp(kx x + km m, lo, hi)        the denoised image
//   x' = ax x + ad D + ap P + az z         P: the previous denoised image, z: a standard normal
#pragma once
#include "../common/host_device.h"

namespace synthfast {

struct SolverCoefficients {
  float kx, km, ax, ad, ap, az, w, lo, hi;
  static constexpr int kCount = 9;

  SF_HD static SolverCoefficients load(const float* c) {
    return {c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8]};
  }
};

SF_HD float guided(float conditional, float unconditional, float w) {
  return unconditional + w * (conditional - unconditional);
}

SF_HD float denoise(float x, float m, const SolverCoefficients& c) { return clamp(c.kx * x + c.km * m, c.lo, c.hi); }

SF_HD float advance(float x, float denoised, const SolverCoefficients& c) { return c.ax * x + c.ad * denoised; }

}  // namespace synthfast
