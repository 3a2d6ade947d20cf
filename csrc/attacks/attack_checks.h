// The argument checks and layout rules of the attack operations, the same for both devices; the device's kernel comes as a
// function.
#pragma once
#include "../common/check.h"
#include "../common/philox.h"
#include "ball.h"

namespace synthfast {

enum class BallNorm { kLinf = 0, kL2 = 1 };

// Dense tensors laid out like x, and contiguous float32 [N] ones.
struct AttackArguments {
  Tensor x, gradient, origin, eps, step_size;
  std::optional<Tensor> previous, momentum;
  Tensor out;
  double lo, hi;
};

struct StartArguments {
  Tensor origin, index, eps, out;
  PhiloxDraw draw;
  double lo, hi;
};

inline BallNorm ball_norm(const char* op, int64_t norm) {
  STD_TORCH_CHECK(norm == 0 || norm == 1, op, ": norm must be 0 (linf) or 1 (l2); got ", norm);
  return static_cast<BallNorm>(norm);
}

inline void check_bounds(const char* op, double lo, double hi) {
  STD_TORCH_CHECK(lo <= hi, op, ": lo must not exceed hi; got lo ", lo, " and hi ", hi);
}

inline Tensor per_sample(const char* op, const char* name, const Tensor& value, const Tensor& x) {
  STD_TORCH_CHECK(value.dim() == 1 && value.size(0) == x.size(0) && value.scalar_type() == ScalarType::Float &&
                      value.device() == x.device(),
                  op, ": ", name, " must be float32 [", x.size(0), "] on the device of the batch; got ", describe(value));
  return value.is_contiguous() ? value : torch::stable::contiguous(value);  // calling it costs a microsecond
}

inline AttackArguments attack_arguments(const char* op, const Tensor& x, const std::optional<Tensor>& previous,
                                        const Tensor& gradient, const Tensor& origin, const Tensor& eps,
                                        const Tensor& step_size, const std::optional<Tensor>& momentum, double lo, double hi) {
  check_batch(op, "x", x);
  if (previous) check_like(op, "previous", *previous, x, false);
  check_like(op, "gradient", gradient, x, false);
  check_like(op, "origin", origin, x, false);
  check_bounds(op, lo, hi);
  const Tensor radius = per_sample(op, "eps", eps, x), step = per_sample(op, "step_size", step_size, x);
  std::optional<Tensor> weight;
  if (momentum) weight = per_sample(op, "momentum", *momentum, x);
  const Tensor state = dense(x);
  std::optional<Tensor> before;
  if (previous) before = laid_out_like(*previous, state);
  return {state, laid_out_like(gradient, state), laid_out_like(origin, state), radius, step, before, weight, state, lo, hi};
}

// linf_step and l2_step.
template <typename Kernel>
Tensor ball_step(const char* op, const Tensor& x, const Tensor& gradient, const Tensor& origin, const Tensor& eps,
                 const Tensor& step_size, double lo, double hi, Kernel&& kernel) {
  AttackArguments a = attack_arguments(op, x, std::nullopt, gradient, origin, eps, step_size, std::nullopt, lo, hi);
  a.out = torch::stable::empty_like(a.x);
  kernel(a);
  return a.out;
}

template <typename Kernel>
void ball_step_inplace(const char* op, Tensor x, const Tensor& gradient, const Tensor& origin, const Tensor& eps,
                       const Tensor& step_size, double lo, double hi, Kernel&& kernel) {
  const AttackArguments a = attack_arguments(op, x, std::nullopt, gradient, origin, eps, step_size, std::nullopt, lo, hi);
  kernel(a);
  if (a.out.data_ptr() != x.data_ptr()) torch::stable::copy_(x, a.out);
}

template <typename Kernel>
Tensor apgd_step(const Tensor& x, const Tensor& previous, const Tensor& gradient, const Tensor& origin, const Tensor& eps,
                 const Tensor& step_size, const Tensor& momentum, int64_t norm, double lo, double hi, Kernel&& kernel) {
  AttackArguments a = attack_arguments("apgd_step", x, previous, gradient, origin, eps, step_size, momentum, lo, hi);
  a.out = torch::stable::empty_like(a.x);
  kernel(a, ball_norm("apgd_step", norm));
  return a.out;
}

// The result goes to `previous`; it is computed in the layout of x.
template <typename Kernel>
void apgd_step_inplace(Tensor previous, const Tensor& x, const Tensor& gradient, const Tensor& origin, const Tensor& eps,
                       const Tensor& step_size, const Tensor& momentum, int64_t norm, double lo, double hi, Kernel&& kernel) {
  AttackArguments a = attack_arguments("apgd_step", x, previous, gradient, origin, eps, step_size, momentum, lo, hi);
  a.out = *a.previous;
  kernel(a, ball_norm("apgd_step", norm));
  if (a.out.data_ptr() != previous.data_ptr()) torch::stable::copy_(previous, a.out);
}

template <typename Kernel>
Tensor ball_start(const Tensor& origin, const Tensor& index, const Tensor& eps, int64_t norm, int64_t seed, int64_t step,
                  double lo, double hi, Kernel&& kernel) {
  constexpr const char* op = "ball_start";
  check_batch(op, "origin", origin);
  check_index(op, index, origin);
  check_bounds(op, lo, hi);
  const BallNorm ball = ball_norm(op, norm);
  const Tensor center = dense(origin);
  const StartArguments a{center,
                         index.is_contiguous() ? index : torch::stable::contiguous(index),
                         per_sample(op, "eps", eps, origin),
                         torch::stable::empty_like(center),
                         {philox_key(seed), stream_step(op, kAttackStream, step)},
                         lo,
                         hi};
  kernel(a, ball);
  return a.out;
}

}  // namespace synthfast
