// The kernels of csrc/sampling under the host shim, behind C functions that the tests call through ctypes.
#include "cuda_host_shim.h"
// clang-format off
#include "../../csrc/sampling/philox_fill.cuh"
#include "../../csrc/sampling/quantize_uint8.cuh"
#include "../../csrc/sampling/solver_step.cuh"
// clang-format on

using namespace synthfast;
using shim::Guarded;
using shim::Order;

namespace {

template <typename State, typename Output>
void solver_step(const State* x, const Output* m, const Output* mu, const State* p, State* out, State* denoised,
                 const float* coefficients, const int64_t* index, int64_t samples, int64_t elements, int64_t seed,
                 uint32_t step, unsigned grid, Order order, int64_t misalign) {
  constexpr int kCount = kSolverStepChunk<State>;
  const int64_t n = samples * elements;
  Guarded<State> gx(x, n, misalign), gp(p, n, misalign), gout(out, n, misalign), gd(denoised, n, misalign);
  Guarded<Output> gm(m, n, misalign), gmu(mu, n, misalign);
  Guarded<float> gc(coefficients, SolverCoefficients::kCount);
  Guarded<int64_t> gi(index, samples);
  // An in-place call, out on x and denoised on p, must alias on the "device" too.
  const Guarded<State>& result = out == x ? gx : gout;
  const Guarded<State>& history = denoised != nullptr && denoised == p ? gp : gd;
  const SolverStepPointers<State, Output> pointers{gx.data(),     gm.data(),      gmu.data(), gp.data(),
                                                   result.data(), history.data(), gc.data(),  gi.data()};
  const Chunks chunks = make_chunks(samples, elements, kCount);
  const PhiloxDraw draw{philox_key(seed), step};
  const bool aligned = elements % kCount == 0 && misalign == 0;
  shim::launch({grid}, {kBlockThreads}, order, [&] {
    if (aligned)
      solver_step_cuda_kernel<State, Output, true>(pointers, chunks, draw);
    else
      solver_step_cuda_kernel<State, Output, false>(pointers, chunks, draw);
  });
  result.copy_to(out);
  history.copy_to(denoised);
}

template <typename T, typename Convert>
void philox_fill(T* out, const int64_t* index, int64_t samples, int64_t elements, int64_t seed, uint32_t stream_step,
                 unsigned grid, Order order) {
  constexpr int kCount = kPhiloxFillChunk<T>;
  Guarded<T> gout(out, samples * elements);
  Guarded<int64_t> gi(index, samples);
  const Chunks chunks = make_chunks(samples, elements, kCount);
  shim::launch({grid}, {kBlockThreads}, order, [&] {
    if (elements % kCount == 0)
      philox_fill_cuda_kernel<T, Convert, true>(gout.data(), gi.data(), chunks, {philox_key(seed), stream_step});
    else
      philox_fill_cuda_kernel<T, Convert, false>(gout.data(), gi.data(), chunks, {philox_key(seed), stream_step});
  });
  gout.copy_to(out);
}

template <typename T>
void quantize_all(const T* x, uint8_t* out, int64_t samples, int64_t elements, uint32_t channels, bool planar, unsigned grid,
                  Order order) {
  Guarded<T> gx(x, samples * elements);
  Guarded<uint8_t> gout(out, samples * elements);
  const Chunks chunks = make_chunks(samples, elements, kQuantizeChunk);
  const bool aligned = elements % kQuantizeChunk == 0;
  shim::launch({grid}, {kBlockThreads}, order, [&] {
    if (planar && aligned)
      quantize_uint8_cuda_kernel<T, true, true>(gx.data(), gout.data(), chunks, channels);
    else if (planar)
      quantize_uint8_cuda_kernel<T, true, false>(gx.data(), gout.data(), chunks, channels);
    else if (aligned)
      quantize_uint8_cuda_kernel<T, false, true>(gx.data(), gout.data(), chunks, channels);
    else
      quantize_uint8_cuda_kernel<T, false, false>(gx.data(), gout.data(), chunks, channels);
  });
  gout.copy_to(out);
}

Order order_of(int order) { return static_cast<Order>(order); }

}  // namespace

