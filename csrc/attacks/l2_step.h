// One step along the normalised gradient, host and device: t = x + step g / ||g|| - o, t min(1, eps / ||t||), v = o + t, into
// [lo, hi]. The norms are sums in double, see sum_squares.h.
#pragma once
#include "ball.h"

namespace synthfast {

// The step per unit of gradient, as a power of two that brings the gradient's norm near 1, and the rest: one float could not
// hold it for the norms that occur. A gradient that is zero or not finite gives no step at all.
struct GradientStep {
  bool any;
  float unit, scale;
};

SF_HD GradientStep gradient_step(double squares, float step) {
  if (!(squares > 0.0 && squares < __builtin_inf())) return {false, 0.0f, 0.0f};
  const double norm = sqrt_rounded(squares);
  const double within = norm < 0x1p-126 ? 0x1p-126 : norm > 0x1p126 ? 0x1p126 : norm;
  const uint32_t exponent = bits_from_float(static_cast<float>(within)) & 0x7f800000u;
  const float unit = float_from_bits((254u << 23) - exponent);
  // Below the normal floats norm * unit is down to 2^-23: a huge step over it stays finite, so that the projection can work.
  const double scale = step / (norm * unit);
  return {true, unit, static_cast<float>(scale < -0x1p127 ? -0x1p127 : scale > 0x1p127 ? 0x1p127 : scale)};
}

SF_HD float l2_move(float x, float gradient, GradientStep step) {
  const float moved = x + step.scale * (gradient * step.unit);
  return step.any ? moved : x;
}

}  // namespace synthfast
