// Runs CUDA kernels on the CPU under plain g++, for tests: the device code is compiled as it stands.
//
// One OS thread plays the GPU. Every CUDA thread of a block is a fiber (ucontext); __syncthreads, __syncwarp and the shuffles
// yield to a scheduler, which runs the threads in forward, reverse or random order, or greedily: a warp as far as it gets before
// the next has its turn. A barrier that not all threads reach is reported as an error. Seen: wrong indices, missing or divergent
// barriers, dependence on thread order. Not seen: races finer than the intervals between barriers, anything under __CUDA_ARCH__,
// launch and stream code, speed.
//
// Include it before the .cuh under test. It needs no CUDA toolkit.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block runs at a time
#define __launch_bounds__(...)
#define __forceinline__ inline

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx{0, 0, 0}, blockIdx{0, 0, 0}, blockDim, gridDim;

namespace shim {

enum class Order { kForward, kReverse, kRandom, kGreedy };
enum class State { kReady, kBlockBarrier, kWarpBarrier, kDone };

constexpr size_t kStackBytes = 64 << 10;

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};  // not cleared: that took most of the time of a launch
  State state = State::kReady;
  uint32_t mask = 0;      // lanes expected at the warp barrier
  uint64_t exchange = 0;  // the value a shuffle offers to other lanes
};

struct Block {
  std::vector<Thread> threads;
  ucontext_t scheduler;
  int current = 0;
  std::function<void()> kernel;
};
inline Block* block = nullptr;

inline void wait(State state) {
  Thread& self = block->threads[block->current];
  self.state = state;
  swapcontext(&self.context, &block->scheduler);
}

inline void thread_main() {
  block->kernel();
  wait(State::kDone);
}

// Releases the warps in which every lane named by a waiting lane's mask has arrived; true if there was one.
inline bool release_warps(std::vector<Thread>& threads) {
  bool released = false;
  for (size_t first = 0; first < threads.size(); first += 32) {
    const size_t lanes = std::min<size_t>(32, threads.size() - first);
    uint32_t wanted = 0, arrived = 0;
    for (size_t lane = 0; lane < lanes; ++lane)
      if (threads[first + lane].state == State::kWarpBarrier) {
        wanted |= threads[first + lane].mask;
        arrived |= 1u << lane;
      }
    const uint32_t existing = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
    if (arrived == 0 || (wanted & existing) != arrived) continue;
    for (size_t lane = 0; lane < lanes; ++lane)
      if (arrived >> lane & 1u) threads[first + lane].state = State::kReady;
    released = true;
  }
  return released;
}

inline void run_block(int thread_count, Order order, std::mt19937& random, const std::function<void()>& kernel) {
  Block current;
  current.kernel = kernel;
  current.threads.resize(thread_count);
  block = &current;
  std::vector<int> turns(thread_count);
  for (int t = 0; t < thread_count; ++t) {
    Thread& thread = current.threads[t];
    turns[t] = order == Order::kReverse ? thread_count - 1 - t : t;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, thread_main, 0);
  }
  for (;;) {
    if (order == Order::kRandom) std::shuffle(turns.begin(), turns.end(), random);
    bool progress = false;
    int warp = -1;  // the only one that runs in this round, if greedy
    for (int t : turns) {
      if (current.threads[t].state != State::kReady) continue;
      if (order == Order::kGreedy && warp >= 0 && t / 32 != warp) continue;
      warp = t / 32;
      progress = true;
      current.current = t;
      const unsigned u = static_cast<unsigned>(t);
      threadIdx = {u % blockDim.x, u / blockDim.x % blockDim.y, u / (blockDim.x * blockDim.y)};
      swapcontext(&current.scheduler, &current.threads[t].context);
    }
    progress |= release_warps(current.threads);
    const auto count = [&](State state) {
      return std::count_if(current.threads.begin(), current.threads.end(), [&](auto& t) { return t.state == state; });
    };
    if (count(State::kDone) == thread_count) break;
    const auto waiting = count(State::kBlockBarrier);
    if (waiting == thread_count) {
      for (Thread& thread : current.threads) thread.state = State::kReady;
      progress = true;
    } else if (!progress) {
      throw std::runtime_error("deadlock: " + std::to_string(waiting) + " of " + std::to_string(thread_count) +
                               " threads reached __syncthreads, or a shuffle mask names a lane that never came");
    }
  }
  block = nullptr;
}

inline void launch(dim3 grid, dim3 threads, Order order, const std::function<void()>& kernel, unsigned seed = 0) {
  std::mt19937 random(seed);
  gridDim = grid;
  blockDim = threads;
  const unsigned blocks = grid.x * grid.y * grid.z;
  for (unsigned k = 0; k < blocks; ++k) {
    const unsigned b = order == Order::kReverse ? blocks - 1 - k : k;
    blockIdx = {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)};
    run_block(static_cast<int>(threads.x * threads.y * threads.z), order, random, kernel);
  }
}

template <typename T>
T shuffle(uint32_t mask, T value, int source_lane) {
  const int self = block->current;
  std::memcpy(&block->threads[self].exchange, &value, sizeof value);
  block->threads[self].mask = mask;
  wait(State::kWarpBarrier);
  const int source = (self & ~31) + source_lane;
  T result = value;
  if (source_lane >= 0 && source_lane < 32 && source < static_cast<int>(block->threads.size()) && (mask >> source_lane & 1u))
    std::memcpy(&result, &block->threads[source].exchange, sizeof result);
  block->threads[self].mask = mask;
  wait(State::kWarpBarrier);  // nobody overwrites its offer before all have read
  return result;
}

// A copy of host data that ends (or begins) at an unreadable page, so one element too far is a crash and not a silent read.
template <typename T>
class Guarded {
 public:
  Guarded(const T* source, int64_t count, int64_t misalign = 0) : count_(count) {
    if (source == nullptr) return;
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = count * sizeof(T) + misalign;
    size_ = (bytes + page - 1) / page * page + page;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) throw std::runtime_error("mmap failed");
    mprotect(base_ + size_ - page, page, PROT_NONE);
    data_ = reinterpret_cast<T*>(base_ + size_ - page - bytes);
    std::memcpy(data_, source, count * sizeof(T));
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() {
    if (base_ != nullptr) munmap(base_, size_);
  }
  T* data() const { return data_; }
  void copy_to(T* destination) const {
    if (destination != nullptr) std::memcpy(destination, data_, count_ * sizeof(T));
  }

 private:
  char* base_ = nullptr;
  T* data_ = nullptr;
  size_t size_ = 0;
  int64_t count_ = 0;
};

}  // namespace shim

inline void __syncthreads() { shim::wait(shim::State::kBlockBarrier); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { shim::shuffle(mask, 0, 0); }
template <typename T>
T __shfl_sync(uint32_t mask, T value, int lane) {
  return shim::shuffle(mask, value, lane & 31);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int delta) {
  return shim::shuffle(mask, value, (shim::block->current & 31) + delta);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask) {
  return shim::shuffle(mask, value, (shim::block->current & 31) ^ lane_mask);
}
template <typename T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}
