// One step of Auto-PGD, host and device (Croce and Hein 2020, algorithm 1): z is the projected gradient step, then
// v = P(x + a (z - x) + (1 - a) (x - previous)).
#pragma once
#include "l2_step.h"
#include "linf_step.h"

namespace synthfast {

SF_HD float with_momentum(float x, float previous, float z, float momentum) {
  return (x + momentum * (z - x)) + (1.0f - momentum) * (x - previous);
}

template <typename T>
SF_HD T apgd_linf_step(float x, float previous, float gradient, float origin, float eps, float step, float momentum, Box box) {
  const float z = linf_project(sign_step(x, gradient, step), origin, eps, box);
  return linf_settle<T>(with_momentum(x, previous, z, momentum), origin, eps, box);
}

// The point whose projection is the result; `moved` is x after the gradient step.
SF_HD float apgd_l2_point(float x, float previous, float moved, float origin, Shrink shrink, float momentum, Box box) {
  const float z = clamp(l2_project(moved, origin, shrink), box.lo, box.hi);
  return with_momentum(x, previous, z, momentum);
}

}  // namespace synthfast
