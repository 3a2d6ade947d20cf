// From model images in [-1, 1] to the bytes of a shard, host and device.
#pragma once
#include "../common/host_device.h"

namespace synthfast {

// 127.5 x + 127.5, clamped to [0, 255] and rounded to nearest even; NaN gives 0.
SF_HD uint8_t quantize(float x) {
  const float scaled = clamp(x * 127.5f + 127.5f, 0.0f, 255.0f);
  // Adding 2^23 leaves the rounded integer in the low bits, in the current (nearest even) mode, without a library call.
  const float shifted = scaled + 8388608.0f;
  return scaled == scaled ? static_cast<uint8_t>(bits_from_float(shifted) & 0xffu) : uint8_t{0};
}

}  // namespace synthfast
