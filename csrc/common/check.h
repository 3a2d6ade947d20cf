// Argument checks that every operation shares. Messages state operation, argument, what was expected and what was found.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

namespace synthfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string describe(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "] " + torch::headeronly::toString(tensor.scalar_type()) + " on " + (tensor.is_cuda() ? "cuda" : "cpu");
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

// Strides count only where a dimension has more than one entry.
inline bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4) return false;
  const int64_t order[4] = {1, 3, 2, 0};
  int64_t expected = 1;
  for (int64_t d : order) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

inline bool same_layout(const Tensor& a, const Tensor& b) {
  return (a.is_contiguous() && b.is_contiguous()) || (is_channels_last(a) && is_channels_last(b));
}

// `tensor` itself when it is dense (contiguous or channels_last), else a contiguous copy.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() || is_channels_last(tensor) ? tensor : torch::stable::contiguous(tensor);
}

// `tensor` itself when it is laid out like `pattern`, else a copy that is, in the type of `pattern`.
inline Tensor laid_out_like(const Tensor& tensor, const Tensor& pattern) {
  if (same_layout(tensor, pattern)) return tensor;
  Tensor copy = torch::stable::empty_like(pattern);
  torch::stable::copy_(copy, tensor);
  return copy;
}

inline void check_batch(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() >= 1, op, ": ", name, " must have a batch dimension, [N, ...]; got a scalar");
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op, ": ", name,
                  " must be float32, bfloat16 or float16; got ", describe(tensor));
}

// `tensor` must have the shape and device of `x`, and its type or (where `narrower` allows) a narrower one than float32.
inline void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& x, bool narrower) {
  check_batch(op, name, tensor);
  STD_TORCH_CHECK(same_shape(tensor, x) && tensor.device() == x.device(), op, ": ", name,
                  " must have the shape and device of x, ", describe(x), "; got ", describe(tensor));
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type() || (narrower && x.scalar_type() == ScalarType::Float), op, ": ",
                  name, " must have the type of x, ", describe(x), "; got ", describe(tensor));
}

inline void check_index(const char* op, const Tensor& index, const Tensor& x) {
  STD_TORCH_CHECK(index.dim() == 1 && index.size(0) == x.size(0) && index.scalar_type() == ScalarType::Long &&
                      index.device() == x.device(),
                  op, ": index must be int64 [", x.size(0), "] on the device of the batch; got ", describe(index));
}

// The low 24 bits of the last counter word hold the step, the upper 8 the stream.
inline uint32_t stream_step(const char* op, int64_t stream, int64_t step) {
  STD_TORCH_CHECK(stream >= 0 && stream < 256, op, ": stream must lie in [0, 256); got ", stream);
  STD_TORCH_CHECK(step >= 0 && step < (int64_t{1} << 24), op, ": step must lie in [0, 2^24); got ", step);
  return static_cast<uint32_t>(stream << 24 | step);
}

}  // namespace synthfast
