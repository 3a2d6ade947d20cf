// From the bytes of a data set to a cropped and mirrored batch in [0, 1], host and device.
#pragma once
#include "../common/philox.h"

namespace synthfast {

// byte / 255, correctly rounded, without a division: 1/255 = 2^-8 + 2^-16 + 2^-24 + ..., and the first product is exact.
SF_HD constexpr float unit_from_byte(uint8_t byte) {
  const float value = static_cast<float>(static_cast<int32_t>(byte));
  return value * 0x1.01p-8f + value * 0x1.0101p-24f;
}

constexpr bool unit_from_byte_is_a_division() {
  for (int32_t byte = 0; byte < 256; ++byte)
    if (unit_from_byte(static_cast<uint8_t>(byte)) != static_cast<float>(byte) / 255.0f) return false;
  return true;
}
static_assert(unit_from_byte_is_a_division());

struct ImageShape {
  int64_t height, width, channels;

  SF_HD int64_t row() const { return width * channels; }
  SF_HD int64_t elements() const { return height * row(); }
};

constexpr int64_t kMaxImage = int64_t{1} << 30;    // bytes of one image, so that coordinates in it fit in 32 bits
constexpr int64_t kMaxPadding = int64_t{1} << 23;  // up to here every one of the 2 padding + 1 offsets can be drawn

// Which part of the padded image a sample shows.
struct Crop {
  int32_t down, right;  // column k of row y of the crop is column k + right of row y + down of the image; outside it is 0
  bool flip;            // output column x is column width - 1 - x of the crop
};

// A number in [0, count) from a word's upper 24 bits; the probabilities differ by 2^-24 at most.
SF_HD int32_t draw_below(uint32_t word, uint32_t count) {
  return static_cast<int32_t>(static_cast<uint64_t>(word >> 8) * count >> 24);
}

// Block 0 of the sample: word 0 gives the crop's first row in the padded image, word 1 its first column, the upper bit of
// word 2 whether it is mirrored (0: yes).
SF_HD Crop draw_crop(PhiloxDraw draw, int64_t index, int32_t padding, bool flip) {
  if (padding == 0 && !flip) return {0, 0, false};
  const PhiloxWords words = draw.words(index, 0);
  const uint32_t offsets = 2 * static_cast<uint32_t>(padding) + 1;
  return {draw_below(words.word[0], offsets) - padding, draw_below(words.word[1], offsets) - padding,
          flip && words.word[2] >> 31 == 0};
}

}  // namespace synthfast
