// The l-infinity steps in AVX-512 intrinsics: the arithmetic of linf_step.h and apgd_step.h, equal bit for bit.
//
// AVX-512 rounds a single addition down or up, so a bound is one instruction instead of eleven; compilers have no way to ask for
// it. The plain loop takes 1.6 times as long. Other processors take that one.
#pragma once
#include "../common/vectorize.h"
#include "ball.h"

#if SF_X86
#include <immintrin.h>

#define SF_AVX512 __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#define SF_AVX512_INLINE SF_AVX512 __attribute__((always_inline)) inline

namespace synthfast {

// 16 values of a type as floats. `mask` says which exist, where kMasked; bounds are rounded to the type inwards, values to
// nearest, and -0 is stored as 0.
template <typename T>
struct Lanes;

template <>
struct Lanes<float> {
  template <bool kMasked>
  SF_AVX512_INLINE static __m512 load(const float* source, __mmask16 mask) {
    return kMasked ? _mm512_maskz_loadu_ps(mask, source) : _mm512_loadu_ps(source);
  }
  template <bool kMasked>
  SF_AVX512_INLINE static void store(float* out, __mmask16 mask, __m512 value) {
    const __m512 positive = _mm512_add_ps(value, _mm512_setzero_ps());
    kMasked ? _mm512_mask_storeu_ps(out, mask, positive) : _mm512_storeu_ps(out, positive);
  }
  SF_AVX512_INLINE static __m512 down(__m512 bound) { return bound; }
  SF_AVX512_INLINE static __m512 up(__m512 bound) { return bound; }
};

// What the two 16-bit types share: moving 16 values of 16 bits.
struct Lanes16 {
  template <bool kMasked, typename T>
  SF_AVX512_INLINE static __m256i load_bits(const T* source, __mmask16 mask) {
    return kMasked ? _mm256_maskz_loadu_epi16(mask, source) : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  }
  template <bool kMasked, typename T>
  SF_AVX512_INLINE static void store_bits(T* out, __mmask16 mask, __m256i bits) {
    const __mmask16 kept = _mm256_cmpneq_epi16_mask(bits, _mm256_set1_epi16(static_cast<int16_t>(0x8000)));
    const __m256i positive = _mm256_maskz_mov_epi16(kept, bits);
    kMasked ? _mm256_mask_storeu_epi16(out, mask, positive)
            : _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), positive);
  }
};

template <>
struct Lanes<bfloat16> : Lanes16 {
  template <bool kMasked>
  SF_AVX512_INLINE static __m512 load(const bfloat16* source, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_bits<kMasked>(source, mask)), 16));
  }
  template <bool kMasked>
  SF_AVX512_INLINE static void store(bfloat16* out, __mmask16 mask, __m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fff0000));
    store_bits<kMasked>(out, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
  }
  // Cutting digits off rounds towards zero; adding 0xffff first rounds away from it.
  SF_AVX512_INLINE static __m512 down(__m512 bound) {
    const __m512i bits = _mm512_castps_si512(bound), ones = _mm512_set1_epi32(0xffff);
    return cut(_mm512_add_epi32(bits, _mm512_and_si512(_mm512_srai_epi32(bits, 31), ones)));
  }
  SF_AVX512_INLINE static __m512 up(__m512 bound) {
    const __m512i bits = _mm512_castps_si512(bound), ones = _mm512_set1_epi32(0xffff);
    return cut(_mm512_add_epi32(bits, _mm512_andnot_si512(_mm512_srai_epi32(bits, 31), ones)));
  }
  SF_AVX512_INLINE static __m512 cut(__m512i bits) {
    return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
};

template <>
struct Lanes<float16> : Lanes16 {
  template <bool kMasked>
  SF_AVX512_INLINE static __m512 load(const float16* source, __mmask16 mask) {
    return _mm512_cvtph_ps(load_bits<kMasked>(source, mask));
  }
  template <bool kMasked>
  SF_AVX512_INLINE static void store(float16* out, __mmask16 mask, __m512 value) {
    store_bits<kMasked>(out, mask, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  SF_AVX512_INLINE static __m512 down(__m512 bound) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(bound, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
  }
  SF_AVX512_INLINE static __m512 up(__m512 bound) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(bound, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC));
  }
};

// clamp() of host_device.h: NaN stays NaN.
SF_AVX512_INLINE __m512 clamp_lanes(__m512 value, __m512 low, __m512 high) {
  return _mm512_min_ps(high, _mm512_max_ps(low, value));
}

