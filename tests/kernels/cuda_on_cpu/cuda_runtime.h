// As much of CUDA as csrc/cuda uses, on one CPU thread: a block's threads, or those of a cluster's blocks, are coroutines
// that run in turn until they wait for others. It proves indices, fragment layouts, barriers and waits, and nothing about speed.
//
// Shared memory starts as NaN. LATENTREVISE_EMULATED_COPIES says when an asynchronous copy is carried out: "late" (when
// it is waited for, so that a missing wait is seen) or "early" (at once, so that a buffer refilled too soon is seen).
#pragma once

#ifndef __x86_64__
#error coroutines are switched in x86-64 assembly
#endif

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#define __device__
#define __global__ static
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

using std::max;
using std::min;

struct dim3 {
  unsigned x;
  dim3(unsigned x = 1) : x(x) {}
};
inline dim3 threadIdx, blockIdx;

using cudaStream_t = void *;
enum cudaError_t { cudaSuccess = 0 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char *cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) { return cudaSuccess; }

struct float2 { float x, y; };
inline float2 make_float2(float x, float y) { return {x, y}; }

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline double __longlong_as_double(long long x) { return bits_as<double>(x); }

namespace emulated {

constexpr int kWarp = 32, kStack = 64 << 10, kSharedBytes = 227 << 10;

struct Barrier {
  int arrived = 0, round = 0;
};

// Keeps the callee's registers and the stack pointer in *from, goes on where `to` was left. ucontext would ask the
// kernel for the signal mask each time.
extern "C" void emulated_switch(void **from, void *to);
asm(R"(
.text
.local emulated_switch
.type emulated_switch, @function
emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

struct Thread {
  void *context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  int shown = 0;  // exchanges so far; two slots by turns need one wait an exchange
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Barrier> warps;
  std::vector<int> warp_live;
  Barrier all;
  int live = 0, current = 0, rank = 0;  // rank: in its cluster
  void *scheduler;
  std::function<void()> body;
  alignas(1024) unsigned char shared[kSharedBytes];
  alignas(16) unsigned char slots[2][1024][64];  // what a lane shows the others of its warp
};
inline Block *block = nullptr;         // whose thread runs
inline std::vector<Block *> cluster;  // the blocks that run together
inline Barrier all_of_cluster;
inline int cluster_live = 0;
inline std::function<void()> cluster_ended;  // what is checked then

inline void yield() { emulated_switch(&block->threads[block->current].context, block->scheduler); }

inline void wait(Barrier &barrier, const int &expected) {
  const int round = barrier.round;
  ++barrier.arrived;
  while (barrier.round == round) {
    if (barrier.arrived >= expected) {
      barrier.arrived = 0;
      ++barrier.round;
      break;
    }
    yield();
  }
}

inline void wait_warp() {
  const int warp = block->current / kWarp;
  wait(block->warps[warp], block->warp_live[warp]);
}

// Show `mine` to the warp; `look` is given what lane i shows as a function of i.
template <typename T, typename Look>
auto exchange(const T &mine, Look &&look) {
  static_assert(sizeof(T) <= 64);
  auto &slots = block->slots[block->threads[block->current].shown++ % 2];
  std::memcpy(slots[block->current], &mine, sizeof(T));
  wait_warp();
  const int first = block->current / kWarp * kWarp;
  return look([first, &slots](int lane) {
    T value;
    std::memcpy(&value, slots[first + lane], sizeof(T));
    return value;
  });
}

inline bool late() {
  static const bool value = std::getenv("LATENTREVISE_EMULATED_COPIES") == nullptr ||
                            std::strcmp(std::getenv("LATENTREVISE_EMULATED_COPIES"), "early") != 0;
  return value;
}

inline void enter() {
  block->body();
  Thread &thread = block->threads[block->current];
  thread.done = true;
  --block->live, --cluster_live;
  --block->warp_live[block->current / kWarp];
  yield();
}

inline void prepare(Block &b, int threads, const std::function<void()> &body) {
  b.body = body;
  std::memset(b.shared, 0xff, kSharedBytes);
  b.threads.resize(threads);
  b.warps.assign(threads / kWarp, {});
  b.warp_live.assign(threads / kWarp, kWarp);
  b.all = {};
  b.live = threads;
  for (Thread &thread : b.threads) {
    thread.done = false;
    thread.shown = 0;
    if (!thread.stack) thread.stack = std::make_unique<char[]>(kStack);
    auto *top = reinterpret_cast<uint64_t *>(thread.stack.get() + kStack) - 2;  // entered as if by a call
    *top = reinterpret_cast<uint64_t>(&enter);
    std::memset(top - 6, 0, 6 * sizeof(*top));
    thread.context = top - 6;
  }
}

// The blocks of a cluster run together, clusters one after the other.
inline void launch(int64_t blocks, int threads, const std::function<void()> &body, int size = 1) {
  static std::vector<std::unique_ptr<Block>> const here = [] {
    std::vector<std::unique_ptr<Block>> made;
    for (int rank = 0; rank < 2; ++rank) made.push_back(std::make_unique<Block>()), made.back()->rank = rank;
    return made;
  }();
  if (size > 2 || blocks % size) std::abort();
  cluster.clear();
  for (int rank = 0; rank < size; ++rank) cluster.push_back(here[rank].get());
  for (int64_t b = 0; b < blocks; b += size) {
    for (Block *one : cluster) prepare(*one, threads, body);
    all_of_cluster = {};
    cluster_live = size * threads;
    // Odd rounds go backwards, so that no thread can rely on being before another.
    for (int turn = 0; cluster_live > 0; ++turn)
      for (int i = 0; i < size * threads; ++i) {
        const int at = turn % 2 ? size * threads - 1 - i : i, t = at % threads;
        block = cluster[at / threads];
        const bool held = size > 1 && at / threads == turn / 16 % 3;  // each block gets ahead of the other for a while
        if (held || block->threads[t].done) continue;
        block->current = t;
        threadIdx.x = static_cast<unsigned>(t);
        blockIdx.x = static_cast<unsigned>(b + at / threads);
        emulated_switch(&block->scheduler, block->threads[t].context);
      }
    if (cluster_ended) cluster_ended();
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::block->all, emulated::block->live); }

template <typename T>
T __shfl_xor_sync(unsigned, T mine, int offset) {
  const int lane = emulated::block->current % emulated::kWarp;
  return emulated::exchange(mine, [&](auto &&of) { return of(lane ^ offset); });
}
