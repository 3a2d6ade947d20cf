// The order in which the squares of a sample are added, the same on every processor, so that norms are equal bit for bit.
//
// A sample is cut into tiles of 512 elements, the last filled up with zeros. A tile is added as a tree: element i and i + 256,
// then i and i + 128, and so on. The sums of tiles k, k + 8, k + 16 ... are added in turn, and the eight results as a tree.
// On a GPU a warp takes a tile and a block of 8 warps a sample (sum_squares.cuh); a CPU takes the elements of a tile in vectors.
#pragma once
#include "../common/host_device.h"

namespace synthfast {

constexpr int64_t kSumTile = 512;
constexpr int kSumClasses = 8;

// Of kCount values, in place.
template <int kCount>
SF_HD double sum_tree(double* values) {
  SF_UNROLL
  for (int half = kCount / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) values[i] += values[i + half];
  return values[0];
}

// A tile on the CPU; element(i) is the i-th square. The upper three levels of the tree are one pass without a buffer.
template <typename Element>
SF_HD double sum_tile(Element element) {
  alignas(64) double s[64];
  for (int i = 0; i < 64; ++i)
    s[i] = ((element(i) + element(i + 256)) + (element(i + 128) + element(i + 384))) +
           ((element(i + 64) + element(i + 320)) + (element(i + 192) + element(i + 448)));
  for (int half = 32; half > 8; half /= 2)
    for (int i = 0; i < half; ++i) s[i] += s[i + half];
  for (int i = 0; i < 8; ++i) s[i] += s[i + 8];
  return sum_tree<8>(s);
}

struct SquareOf {
  const float* value;
  SF_HD double operator()(int i) const {
    const double v = value[i];
    return v * v;
  }
};

// The tiles of a sample on the CPU.
struct SampleSum {
  double classes[kSumClasses] = {};

  SF_HD void add(int64_t tile, double sum) { classes[tile % kSumClasses] += sum; }
  SF_HD double total() { return sum_tree<kSumClasses>(classes); }
};

}  // namespace synthfast
