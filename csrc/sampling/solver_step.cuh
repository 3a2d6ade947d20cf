// The CUDA kernel of solver_step: a thread takes one chunk of a sample at a time, with the noise drawn in registers.
#pragma once
#include "../common/kernel.cuh"
#include "../common/philox.h"
#include "solver_step.h"

namespace synthfast {

template <typename State, typename Output>
struct SolverStepPointers {
  const State* x;
  const Output* model_output;
  const Output* unconditional;  // may be null, as the two below
  const State* previous;
  State* out;
  State* denoised;
  const float* coefficients;
  const int64_t* index;
};

// Elements a thread handles at a time: 16 bytes of state.
template <typename State>
constexpr int kSolverStepChunk = 16 / sizeof(State);

// Pointers may alias (in-place calls), so none is __restrict__; each thread reads its elements before it writes them.
template <typename State, typename Output, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads)
    solver_step_cuda_kernel(SolverStepPointers<State, Output> p, Chunks chunks, PhiloxDraw draw) {
  constexpr int kCount = kSolverStepChunk<State>;
  SolverCoefficients c = SolverCoefficients::load(p.coefficients);
  if (p.previous == nullptr && c.ap != 0.0f) c.kx = float_from_bits(0x7fffffffu);  // NaN: a missing history must show
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < chunks.items(); item += stride) {
    const int64_t sample = chunks.sample_of(item);
    const int64_t offset = (item - sample * chunks.per_sample) * kCount;
    const int64_t at = sample * chunks.elements + offset;
    const int64_t left = chunks.elements - offset;
    const int valid = left < kCount ? static_cast<int>(left) : kCount;

    float x[kCount], m[kCount], other[kCount], denoised[kCount], result[kCount];
    load_pack<kAligned, kCount>(p.x + at, valid, x);
    load_pack<kAligned, kCount>(p.model_output + at, valid, m);
    if (p.unconditional != nullptr) {
      load_pack<kAligned, kCount>(p.unconditional + at, valid, other);
      SF_UNROLL
      for (int k = 0; k < kCount; ++k) m[k] = guided(m[k], other[k], c.w);
    }
    SF_UNROLL
    for (int k = 0; k < kCount; ++k) {
      denoised[k] = denoise(x[k], m[k], c);
      result[k] = advance(x[k], denoised[k], c);
    }
    if (c.ap != 0.0f && p.previous != nullptr) {
      load_pack<kAligned, kCount>(p.previous + at, valid, other);
      SF_UNROLL
      for (int k = 0; k < kCount; ++k) result[k] = result[k] + c.ap * other[k];
    }
    if (c.az != 0.0f) {
      SF_UNROLL
      for (int k = 0; k < kCount; k += 4)
        PhiloxNormals::convert(draw.words(p.index[sample], static_cast<uint32_t>((offset + k) / 4)), other + k);
      SF_UNROLL
      for (int k = 0; k < kCount; ++k) result[k] = result[k] + c.az * other[k];
    }
    store_pack<kAligned, kCount>(p.out + at, valid, result);
    if (p.denoised != nullptr) store_pack<kAligned, kCount>(p.denoised + at, valid, denoised);
  }
}

}  // namespace synthfast
