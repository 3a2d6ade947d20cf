// One step of a sign-gradient attack, host and device: v = x + step sign(g), into the l-infinity ball, into [lo, hi].
#pragma once
#include "ball.h"

namespace synthfast {

// sign(NaN) is 0. Selected and not multiplied, so that an infinite step and a zero gradient give x.
SF_HD float sign_step(float x, float gradient, float step) {
  const float up = gradient > 0.0f ? step : 0.0f;
  return x + (gradient < 0.0f ? -step : up);
}

template <typename T>
SF_HD T linf_step(float x, float gradient, float origin, float eps, float step, Box box) {
  return linf_settle<T>(sign_step(x, gradient, step), origin, eps, box);
}

}  // namespace synthfast
