// Stands in for csrc/cuda/ptx90.cuh, written from the PTX manual. Multiplications are carried out when they are waited for,
// so that a stage given back too soon is seen.
#pragma once

#include <map>

#include "cuda.h"
#include "cuda/ptx.cuh"

namespace latentrevise::cuda {

struct PhaseBarrier {
  int arrivals, pending, bytes, phase;
  std::vector<std::function<void()>> copies;
};
inline std::map<uint32_t, PhaseBarrier> phase_barriers[2];                         // of each block of a cluster
inline std::vector<std::vector<std::function<void()>>> multiplications[2][1024];  // groups of each thread, the last open

inline uint32_t cluster_rank() { return emulated::block->rank; }
inline PhaseBarrier &barrier_of(uint32_t rank, uint32_t barrier) {
  if (rank >= emulated::cluster.size() || emulated::cluster[rank]->live == 0) std::abort();  // a block that has ended
  return phase_barriers[rank].at(barrier);
}
inline void synchronise_cluster() { emulated::wait(emulated::all_of_cluster, emulated::cluster_live); }

inline void init_barrier(uint32_t barrier, int arrivals) {
  phase_barriers[cluster_rank()][barrier] = {arrivals, arrivals, 0, 0, {}};
}
inline void publish_barriers() {}
inline void turn(PhaseBarrier &b) {
  if (b.pending == 0 && b.bytes == 0) b.phase ^= 1, b.pending = b.arrivals;
}
inline void arrive_at(uint32_t barrier, uint32_t rank) {
  PhaseBarrier &b = barrier_of(rank, barrier);
  if (--b.pending < 0) std::abort();
  turn(b);
}
inline void arrive(uint32_t barrier) { arrive_at(barrier, cluster_rank()); }
inline void arrive_expecting(uint32_t barrier, int bytes) {
  barrier_of(cluster_rank(), barrier).bytes += bytes;
  arrive(barrier);
}
inline void await_phase(uint32_t barrier, int parity) {
  PhaseBarrier &b = barrier_of(cluster_rank(), barrier);
  while (b.phase == parity) {
    for (const auto &copy : b.copies) copy();
    b.copies.clear();
    turn(b);
    if (b.phase == parity) emulated::yield();
  }
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
inline float element(uint64_t descriptor, int row, int k) {
  const uint32_t start = (descriptor & 0x3fff) << 4, group = (descriptor >> 32 & 0x3fff) << 4;
  uint32_t address = start + row / 8 * group + row % 8 * 128 + k * 2;
  address ^= (address >> 7 & 7) << 4;
  uint16_t bits;
  std::memcpy(&bits, emulated::block->shared + address, 2);
  return __uint_as_float(static_cast<unsigned>(bits) << 16);
}

inline std::vector<std::vector<std::function<void()>>> &groups() {
  return multiplications[cluster_rank()][emulated::block->current];
}
inline void open_multiplications() {
  if (groups().empty()) groups().emplace_back();
}
inline void commit_multiplications() { groups().emplace_back(); }
template <int kPending>
void await_multiplications() {
  while (groups().size() - 1 > kPending) {
    for (const auto &multiplication : groups().front()) multiplication();
    groups().erase(groups().begin());
  }
}
inline void settle(float (&)[128]) {
  if (groups().size() > 1) std::abort();
}
inline void multiply_tiles(float (&c)[128], uint64_t a, uint64_t b, bool more) {
  const int thread = emulated::block->current % 128, row = thread / 32 * 16 + thread % 32 / 4;
  float *const sums = c;
  groups().back().push_back([=] {
    float left[2][16];
    for (int k = 0; k < 16; ++k) left[0][k] = element(a, row, k), left[1][k] = element(a, row + 8, k);
    for (int n = 0; n < 64; ++n) {
      const int column = n / 2 * 8 + thread % 4 * 2 + n % 2;
      for (int h = 0; h < 2; ++h) {
        float &sum = sums[n / 2 * 4 + h * 2 + n % 2];
        double exact = more ? sum : 0.;
        for (int k = 0; k < 16; ++k) exact += static_cast<double>(left[h][k]) * element(b, column, k);
        sum = static_cast<float>(exact);
      }
    }
  });
}

}  // namespace latentrevise::cuda
