#include "ball_start.h"

#include <torch/csrc/stable/library.h>

#include "../common/dispatch.h"
#include "../sampling/random_tile.h"
#include "attack_checks.h"
#include "sample_loops.h"

namespace synthfast {

namespace {

// `offset` is the tile's place in its sample, n <= kTile its elements.
template <typename T>
struct LinfStartTile {
  template <CpuCapability kCapability>
  SF_HD static void run(const T* origin, T* out, int64_t n, float eps, Box box, PhiloxDraw draw, int64_t index,
                        int64_t offset) {
    alignas(64) float u[kTile];
    RandomTile<BallUniforms>::template run<kCapability>(u, n, draw, index, static_cast<uint32_t>(offset / 4));
    for (int64_t i = 0; i < n; ++i) out[i] = linf_start<T>(to_float(origin[i]), u[i], eps, box);
  }
};

template <typename T>
struct L2StartSample {
  template <CpuCapability kCapability>
  SF_HD static void run(const T* origin, T* out, float* z, int64_t elements, float eps, Box box, PhiloxDraw draw,
                        int64_t index) {
    const int64_t normals = elements + kSphereExtra;
    SampleSum sum;
    for (int64_t at = 0; at < normals; at += kSumTile) {
      const int64_t n = std::min(kSumTile, normals - at);
      NormalsTile::run<kCapability>(z + at, n, draw, index, static_cast<uint32_t>(at / 4));
      for (int64_t i = n; i < kSumTile; ++i) z[at + i] = 0.0f;
      sum.add(at / kSumTile, sum_tile(SquareOf{z + at}));
    }
    const float factor = start_factor(sum.total(), eps);
    for (int64_t i = 0; i < elements; ++i) out[i] = l2_start<T>(to_float(origin[i]), z[i], factor, box);
  }
};
static_assert(kSumTile == kTile);

void ball_start_kernel(const StartArguments& a, BallNorm norm) {
  if (a.origin.numel() == 0) return;
  const int64_t samples = a.origin.size(0), elements = a.origin.numel() / samples;
  const float* eps = const_data<float>(a.eps);
  const int64_t* index = const_data<int64_t>(a.index);
  dispatch_float(a.origin.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* origin = const_data<T>(a.origin);
    T* out = mutable_data<T>(a.out);
    const Box box = make_box<T>(a.lo, a.hi);
    if (norm == BallNorm::kLinf) {
      const int64_t tiles = (elements + kTile - 1) / kTile;
      const int64_t grain = std::max<int64_t>(1, 16384 / std::min(elements, kTile));
      torch::stable::parallel_for(0, samples * tiles, grain, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
          const int64_t sample = tile / tiles, offset = tile % tiles * kTile, at = sample * elements + offset;
          vectorized<LinfStartTile<T>>(origin + at, out + at, std::min(kTile, elements - offset),
                                       valid_radius(eps[sample]), box, a.draw, index[sample], offset);
        }
      });
    } else {
      for_samples(samples, elements + kSphereExtra, [&](int64_t sample, float* z) {
        const int64_t at = sample * elements;
        vectorized<L2StartSample<T>>(origin + at, out + at, z, elements, valid_radius(eps[sample]), box, a.draw,
                                     index[sample]);
      });
    }
  });
}

Tensor ball_start_cpu(Tensor origin, Tensor index, Tensor eps, int64_t norm, int64_t seed, int64_t step, double lo,
                      double hi) {
  return ball_start(origin, index, eps, norm, seed, step, lo, hi, ball_start_kernel);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(synthfast, CPU, m) { m.impl("ball_start", TORCH_BOX(&ball_start_cpu)); }

}  // namespace synthfast