// linf_project and linf_settle of ball.h, the latter before its rounding to nearest.
template <typename T>
SF_AVX512_INLINE __m512 linf_project_lanes(__m512 value, __m512 origin, __m512 eps, __m512 lo, __m512 hi) {
  const __m512 low = _mm512_sub_round_ps(origin, eps, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
  const __m512 high = _mm512_add_round_ps(origin, eps, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return clamp_lanes(clamp_lanes(value, Lanes<T>::up(low), Lanes<T>::down(high)), lo, hi);
}

// sign_step: the step with the gradient's sign, where there is a gradient.
SF_AVX512_INLINE __m512 sign_step_lanes(__m512 x, __m512 gradient, __m512 step) {
  const __mmask16 moves = _mm512_cmp_ps_mask(gradient, _mm512_setzero_ps(), _CMP_NEQ_OQ);
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  const __m512i along =  // (gradient & sign) ^ step
      _mm512_ternarylogic_epi32(_mm512_castps_si512(gradient), sign, _mm512_castps_si512(step), 0x6a);
  return _mm512_mask_add_ps(x, moves, x, _mm512_castsi512_ps(along));
}

template <typename T>
struct LinfStepAvx512 {
  const T *x, *gradient, *origin;
  T* out;
  float eps, step;
  Box box;

  template <bool kMasked>
  SF_AVX512_INLINE void at(int64_t i, __mmask16 mask) const {
    const __m512 moved = sign_step_lanes(Lanes<T>::template load<kMasked>(x + i, mask),
                                         Lanes<T>::template load<kMasked>(gradient + i, mask), _mm512_set1_ps(step));
    const __m512 center = Lanes<T>::template load<kMasked>(origin + i, mask);
    Lanes<T>::template store<kMasked>(out + i, mask,
                                      linf_project_lanes<T>(moved, center, _mm512_set1_ps(eps), _mm512_set1_ps(box.lo),
                                                            _mm512_set1_ps(box.hi)));
  }
};

template <typename T>
struct ApgdLinfAvx512 {
  const T *x, *previous, *gradient, *origin;
  T* out;
  float eps, step, momentum;
  Box box;

  template <bool kMasked>
  SF_AVX512_INLINE void at(int64_t i, __mmask16 mask) const {
    const __m512 radius = _mm512_set1_ps(eps), lo = _mm512_set1_ps(box.lo), hi = _mm512_set1_ps(box.hi);
    const __m512 state = Lanes<T>::template load<kMasked>(x + i, mask);
    const __m512 before = Lanes<T>::template load<kMasked>(previous + i, mask);
    const __m512 center = Lanes<T>::template load<kMasked>(origin + i, mask);
    const __m512 moved =
        sign_step_lanes(state, Lanes<T>::template load<kMasked>(gradient + i, mask), _mm512_set1_ps(step));
    const __m512 z = linf_project_lanes<float>(moved, center, radius, lo, hi);
    const __m512 ahead = _mm512_mul_ps(_mm512_set1_ps(momentum), _mm512_sub_ps(z, state));
    const __m512 behind = _mm512_mul_ps(_mm512_set1_ps(1.0f - momentum), _mm512_sub_ps(state, before));
    const __m512 point = _mm512_add_ps(_mm512_add_ps(state, ahead), behind);
    Lanes<T>::template store<kMasked>(out + i, mask, linf_project_lanes<T>(point, center, radius, lo, hi));
  }
};

template <typename Step>
SF_AVX512_INLINE void run_lanes(Step step, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) step.template at<false>(i, 0xffff);
  if (i < n) step.template at<true>(i, static_cast<__mmask16>((1u << (n - i)) - 1));
}

// All n elements. Each is read before its result is written, so `out` may lie on an input. The arguments fit in registers.
template <typename T>
SF_AVX512 void linf_step_avx512(const T* x, const T* gradient, const T* origin, T* out, int64_t n, float eps, float step,
                                Box box) {
  run_lanes(LinfStepAvx512<T>{x, gradient, origin, out, eps, step, box}, n);
}

template <typename T>
SF_AVX512 void apgd_linf_avx512(const T* x, const T* previous, const T* gradient, const T* origin, T* out, int64_t n, float eps,
                                float step, float momentum, Box box) {
  run_lanes(ApgdLinfAvx512<T>{x, previous, gradient, origin, out, eps, step, momentum, box}, n);
}

}  // namespace synthfast

#endif
