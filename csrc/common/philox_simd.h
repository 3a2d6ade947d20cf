// Philox words of many consecutive blocks on the CPU, written as four arrays.
//
// The 32 x 32 -> 64 bit products decide its speed. A 64-bit lane holds one counter word, and vpmuludq ignores a lane's upper
// half, so a round is two products, two shifts and two xors, with nothing to clean up. Compilers do not find this by
// themselves (1.4 times slower on AVX-512), hence the intrinsics; other processors take the plain loop.
#pragma once
#include "philox.h"
#include "vectorize.h"

#if SF_X86
#include <immintrin.h>
#endif

namespace synthfast {

// `words[k][b]` for blocks first_block ... first_block + blocks. Up to kBlockRound - 1 entries more may be written.
constexpr int64_t kBlockRound = 16;

inline void philox_blocks_plain(uint32_t* w0, uint32_t* w1, uint32_t* w2, uint32_t* w3, int64_t blocks, PhiloxDraw draw,
                                int64_t sample, uint32_t first_block) {
  for (int64_t b = 0; b < blocks; ++b) {
    const PhiloxWords words = draw.words(sample, first_block + static_cast<uint32_t>(b));
    w0[b] = words.word[0];
    w1[b] = words.word[1];
    w2[b] = words.word[2];
    w3[b] = words.word[3];
  }
}

#if SF_X86

__attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))) inline void philox_blocks_avx512(
    uint32_t* w0, uint32_t* w1, uint32_t* w2, uint32_t* w3, int64_t blocks, PhiloxDraw draw, int64_t sample,
    uint32_t first_block) {
  const __m512i multiplier0 = _mm512_set1_epi64(0xD2511F53u), multiplier1 = _mm512_set1_epi64(0xCD9E8D57u);
  const __m512i lane = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  for (int64_t b = 0; b < blocks; b += 16) {
    __m512i c0[2], c1[2], c2[2], c3[2];  // two independent chains hide the latency of the products
    for (int k = 0; k < 2; ++k) {
      c0[k] = _mm512_add_epi64(_mm512_set1_epi64(first_block + static_cast<uint32_t>(b) + 8 * k), lane);
      c1[k] = _mm512_set1_epi64(static_cast<uint32_t>(sample));
      c2[k] = _mm512_set1_epi64(static_cast<int64_t>(static_cast<uint64_t>(sample) >> 32));
      c3[k] = _mm512_set1_epi64(draw.stream_step);
    }
    uint32_t key_low = draw.key.low, key_high = draw.key.high;
    for (int round = 0; round < 10; ++round) {
      const __m512i low = _mm512_set1_epi64(key_low), high = _mm512_set1_epi64(key_high);
      for (int k = 0; k < 2; ++k) {
        const __m512i product0 = _mm512_mul_epu32(c0[k], multiplier0), product1 = _mm512_mul_epu32(c2[k], multiplier1);
        c0[k] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), c1[k], low, 0x96);  // three-way xor
        c2[k] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), c3[k], high, 0x96);
        c1[k] = product1;
        c3[k] = product0;
      }
      key_low += 0x9E3779B9u;
      key_high += 0xBB67AE85u;
    }
    for (int k = 0; k < 2; ++k) {
      const int64_t at = b + 8 * k;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(w0 + at), _mm512_cvtepi64_epi32(c0[k]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(w1 + at), _mm512_cvtepi64_epi32(c1[k]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(w2 + at), _mm512_cvtepi64_epi32(c2[k]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(w3 + at), _mm512_cvtepi64_epi32(c3[k]));
    }
  }
}

__attribute__((target("arch=x86-64-v3"))) inline void philox_blocks_avx2(uint32_t* w0, uint32_t* w1, uint32_t* w2,
                                                                         uint32_t* w3, int64_t blocks, PhiloxDraw draw,
                                                                         int64_t sample, uint32_t first_block) {
  const __m256i multiplier0 = _mm256_set1_epi64x(0xD2511F53u), multiplier1 = _mm256_set1_epi64x(0xCD9E8D57u);
  const __m256i lane = _mm256_set_epi64x(3, 2, 1, 0);
  const __m256i even_words = _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0);
  for (int64_t b = 0; b < blocks; b += 8) {
    __m256i c0[2], c1[2], c2[2], c3[2];
    for (int k = 0; k < 2; ++k) {
      c0[k] = _mm256_add_epi64(_mm256_set1_epi64x(first_block + static_cast<uint32_t>(b) + 4 * k), lane);
      c1[k] = _mm256_set1_epi64x(static_cast<uint32_t>(sample));
      c2[k] = _mm256_set1_epi64x(static_cast<int64_t>(static_cast<uint64_t>(sample) >> 32));
      c3[k] = _mm256_set1_epi64x(draw.stream_step);
    }
    uint32_t key_low = draw.key.low, key_high = draw.key.high;
    for (int round = 0; round < 10; ++round) {
      const __m256i low = _mm256_set1_epi64x(key_low), high = _mm256_set1_epi64x(key_high);
      for (int k = 0; k < 2; ++k) {
        const __m256i product0 = _mm256_mul_epu32(c0[k], multiplier0), product1 = _mm256_mul_epu32(c2[k], multiplier1);
        c0[k] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), c1[k]), low);
        c2[k] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), c3[k]), high);
        c1[k] = product1;
        c3[k] = product0;
      }
      key_low += 0x9E3779B9u;
      key_high += 0xBB67AE85u;
    }
    for (int k = 0; k < 2; ++k) {
      const __m256i* words[4] = {&c0[k], &c1[k], &c2[k], &c3[k]};
      uint32_t* targets[4] = {w0, w1, w2, w3};
      for (int j = 0; j < 4; ++j) {
        const __m256i packed = _mm256_permutevar8x32_epi32(*words[j], even_words);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(targets[j] + b + 4 * k), _mm256_castsi256_si128(packed));
      }
    }
  }
}

#endif

template <CpuCapability kCapability>
SF_HD void philox_blocks(uint32_t* w0, uint32_t* w1, uint32_t* w2, uint32_t* w3, int64_t blocks, PhiloxDraw draw,
                         int64_t sample, uint32_t first_block) {
#if SF_X86
  if constexpr (kCapability == CpuCapability::kAvx512)
    return philox_blocks_avx512(w0, w1, w2, w3, blocks, draw, sample, first_block);
  if constexpr (kCapability == CpuCapability::kAvx2)
    return philox_blocks_avx2(w0, w1, w2, w3, blocks, draw, sample, first_block);
#endif
  philox_blocks_plain(w0, w1, w2, w3, blocks, draw, sample, first_block);
}

}  // namespace synthfast