#define SOLVER_STEP(name, State, Output)                                                                                   \
  extern "C" void name(const void* x, const void* m, const void* mu, const void* p, void* out, void* denoised,            \
                       const float* coefficients, const int64_t* index, int64_t samples, int64_t elements, int64_t seed,   \
                       uint32_t step, unsigned grid, int order, int64_t misalign) {                                        \
    solver_step(static_cast<const State*>(x), static_cast<const Output*>(m), static_cast<const Output*>(mu),               \
                static_cast<const State*>(p), static_cast<State*>(out), static_cast<State*>(denoised), coefficients,       \
                index, samples, elements, seed, step, grid, order_of(order), misalign);                                    \
  }
SOLVER_STEP(solver_step_float32_float32, float, float)
SOLVER_STEP(solver_step_float32_bfloat16, float, bfloat16)
SOLVER_STEP(solver_step_float32_float16, float, float16)
SOLVER_STEP(solver_step_bfloat16_bfloat16, bfloat16, bfloat16)
SOLVER_STEP(solver_step_float16_float16, float16, float16)

#define PER_TYPE(type, T)                                                                                                  \
  extern "C" void philox_normal_##type(void* out, const int64_t* index, int64_t samples, int64_t elements, int64_t seed,   \
                                       uint32_t stream_step, unsigned grid, int order) {                                   \
    philox_fill<T, NormalsOf<T>>(static_cast<T*>(out), index, samples, elements, seed, stream_step, grid,                  \
                                 order_of(order));                                                                         \
  }                                                                                                                        \
  extern "C" void philox_uniform_##type(void* out, const int64_t* index, int64_t samples, int64_t elements, int64_t seed,  \
                                        uint32_t stream_step, unsigned grid, int order) {                                  \
    philox_fill<T, UniformsOf<T>>(static_cast<T*>(out), index, samples, elements, seed, stream_step, grid,                 \
                                  order_of(order));                                                                        \
  }                                                                                                                        \
  extern "C" void quantize_uint8_##type(const void* x, uint8_t* out, int64_t samples, int64_t elements, uint32_t channels, \
                                        int planar, unsigned grid, int order) {                                            \
    quantize_all(static_cast<const T*>(x), out, samples, elements, channels, planar != 0, grid, order_of(order));          \
  }
PER_TYPE(float32, float)
PER_TYPE(bfloat16, bfloat16)
PER_TYPE(float16, float16)

// The normals of given words, four a block: extremes that no draw of reasonable size meets.
extern "C" void normals_of_words(const uint32_t* words, float* z, int64_t blocks) {
  for (int64_t b = 0; b < blocks; ++b) {
    const uint32_t* w = words + 4 * b;
    PhiloxNormals::convert(PhiloxWords{{w[0], w[1], w[2], w[3]}}, z + 4 * b);
  }
}

// Kernels of the shim's own tests: a block sum by shuffles and shared memory, with a barrier that can be left out.
namespace {
void block_sum(const float* values, float* sum, int skip_barrier_from) {
  __shared__ float partial[32];
  float total = values[threadIdx.x];
  for (int delta = 16; delta > 0; delta >>= 1) total += __shfl_down_sync(0xffffffffu, total, delta);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = total;
  if (static_cast<int>(threadIdx.x) < skip_barrier_from) __syncthreads();
  if (threadIdx.x == 0) {
    *sum = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) *sum += partial[warp];
  }
}
}  // namespace

extern "C" int shim_block_sum(const float* values, float* sum, unsigned threads, int order, int skip_barrier_from) {
  try {
    shim::launch({1}, {threads}, order_of(order), [&] { block_sum(values, sum, skip_barrier_from); });
    return 0;
  } catch (const std::runtime_error&) {
    return 1;
  }
}
