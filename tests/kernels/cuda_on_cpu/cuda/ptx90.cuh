// Stands in for csrc/cuda/ptx90.cuh, written from the PTX manual.
//
// Multiplications are carried out when a thread waits for them, those of its whole warpgroup together, so that a stage
// given back too soon is seen, and a register that is written to while a multiplication may still read it. An arrival at
// the barrier of another block is carried out late ("late": when that barrier is waited for, or at a barrier of the cluster
// that the arriving thread comes to); one that is left when the cluster ends might have met a block that had ended.
#pragma once

#include <cstdio>
#include <deque>
#include <map>

#include "cuda.h"
#include "cuda_bf16.h"

namespace latentrevise::cuda {

inline uint32_t cluster_rank() { return emulated::block->rank; }
inline uint32_t shared_base() { return 0; }
inline void load16(uint32_t (&r)[4], uint32_t address) {
  if (address % 16) std::abort();
  std::memcpy(r, emulated::block->shared + address, 16);
}
inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.f : y;
}
inline float reciprocal_fast(float x) { return 1.f / x; }

struct PhaseBarrier {
  int arrivals, pending, bytes, phase;
  std::vector<std::function<void()>> copies;
  std::vector<std::pair<int, int>> remote;  // (rank, thread) of arrivals that are on their way
};
inline std::map<uint32_t, PhaseBarrier> phase_barriers[2];  // of each block of a cluster
inline std::map<std::pair<int, int>, int> synchronised;     // how often each (rank, thread) met the cluster

struct Multiplication {
  float *sums;
  bool more;
  uint64_t b, a;                  // the left operand's descriptor, or 0 and its registers
  const uint32_t *registers[4];
};
struct Multiplications {
  std::deque<std::vector<Multiplication>> groups;  // that are not carried out; the last one is open
  int done = 0;
  int committed() const { return done + std::max<int>(0, static_cast<int>(groups.size()) - 1); }
};
inline Multiplications multiplications[2][1024];  // of each thread

inline PhaseBarrier &barrier_of(uint32_t rank, uint32_t barrier) {
  if (rank >= emulated::cluster.size() || emulated::cluster[rank]->live == 0) {
    std::fputs("a block that has ended is written to\n", stderr);
    std::abort();
  }
  return phase_barriers[rank].at(barrier);
}
inline void turn(PhaseBarrier &b) {
  if (b.pending == 0 && b.bytes == 0) b.phase ^= 1, b.pending = b.arrivals;
}
inline void count_arrival(PhaseBarrier &b) {
  if (--b.pending < 0) std::abort();
  turn(b);
}
inline void init_barrier(uint32_t barrier, int arrivals) {
  phase_barriers[cluster_rank()][barrier] = {arrivals, arrivals, 0, 0, {}, {}};
  emulated::cluster_ended = [] {
    for (auto &barriers : phase_barriers) {
      for (const auto &[_, b] : barriers)
        if (!b.remote.empty()) {
          std::fputs("a block may have ended before another one's arrival at its barrier\n", stderr);
          std::abort();
        }
      barriers.clear();
    }
    synchronised.clear();
    for (auto &block : multiplications)
      for (Multiplications &thread : block) thread = {};
  };
}
inline void publish_barriers() {}
inline void arrive_at(uint32_t barrier, uint32_t rank) {
  PhaseBarrier &b = barrier_of(rank, barrier);
  if (rank != cluster_rank() && emulated::late())
    b.remote.emplace_back(cluster_rank(), emulated::block->current);
  else
    count_arrival(b);
}
inline void arrive(uint32_t barrier) { count_arrival(barrier_of(cluster_rank(), barrier)); }
inline void arrive_expecting(uint32_t barrier, int bytes) {
  barrier_of(cluster_rank(), barrier).bytes += bytes;
  arrive(barrier);
}
inline void await_phase(uint32_t barrier, int parity) {
  PhaseBarrier &b = barrier_of(cluster_rank(), barrier);
  while (b.phase == parity) {
    for (const auto &copy : b.copies) copy();
    b.copies.clear();
    for (size_t i = b.remote.size(); i > 0; --i) count_arrival(b);
    b.remote.clear();
    turn(b);
    if (b.phase == parity) emulated::yield();
  }
}

// With LATENTREVISE_EMULATED_FAULT all but a thread's first are left out, for the test that this is seen.
inline void synchronise_cluster() {
  static const bool faulty = std::getenv("LATENTREVISE_EMULATED_FAULT") != nullptr;
  const std::pair<int, int> self(cluster_rank(), emulated::block->current);
  if (faulty && synchronised[self]++) return;
  for (auto &barriers : phase_barriers)
    for (auto &[_, b] : barriers)
      for (size_t i = b.remote.size(); i > 0; --i)
        if (b.remote[i - 1] == self) b.remote.erase(b.remote.begin() + i - 1), count_arrival(b);
  emulated::wait(emulated::all_of_cluster, emulated::cluster_live);
}

