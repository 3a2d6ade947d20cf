// What host code (g++), device code (nvcc) and the host shim of the tests share: storage types, bit casts, exact rounding.
// Nothing here includes torch or the CUDA toolkit, so the same header compiles in all three.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define SF_HD __host__ __device__ __forceinline__
#define SF_UNROLL _Pragma("unroll")
#elif defined(__clang__)
#define SF_HD inline __attribute__((always_inline))
#define SF_UNROLL _Pragma("unroll")
#else
#define SF_HD inline __attribute__((always_inline))
#define SF_UNROLL _Pragma("GCC unroll 16")
#endif

namespace synthfast {

SF_HD float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

SF_HD uint32_t bits_from_float(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// Correctly rounded on both sides; CUDA's plain sqrtf may be replaced by an approximation under some flags.
SF_HD float sqrt_rounded(float value) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(value);
#else
  return __builtin_sqrtf(value);
#endif
}

// Comparisons with NaN are false, so NaN stays NaN, as in torch.clamp.
SF_HD float clamp(float value, float low, float high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

// Storage types of 16 bits. Arithmetic is always in float; these only carry bits between memory and float.
struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

SF_HD float to_float(float value) { return value; }

SF_HD float to_float(bfloat16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }

SF_HD float to_float(float16 value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  // Branch-free, so that loops over it vectorise: rebias the exponent, then mend infinities (NaN) and subnormals.
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  const uint32_t normal = magnitude + ((127u - 15u) << 23);
  const uint32_t subnormal = bits_from_float(float_from_bits(normal + (1u << 23)) - float_from_bits(113u << 23));
  const uint32_t special = normal + ((128u - 16u) << 23);
  const uint32_t exponent = magnitude & (0x7c00u << 13);
  const uint32_t finite = exponent == 0 ? subnormal : normal;
  const uint32_t result = exponent == (0x7c00u << 13) ? special : finite;
  return float_from_bits(result | (value.bits & 0x8000u) << 16);
#endif
}

// Round to nearest even.
template <typename T>
SF_HD T from_float(float value);

template <>
SF_HD float from_float<float>(float value) {
  return value;
}

template <>
SF_HD bfloat16 from_float<bfloat16>(float value) {
#if defined(__CUDA_ARCH__)
  bfloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const uint32_t bits = bits_from_float(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return bfloat16{static_cast<uint16_t>(is_nan ? 0x7fffu : rounded)};
#endif
}

template <>
SF_HD float16 from_float<float16>(float value) {
#if defined(__CUDA_ARCH__)
  float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const uint32_t bits = bits_from_float(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Adding 1/2 puts the last bit of a half subnormal in the last bit of the float, which then rounds by itself.
  const uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - bits_from_float(0.5f);
  const uint32_t special = magnitude > 0x7f800000u ? 0x7fffu : 0x7c00u;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t result = magnitude >= (143u << 23) ? special : finite;
  return float16{static_cast<uint16_t>(result | (bits >> 16 & 0x8000u))};
#endif
}

}  // namespace synthfast
