// Score tiles in bfloat16 on sm_80 tensor cores, for kernels that use scores while they are in registers.
//
// A block owns kM tokens and walks a range of table rows in tiles of kN: a three-stage cp.async pipeline feeds mma.sync
// (float32 sums), and each finished tile is handed to `fold`. Shared rows are 64 bytes; their 16-byte chunks are permuted
// so that neither the copies nor ldmatrix conflict.
#pragma once

#include "cuda/common.cuh"
#include "cuda/ptx.cuh"

namespace latentrevise::cuda {

constexpr int kM = 128, kN = 128, kK = 32, kStages = 3, kThreads = 256;
constexpr int kTileBytes = (kM + kN) * kK * 2;

// A matrix of bfloat16 with contiguous rows.
struct Matrix {
  const __nv_bfloat16 *data;
  int64_t rows, dim, stride;
};

// What a thread holds of a tile: acc[m][n][2 * h + c] is token `row(m, h)` of the block and row `column(n) + c` of the
// tile. Its eight warps are two by four, 64 tokens by 32 table rows each.
struct Place {
  int lane = threadIdx.x % 32, warp_m = threadIdx.x / 128, warp_n = threadIdx.x / 32 % 4;
  __device__ __forceinline__ int row(int m, int h) const { return warp_m * 64 + m * 16 + h * 8 + lane / 4; }
  __device__ __forceinline__ int column(int n) const { return warp_n * 32 + n * 8 + lane % 4 * 2; }
};
using Scores = float[4][4][4];

// Byte offset of 16-byte chunk `chunk` (0..3) of row `row` in a tile of 64-byte rows.
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) { return row * 64 + ((chunk ^ (row >> 1)) & 3) * 16; }

// Rows [first, first + 128) x coordinates [k, k + kK) of a matrix into shared memory, zeros outside.
__device__ __forceinline__ void copy_tile(uint32_t to, const Matrix &x, int64_t first, int64_t k) {
#pragma unroll
  for (int i = threadIdx.x; i < 128 * 4; i += kThreads) {
    const int row = i / 4, chunk = i % 4;
    const bool there = first + row < x.rows && k + chunk * 8 < x.dim;
    copy16(to + chunk_offset(row, chunk), there ? x.data + (first + row) * x.stride + k + chunk * 8 : x.data, there);
  }
}

// Token group m of a warp, 16 tokens by the 16 coordinates of a slice.
__device__ __forceinline__ void load_tokens(uint32_t (&a)[4], uint32_t tile, const Place &at, int m, int slice) {
  load_matrices(a, tile + chunk_offset(at.warp_m * 64 + m * 16 + at.lane % 16, 2 * slice + at.lane / 16));
}

// Tiles of rows [begin, table.rows) of the table against tokens [token, token + kM); `fold(acc, first)` may use `acc`
// up and must leave zeros. All threads of the block call this together; `base` has kStages * kTileBytes bytes.
template <typename Fold>
__device__ __forceinline__ void walk_scores(const Matrix &queries, int64_t token, const Matrix &table, int64_t begin,
                                            uint32_t base, const Place &at, Fold &&fold) {
  const int steps = static_cast<int>((table.dim + kK - 1) / kK);
  const int tiles = static_cast<int>((table.rows - begin + kN - 1) / kN), total = tiles * steps;
  const auto fetch = [&](int step) {
    if (step < total) {
      const uint32_t stage = base + step % kStages * kTileBytes;
      copy_tile(stage, queries, token, static_cast<int64_t>(step % steps) * kK);
      copy_tile(stage + kM * kK * 2, table, begin + step / steps * int64_t{kN}, static_cast<int64_t>(step % steps) * kK);
    }
    commit_copies();
  };
  Scores acc = {};
  for (int step = 0; step < kStages - 1; ++step) fetch(step);
  for (int step = 0; step < total; ++step) {
    await_copies<kStages - 2>();
    __syncthreads();  // stage `step` has arrived, and everybody is done with the stage that is refilled next
    fetch(step + kStages - 1);
    const uint32_t x = base + step % kStages * kTileBytes, e = x + kM * kK * 2;
#pragma unroll
    for (int k = 0; k < 2; ++k) {  // two 16-wide slices
      uint32_t a[4][4], b[2][4];
#pragma unroll
      for (int m = 0; m < 4; ++m) load_tokens(a[m], x, at, m, k);
#pragma unroll
      for (int n = 0; n < 2; ++n)  // two 8-row tiles at once: (rows 0-7, k 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15)
        load_matrices(b[n], e + chunk_offset(at.warp_n * 32 + n * 16 + at.lane % 8 + at.lane / 16 * 8,
                                             2 * k + at.lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) multiply(acc[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
    if ((step + 1) % steps == 0) fold(acc, begin + step / steps * int64_t{kN});
  }
  await_copies<0>();
  __syncthreads();
}

}  // namespace latentrevise::cuda
