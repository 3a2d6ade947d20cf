#include "solver_step.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "../common/check.h"
#include "../common/dispatch.h"
#include "../common/vectorize.h"
#include "random_tile.h"
#include "solver_step_checks.h"

namespace synthfast {

namespace {

// One tile of one sample. Null pointers stand for absent tensors; `noise_first_block` counts from the sample's start.
template <typename State, typename Output>
struct SolverStepTile {
  template <CpuCapability kCapability>
  SF_HD static void run(const State* x, const Output* m, const Output* mu, const State* p, State* out, State* denoised,
                        int64_t n, SolverCoefficients c, PhiloxDraw draw, int64_t sample, uint32_t first_block) {
    alignas(64) float x_buffer[kTile], m_buffer[kTile], mu_buffer[kTile], d_buffer[kTile], out_buffer[kTile];
    alignas(64) float p_buffer[kTile], z[kTile];
    const float* state = load_tile(x, x_buffer, n);
    const float* output = load_tile(m, m_buffer, n);
    if (mu != nullptr) {
      const float* unconditional = load_tile(mu, mu_buffer, n);
      for (int64_t i = 0; i < n; ++i) m_buffer[i] = guided(output[i], unconditional[i], c.w);
      output = m_buffer;
    }
    const bool with_previous = c.ap != 0.0f, with_noise = c.az != 0.0f;
    const float* previous = with_previous ? load_tile(p, p_buffer, n) : nullptr;
    if (with_noise) NormalsTile::run<kCapability>(z, n, draw, sample, first_block);

    float* d = denoised != nullptr ? tile_target(denoised, d_buffer) : d_buffer;
    float* result = tile_target(out, out_buffer);
    // Each loop reads element i before it writes it, so in-place calls (out on x, denoised on p) are safe.
    if (with_previous && with_noise) {
      for (int64_t i = 0; i < n; ++i) {
        const float value = state[i], before = previous[i];
        d[i] = denoise(value, output[i], c);
        result[i] = advance(value, d[i], c) + c.ap * before + c.az * z[i];
      }
    } else if (with_previous) {
      for (int64_t i = 0; i < n; ++i) {
        const float value = state[i], before = previous[i];
        d[i] = denoise(value, output[i], c);
        result[i] = advance(value, d[i], c) + c.ap * before;
      }
    } else if (with_noise) {
      for (int64_t i = 0; i < n; ++i) {
        const float value = state[i];
        d[i] = denoise(value, output[i], c);
        result[i] = advance(value, d[i], c) + c.az * z[i];
      }
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const float value = state[i];
        d[i] = denoise(value, output[i], c);
        result[i] = advance(value, d[i], c);
      }
    }
    if (denoised != nullptr) store_tile(denoised, d, n);
    store_tile(out, result, n);
  }
};

// The arguments are dense, laid out alike and checked.
void solver_step_kernel(const SolverStepArguments& a) {
  const int64_t samples = a.x.size(0);
  if (a.x.numel() == 0) return;
  const int64_t elements = a.x.numel() / samples;
  const SolverCoefficients c = SolverCoefficients::load(const_data<float>(a.coefficients));
  STD_TORCH_CHECK(c.ap == 0.0f || a.previous.has_value(),
                  "solver_step: previous (history) must be given when coefficient ap is not 0; got none");
  const int64_t tiles = (elements + kTile - 1) / kTile;
  const int64_t* index = const_data<int64_t>(a.index);
  dispatch_state_output(a.x.scalar_type(), a.model_output.scalar_type(), [&](auto state_type, auto output_type) {
    using State = typename decltype(state_type)::type;
    using Output = typename decltype(output_type)::type;
    const State* x = const_data<State>(a.x);
    const Output* m = const_data<Output>(a.model_output);
    const Output* mu = a.unconditional ? const_data<Output>(*a.unconditional) : nullptr;
    const State* p = a.previous ? const_data<State>(*a.previous) : nullptr;
    State* out = mutable_data<State>(a.out);
    State* denoised = a.denoised ? mutable_data<State>(*a.denoised) : nullptr;
    const int64_t grain = std::max<int64_t>(1, 16384 / std::min(elements, kTile));
    torch::stable::parallel_for(0, samples * tiles, grain, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t sample = tile / tiles, offset = tile % tiles * kTile;
        const int64_t at = sample * elements + offset;
        vectorized<SolverStepTile<State, Output>>(
            x + at, m + at, mu ? mu + at : nullptr, p ? p + at : nullptr, out + at, denoised ? denoised + at : nullptr,
            std::min(kTile, elements - offset), c, a.draw, index[sample], static_cast<uint32_t>(offset / 4));
      }
    });
  });
}

std::tuple<Tensor, Tensor> solver_step_cpu(Tensor x, Tensor model_output, Tensor coefficients, Tensor index, int64_t seed,
                                           int64_t step, std::optional<Tensor> unconditional,
                                           std::optional<Tensor> previous) {
  return solver_step_functional(x, model_output, coefficients, index, seed, step, unconditional, previous,
                                solver_step_kernel);
}

void solver_step_inplace_cpu(Tensor x, Tensor model_output, Tensor coefficients, Tensor index, int64_t seed, int64_t step,
                             std::optional<Tensor> unconditional, std::optional<Tensor> history) {
  solver_step_inplace(x, model_output, coefficients, index, seed, step, unconditional, history, solver_step_kernel);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(synthfast, CPU, m) {
  m.impl("solver_step", TORCH_BOX(&solver_step_cpu));
  m.impl("solver_step_", TORCH_BOX(&solver_step_inplace_cpu));
}

}  // namespace synthfast
