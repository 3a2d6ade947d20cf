// Philox4x32-10 and what is made of its words: uniforms and normals. Host and device, branch-free.
// Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
//
// Element e of sample i is word e % 4 of the block with the counter (e / 4, i low, i high, stream << 24 | step) under the
// run's seed as key. So sample i's numbers depend on the seed and i alone: not on batch size, rank, layout or device.
#pragma once
#include "host_device.h"

namespace synthfast {

struct PhiloxKey {
  uint32_t low, high;
};

SF_HD PhiloxKey philox_key(int64_t seed) {
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)};
}

struct PhiloxWords {
  uint32_t word[4];
};

SF_HD PhiloxWords philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, PhiloxKey key) {
  SF_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key.low;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key.high;
    c3 = static_cast<uint32_t>(product0);
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Where in the counter space a sample's draw lies.
struct PhiloxDraw {
  PhiloxKey key;
  uint32_t stream_step;

  SF_HD PhiloxWords words(int64_t sample, uint32_t block) const {
    return philox4x32(block, static_cast<uint32_t>(sample), static_cast<uint32_t>(static_cast<uint64_t>(sample) >> 32),
                      stream_step, key);
  }
};

// Natural logarithm of a normal number in (0, 1). The exponent comes off so that the rest lies in [sqrt(1/2), sqrt(2));
// the polynomial is the single precision one of the Cephes library. Within 1 ulp on the arguments used here.
SF_HD float log_unit(float x) {
  const uint32_t bits = bits_from_float(x);
  const int32_t exponent_bits = static_cast<int32_t>((bits - 0x3f3504f3u) & 0xff800000u);
  const float exponent = static_cast<float>(exponent_bits >> 23);
  const float m = float_from_bits(bits - static_cast<uint32_t>(exponent_bits)) - 1.0f;
  const float square = m * m;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  float result = m * square * p;
  result += exponent * -2.12194440e-4f;  // ln 2 in two parts, this one and 0.693359375
  result -= 0.5f * square;
  return (m + result) + exponent * 0.693359375f;
}

// Box and Muller (1958): two words to two normals. The first word's upper 24 bits give the radius from u = (k + 1/2) 2^-24,
// rounded to float (so u may be 1, and the radius 0); the second's upper 2 bits give the quadrant and the next 24 the
// position in it, so sine and cosine need only [-pi/4, pi/4).
SF_HD void normal_pair(uint32_t first, uint32_t second, float& z0, float& z1) {
  const float u = static_cast<float>(static_cast<int32_t>(first >> 8)) * 0x1p-24f + 0x1p-25f;
  const float radius = sqrt_rounded(-2.0f * log_unit(u));
  const float t = static_cast<float>(static_cast<int32_t>(second >> 6 & 0xffffffu)) * 0x1p-24f - 0.5f;
  const float angle = t * 1.57079632679f;
  const float square = angle * angle;
  const float sine =
      ((-1.9515295891e-4f * square + 8.3321608736e-3f) * square - 1.6666654611e-1f) * square * angle + angle;
  const float cosine =
      ((2.443315711809948e-5f * square - 1.388731625493765e-3f) * square + 4.166664568298827e-2f) * square * square -
      0.5f * square + 1.0f;
  // A quarter turn swaps the two and flips one sign; done on the bits, so there is no branch.
  const uint32_t quadrant = second >> 30;
  const uint32_t swap = 0u - (quadrant & 1u);
  const uint32_t s = bits_from_float(sine), c = bits_from_float(cosine);
  const uint32_t turned_cosine = ((s & swap) | (c & ~swap)) ^ ((quadrant + 1u) & 2u) << 30;
  const uint32_t turned_sine = ((c & swap) | (s & ~swap)) ^ (quadrant & 2u) << 30;
  z0 = radius * float_from_bits(turned_cosine);
  z1 = radius * float_from_bits(turned_sine);
}

struct PhiloxNormals {
  SF_HD static void convert(const PhiloxWords& words, float* z) {
    normal_pair(words.word[0], words.word[1], z[0], z[1]);
    normal_pair(words.word[2], words.word[3], z[2], z[3]);
  }
};

// [0, 1) with as many digits as the storage type holds exactly, so that rounding can never reach 1.
template <int kDigits>
struct PhiloxUniforms {
  SF_HD static void convert(const PhiloxWords& words, float* u) {
    SF_UNROLL
    for (int k = 0; k < 4; ++k)
      u[k] = static_cast<float>(static_cast<int32_t>(words.word[k] >> (32 - kDigits))) * (1.0f / (1 << kDigits));
  }
};

}  // namespace synthfast
