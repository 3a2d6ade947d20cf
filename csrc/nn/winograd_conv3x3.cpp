#include "winograd_conv3x3.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>

#include "../common/check.h"
#include "../common/dispatch.h"
#include "../common/vectorize.h"

#if SF_X86
#include <immintrin.h>
#endif

namespace synthfast {

namespace {

struct Kernels {
  void (*input_tile)(const float* const* pixels, int64_t channels, const Activation&, float* out, int64_t stride);
  void (*output_tile)(const float* rows, int64_t stride, int64_t channels, const Epilogue&, const int64_t* at);
  void (*multiply_panel)(int64_t rows, const float* a, int64_t a_stride, const float* panel, int64_t depth, float* out,
                         int64_t out_stride);
  void (*weight_rows)(const float* weights, float* out, int64_t stride);
};

#define SF_INLINE inline __attribute__((always_inline))

// Fused multiply-adds are asked for by name (the build turns contraction off), so the last bits of the variants differ.
namespace plain {
#define SF_TARGET
constexpr int kLanes = 4, kRows = 4;
template <typename V>
SF_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}
#include "winograd_kernels.h"
#undef SF_TARGET
}  // namespace plain

#if SF_X86
namespace avx2 {
#define SF_TARGET __attribute__((target("arch=x86-64-v3")))
constexpr int kLanes = 8, kRows = 6;
SF_TARGET SF_INLINE __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
#include "winograd_kernels.h"
#undef SF_TARGET
}  // namespace avx2

namespace avx512 {
#define SF_TARGET __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
constexpr int kLanes = 16, kRows = 12;
SF_TARGET SF_INLINE __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
#include "winograd_kernels.h"
#undef SF_TARGET
}  // namespace avx512
#endif

const Kernels& kernels() {
#if SF_X86
  if (cpu_capability() == CpuCapability::kAvx512) return avx512::kKernels;
  if (cpu_capability() == CpuCapability::kAvx2) return avx2::kKernels;
#endif
  return plain::kKernels;
}

constexpr int kPad = 16;  // channels of a transformed tile are filled up to the widest vector

int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Memory that a thread keeps between calls: fresh pages cost as much as a small convolution.
float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t capacity = 0;
  if (floats > capacity) {
    memory.reset();
    capacity = 0;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(rounded_up(floats, 16)) * sizeof(float))));
    if (memory == nullptr) throw std::bad_alloc();
    capacity = floats;
  }
  return memory.get();
}

// A thread works on as many tiles at a time as fit into its second-level cache, within these bounds. Fewer would read all
// weights for too little work (many channels, few tiles); then the threads share one block and divide its phases.
constexpr int64_t kBlockBytes = 1 << 20, kLeastTiles = 24, kMostTiles = 96, kSharedBytes = 24 << 20;

struct Convolution {
  const Kernels& kernel;
  const float* x;
  const float* transformed;
  Activation activation;
  Epilogue epilogue;
  int64_t channels_in, channels_out, height, width, down, across, tiles, panels, in_row, out_row;

  // Rows of the transformed tiles of a block: [36][tiles][channels], 16 floats apart so that not all fall into one cache set.
  int64_t in_stride(int64_t block) const { return block * in_row + 16; }
  int64_t out_stride(int64_t block) const { return block * out_row + 16; }
  int64_t floats(int64_t block) const { return 36 * (in_stride(block) + out_stride(block)); }

