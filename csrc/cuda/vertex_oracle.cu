// Fused vertex oracle for bfloat16: ids[t] = argmin over allowed v of <queries[t], table[v]>, 2*T*V*d FLOP, no scores in
// memory.
//
// A block owns kM tokens and one part of the vocabulary. It walks the part in tiles of kN rows: a three-stage cp.async
// pipeline feeds mma.sync (bf16 in, float32 sums), and the tile's scores are folded into one 64-bit key a token while
// they are in registers: the score's bits made order-preserving, then the id. The minimum of keys is associative, so the
// result is bitwise the same under any number of parts: ties go to the lowest id, NaN (key 0) below everything. Blocks of
// one part are neighbours in the grid, so they read the same table rows at the same time, from L2. A second kernel, a
// warp a token, merges the parts. Shared rows are 64 bytes; their 16-byte chunks are permuted so that neither the copies
// nor ldmatrix conflict. Runs on sm_80 and newer; Hopper's wgmma is not used.

#include "cuda/common.cuh"

namespace latentrevise::cuda {
namespace {

constexpr int kM = 128, kN = 128, kK = 32, kStages = 3, kThreads = 256;
constexpr int kTileBytes = (kM + kN) * kK * 2;
constexpr unsigned long long kNothing = ~0ull;

__device__ __forceinline__ uint32_t shared_address(const void *p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void copy16(uint32_t to, const void *from, bool there) {
  const int bytes = there ? 16 : 0;  // the rest is filled with zeros
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes));
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ unsigned long long score_key(float score, int64_t id) {
  uint32_t bits = __float_as_uint(score == 0.f ? 0.f : score);  // -0 ties with 0
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  if (score != score) bits = 0;
  return (static_cast<unsigned long long>(bits) << 32) | static_cast<uint32_t>(id);
}

// Byte offset of 16-byte chunk `chunk` (0..3) of row `row` in a tile of 64-byte rows.
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) { return row * 64 + ((chunk ^ (row >> 1)) & 3) * 16; }

// Rows [first, first + kRows) x coordinates [k, k + kK) of a matrix into shared memory.
template <int kRows>
__device__ __forceinline__ void copy_tile(uint32_t to, const __nv_bfloat16 *data, int64_t stride, int64_t first,
                                          int64_t rows, int64_t k, int64_t dim) {
#pragma unroll
  for (int i = threadIdx.x; i < kRows * 4; i += kThreads) {
    const int row = i / 4, chunk = i % 4;
    const bool there = first + row < rows && k + chunk * 8 < dim;
    const __nv_bfloat16 *from = there ? data + (first + row) * stride + k + chunk * 8 : data;
    copy16(to + chunk_offset(row, chunk), from, there);
  }
}

__global__ void __launch_bounds__(kThreads, 2) oracle_parts(lr_oracle_args a, int64_t token_blocks, int64_t part_rows) {
  extern __shared__ __align__(128) unsigned char shared[];
  const auto *queries = static_cast<const __nv_bfloat16 *>(a.queries);
  const auto *table = static_cast<const __nv_bfloat16 *>(a.table);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_m = warp / 4, warp_n = warp % 4;
  const int64_t part = blockIdx.x / token_blocks, token = blockIdx.x % token_blocks * kM;
  const int64_t begin = part * part_rows, end = min(begin + part_rows, a.vocab);
  const int steps = static_cast<int>((a.dim + kK - 1) / kK);
  const int tiles = static_cast<int>((end - begin + kN - 1) / kN), total = tiles * steps;
  const uint32_t base = shared_address(shared);

  const auto fetch = [&](int step) {
    if (step < total) {
      const uint32_t stage = base + step % kStages * kTileBytes;
      const int64_t k = static_cast<int64_t>(step % steps) * kK;
      copy_tile<kM>(stage, queries, a.queries_stride, token, a.rows, k, a.dim);
      copy_tile<kN>(stage + kM * kK * 2, table, a.table_stride, begin + step / steps * int64_t{kN}, end, k, a.dim);
    }
    asm volatile("cp.async.commit_group;\n");
  };

  unsigned long long best[8];  // a thread holds rows lane / 4 and lane / 4 + 8 of each of its four 16-row tiles
#pragma unroll
  for (int i = 0; i < 8; ++i) best[i] = kNothing;
  float acc[4][4][4] = {};
  for (int step = 0; step < kStages - 1; ++step) fetch(step);
  for (int step = 0; step < total; ++step) {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kStages - 2));
    __syncthreads();  // stage `step` has arrived, and everybody is done with the stage that is refilled next
    fetch(step + kStages - 1);
    const uint32_t x = base + step % kStages * kTileBytes, e = x + kM * kK * 2;
#pragma unroll
    for (int k = 0; k < 2; ++k) {  // two 16-wide slices
      uint32_t rows_a[4][4], rows_b[2][4];
#pragma unroll
      for (int m = 0; m < 4; ++m)
        load_matrices(rows_a[m], x + chunk_offset(warp_m * 64 + m * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int n = 0; n < 2; ++n)  // two 8-row tiles at once: (rows 0-7, k 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15)
        load_matrices(rows_b[n],
                      e + chunk_offset(warp_n * 32 + n * 16 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) multiply(acc[m][n], rows_a[m], rows_b[n / 2][n % 2 * 2], rows_b[n / 2][n % 2 * 2 + 1]);
    }
    if ((step + 1) % steps) continue;
    const int64_t first = begin + step / steps * int64_t{kN} + warp_n * 32 + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int64_t v = first + n * 8 + c;
        const bool valid = v < end && (a.allowed == nullptr || a.allowed[v]);
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const unsigned long long key = score_key(acc[m][n][2 * h + c], v);
            if (valid && key < best[2 * m + h]) best[2 * m + h] = key;
            acc[m][n][2 * h + c] = 0.f;
          }
      }
  }
  asm volatile("cp.async.wait_group 0;\n");
  __syncthreads();
  auto *merged = reinterpret_cast<unsigned long long *>(shared);  // [4 column warps][kM]
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) {
      const unsigned long long other = __shfl_xor_sync(0xffffffffu, best[i], offset);
      if (other < best[i]) best[i] = other;
    }
    if (lane % 4 == 0) merged[warp_n * kM + warp_m * 64 + i / 2 * 16 + i % 2 * 8 + lane / 4] = best[i];
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
  const int64_t token_blocks = (a->rows + kM - 1) / kM, tiles = (a->vocab + kN - 1) / kN;
  const int64_t part_rows = (tiles + a->splits - 1) / a->splits * kN;
  if (token_blocks * a->splits > INT32_MAX || a->rows > INT32_MAX)
    return fail(LR_UNSUPPORTED, "too many rows for one launch");
  const int bytes = kStages * kTileBytes;
  const cudaError_t error = cudaFuncSetAttribute(oracle_parts, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return fail(LR_CUDA_ERROR, "vertex_oracle: %s", cudaGetErrorString(error));
  oracle_parts<<<static_cast<unsigned>(token_blocks * a->splits), kThreads, bytes, stream>>>(*a, token_blocks, part_rows);
  if (const int status = launched("vertex_oracle")) return status;
  oracle_merge<<<static_cast<unsigned>((a->rows * 32 + kThreads - 1) / kThreads), kThreads, 0, stream>>>(*a);
  return launched("vertex_oracle merge");
}

}  // namespace
}  // namespace latentrevise::cuda

extern "C" int lr_cuda_vertex_oracle(const lr_oracle_args *a, void *stream) {
  return latentrevise::cuda::run(a, static_cast<cudaStream_t>(stream));
}
