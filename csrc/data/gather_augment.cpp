// gather_augment on the CPU. Rows of the crop are put together as bytes in a tile, then the tile is converted in one run:
// copies and shuffles of bytes are cheap, and the conversion has no short pieces.
#include "gather_augment.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../common/dispatch.h"
#include "../common/vectorize.h"
#include "gather_augment_checks.h"

#if SF_X86
#include <immintrin.h>
#endif

namespace synthfast {

namespace {

constexpr int64_t kTileBytes = 8192;      // stays in the first-level cache
constexpr int64_t kTileSlack = 16;        // a mirrored row may be followed by that many bytes less one
constexpr int64_t kPrefetchBytes = 4096;  // of the next image; of larger ones the processor follows the rows

// What from_float<T>(unit_from_byte(byte)) gives, in fewer steps: nothing here is negative, infinite, NaN or subnormal,
// or half-way between two values of T.
template <typename T>
SF_HD T unit_as(uint8_t byte);

template <>
SF_HD float unit_as<float>(uint8_t byte) {
  return unit_from_byte(byte);
}

template <>
SF_HD bfloat16 unit_as<bfloat16>(uint8_t byte) {
  const uint32_t bits = bits_from_float(unit_from_byte(byte));
  return {static_cast<uint16_t>((bits + 0x8000u) >> 16)};
}

template <>
SF_HD float16 unit_as<float16>(uint8_t byte) {
  const uint32_t bits = bits_from_float(unit_from_byte(byte) * 0x1p-112f);  // the exponent of a float16, zero stays zero
  return {static_cast<uint16_t>((bits + 0x1000u) >> 13)};
}

template <typename T>
SF_HD void store_run(const uint8_t* bytes, T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = unit_as<T>(bytes[i]);
}

// The order of bytes that mirrors a block of 16 / channels whole pixels.
struct MirrorOrder {
  alignas(16) uint8_t block[16], last[16];  // the block's pixels lie at the end, and at the start, of the 16 bytes read
  int64_t bytes;                            // of the whole pixels; 0 where not one fits

  explicit MirrorOrder(int64_t channels) : bytes(channels > 0 ? 16 / channels * channels : 0) {
    for (int64_t k = 0; k < 16; ++k) {
      const int64_t from = k < bytes ? bytes - channels - k / channels * channels + k % channels : 0;
      block[k] = static_cast<uint8_t>(k < bytes ? 16 - bytes + from : 0x80);  // 0x80 gives a zero
      last[k] = static_cast<uint8_t>(k < bytes ? from : 0x80);
    }
  }
};

// `n` bytes of whole pixels in the opposite order of pixels.
SF_HD void mirror_plain(const uint8_t* bytes, uint8_t* out, int64_t n, int64_t channels) {
  for (int64_t at = 0; at < n; at += channels)
    for (int64_t k = 0; k < channels; ++k) out[at + k] = bytes[n - channels - at + k];
}

#if SF_X86
// n >= 16. Up to 15 zeros may be written behind the n bytes.
__attribute__((target("arch=x86-64-v3"))) inline void mirror_shuffled(const uint8_t* bytes, uint8_t* out, int64_t n,
                                                                      const MirrorOrder* order) {
  const __m128i block = _mm_load_si128(reinterpret_cast<const __m128i*>(order->block));
  const __m128i last = _mm_load_si128(reinterpret_cast<const __m128i*>(order->last));
  int64_t at = 0;
  for (; at + 16 <= n; at += order->bytes) {
    const __m128i pixels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + n - at - 16));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + at), _mm_shuffle_epi8(pixels, block));
  }
  if (at == n) return;
  const __m128i pixels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + n - order->bytes), _mm_shuffle_epi8(pixels, last));
}
#endif

template <CpuCapability kCapability>
SF_HD void mirror(const uint8_t* bytes, uint8_t* out, int64_t n, int64_t channels, const MirrorOrder* order) {
#if SF_X86
  if constexpr (kCapability != CpuCapability::kDefault)
    if (n >= 16 && order->bytes > 0) return mirror_shuffled(bytes, out, n, order);
#endif
  mirror_plain(bytes, out, n, channels);
}

// Where the bytes of output columns [x0, x1) of a row lie: `n` bytes at `from` in the image's row go to `to` in the
// piece of the output; what is left of the piece is padding.
struct Span {
  int64_t from, to, n;
};

SF_HD Span span_of(int64_t x0, int64_t x1, const ImageShape& shape, const Crop& crop) {
  const int64_t first = crop.flip ? shape.width - x1 : x0, last = first + x1 - x0;  // columns of the crop
  const int64_t inside = std::clamp<int64_t>(-crop.right, first, last);
  const int64_t outside = std::clamp<int64_t>(shape.width - crop.right, first, last);
  const int64_t before = crop.flip ? last - outside : inside - first;
  return {(inside + crop.right) * shape.channels, before * shape.channels, (outside - inside) * shape.channels};
}

