// The CUDA kernel of gather_augment. A thread writes up to kGatherPasses chunks of 16 bytes of one sample, as far apart as
// the sample has threads: neighbours write neighbouring chunks, and a thread draws the crop once for all of its chunks.
#pragma once
#include "../common/kernel.cuh"
#include "gather_augment.h"

namespace synthfast {

constexpr int kGatherPasses = 4;

template <typename T>
constexpr int kGatherChunk = 16 / sizeof(T);

// The threads of a sample, as work items.
template <typename T>
Chunks gather_threads(int64_t samples, const ImageShape& shape) {
  return make_chunks(samples, shape.elements(), kGatherChunk<T> * kGatherPasses);
}

// An item outside [0, count) cannot be reported from here, so the whole sample becomes NaN.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads)
    gather_augment_cuda_kernel(const uint8_t* __restrict__ images, int64_t count, const int64_t* items,
                               const int64_t* index, T* out, Chunks threads, ImageShape shape, int32_t padding, bool flip,
                               PhiloxDraw draw) {
  constexpr int kCount = kGatherChunk<T>;
  // One image has at most 2^30 elements.
  const int32_t height = static_cast<int32_t>(shape.height), width = static_cast<int32_t>(shape.width);
  const int32_t channels = static_cast<int32_t>(shape.channels);
  const uint32_t row = static_cast<uint32_t>(shape.row()), elements = static_cast<uint32_t>(shape.elements());
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; thread < threads.items();
       thread += stride) {
    const int64_t sample = threads.sample_of(thread);
    const int64_t item = items[sample];
    const bool exists = item >= 0 && item < count;
    const uint8_t* image = images + (exists ? item * shape.elements() : 0);
    const Crop crop = draw_crop(draw, index[sample], padding, flip);
    uint32_t offset = static_cast<uint32_t>(thread - sample * threads.per_sample) * kCount;
    for (; offset < elements; offset += static_cast<uint32_t>(threads.per_sample) * kCount) {
      const int valid = elements - offset < kCount ? static_cast<int>(elements - offset) : kCount;
      int32_t y = static_cast<int32_t>(offset / row);
      const uint32_t in_row = offset - y * row;
      int32_t x = static_cast<int32_t>(in_row / channels);
      int32_t channel = static_cast<int32_t>(in_row) - x * channels;
      float values[kCount];
      SF_UNROLL
      for (int k = 0; k < kCount; ++k) {  // beyond `valid` too, where nothing outside the image is read
        const int32_t from_y = y + crop.down, from_x = (crop.flip ? width - 1 - x : x) + crop.right;
        const bool inside = from_y >= 0 && from_y < height && from_x >= 0 && from_x < width;
        values[k] = 0.0f;
        if (inside && exists) values[k] = unit_from_byte(image[(from_y * width + from_x) * channels + channel]);
        if (!exists) values[k] = float_from_bits(0x7fc00000u);
        if (++channel == channels) {
          channel = 0;
          if (++x == width) {
            x = 0;
            ++y;
          }
        }
      }
      store_pack<kAligned, kCount>(out + sample * shape.elements() + offset, valid, values);
    }
  }
}

}  // namespace synthfast
