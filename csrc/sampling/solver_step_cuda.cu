#include <torch/csrc/stable/library.h>

#include "../common/dispatch.h"
#include "../common/launch.cuh"
#include "solver_step.cuh"
#include "solver_step_checks.h"

namespace synthfast {

namespace {

void solver_step_launch(const SolverStepArguments& a) {
  if (a.x.numel() == 0) return;
  dispatch_state_output(a.x.scalar_type(), a.model_output.scalar_type(), [&](auto state_type, auto output_type) {
    using State = typename decltype(state_type)::type;
    using Output = typename decltype(output_type)::type;
    constexpr int kCount = kSolverStepChunk<State>;
    const SolverStepPointers<State, Output> p{
        const_data<State>(a.x),
        const_data<Output>(a.model_output),
        a.unconditional ? const_data<Output>(*a.unconditional) : nullptr,
        a.previous ? const_data<State>(*a.previous) : nullptr,
        mutable_data<State>(a.out),
        a.denoised ? mutable_data<State>(*a.denoised) : nullptr,
        const_data<float>(a.coefficients),
        const_data<int64_t>(a.index),
    };
    const Chunks chunks = make_chunks(a.x.size(0), a.x.numel() / a.x.size(0), kCount);
    const bool aligned = chunks.elements % kCount == 0 && aligned_for(p.x, 16) && aligned_for(p.out, 16) &&
                         aligned_for(p.model_output, sizeof(Output) * kCount) &&
                         aligned_for(p.unconditional, sizeof(Output) * kCount) && aligned_for(p.previous, 16) &&
                         aligned_for(p.denoised, 16);
    launch_items(a.x, chunks.items(), [&](unsigned grid, cudaStream_t stream) {
      if (aligned)
        solver_step_cuda_kernel<State, Output, true><<<grid, kBlockThreads, 0, stream>>>(p, chunks, a.draw);
      else
        solver_step_cuda_kernel<State, Output, false><<<grid, kBlockThreads, 0, stream>>>(p, chunks, a.draw);
    });
  });
}

std::tuple<Tensor, Tensor> solver_step_cuda(Tensor x, Tensor model_output, Tensor coefficients, Tensor index,
                                            int64_t seed, int64_t step, std::optional<Tensor> unconditional,
                                            std::optional<Tensor> previous) {
  return solver_step_functional(x, model_output, coefficients, index, seed, step, unconditional, previous,
                                solver_step_launch);
}

void solver_step_inplace_cuda(Tensor x, Tensor model_output, Tensor coefficients, Tensor index, int64_t seed,
                              int64_t step, std::optional<Tensor> unconditional, std::optional<Tensor> history) {
  solver_step_inplace(x, model_output, coefficients, index, seed, step, unconditional, history, solver_step_launch);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(synthfast, CUDA, m) {
  m.impl("solver_step", TORCH_BOX(&solver_step_cuda));
  m.impl("solver_step_", TORCH_BOX(&solver_step_inplace_cuda));
}

}  // namespace synthfast