  void transform_input(int64_t first, int64_t begin, int64_t end, int64_t block, float* in) const {
    const float* pixels[36];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t tile = first + t, image = tile / (down * across);
      const int64_t top = tile / across % down * 4 - 1, left = tile % across * 4 - 1;
      for (int64_t i = 0; i < 6; ++i)
        for (int64_t j = 0; j < 6; ++j) {
          const int64_t y = top + i, z = left + j;
          const bool inside = y >= 0 && y < height && z >= 0 && z < width;
          pixels[6 * i + j] = inside ? x + ((image * height + y) * width + z) * channels_in : nullptr;
        }
      kernel.input_tile(pixels, channels_in, activation, in + t * in_row, in_stride(block));
    }
  }

  // Of 36 * panels pairs of position and panel.
  void multiply(int64_t begin, int64_t end, int64_t block, const float* in, float* out) const {
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t position = pair / panels, panel = pair % panels;
      kernel.multiply_panel(block, in + position * in_stride(block), in_row, transformed + pair * channels_in * kPanel,
                            channels_in, out + position * out_stride(block) + panel * kPanel, out_row);
    }
  }

  void transform_output(int64_t first, int64_t begin, int64_t end, int64_t block, const float* out) const {
    int64_t at[16];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t tile = first + t, image = tile / (down * across);
      const int64_t top = tile / across % down * 4, left = tile % across * 4;
      for (int64_t i = 0; i < 4; ++i)
        for (int64_t j = 0; j < 4; ++j) {
          const int64_t y = top + i, z = left + j;
          at[4 * i + j] = y < height && z < width ? ((image * height + y) * width + z) * channels_out : -1;
        }
      kernel.output_tile(out + t * out_row, out_stride(block), channels_out, epilogue, at);
    }
  }

  void run() const {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t tile_bytes = 36 * 4 * (in_row + out_row);
    if (threads > 1 && tiles < threads * kLeastTiles) return run_together(std::max(kLeastTiles, kSharedBytes / tile_bytes));
    const int64_t block = std::clamp(kBlockBytes / tile_bytes, kLeastTiles, kMostTiles);
    const int64_t blocks = std::min(tiles, rounded_up((tiles + block - 1) / block, threads));
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      float* in = scratch(floats((tiles + blocks - 1) / blocks));
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = tiles * b / blocks, n = tiles * (b + 1) / blocks - first;
        float* out = in + 36 * in_stride(n);
        transform_input(first, 0, n, n, in);
        multiply(0, 36 * panels, n, in, out);
        transform_output(first, 0, n, n, out);
      }
    });
  }

  void run_together(int64_t block) const {
    float* in = scratch(floats(std::min(block, tiles)));
    for (int64_t first = 0; first < tiles; first += block) {
      const int64_t n = std::min(block, tiles - first);
      float* out = in + 36 * in_stride(n);
      torch::stable::parallel_for(0, n, 1, [&](int64_t b, int64_t e) { transform_input(first, b, e, n, in); });
      torch::stable::parallel_for(0, 36 * panels, 1, [&](int64_t b, int64_t e) { multiply(b, e, n, in, out); });
      torch::stable::parallel_for(0, n, 1, [&](int64_t b, int64_t e) { transform_output(first, b, e, n, out); });
    }
  }
};

bool is_float_cpu(const Tensor& t) { return t.scalar_type() == ScalarType::Float && !t.is_cuda(); }

Tensor channels_last(const Tensor& x) {
  return is_channels_last(x) ? x : torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

void check_images(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && is_float_cpu(x), op, ": ", name, " must be float32 [N, C, H, W] on the CPU; got ",
                  describe(x));
}

std::optional<Tensor> channel_values(const char* op, const char* name, const std::optional<Tensor>& t, int64_t channels) {
  if (!t) return std::nullopt;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == channels && is_float_cpu(*t), op, ": ", name, " must be float32 [", channels,
                  "] on the CPU; got ", describe(*t));
  return torch::stable::contiguous(*t);
}

std::optional<Tensor> image_values(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& x,
                                   int64_t channels) {
  if (!t) return std::nullopt;
  check_images(op, name, *t);
  STD_TORCH_CHECK(t->size(0) == x.size(0) && t->size(1) == channels && t->size(2) == x.size(2) && t->size(3) == x.size(3), op,
                  ": ", name, " must be [", x.size(0), ", ", channels, ", ", x.size(2), ", ", x.size(3), "]; got ", describe(*t));
  return channels_last(*t);
}

const float* data_or_null(const std::optional<Tensor>& t) { return t ? const_data<float>(*t) : nullptr; }

// conv(activation(x)) + bias + residual, or, where `input` is given, conv(x) times the derivative of the activation there.
Tensor convolve(const char* op, const Tensor& x, const Tensor& transformed, int64_t channels, std::optional<Tensor> bias,
                std::optional<Tensor> residual, std::optional<Tensor> input, std::optional<Tensor> scale,
                std::optional<Tensor> shift, bool relu, bool gradient) {
  check_images(op, gradient ? "gradient" : "x", x);
  const int64_t panels = (channels + kPanel - 1) / kPanel;
  STD_TORCH_CHECK(channels > 0 && transformed.dim() == 4 && transformed.size(0) == 36 && transformed.size(1) == panels &&
                      transformed.size(2) == x.size(1) && transformed.size(3) == kPanel && is_float_cpu(transformed),
                  op, ": transformed must be float32 [36, ", panels, ", ", x.size(1), ", ", kPanel,
                  "] on the CPU, as of winograd_weights; got ", describe(transformed));
  STD_TORCH_CHECK(scale.has_value() == shift.has_value() && (relu || !scale), op,
                  ": scale and shift must be given both or not at all, and with relu");
  STD_TORCH_CHECK(!gradient || input.has_value() == relu, op, ": x must be given with relu, and only then");
  const int64_t activated = gradient ? channels : x.size(1);
  bias = channel_values(op, "bias", bias, channels);
  scale = channel_values(op, "scale", scale, activated);
  shift = channel_values(op, "shift", shift, activated);
  residual = image_values(op, "residual", residual, x, channels);
  input = image_values(op, "x", input, x, channels);
  const Tensor images = channels_last(x), weights = torch::stable::contiguous(transformed);
  const int64_t shape[4] = {x.size(0), channels, x.size(2), x.size(3)};
  Tensor out = torch::stable::empty(shape, ScalarType::Float, std::nullopt, x.device(), std::nullopt,
                                    torch::headeronly::MemoryFormat::ChannelsLast);
  if (out.numel() == 0) return out;

  const Activation activation = {data_or_null(scale), data_or_null(shift), relu};
  Convolution c = {kernels(), const_data<float>(images), const_data<float>(weights)};
  c.activation = gradient ? Activation{} : activation;
  c.epilogue = {mutable_data<float>(out), data_or_null(bias), data_or_null(residual), data_or_null(input),
                gradient ? activation : Activation{}};
  c.channels_in = x.size(1);
  c.channels_out = channels;
  c.height = x.size(2);
  c.width = x.size(3);
  c.down = (c.height + 3) / 4;
  c.across = (c.width + 3) / 4;
  c.tiles = x.size(0) * c.down * c.across;
  c.panels = panels;
  c.in_row = rounded_up(c.channels_in, kPad);
  c.out_row = panels * kPanel;
  c.run();
  return out;
}

