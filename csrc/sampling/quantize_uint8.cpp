#include "quantize_uint8.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../common/dispatch.h"
#include "../common/vectorize.h"
#include "quantize_uint8_checks.h"

namespace synthfast {

namespace {

template <typename T>
struct QuantizeRun {
  template <CpuCapability>
  SF_HD static void run(const T* x, uint8_t* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = quantize(to_float(x[i]));
  }
};

// Planes [C, pixels] to interleaved pixels [pixels, C], a tile of one image.
template <typename T>
struct QuantizeInterleave {
  template <CpuCapability>
  SF_HD static void run(const T* x, uint8_t* out, int64_t pixels, int64_t channels, int64_t plane) {
    if (channels == 3) {  // the usual case, with constant strides
      const T *r = x, *g = x + plane, *b = x + 2 * plane;
      for (int64_t i = 0; i < pixels; ++i) {
        out[3 * i] = quantize(to_float(r[i]));
        out[3 * i + 1] = quantize(to_float(g[i]));
        out[3 * i + 2] = quantize(to_float(b[i]));
      }
      return;
    }
    for (int64_t channel = 0; channel < channels; ++channel)
      for (int64_t i = 0; i < pixels; ++i) out[i * channels + channel] = quantize(to_float(x[channel * plane + i]));
  }
};

void quantize_kernel(const Tensor& x, const Tensor& out) {
  if (x.numel() == 0) return;
  uint8_t* bytes = mutable_data<uint8_t>(out);
  dispatch_float(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* values = const_data<T>(x);
    if (is_channels_last(x)) {
      torch::stable::parallel_for(0, x.numel(), 65536, [&](int64_t begin, int64_t end) {
        vectorized<QuantizeRun<T>>(values + begin, bytes + begin, end - begin);
      });
      return;
    }
    const int64_t channels = x.size(1), plane = x.size(2) * x.size(3);
    const int64_t tiles = (plane + kTile - 1) / kTile;
    const int64_t grain = std::max<int64_t>(1, 65536 / (std::min(plane, kTile) * channels));
    torch::stable::parallel_for(0, x.size(0) * tiles, grain, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t at = tile / tiles * channels * plane, pixel = tile % tiles * kTile;
        vectorized<QuantizeInterleave<T>>(values + at + pixel, bytes + at + pixel * channels,
                                          std::min(kTile, plane - pixel), channels, plane);
      }
    });
  });
}

Tensor quantize_uint8_cpu(Tensor x) { return quantize_uint8(x, quantize_kernel); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(synthfast, CPU, m) { m.impl("quantize_uint8", TORCH_BOX(&quantize_uint8_cpu)); }

}  // namespace synthfast
