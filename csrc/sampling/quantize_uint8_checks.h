// The argument checks of quantize_uint8, the same for both devices; the device's kernel comes as a function.
#pragma once
#include "../common/check.h"

namespace synthfast {

template <typename Kernel>
Tensor quantize_uint8(const Tensor& x, Kernel&& kernel) {
  check_batch("quantize_uint8", "x", x);
  STD_TORCH_CHECK(x.dim() == 4, "quantize_uint8: x must be [N, C, H, W]; got ", describe(x));
  const Tensor images = dense(x);
  const int64_t shape[4] = {x.size(0), x.size(2), x.size(3), x.size(1)};
  Tensor out = torch::stable::new_empty(images, shape, ScalarType::Byte);
  kernel(images, out);
  return out;
}

}  // namespace synthfast
