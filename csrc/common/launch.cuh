// What every kernel launch needs on the host side: device guard, current stream, grid size, launch check.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>

#include "check.h"
#include "kernel.cuh"

namespace synthfast {

// Calls launch(grid, stream) for `items` work items, one a thread with a grid-stride loop, on the device of `tensor`.
template <typename Launch>
void launch_items(const Tensor& tensor, int64_t items, Launch&& launch) {
  if (items == 0) return;
  const int32_t device = tensor.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  int processors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  // 2,048 resident threads a multiprocessor: 8 blocks of 256; twice that evens out the tail.
  const int64_t grid = std::min<int64_t>((items + kBlockThreads - 1) / kBlockThreads, int64_t{16} * processors);
  launch(static_cast<unsigned>(grid), static_cast<cudaStream_t>(stream));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace synthfast
