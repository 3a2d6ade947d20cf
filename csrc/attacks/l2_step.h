// One step along the normalised gradient, host and device: t = x + step g / ||g|| - o, t min(1, eps / ||t||), v = o + t, into
// [lo, hi]. The norms are sums in double, see sum_squares.h.
#pragma once
#include "ball.h"

namespace synthfast {

// The step per unit of gradient. A gradient that is zero or not finite gives no step at all.
struct GradientStep {
  bool any;
  double scale;
};

SF_HD GradientStep gradient_step(double squares, float step) {
  const bool any = squares > 0.0 && squares < __builtin_inf();
  return {any, any ? step / sqrt_rounded(squares) : 0.0};
}

// In double, because the scale of a small gradient is beyond floats.
SF_HD float l2_move(float x, float gradient, GradientStep step) {
  const float moved = static_cast<float>(x + step.scale * gradient);
  return step.any ? moved : x;
}

}  // namespace synthfast
