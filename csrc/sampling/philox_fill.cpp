// philox_normal_ and philox_uniform_ on the CPU.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../common/check.h"
#include "../common/dispatch.h"
#include "random_tile.h"
#include "philox_fill.h"

namespace synthfast {

namespace {

template <typename T, typename Convert>
struct FillTile {
  template <CpuCapability kCapability>
  SF_HD static void run(T* out, int64_t n, PhiloxDraw draw, int64_t sample, uint32_t first_block) {
    alignas(64) float buffer[kTile];
    RandomTile<Convert>::template run<kCapability>(buffer, n, draw, sample, first_block);
    for (int64_t i = 0; i < n; ++i) out[i] = from_float<T>(buffer[i]);
  }
};

template <template <typename> class Convert>
void fill_kernel(const Tensor& out, const Tensor& index, PhiloxDraw draw) {
  if (out.numel() == 0) return;
  const int64_t samples = out.size(0), elements = out.numel() / samples;
  const int64_t tiles = (elements + kTile - 1) / kTile;
  const int64_t* indices = const_data<int64_t>(index);
  dispatch_float(out.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    T* values = mutable_data<T>(out);
    const int64_t grain = std::max<int64_t>(1, 16384 / std::min(elements, kTile));
    torch::stable::parallel_for(0, samples * tiles, grain, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t sample = tile / tiles, offset = tile % tiles * kTile;
        vectorized<FillTile<T, Convert<T>>>(values + sample * elements + offset, std::min(kTile, elements - offset), draw,
                                            indices[sample], static_cast<uint32_t>(offset / 4));
      }
    });
  });
}

void philox_normal_cpu(Tensor out, Tensor index, int64_t seed, int64_t stream, int64_t step) {
  philox_fill("philox_normal_", out, index, seed, stream, step, fill_kernel<NormalsOf>);
}

void philox_uniform_cpu(Tensor out, Tensor index, int64_t seed, int64_t stream, int64_t step) {
  philox_fill("philox_uniform_", out, index, seed, stream, step, fill_kernel<UniformsOf>);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(synthfast, CPU, m) {
  m.impl("philox_normal_", TORCH_BOX(&philox_normal_cpu));
  m.impl("philox_uniform_", TORCH_BOX(&philox_uniform_cpu));
}

}  // namespace synthfast
