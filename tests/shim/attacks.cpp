// The kernels of csrc/attacks under the host shim, behind C functions that the tests call through ctypes.
#include "cuda_host_shim.h"
// clang-format off
#include "../../csrc/attacks/apgd_step.cuh"
#include "../../csrc/attacks/ball_start.cuh"
#include "../../csrc/attacks/l2_step.cuh"
#include "../../csrc/attacks/linf_step.cuh"
// clang-format on

using namespace synthfast;
using shim::Guarded;
using shim::Order;

namespace {

struct Run {
  int64_t samples, elements;
  double lo, hi;
  unsigned grid;
  Order order;
  int64_t misalign;
};

// Launches `aligned` or `unaligned` as the host code would, with `threads` a block.
template <typename T, typename Aligned, typename Unaligned>
void launch(const Run& r, unsigned threads, Aligned&& aligned, Unaligned&& unaligned) {
  if (r.elements % kAttackChunk<T> == 0 && r.misalign == 0)
    shim::launch({r.grid}, {threads}, r.order, aligned);
  else
    shim::launch({r.grid}, {threads}, r.order, unaligned);
}

unsigned threads_for(int64_t elements) { return 32u * static_cast<unsigned>(sample_warps(elements)); }

// norm 0: l-infinity, 1: l2. Without `previous` linf_step or l2_step, else apgd_step. `out` may be x or previous: in place.
template <typename T>
void step(const T* x, const T* previous, const T* gradient, const T* origin, T* out, const float* eps, const float* step_size,
          const float* momentum, int norm, const Run& r) {
  const int64_t n = r.samples * r.elements;
  Guarded<T> gx(x, n, r.misalign), gp(previous, n, r.misalign), gg(gradient, n, r.misalign), go(origin, n, r.misalign);
  Guarded<T> gout(out, n, r.misalign);
  Guarded<float> ge(eps, r.samples), gs(step_size, r.samples), gm(momentum, r.samples);
  const Guarded<T>& result = out == x ? gx : out == previous ? gp : gout;
  const Box box = make_box<T>(r.lo, r.hi);
  const Chunks chunks = make_chunks(r.samples, r.elements, kAttackChunk<T>);
  if (previous == nullptr && norm == 0) {
    const LinfStepPointers<T> p{gx.data(), gg.data(), go.data(), result.data(), ge.data(), gs.data()};
    launch<T>(
        r, kBlockThreads, [&] { linf_step_cuda_kernel<T, true>(p, chunks, box); },
        [&] { linf_step_cuda_kernel<T, false>(p, chunks, box); });
  } else if (previous == nullptr) {
    const L2StepPointers<T> p{gx.data(), gg.data(), go.data(), result.data(), ge.data(), gs.data()};
    launch<T>(
        r, threads_for(r.elements), [&] { l2_step_cuda_kernel<T, true>(p, r.samples, r.elements, box); },
        [&] { l2_step_cuda_kernel<T, false>(p, r.samples, r.elements, box); });
  } else {
    const ApgdStepPointers<T> p{gx.data(),     gp.data(), gg.data(), go.data(),
                                result.data(), ge.data(), gs.data(), gm.data()};
    if (norm == 0)
      launch<T>(
          r, kBlockThreads, [&] { apgd_linf_cuda_kernel<T, true>(p, chunks, box); },
          [&] { apgd_linf_cuda_kernel<T, false>(p, chunks, box); });
    else
      launch<T>(
          r, threads_for(r.elements), [&] { apgd_l2_cuda_kernel<T, true>(p, r.samples, r.elements, box); },
          [&] { apgd_l2_cuda_kernel<T, false>(p, r.samples, r.elements, box); });
  }
  result.copy_to(out);
}

template <typename T>
void start(const T* origin, T* out, const float* eps, const int64_t* index, int norm, int64_t seed, uint32_t stream_step,
           const Run& r) {
  const int64_t n = r.samples * r.elements;
  Guarded<T> go(origin, n, r.misalign), gout(out, n, r.misalign);
  Guarded<float> ge(eps, r.samples);
  Guarded<int64_t> gi(index, r.samples);
  const BallStartPointers<T> p{go.data(), gout.data(), ge.data(), gi.data()};
  const Box box = make_box<T>(r.lo, r.hi);
  const PhiloxDraw draw{philox_key(seed), stream_step};
  const Chunks chunks = make_chunks(r.samples, r.elements, kAttackChunk<T>);
  if (norm == 0)
    launch<T>(
        r, kBlockThreads, [&] { linf_start_cuda_kernel<T, true>(p, chunks, box, draw); },
        [&] { linf_start_cuda_kernel<T, false>(p, chunks, box, draw); });
  else
    launch<T>(
        r, threads_for(r.elements + kSphereExtra),
        [&] { l2_start_cuda_kernel<T, true>(p, r.samples, r.elements, box, draw); },
        [&] { l2_start_cuda_kernel<T, false>(p, r.samples, r.elements, box, draw); });
  gout.copy_to(out);
}

}  // namespace

#define PER_TYPE(type, T)                                                                                                  \
  extern "C" void step_##type(const void* x, const void* previous, const void* gradient, const void* origin, void* out,    \
                              const float* eps, const float* step_size, const float* momentum, int norm, int64_t samples,  \
                              int64_t elements, double lo, double hi, unsigned grid, int order, int64_t misalign) {        \
    step(static_cast<const T*>(x), static_cast<const T*>(previous), static_cast<const T*>(gradient),                       \
         static_cast<const T*>(origin), static_cast<T*>(out), eps, step_size, momentum, norm,                              \
         Run{samples, elements, lo, hi, grid, static_cast<Order>(order), misalign});                                       \
  }                                                                                                                        \
  extern "C" void start_##type(const void* origin, void* out, const float* eps, const int64_t* index, int norm,            \
                               int64_t seed, uint32_t stream_step, int64_t samples, int64_t elements, double lo,           \
                               double hi, unsigned grid, int order, int64_t misalign) {                                    \
    start(static_cast<const T*>(origin), static_cast<T*>(out), eps, index, norm, seed, stream_step,                        \
          Run{samples, elements, lo, hi, grid, static_cast<Order>(order), misalign});                                      \
  }
PER_TYPE(float32, float)
PER_TYPE(bfloat16, bfloat16)
PER_TYPE(float16, float16)
