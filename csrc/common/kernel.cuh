// Device-side building blocks. Free of torch and of launch syntax, so that the host shim of the tests compiles it with g++.
#pragma once
#include "host_device.h"

namespace synthfast {

constexpr int kBlockThreads = 256;

// kCount elements of T moved in one access of sizeof(T) * kCount bytes (16 at most).
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T value[kCount];
};

// kCount elements from `source` as floats; one access where kAligned, else element by element, `valid` of them.
template <bool kAligned, int kCount, typename T>
SF_HD void load_pack(const T* source, int valid, float* values) {
  if constexpr (kAligned) {
    const Pack<T, kCount> pack = *reinterpret_cast<const Pack<T, kCount>*>(source);
    SF_UNROLL
    for (int k = 0; k < kCount; ++k) values[k] = to_float(pack.value[k]);
  } else {
    SF_UNROLL
    for (int k = 0; k < kCount; ++k) values[k] = k < valid ? to_float(source[k]) : 0.0f;
  }
}

template <bool kAligned, int kCount, typename T>
SF_HD void store_pack(T* destination, int valid, const float* values) {
  if constexpr (kAligned) {
    Pack<T, kCount> pack;
    SF_UNROLL
    for (int k = 0; k < kCount; ++k) pack.value[k] = from_float<T>(values[k]);
    *reinterpret_cast<Pack<T, kCount>*>(destination) = pack;
  } else {
    SF_UNROLL
    for (int k = 0; k < kCount; ++k)
      if (k < valid) destination[k] = from_float<T>(values[k]);
  }
}

// Samples cut into chunks of kCount elements; a work item is one chunk, so a thread's elements share a sample and
// whole Philox blocks. Whether chunks may be moved in one access is the template parameter of the kernels.
struct Chunks {
  int64_t samples, elements, per_sample;

  SF_HD int64_t items() const { return samples * per_sample; }

  // 64-bit division is slow on a GPU; up to 2^32 items (64 GB of float32) 32 bits do.
  SF_HD int64_t sample_of(int64_t item) const {
    if (items() <= 0xffffffffll) return static_cast<uint32_t>(item) / static_cast<uint32_t>(per_sample);
    return item / per_sample;
  }
};

SF_HD Chunks make_chunks(int64_t samples, int64_t elements, int count) {
  return {samples, elements, (elements + count - 1) / count};
}

inline bool aligned_for(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace synthfast
