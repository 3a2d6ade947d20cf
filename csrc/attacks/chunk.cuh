// What the CUDA kernels of the attacks share: storing values that are already of the storage type.
#pragma once
#include "../common/kernel.cuh"

namespace synthfast {

// Elements a thread handles at a time: 16 bytes.
template <typename T>
constexpr int kAttackChunk = 16 / sizeof(T);

template <bool kAligned, int kCount, typename T>
SF_HD void store_values(T* destination, int valid, const T* values) {
  if constexpr (kAligned) {
    Pack<T, kCount> pack;
    SF_UNROLL
    for (int k = 0; k < kCount; ++k) pack.value[k] = values[k];
    *reinterpret_cast<Pack<T, kCount>*>(destination) = pack;
  } else {
    SF_UNROLL
    for (int k = 0; k < kCount; ++k)
      if (k < valid) destination[k] = values[k];
  }
}

}  // namespace synthfast
