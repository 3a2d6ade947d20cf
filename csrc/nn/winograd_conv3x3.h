// 3x3 convolutions by Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray 2016, section 4.2): constants and layouts.
//
// A tile of 4x4 outputs needs 6x6 inputs d and the weights g of each pair of channels:
//
//   Y = A^T [ sum over input channels of (G g G^T) * (B^T d B) ] A        *: element by element, 36 products instead of 144
//
// The matrices follow from the points 0, a, -a, b, -b and infinity, where polynomials are multiplied by their values. With
// a = 5/8 and b = 3/2 (found by a search over sixteenths) the error is half of that of the usual points 1 and 2 at 64 channels, a
// third at 512; all constants of A and B are exact in float32.
//
//   A^T = [1  1   1   1   1  0]   B^T = [a2 b2    0     -a2-b2     0     1  0]   G = [    1/(a2 b2)     0    0]
//         [0  a  -a   b  -b  0]         [    0  -a b2      -b2     a     1  0]       [p (  1          a   a2)]
//         [0  a2 a2  b2  b2  0]         [    0   a b2      -b2    -a     1  0]       [p (  1         -a   a2)]
//         [0  a3 -a3 b3 -b3  1]         [    0  -b a2      -a2     b     1  0]       [q (  1          b   b2)]
//                                       [    0   b a2      -a2    -b     1  0]       [q (  1         -b   b2)]
//   p = 1 / (2 a2 (a2 - b2))            [    0  a2 b2        0 -a2-b2    0  1]       [    0             0    1]
//   q = 1 / (2 b2 (b2 - a2))
#pragma once
#include <cstdint>

namespace synthfast {

constexpr float kA = 0.625f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;
constexpr float kG0 = static_cast<float>(1.0 / (0.390625 * 2.25));
constexpr float kGA = static_cast<float>(0.5 / (0.390625 * (0.390625 - 2.25)));
constexpr float kGB = static_cast<float>(0.5 / (2.25 * (2.25 - 0.390625)));

// Transformed weights are [36, panels, channels in, kPanel]: kPanel outputs side by side, missing ones 0.
constexpr int kPanel = 32;

// What the convolution reads: x, relu(x), or relu(scale x + shift) by channel (scale not null). Padding is 0 after it.
struct Activation {
  const float* scale = nullptr;
  const float* shift = nullptr;
  bool relu = false;
};

// What becomes of a sum: (sum + bias + residual), times the derivative of `activation` at `input`, where these are not null.
struct Epilogue {
  float* out = nullptr;
  const float* bias = nullptr;
  const float* residual = nullptr;
  const float* input = nullptr;
  Activation activation;
};

}  // namespace synthfast
