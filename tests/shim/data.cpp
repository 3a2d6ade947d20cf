// The kernels of csrc/data under the host shim, behind C functions that the tests call through ctypes.
#include "cuda_host_shim.h"
// clang-format off
#include "../../csrc/data/gather_augment.cuh"
// clang-format on

using namespace synthfast;
using shim::Guarded;
using shim::Order;

namespace {

constexpr uint32_t kAugmentStreamStep = 5u << 24;

template <typename T>
void gather_augment(const uint8_t* images, int64_t count, const int64_t* items, const int64_t* index, T* out,
                    int64_t samples, ImageShape shape, int64_t seed, int32_t padding, bool flip, unsigned grid, Order order,
                    int64_t misalign) {
  Guarded<uint8_t> gimages(images, count * shape.elements());
  Guarded<int64_t> gitems(items, samples), gindex(index, samples);
  Guarded<T> gout(out, samples * shape.elements(), misalign);
  const Chunks threads = gather_threads<T>(samples, shape);
  const bool aligned = shape.elements() % kGatherChunk<T> == 0 && misalign == 0;
  const PhiloxDraw draw{philox_key(seed), kAugmentStreamStep};
  shim::launch({grid}, {kBlockThreads}, order, [&] {
    if (aligned)
      gather_augment_cuda_kernel<T, true>(gimages.data(), count, gitems.data(), gindex.data(), gout.data(), threads, shape,
                                          padding, flip, draw);
    else
      gather_augment_cuda_kernel<T, false>(gimages.data(), count, gitems.data(), gindex.data(), gout.data(), threads, shape,
                                           padding, flip, draw);
  });
  gout.copy_to(out);
}

}  // namespace

#define PER_TYPE(type, T)                                                                                                  \
  extern "C" void gather_augment_##type(const uint8_t* images, int64_t count, const int64_t* items, const int64_t* index,  \
                                        void* out, int64_t samples, int64_t height, int64_t width, int64_t channels,       \
                                        int64_t seed, int32_t padding, int flip, unsigned grid, int order,                 \
                                        int64_t misalign) {                                                                \
    gather_augment(images, count, items, index, static_cast<T*>(out), samples, {height, width, channels}, seed, padding,   \
                   flip != 0, grid, static_cast<Order>(order), misalign);                                                  \
  }
PER_TYPE(float32, float)
PER_TYPE(bfloat16, bfloat16)
PER_TYPE(float16, float16)

// The crops alone, which images of a reasonable size cannot show where the padding is large.
extern "C" void draw_crops(const int64_t* index, int64_t samples, int64_t seed, int32_t padding, int64_t* top, int64_t* left,
                           bool* flip) {
  for (int64_t n = 0; n < samples; ++n) {
    const Crop crop = draw_crop({philox_key(seed), kAugmentStreamStep}, index[n], padding, true);
    top[n] = crop.down + padding;
    left[n] = crop.right + padding;
    flip[n] = crop.flip;
  }
}
