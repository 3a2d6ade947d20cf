// Uniform points of the eps-ball around an origin, host and device.
//
// l-infinity: eps (2 u - 1) in each coordinate. l2: D + 2 normals over their norm are uniform on the sphere in D + 2 dimensions,
// and its first D coordinates are uniform in the ball of D dimensions (Voelker, Gosmann, Stewart 2017).
#pragma once
#include "../common/philox.h"
#include "ball.h"

namespace synthfast {

using BallUniforms = PhiloxUniforms<24>;
constexpr int64_t kSphereExtra = 2;

template <typename T>
SF_HD T linf_start(float origin, float uniform, float eps, Box box) {
  return linf_settle<T>(origin + eps * (2.0f * uniform - 1.0f), origin, eps, box);
}

// What makes a displacement of a normal, from the squares of all D + 2.
SF_HD float start_factor(double squares, float eps) { return squares > 0.0 ? shrink_factor(sqrt_rounded(squares), eps) : 0.0f; }

template <typename T>
SF_HD T l2_start(float origin, float normal, float factor, Box box) {
  return l2_settle<T>(pulled_in(origin, normal, factor), origin, box);
}

}  // namespace synthfast
