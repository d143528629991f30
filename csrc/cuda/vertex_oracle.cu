// Fused vertex oracle for bfloat16: ids[t] = argmin over allowed v of <queries[t], table[v]>, 2*T*V*d FLOP, no scores in
// memory.
//
// A block owns kM tokens and one part of the vocabulary. The tiles' scores (tiles.cuh) are folded into one 64-bit key a
// token while they are in registers: the score's bits made order-preserving, then the id. The minimum of keys is
// associative, so the result is bitwise the same under any number of parts: ties go to the lowest id, NaN (key 0) below
// everything. Blocks of one part are neighbours in the grid, so they read the same table rows at the same time, from L2.
// A second kernel, a warp a token, merges the parts. Runs on sm_80 and newer; vertex_oracle_sm90.cu
// computes the same keys on Hopper.

#include "cuda/oracle.cuh"
#include "cuda/tiles.cuh"

namespace latentrevise::cuda {
namespace {

__global__ void __launch_bounds__(kThreads, 2) oracle_parts(lr_oracle_args a, int64_t token_blocks, int64_t part_rows) {
  extern __shared__ __align__(128) unsigned char shared[];
  const Place at;
  const int64_t part = blockIdx.x / token_blocks, token = blockIdx.x % token_blocks * kM;
  const int64_t begin = part * part_rows, end = min(begin + part_rows, a.vocab);
  const Matrix queries{static_cast<const __nv_bfloat16 *>(a.queries), a.rows, a.dim, a.queries_stride};
  const Matrix table{static_cast<const __nv_bfloat16 *>(a.table), end, a.dim, a.table_stride};

  unsigned long long best[8];  // of row(i / 2, i % 2)
#pragma unroll
  for (int i = 0; i < 8; ++i) best[i] = kNothing;
  walk_scores(queries, token, table, begin, shared_address(shared), at, [&](Scores &acc, int64_t first) {
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int64_t v = first + at.column(n) + c;
        const bool valid = v < end && (a.allowed == nullptr || a.allowed[v]);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float &score = acc[i / 2][n][i % 2 * 2 + c];
          const unsigned long long key = score_key(score, v);
          if (valid && key < best[i]) best[i] = key;
          score = 0.f;
        }
      }
  });
  auto *merged = reinterpret_cast<unsigned long long *>(shared);  // [4 column warps][kM]
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) {
      const unsigned long long other = __shfl_xor_sync(0xffffffffu, best[i], offset);
      if (other < best[i]) best[i] = other;
    }
    if (at.lane % 4 == 0) merged[at.warp_n * kM + at.row(i / 2, i % 2)] = best[i];
  }
  __syncthreads();
  const int row = threadIdx.x;
  if (row >= kM || token + row >= a.rows) return;
  unsigned long long key = merged[row];
  for (int w = 1; w < 4; ++w) key = min(key, merged[w * kM + row]);
  static_cast<unsigned long long *>(a.workspace)[part * a.rows + token + row] = key;
}

__global__ void __launch_bounds__(kThreads) oracle_merge(lr_oracle_args a) {
  const int64_t t = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (t >= a.rows) return;  // whole warps leave together
  const auto *keys = static_cast<const unsigned long long *>(a.workspace);
  unsigned long long key = kNothing;
  for (int64_t part = threadIdx.x % 32; part < a.splits; part += 32) key = min(key, keys[part * a.rows + t]);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) key = min(key, __shfl_xor_sync(0xffffffffu, key, offset));
  if (threadIdx.x % 32) return;
  const uint32_t bits = static_cast<uint32_t>(key >> 32);
  const float score = bits == 0 ? __int_as_float(0x7fc00000)
                                : __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
  a.ids[t] = key == kNothing ? -1 : static_cast<int64_t>(key & 0xffffffffu);
  a.values[t] = key == kNothing ? __int_as_float(0x7f800000) : score;
}

int run(const lr_oracle_args *a, cudaStream_t stream) {
  if (a == nullptr || a->size < sizeof(lr_oracle_args))
    return fail(LR_INVALID_ARGUMENT, "lr_oracle_args is missing or from an older header");
  if (a->rows < 0 || a->dim < 1 || a->vocab < 1 || a->vocab > INT32_MAX || a->table_stride < a->dim || a->splits < 1)
    return fail(LR_INVALID_ARGUMENT, "bad shape: rows %lld, dim %lld, vocab %lld, splits %d", (long long)a->rows,
                (long long)a->dim, (long long)a->vocab, a->splits);
  if (a->queries_dtype != LR_BFLOAT16 || a->table_dtype != LR_BFLOAT16 || a->dim2 || a->candidates)
    return fail(LR_UNSUPPORTED, "the CUDA vertex oracle takes bfloat16, one table and no candidate sets");
  if (a->dim % 8 || a->table_stride % 8 || a->queries_stride % 8 || !aligned16(a->table) || !aligned16(a->queries))
    return fail(LR_UNSUPPORTED, "the CUDA vertex oracle needs rows of whole 16-byte chunks, aligned to 16 bytes");
  if (a->rows == 0) return LR_OK;
  if (!a->queries || !a->table || !a->ids || !a->values || !a->workspace)
    return fail(LR_INVALID_ARGUMENT, "a required pointer is null");
  const int tile = a->hopper ? kHopperTile : kN;
  const int64_t token_blocks = (a->rows + kM - 1) / kM, tiles = (a->vocab + tile - 1) / tile;
  const int64_t part_rows = (tiles + a->splits - 1) / a->splits * tile;
  if (token_blocks * a->splits > INT32_MAX || a->rows > INT32_MAX)
    return fail(LR_UNSUPPORTED, "too many rows for one launch");
  if (a->hopper) {
    if (const int status = launch_hopper_parts(*a, part_rows, stream)) return status;
  } else {
    const int bytes = kStages * kTileBytes;
    const cudaError_t error = cudaFuncSetAttribute(oracle_parts, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return fail(LR_CUDA_ERROR, "vertex_oracle: %s", cudaGetErrorString(error));
    oracle_parts<<<static_cast<unsigned>(token_blocks * a->splits), kThreads, bytes, stream>>>(*a, token_blocks, part_rows);
    if (const int status = launched("vertex_oracle")) return status;
  }
  oracle_merge<<<static_cast<unsigned>((a->rows * 32 + kThreads - 1) / kThreads), kThreads, 0, stream>>>(*a);
  return launched("vertex_oracle merge");
}

}  // namespace
}  // namespace latentrevise::cuda

extern "C" int lr_cuda_vertex_oracle(const lr_oracle_args *a, void *stream) {
  return latentrevise::cuda::run(a, static_cast<cudaStream_t>(stream));
}
