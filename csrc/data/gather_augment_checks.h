// The argument checks of gather_augment, the same for both devices; the device's kernel comes as a function.
#pragma once
#include "../common/check.h"
#include "gather_augment.h"

namespace synthfast {

struct GatherAugmentArguments {
  Tensor images, items, index, out;  // out is [N, H, W, C]
  ImageShape shape;
  int32_t padding;
  bool flip;
  PhiloxDraw draw;
};

constexpr int64_t kAugmentStream = 5;  // synthfast.ops.Stream.AUGMENT

template <typename Kernel>
Tensor gather_augment(const Tensor& images, const Tensor& items, const Tensor& index, int64_t seed, int64_t padding,
                      bool flip, ScalarType type, Kernel&& kernel) {
  constexpr const char* op = "gather_augment";
  STD_TORCH_CHECK(images.dim() == 4 && images.scalar_type() == ScalarType::Byte, op,
                  ": images must be uint8 [M, H, W, C]; got ", describe(images));
  STD_TORCH_CHECK(images.is_contiguous(), op, ": images must be contiguous, because a set is never copied; got ",
                  describe(images), " with other strides: call contiguous() once");
  STD_TORCH_CHECK(items.dim() == 1 && items.scalar_type() == ScalarType::Long && items.device() == images.device(), op,
                  ": items must be int64 [N] on the device of images; got ", describe(items));
  check_index(op, index, items);
  STD_TORCH_CHECK(padding >= 0 && padding < kMaxPadding, op, ": padding must lie in [0, 2^23); got ", padding);
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
                  ": dtype must be float32, bfloat16 or float16; got ", torch::headeronly::toString(type));
  const ImageShape shape{images.size(1), images.size(2), images.size(3)};
  STD_TORCH_CHECK(shape.elements() <= kMaxImage && (shape.elements() > 0 || shape.height <= kMaxImage), op,
                  ": an image may have 2^30 bytes at most; got images ", describe(images));
  const int64_t sizes[4] = {items.size(0), shape.height, shape.width, shape.channels};
  GatherAugmentArguments a{images,
                           torch::stable::contiguous(items),
                           torch::stable::contiguous(index),
                           torch::stable::new_empty(images, sizes, type),
                           shape,
                           static_cast<int32_t>(padding),
                           flip,
                           {philox_key(seed), stream_step(op, kAugmentStream, 0)}};
  kernel(a);
  return torch::stable::permute(a.out, {0, 3, 1, 2});
}

}  // namespace synthfast
