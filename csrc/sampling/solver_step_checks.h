// The argument checks and layout rules of solver_step, the same for both devices; the device's kernel comes as a function.
#pragma once
#include <tuple>

#include "../common/check.h"
#include "../common/philox.h"
#include "solver_step.h"

namespace synthfast {

struct SolverStepArguments {
  Tensor x, model_output, coefficients, index;
  std::optional<Tensor> unconditional, previous;
  Tensor out;
  std::optional<Tensor> denoised;
  PhiloxDraw draw;
};

inline SolverStepArguments solver_step_arguments(const Tensor& x, const Tensor& model_output, const Tensor& coefficients,
                                                 const Tensor& index, int64_t seed, int64_t step,
                                                 const std::optional<Tensor>& unconditional,
                                                 const std::optional<Tensor>& previous) {
  constexpr const char* op = "solver_step";
  check_batch(op, "x", x);
  check_like(op, "model_output", model_output, x, true);
  if (unconditional) {
    check_like(op, "unconditional", *unconditional, x, true);
    STD_TORCH_CHECK(unconditional->scalar_type() == model_output.scalar_type(), op,
                    ": unconditional must have the type of model_output, ", describe(model_output), "; got ",
                    describe(*unconditional));
  }
  if (previous) check_like(op, "previous", *previous, x, false);
  check_index(op, index, x);
  STD_TORCH_CHECK(coefficients.dim() == 1 && coefficients.size(0) == SolverCoefficients::kCount &&
                      coefficients.scalar_type() == ScalarType::Float && coefficients.device() == x.device(),
                  op, ": coefficients must be float32 [9] on the device of x; got ", describe(coefficients));

  const Tensor state = dense(x);
  Tensor output = model_output;
  std::optional<Tensor> guide = unconditional, history = previous;
  // Outputs in another layout are copied to the state's, in its type; the two must keep one type.
  if (!same_layout(output, state) || (guide && !same_layout(*guide, state))) {
    const bool widen = output.scalar_type() != state.scalar_type();
    const auto bring = [&](const Tensor& t) {
      if (same_layout(t, state) && !widen) return t;
      Tensor copy = torch::stable::empty_like(state);
      torch::stable::copy_(copy, t);
      return copy;
    };
    output = bring(output);
    if (guide) guide = bring(*guide);
  }
  if (history) history = laid_out_like(*history, state);
  return {state,   output, torch::stable::contiguous(coefficients), torch::stable::contiguous(index), guide, history, state, {},
          {philox_key(seed), stream_step(op, 0, step)}};
}

template <typename Kernel>
std::tuple<Tensor, Tensor> solver_step_functional(const Tensor& x, const Tensor& model_output, const Tensor& coefficients,
                                                  const Tensor& index, int64_t seed, int64_t step,
                                                  const std::optional<Tensor>& unconditional,
                                                  const std::optional<Tensor>& previous, Kernel&& kernel) {
  SolverStepArguments a =
      solver_step_arguments(x, model_output, coefficients, index, seed, step, unconditional, previous);
  a.out = torch::stable::empty_like(a.x);
  a.denoised = torch::stable::empty_like(a.x);
  kernel(a);
  return {a.out, *a.denoised};
}

// x becomes x'; history is read as P and becomes D.
template <typename Kernel>
void solver_step_inplace(Tensor x, const Tensor& model_output, const Tensor& coefficients, const Tensor& index, int64_t seed,
                         int64_t step, const std::optional<Tensor>& unconditional, std::optional<Tensor> history,
                         Kernel&& kernel) {
  SolverStepArguments a =
      solver_step_arguments(x, model_output, coefficients, index, seed, step, unconditional, history);
  a.out = a.x;
  a.denoised = a.previous;
  kernel(a);
  if (a.x.data_ptr() != x.data_ptr()) torch::stable::copy_(x, a.x);
  if (history && a.previous->data_ptr() != history->data_ptr()) torch::stable::copy_(*history, *a.previous);
}

}  // namespace synthfast
