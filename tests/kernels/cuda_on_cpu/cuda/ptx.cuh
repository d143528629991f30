// Stands in for csrc/cuda/ptx.cuh: the same functions, written from the PTX manual's tables of fragments.
#pragma once

#include <array>

#include "cuda_bf16.h"

namespace latentrevise::cuda {

inline uint32_t shared_address(const void *p) {
  return static_cast<uint32_t>(static_cast<const unsigned char *>(p) - emulated::block->shared);
}
inline void copy16(uint32_t to, const void *from, bool there) { emulated::start_copy(to, from, 16, there ? 16 : 0); }
inline void copy4(uint32_t to, const void *from, bool there) { emulated::start_copy(to, from, 4, there ? 4 : 0); }
inline void commit_copies() { emulated::commit(); }
template <int kPending>
void await_copies() { emulated::await(kPending); }

inline void load_rows(uint32_t (&r)[4], uint32_t address, bool transposed) {
  const int lane = emulated::block->current % emulated::kWarp;
  const auto loaded = emulated::exchange(address, [&](auto &&of) {
    std::array<uint32_t, 4> out;
    for (int i = 0; i < 4; ++i) {
      uint16_t pair[2];
      for (int c = 0; c < 2; ++c) {
        const int row = transposed ? lane % 4 * 2 + c : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + c;
        const uint32_t from = of(8 * i + row);
        if (from % 16) std::abort();
        std::memcpy(&pair[c], emulated::block->shared + from + 2 * column, 2);
      }
      out[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
    return out;
  });
  std::copy(loaded.begin(), loaded.end(), r);
}
inline void load_matrices(uint32_t (&r)[4], uint32_t address) { load_rows(r, address, false); }
inline void load_transposed(uint32_t (&r)[4], uint32_t address) { load_rows(r, address, true); }

inline float half_of(uint32_t pair, int which) { return __uint_as_float(which ? pair & 0xffff0000u : pair << 16); }

inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands { uint32_t a[4], b[2]; };
  const Operands mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const int lane = emulated::block->current % emulated::kWarp;
  const auto sums = emulated::exchange(mine, [&](auto &&of) {
    std::array<float, 4> out;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4, column = lane % 4 * 2 + i % 2;  // of c; i / 2 says whether 8 rows further down
      double sum = c[i];
      for (int k = 0; k < 16; ++k) {
        const Operands left = of(row * 4 + k % 8 / 2), right = of(column * 4 + k % 8 / 2);
        sum += static_cast<double>(half_of(left.a[i / 2 + k / 8 * 2], k % 2)) * half_of(right.b[k / 8], k % 2);
      }
      out[i] = static_cast<float>(sum);
    }
    return out;
  });
  std::copy(sums.begin(), sums.end(), c);
}

}  // namespace latentrevise::cuda