Tensor winograd_conv3x3_cpu(Tensor x, Tensor transformed, int64_t channels, std::optional<Tensor> bias,
                            std::optional<Tensor> scale, std::optional<Tensor> shift, bool relu,
                            std::optional<Tensor> residual) {
  return convolve("winograd_conv3x3", x, transformed, channels, bias, residual, std::nullopt, scale, shift, relu, false);
}

Tensor winograd_conv3x3_gradient_cpu(Tensor gradient, Tensor transformed, int64_t channels, std::optional<Tensor> x,
                                     std::optional<Tensor> scale, std::optional<Tensor> shift, bool relu) {
  return convolve("winograd_conv3x3_gradient", gradient, transformed, channels, std::nullopt, std::nullopt, x, scale, shift,
                  relu, true);
}

void winograd_weights_inplace_cpu(Tensor out, Tensor weight, bool rotated) {
  constexpr const char* op = "winograd_weights";
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 && weight.numel() > 0 && is_float_cpu(weight),
                  op, ": weight must be float32 [K, C, 3, 3] on the CPU, not empty; got ", describe(weight));
  const int64_t outs = weight.size(rotated ? 1 : 0), ins = weight.size(rotated ? 0 : 1);
  const int64_t panels = (outs + kPanel - 1) / kPanel;
  STD_TORCH_CHECK(out.dim() == 4 && out.size(0) == 36 && out.size(1) == panels && out.size(2) == ins &&
                      out.size(3) == kPanel && is_float_cpu(out) && out.is_contiguous(),
                  op, ": out must be contiguous float32 [36, ", panels, ", ", ins, ", ", kPanel, "] on the CPU; got ",
                  describe(out));
  // Inputs are few in a line of a panel, so the layout of the weights (contiguous, channels_last) hardly matters.
  const float* source = const_data<float>(weight);
  float* target = mutable_data<float>(out);
  const Kernels& kernel = kernels();
  const int64_t out_step = weight.stride(rotated ? 1 : 0), in_step = weight.stride(rotated ? 0 : 1);
  const int64_t row_step = weight.stride(2), column_step = weight.stride(3);
  torch::stable::parallel_for(0, panels * ins, 16, [&](int64_t begin, int64_t end) {
    alignas(64) float line[9 * kPanel];
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = row / ins * kPanel, n = std::min<int64_t>(kPanel, outs - first);
      const float* corner = source + first * out_step + row % ins * in_step;
      for (int64_t i = 0; i < 9; ++i) {
        const int64_t tap = rotated ? 8 - i : i;
        const float* from = corner + tap / 3 * row_step + tap % 3 * column_step;
        for (int64_t k = 0; k < n; ++k) line[i * kPanel + k] = from[k * out_step];
        for (int64_t k = n; k < kPanel; ++k) line[i * kPanel + k] = 0.0f;
      }
      kernel.weight_rows(line, target + row * kPanel, panels * ins * kPanel);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(synthfast, CPU, m) {
  m.impl("winograd_weights_", TORCH_BOX(&winograd_weights_inplace_cpu));
  m.impl("winograd_conv3x3", TORCH_BOX(&winograd_conv3x3_cpu));
  m.impl("winograd_conv3x3_gradient", TORCH_BOX(&winograd_conv3x3_gradient_cpu));
}

}  // namespace synthfast
