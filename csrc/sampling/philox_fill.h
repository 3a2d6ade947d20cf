// What philox_normal_ and philox_uniform_ share on both devices: checks, layout, and the conversion for each storage type.
#pragma once
#include "../common/check.h"
#include "../common/philox.h"
#include "philox_convert.h"

namespace synthfast {

// Fills `out` [N, ...] in storage order through kernel(dense out, contiguous index, draw).
template <typename Kernel>
void philox_fill(const char* op, Tensor out, const Tensor& index, int64_t seed, int64_t stream, int64_t step,
                 Kernel&& kernel) {
  check_batch(op, "out", out);
  check_index(op, index, out);
  const PhiloxDraw draw{philox_key(seed), stream_step(op, stream, step)};
  const Tensor target = dense(out);
  kernel(target, torch::stable::contiguous(index), draw);
  if (target.data_ptr() != out.data_ptr()) torch::stable::copy_(out, target);
}

}  // namespace synthfast
