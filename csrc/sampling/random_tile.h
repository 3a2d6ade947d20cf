// A tile of one sample's random values on the CPU.
#pragma once
#include "../common/philox_simd.h"

namespace synthfast {

// Values 4 first_block ... of `sample`, n <= kTile of them, through Convert (PhiloxNormals or PhiloxUniforms). Whole blocks
// are written: `values` has room up to the next multiple of 4.
template <typename Convert>
struct RandomTile {
  template <CpuCapability kCapability>
  SF_HD static void run(float* values, int64_t n, PhiloxDraw draw, int64_t sample, uint32_t first_block) {
    static_assert(kTile % (4 * kBlockRound) == 0);
    alignas(64) uint32_t w0[kTile / 4], w1[kTile / 4], w2[kTile / 4], w3[kTile / 4];
    const int64_t blocks = (n + 3) / 4;
    philox_blocks<kCapability>(w0, w1, w2, w3, blocks, draw, sample, first_block);
    for (int64_t b = 0; b < blocks; ++b)
      Convert::convert(PhiloxWords{{w0[b], w1[b], w2[b], w3[b]}}, values + 4 * b);
  }
};

using NormalsTile = RandomTile<PhiloxNormals>;

}  // namespace synthfast
