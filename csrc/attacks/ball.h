// What keeps a stored value inside the eps-ball around its origin and inside [lo, hi] exactly, host and device.
//
// A bound that is rounded to nearest may lie outside the ball, and so may a value that is rounded after it was clamped. So
// bounds are rounded inwards, from the exact sum, and the value that is checked is the one that is stored.
#pragma once
#include "../common/host_device.h"

namespace synthfast {

constexpr float kLargestFloat = 0x1.fffffep127f;
constexpr float kSmallestNormal = 0x1p-126f;

// The random stream of attack starts (synthfast.ops.Stream.ATTACK).
constexpr int64_t kAttackStream = 6;

// A radius that the arithmetic below can use: negative and NaN count as 0, infinity as the largest float.
SF_HD float valid_radius(float eps) {
  const float finite = eps < kLargestFloat ? eps : kLargestFloat;
  return eps > 0.0f ? finite : 0.0f;
}

// a + b = sum + error exactly; the sum is rounded to nearest (Knuth, The Art of Computer Programming, 4.2.2, theorem B).
// The error is NaN where the sum overflows.
struct ExactSum {
  float sum, error;
};

SF_HD ExactSum exact_sum(float a, float b) {
  const float sum = a + b;
  const float b_part = sum - a;
  return {sum, (a - (sum - b_part)) + (b - b_part)};
}

// The neighbours of a float that is neither 0 nor NaN: a sum of floats that was rounded is not 0.
SF_HD float next_down(float value) {
  const uint32_t bits = bits_from_float(value);
  return float_from_bits(bits - static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31 | 1));
}

SF_HD float next_up(float value) {
  const uint32_t bits = bits_from_float(value);
  return float_from_bits(bits + static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31 | 1));
}

// The largest float that is not above a + b. Not (error >= 0): an overflow to infinity steps back to the largest float.
SF_HD float sum_down(float a, float b) {
  const ExactSum s = exact_sum(a, b);
  return !(s.error >= 0.0f) ? next_down(s.sum) : s.sum;
}

// The smallest float that is not below a + b.
SF_HD float sum_up(float a, float b) {
  const ExactSum s = exact_sum(a, b);
  return !(s.error <= 0.0f) ? next_up(s.sum) : s.sum;
}

// The value of T next to `value`, or one step further in where that lies outside [low, high]. `value` lies in this interval,
// and so does some value of T. Never -0, which bounds could give or not give, depending on how they are rounded.
template <typename T>
SF_HD T settle(float value, float low, float high) {
  T nearest = from_float<T>(value);
  const float rounded = to_float(nearest);
  const int32_t upwards = 1 - 2 * static_cast<int32_t>(nearest.bits >> 15);  // in bits
  const int32_t steps = static_cast<int32_t>(rounded < low) - static_cast<int32_t>(rounded > high);
  const uint16_t bits = static_cast<uint16_t>(nearest.bits + steps * upwards);
  nearest.bits = bits == 0x8000u ? uint16_t{0} : bits;
  return nearest;
}

template <>
SF_HD float settle<float>(float value, float, float) {
  return value + 0.0f;
}

// [lo, hi] in values of T: the smallest not below lo, the largest not above hi.
struct Box {
  float lo, hi;
};

template <typename T>
Box make_box(double lo, double hi) {
  constexpr float infinity = __builtin_inff();
  float low = static_cast<float>(lo), high = static_cast<float>(hi);
  if (low < lo) low = __builtin_nextafterf(low, infinity);
  if (high > hi) high = __builtin_nextafterf(high, -infinity);
  return {to_float(settle<T>(low, low, infinity)), to_float(settle<T>(high, -infinity, high))};
}

// `value` brought into the l-infinity ball, then into the box, in float.
SF_HD float linf_project(float value, float origin, float eps, Box box) {
  return clamp(clamp(value, sum_up(origin, -eps), sum_down(origin, eps)), box.lo, box.hi);
}

// The same as a value of T.
template <typename T>
SF_HD T linf_settle(float value, float origin, float eps, Box box) {
  const float low = clamp(sum_up(origin, -eps), box.lo, box.hi), high = clamp(sum_down(origin, eps), box.lo, box.hi);
  return settle<T>(clamp(value, low, high), low, high);
}

template <>
SF_HD float linf_settle<float>(float value, float origin, float eps, Box box) {
  return settle<float>(linf_project(value, origin, eps, box), 0.0f, 0.0f);
}

SF_HD double sqrt_rounded(double value) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(value);
#else
  return __builtin_sqrt(value);
#endif
}

// How far a displacement must shrink to lie in the l2 ball.
struct Shrink {
  bool inside;   // not at all: the point stays as it is
  float factor;  // else times this
};

// A projected displacement is three roundings to float too long at most (of the factor, of a product, and of the comparison in
// pulled_in), each of 2^-24: kShrink allows for six. kMargin allows for the rounding of the displacement itself; it is small
// enough that a projected point counts as inside when it is measured again. The errors of the sums in double are below 2^-40.
constexpr double kShrink = 1 - 3 * 0x1p-23;
constexpr double kMargin = 1 + 3 * 0x1p-25;

// Below this radius, or with a factor that is not a normal float, roundings are not small beside the result: the origin is taken.
constexpr float kSmallestRadius = 0x1p-100f;

SF_HD float shrink_factor(double norm, float eps) {
  const double factor = eps / norm * kShrink;
  return eps < kSmallestRadius || factor < kSmallestNormal ? 0.0f : static_cast<float>(factor);
}

// `squares` is the sum in double of the squares of the displacement in float.
SF_HD Shrink shrink_to(double squares, float eps) {
  const double norm = sqrt_rounded(squares);
  if (norm * kMargin <= eps) return {true, 1.0f};
  return {false, shrink_factor(norm, eps)};
}

// The point at `factor` times the displacement t from the origin, and no further away from it in any coordinate: a sum that was
// rounded away from the origin goes one float back.
SF_HD float pulled_in(float origin, float t, float factor) {
  const float scaled = factor * t;
  const float sum = origin + scaled;
  const uint32_t bits = bits_from_float(sum);
  // Against the sign of `scaled`: where both have one sign, the magnitude shrinks.
  const uint32_t back = bits - static_cast<uint32_t>(static_cast<int32_t>(bits ^ bits_from_float(scaled)) >> 31 | 1);
  return __builtin_fabsf(sum - origin) > __builtin_fabsf(scaled) ? float_from_bits(back) : sum;
}

SF_HD float l2_project(float value, float origin, Shrink shrink) {
  return shrink.inside ? value : pulled_in(origin, value - origin, shrink.factor);
}

// The value of T between the origin and `value`, after the box: the box holds the origin, so it can only shorten the way.
template <typename T>
SF_HD T l2_settle(float value, float origin, Box box) {
  const float boxed = clamp(value, box.lo, box.hi);
  return settle<T>(boxed, boxed < origin ? boxed : origin, boxed < origin ? origin : boxed);
}

template <>
SF_HD float l2_settle<float>(float value, float, Box box) {
  return clamp(value, box.lo, box.hi);
}

}  // namespace synthfast