inline void copy_box_into(uint32_t rank, uint32_t to, const CUtensorMap &map, int column, int row, uint32_t barrier) {
  if (to % 1024) std::abort();
  PhaseBarrier *const b = &barrier_of(rank, barrier);
  unsigned char *const shared = emulated::cluster[rank]->shared;
  const auto copy = [=] {
    for (uint32_t i = 0; i < map.box_rows; ++i)
      for (uint32_t j = 0; j < map.box_columns; ++j) {
        uint16_t value = 0;
        const uint64_t r = row + i, c = column + j;
        if (r < map.rows && c < map.columns) std::memcpy(&value, map.data + r * map.stride + c * 2, 2);
        std::memcpy(shared + to + i * 128 + (j / 8 ^ (i & 7)) * 16 + j % 8 * 2, &value, 2);
      }
    b->bytes -= static_cast<int>(map.box_rows * map.box_columns * 2);
  };
  if (emulated::late())
    b->copies.push_back(copy);
  else
    copy(), turn(*b);
}
inline void copy_box(uint32_t to, const CUtensorMap &map, int column, int row, uint32_t barrier) {
  copy_box_into(cluster_rank(), to, map, column, row, barrier);
}
inline void copy_box_to(uint16_t blocks, uint32_t to, const CUtensorMap &map, int column, int row, uint32_t barrier) {
  for (uint32_t rank = 0; blocks >> rank; ++rank)
    if (blocks >> rank & 1) copy_box_into(rank, to, map, column, row, barrier);
}

inline float minimum_or_nan(float a, float b) { return a != a ? a : b != b ? b : b < a ? b : a; }

template <int>
void give_registers() {}
template <int>
void take_registers() {}

inline uint64_t describe_tile(uint32_t address) {
  return (static_cast<uint64_t>(address) >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
inline float shared_element(uint32_t address) {
  address ^= (address >> 7 & 7) << 4;
  uint16_t bits;
  std::memcpy(&bits, emulated::block->shared + address, 2);
  return __uint_as_float(static_cast<unsigned>(bits) << 16);
}
inline float element(uint64_t descriptor, int row, int k) {
  const uint32_t start = (descriptor & 0x3fff) << 4, group = (descriptor >> 32 & 0x3fff) << 4;
  return shared_element(start + row / 8 * group + row % 8 * 128 + k * 2);
}

inline uint64_t describe_columns(uint32_t address, int apart) {
  return (static_cast<uint64_t>(address) >> 4 & 0x3fff) | static_cast<uint64_t>(apart / 16) << 16 | 64ull << 32 | 1ull << 62;
}
inline float transposed_element(uint64_t descriptor, int k, int column) {
  const uint32_t start = (descriptor & 0x3fff) << 4, next = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t down = (descriptor >> 32 & 0x3fff) << 4;
  return shared_element(start + column / 64 * next + k / 8 * down + k % 8 * 128 + column % 64 * 2);
}

inline Multiplications &own_multiplications() { return multiplications[cluster_rank()][emulated::block->current]; }
inline void open_multiplications() {
  if (own_multiplications().groups.empty()) own_multiplications().groups.emplace_back();
}
inline void commit_multiplications() { own_multiplications().groups.emplace_back(); }
// Multiplication i of `thread`'s oldest group; what four neighbours have in registers makes a row of the left operand.
inline void carry_out(const Multiplications *group, int thread, size_t i) {
  const Multiplication &m = group[thread].groups.front()[i];
  const auto left = [&](int h, int k) {
    if (m.a) return element(m.a, thread / 32 * 16 + thread % 32 / 4 + 8 * h, k);
    const uint32_t pair = *group[thread / 4 * 4 + k % 8 / 2].groups.front()[i].registers[h + k / 8 * 2];
    return __uint_as_float(k % 2 ? pair & 0xffff0000u : pair << 16);
  };
  float row[2][16];
  for (int h = 0; h < 2; ++h)
    for (int k = 0; k < 16; ++k) row[h][k] = left(h, k);
  for (int n = 0; n < 64; ++n) {
    const int column = n / 2 * 8 + thread % 4 * 2 + n % 2;
    for (int h = 0; h < 2; ++h) {
      float &sum = m.sums[n / 2 * 4 + h * 2 + n % 2];
      double exact = m.more ? sum : 0.;
      for (int k = 0; k < 16; ++k)
        exact += static_cast<double>(row[h][k]) * (m.a ? element(m.b, column, k) : transposed_element(m.b, k, column));
      sum = static_cast<float>(exact);
    }
  }
}
template <int kPending>
void await_multiplications() {
  const int target = own_multiplications().committed() - kPending;
  Multiplications *const group = multiplications[cluster_rank()] + emulated::block->current / 128 * 128;
  while (!std::all_of(group, group + 128, [&](const Multiplications &m) { return m.committed() >= target; }))
    emulated::yield();
  while (group->done < target) {
    for (int thread = 0; thread < 128; ++thread)
      for (size_t i = 0; i < group[thread].groups.front().size(); ++i) carry_out(group, thread, i);
    for (int thread = 0; thread < 128; ++thread) group[thread].groups.pop_front(), ++group[thread].done;
  }
}
inline void settle(float (&)[128]) {
  if (own_multiplications().groups.size() > 1) std::abort();
}

inline void multiply_tiles(float (&c)[128], uint64_t a, uint64_t b, bool more) {
  own_multiplications().groups.back().push_back({c, more, b, a, {}});
}
inline void multiply_rows(float (&c)[128], const uint32_t &a0, const uint32_t &a1, const uint32_t &a2, const uint32_t &a3,
                          uint64_t b, bool more) {
  own_multiplications().groups.back().push_back({c, more, b, 0, {&a0, &a1, &a2, &a3}});
}

}  // namespace latentrevise::cuda
