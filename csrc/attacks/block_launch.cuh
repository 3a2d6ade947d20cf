// How the kernels that give a block to a sample are launched.
#pragma once
#include "../common/launch.cuh"
#include "sum_squares.cuh"

namespace synthfast {

// Calls launch(grid, threads, stream); `elements` are those that are summed.
template <typename Launch>
void launch_samples(const Tensor& tensor, int64_t samples, int64_t elements, Launch&& launch) {
  const unsigned threads = 32u * static_cast<unsigned>(sample_warps(elements));
  launch_items(tensor, samples * kBlockThreads, [&](unsigned grid, cudaStream_t stream) { launch(grid, threads, stream); });
}

}  // namespace synthfast