// Rows [y0, y1) of one sample.
template <typename T>
struct GatherRows {
  template <CpuCapability kCapability>
  SF_HD static void run(const uint8_t* image, T* out, int64_t y0, int64_t y1, ImageShape shape, Crop crop,
                        const MirrorOrder* order) {
    const int64_t row = shape.row();
    if (crop.right == 0 && !crop.flip) {  // whole rows, which lie one behind the other
      const int64_t inside = std::clamp<int64_t>(-crop.down, y0, y1);
      const int64_t outside = std::clamp<int64_t>(shape.height - crop.down, y0, y1);
      std::fill(out + y0 * row, out + inside * row, T{});
      store_run(image + (inside + crop.down) * row, out + inside * row, (outside - inside) * row);
      std::fill(out + outside * row, out + y1 * row, T{});
      return;
    }
    alignas(64) uint8_t tile[kTileBytes + kTileSlack];
    const int64_t columns = std::min(shape.width, kTileBytes / shape.channels);
    if (columns == 0) return wide_pixels(image, out, y0, y1, shape, crop);
    const int64_t rows = columns == shape.width ? kTileBytes / row : 1;
    for (int64_t y = y0; y < y1; y += rows) {
      const int64_t y_end = std::min(y + rows, y1);
      const int64_t inside = std::clamp<int64_t>(-crop.down, y, y_end);
      const int64_t outside = std::clamp<int64_t>(shape.height - crop.down, y, y_end);
      for (int64_t x = 0; x < shape.width; x += columns) {
        const int64_t x_end = std::min(x + columns, shape.width);
        const int64_t piece = (x_end - x) * shape.channels;
        const Span span = span_of(x, x_end, shape, crop);
        if (span.n < piece || outside - inside < y_end - y) std::fill(tile, tile + (y_end - y) * piece, uint8_t{0});
        // In this order, because a mirrored row may write zeros behind its end.
        if (span.n > 0)
          for (int64_t k = inside; k < outside; ++k) {
            const uint8_t* from = image + (k + crop.down) * row + span.from;
            uint8_t* to = tile + (k - y) * piece + span.to;
            if (crop.flip)
              mirror<kCapability>(from, to, span.n, shape.channels, order);
            else
              __builtin_memcpy(to, from, span.n);
          }
        store_run(tile, out + y * row + x * shape.channels, (y_end - y) * piece);
      }
    }
  }

  // Pixels of more channels than a tile has bytes.
  SF_HD static void wide_pixels(const uint8_t* image, T* out, int64_t y0, int64_t y1, const ImageShape& shape,
                                const Crop& crop) {
    for (int64_t y = y0; y < y1; ++y)
      for (int64_t x = 0; x < shape.width; ++x) {
        T* pixel = out + y * shape.row() + x * shape.channels;
        const Span span = span_of(x, x + 1, shape, crop);
        if (span.n > 0 && y + crop.down >= 0 && y + crop.down < shape.height)
          store_run(image + (y + crop.down) * shape.row() + span.from, pixel, shape.channels);
        else
          std::fill(pixel, pixel + shape.channels, T{});
      }
  }
};

void gather_augment_kernel(const GatherAugmentArguments& a) {
  const int64_t* items = const_data<int64_t>(a.items);
  const int64_t* index = const_data<int64_t>(a.index);
  const int64_t samples = a.items.size(0), count = a.images.size(0);
  for (int64_t n = 0; n < samples; ++n)
    STD_TORCH_CHECK(items[n] >= 0 && items[n] < count, "gather_augment: items must lie in [0, ", count,
                    "), the images of the set; got ", items[n], " at position ", n);
  if (a.out.numel() == 0) return;
  const uint8_t* images = const_data<uint8_t>(a.images);
  const int64_t height = a.shape.height, elements = a.shape.elements();
  const MirrorOrder order(a.shape.channels);
  dispatch_float(a.out.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    T* out = mutable_data<T>(a.out);
    const int64_t grain = std::max<int64_t>(1, 65536 / a.shape.row());
    torch::stable::parallel_for(0, samples * height, grain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t sample = begin / height, y0 = begin % height, y1 = std::min(height, y0 + end - begin);
        begin += y1 - y0;
        if (begin < end) {
          const uint8_t* next = images + items[sample + 1] * elements;
          for (int64_t byte = 0; byte < std::min(elements, kPrefetchBytes); byte += 64) __builtin_prefetch(next + byte);
        }
        vectorized<GatherRows<T>>(images + items[sample] * elements, out + sample * elements, y0, y1, a.shape,
                                  draw_crop(a.draw, index[sample], a.padding, a.flip), &order);
      }
    });
  });
}

Tensor gather_augment_cpu(Tensor images, Tensor items, Tensor index, int64_t seed, int64_t padding, bool flip,
                          ScalarType dtype) {
  return gather_augment(images, items, index, seed, padding, flip, dtype, gather_augment_kernel);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(synthfast, CPU, m) { m.impl("gather_augment", TORCH_BOX(&gather_augment_cpu)); }

}  // namespace synthfast
