// Fused vertex oracle for bfloat16 on Hopper: ids[t] = argmin over allowed v of <queries[t], table[v]>, 2*T*V*d FLOP, no
// scores in memory.
//
// A block of the main loop (hopper.cuh) owns 128 tokens and one part of the vocabulary. A tile's scores become one 64-bit
// key a token while they are in registers: the score's bits made order-preserving, then the id. The minimum of keys is
// associative, so the result is bitwise the same under any number of parts: ties go to the lowest id, NaN (key 0) below
// everything. A second kernel, a warp a token, merges the parts.
//
// The epilogue has no branch that data decides but for NaN and infinity: a thread's least score of each of its two tokens,
// the first column that has it, one key.

#include "cuda/hopper.cuh"

namespace latentrevise::cuda {
namespace {

constexpr unsigned long long kNothing = ~0ull;
constexpr int kMergeThreads = 256;

// The score's bits made order-preserving, then the id: ties go to the lowest id, NaN (0) is below everything.
__device__ __forceinline__ unsigned long long score_key(float score, int64_t id) {
  uint32_t bits = __float_as_uint(score == 0.f ? 0.f : score);  // -0 ties with 0
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  if (score != score) bits = 0;
  return (static_cast<unsigned long long>(bits) << 32) | static_cast<uint32_t>(id);
}

// Keys [parts, rows] into the workspace.
struct Oracle : Scores {
  const uint8_t *allowed;
  unsigned long long *keys;
  int64_t rows;

  struct Consumer : Scores::Consumer {
    const Oracle &form;
    const Work work;
    const Place place;
    unsigned long long key[2] = {kNothing, kNothing};
    __device__ __forceinline__ Consumer(const Oracle &form, const Work &work, const Place &place)
        : form(form), work(work), place(place) {}

    __device__ __forceinline__ void fold(float (&score)[128], int tile) {
      const float infinity = __int_as_float(0x7f800000);
      const int first = work.begin + tile * kColumns;
      const auto valid = [&](int i) {
        const int v = first + place.column(i);
        return v < work.end && (form.allowed == nullptr || form.allowed[v]);
      };
      if (form.allowed != nullptr || first + kColumns > work.end) {
#pragma unroll
        for (int i = 0; i < 128; ++i)
          if (!valid(i)) score[i] = infinity;
      }
      float low[2] = {score[0], score[2]};
#pragma unroll
      for (int i = 1; i < 128; ++i) low[i / 2 % 2] = minimum_or_nan(low[i / 2 % 2], score[i]);
      int column[2];  // of the first that is not larger
#pragma unroll
      for (int i = 127; i >= 0; --i)
        if (score[i] == low[i / 2 % 2]) column[i / 2 % 2] = i / 4 * 8 + i % 2;
      if (low[0] < infinity && low[1] < infinity) {
        for (int h = 0; h < 2; ++h) key[h] = min(key[h], score_key(low[h], first + place.column(0) + column[h]));
        return;
      }
#pragma unroll
      for (int i = 0; i < 128; ++i)  // NaN, or nothing but infinity and what does not compete
        if (valid(i)) key[i / 2 % 2] = min(key[i / 2 % 2], score_key(score[i], first + place.column(i)));
    }

    __device__ __forceinline__ void finish() {
      const int64_t part = blockIdx.x / form.token_blocks;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int offset = 1; offset < 4; offset *= 2) key[h] = min(key[h], __shfl_xor_sync(0xffffffffu, key[h], offset));
        const int64_t t = work.token + place.row(h);
        if (place.lane % 4 == 0 && t < form.rows) form.keys[part * form.rows + t] = key[h];
      }
    }
  };
};

__global__ void __launch_bounds__(kMergeThreads) oracle_merge(lr_oracle_args a) {
  const int64_t t = (static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x) / 32;
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
  if (a->rows > INT32_MAX) return fail(LR_UNSUPPORTED, "too many rows for one launch");
  const int64_t part_rows = ceil_div(ceil_div(a->vocab, kColumns), a->splits) * kColumns;
  const Oracle form{{count_token_blocks(a->rows), part_rows, a->vocab, a->dim}, a->allowed,
                    static_cast<unsigned long long *>(a->workspace), a->rows};
  CUtensorMap queries, table;
  if (const int status = describe_matrix(&queries, a->queries, a->rows, a->dim, a->queries_stride, kTokens)) return status;
  if (const int status = describe_matrix(&table, a->table, a->vocab, a->dim, a->table_stride, Oracle::kBoxRows))
    return status;
  if (const int status = launch_loop("vertex_oracle", form, queries, table, form.token_blocks * a->splits, stream))
    return status;
  oracle_merge<<<static_cast<unsigned>(ceil_div(a->rows * 32, kMergeThreads)), kMergeThreads, 0, stream>>>(*a);
  return launched("vertex_oracle merge");
}

}  // namespace
}  // namespace latentrevise::cuda

extern "C" int lr_cuda_vertex_oracle(const lr_oracle_args *a, void *stream) {
  return latentrevise::cuda::run(a, static_cast<cudaStream_t>(stream));
}
