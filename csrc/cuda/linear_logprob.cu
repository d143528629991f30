// Log-probs of given tokens from bfloat16 hidden states on Hopper, their entropy and their gradient, 2*N*V*d FLOP, 4*N*V*d
// with the gradient; the scheme is that of kernels/linear_logprob/triton.py. Both products are forms of hopper.cuh.
//
// LogProbs        A block owns 128 tokens and one part of the vocabulary. Each tile's scores are transformed in registers,
//                 the target's taken out and stored exactly. Per token and tile of 256 rows an integer k with
//                 2^k >= max exp(z), and the sum of x = 2^(z log2(e) - k), which joins a running sum by a power of two,
//                 that is exactly. For the gradient x * slope goes to the workspace in bfloat16 (relative error 2^-9
//                 everywhere), and k beside it.
// logprob_merge   A warp a token merges the parts in float64 in fixed order: log p, entropy, the token's largest k, and the
//                 two factors of the gradient.
// Means           sum over tiles of 2^(k_tile - k_token) X_tile W_tile: the inner dimension is the vocabulary, the left
//                 operand is scaled in registers (by a power of two: exactly), the right one is the table transposed, by
//                 wgmma. Parts of the vocabulary go to the workspace.
// logprob_finish  d log p / dH = (1 - p_y) scale / temperature (slope_y W_y - mean of the others), parts added in order.
//
// Everything is a function of the shapes and of `blocks` alone: no atomics, bitwise the same every time.

#include <algorithm>
#include <type_traits>

#include "cuda/hopper.cuh"

namespace latentrevise::cuda {
namespace {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kMergeThreads = 256, kTileSteps = kColumns / kDepth;
static_assert(kTileSteps == kStages && kStages % 2 == 0, "Means takes a tile of the vocabulary a turn of the ring");

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// Into how many parts to cut `blocks` pieces of work: whole waves of the processors, as nearly as is worth more parts.
int64_t count_parts(int64_t blocks, int64_t most, int64_t processors) {
  int64_t best = 1;
  double filled = 0.;
  for (int64_t parts = 1; parts <= most; ++parts) {
    const double share = static_cast<double>(blocks * parts) / (ceil_div(blocks * parts, processors) * processors);
    if (share > 1.05 * filled) best = parts, filled = share;
  }
  return best;
}

// How the vocabulary is cut, and where things are in the workspace.
struct Plan {
  int64_t token_blocks, tiles, parts, part_rows, mean_parts, mean_tiles;
  float *sums;          // [parts, 3, rows]: k, sum, moment
  float *targets;       // [2, rows]: logit, slope
  float *tokens;        // [3, rows]: largest k, factor of the target's row, factor of the others
  float *exponents;     // [tiles, rows]
  float *means;         // [mean_parts, rows, dim]
  __nv_bfloat16 *exps;  // [rows, tiles * kColumns], 64 columns at a time in the order of `store`
  int64_t bytes;

  explicit Plan(const lr_logprob_args &a) {
    token_blocks = count_token_blocks(a.rows), tiles = ceil_div(a.vocab, kColumns);
    part_rows = ceil_div(tiles, std::clamp<int64_t>(a.blocks / token_blocks, 1, tiles)) * kColumns;
    parts = ceil_div(a.vocab, part_rows);
    const int64_t blocks = token_blocks * ceil_div(a.dim, kColumns);
    mean_tiles = ceil_div(tiles, count_parts(blocks, std::min(tiles, std::max<int64_t>(8, a.blocks / blocks)), a.blocks));
    mean_parts = ceil_div(tiles, mean_tiles);
    bytes = 0;
    const auto take = [&](auto *&pointer, int64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(static_cast<char *>(a.workspace) + bytes);
      bytes += ceil_div(count * static_cast<int64_t>(sizeof(*pointer)), 16) * 16;
    };
    take(sums, parts * 3 * a.rows), take(targets, 2 * a.rows), take(tokens, 3 * a.rows);
    if (a.gradient == nullptr) return;
    take(exponents, tiles * a.rows), take(means, mean_parts * a.rows * a.dim), take(exps, a.rows * tiles * kColumns);
  }
};

// Logits from raw scores, and d logit / d raw over scale / temperature.
struct Transform {
  bool capped;
  float inner, outer;  // logit = outer * tanh(inner * raw), or outer * raw
  explicit Transform(const lr_logprob_args &a)
      : capped(a.softcap > 0), inner(static_cast<float>(capped ? a.scale / a.softcap : 0)),
        outer(static_cast<float>((capped ? a.softcap : a.scale) / a.temperature)) {}
  __device__ __forceinline__ float2 operator()(float raw) const {
    if (!capped) return make_float2(raw * outer, 1.f);
    const float x = raw * inner, e = expf(-2.f * fabsf(x)), over = reciprocal_fast(1.f + e);
    return make_float2(copysignf((1.f - e) * over, x) * outer, 4.f * e * over * over);
  }
};

// A sum of 2^(k + x) over some x, and of 2^(k + x) * x * ln 2.
struct Sum {
  float k = -infinity(), sum = 0.f, moment = 0.f;
};

// `into` and `more` on a common k; the larger one's, so that nothing overflows. Exact but for the addition.
__device__ __forceinline__ void join(Sum &into, const Sum &more) {
  const float k = fmaxf(into.k, more.k), base = k == -infinity() ? 0.f : k;
  const float a = exp2_fast(into.k - base), b = exp2_fast(more.k - base);
  const float x = a > 0.f ? a * (into.moment + (into.k - base) * kLn2 * into.sum) : 0.f;
  const float y = b > 0.f ? b * (more.moment + (more.k - base) * kLn2 * more.sum) : 0.f;
  into.moment = x + y;
  into.sum = a * into.sum + b * more.sum;
  into.k = k;
}

struct alignas(16) Chunk {
  uint32_t at[4];
};

__device__ __forceinline__ uint32_t pack(float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const uint32_t &>(pair);
}

template <bool kStore>
struct LogProbs : Scores {
  lr_logprob_args a;
  Plan plan;
  Transform head;

  struct Consumer : Scores::Consumer {
    const LogProbs &form;
    const Work work;
    const Place place;
    int target[2];  // in the numbering of column(i) of the part's first tile
    Sum all[2];     // of this thread's columns
    __device__ __forceinline__ Consumer(const LogProbs &form, const Work &work, const Place &place)
        : form(form), work(work), place(place) {
#pragma unroll
      for (int h = 0; h < 2; ++h) target[h] = row(h) < form.a.rows ? static_cast<int>(form.a.targets[row(h)]) : -1;
    }
    __device__ __forceinline__ int64_t row(int h) const { return work.token + place.row(h); }

    __device__ __forceinline__ void fold(float (&z)[128], int tile) {
      const int first = work.begin + tile * kColumns;
      if (form.a.bias != nullptr) {
#pragma unroll
        for (int i = 0; i < 128; ++i)
          if (first + place.column(i) < work.end) z[i] += form.a.bias[first + place.column(i)];
      }
      bool masked = first + kColumns > work.end;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int at = target[h] - first - place.column(0);
        if (at < 0 || at >= kColumns || at % 8 > 1) continue;
        masked = true;
        float raw = 0.f;
#pragma unroll
        for (int i = 0; i < 128; ++i)
          if (i / 2 % 2 == h && i / 4 * 8 + i % 2 == at) raw = z[i];
        const float2 logit = form.head(raw);
        form.plan.targets[row(h)] = logit.x;
        form.plan.targets[form.a.rows + row(h)] = logit.y;
      }
      transform(z);
      if (masked) {
#pragma unroll
        for (int i = 0; i < 128; ++i) {
          const int v = first + place.column(i);
          if (v >= work.end || v == target[i / 2 % 2]) z[i] = -infinity();
        }
      }
      float top[2] = {-infinity(), -infinity()}, base[2];
#pragma unroll
      for (int i = 0; i < 128; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], z[i]);
      Sum found[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int offset = 1; offset < 4; offset *= 2) top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], offset));
        found[h].k = ceilf(top[h]);
        base[h] = top[h] == -infinity() ? 0.f : found[h].k;
      }
      const float saturation = form.head.capped ? kLn2 / form.head.outer : 0.f;
#pragma unroll
      for (int i = 0; i < 128; i += 16) {  // eight columns of a thread's two rows
        float stored[16];
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          const int h = j / 2 % 2;
          const float x = z[i + j] - base[h], p = exp2_fast(x), tanh = z[i + j] * saturation;
          found[h].sum += p, found[h].moment += p > 0.f ? p * x : p;
          // Near saturation the slope has an absolute error of float32, enough for the mean of the others.
          stored[j] = p > 0.f ? p * (1.f - tanh * tanh) : p;
        }
        if constexpr (kStore) store(stored, first + i / 32 * 64 + place.lane % 4 * 16 + i / 16 % 2 * 8);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        found[h].moment *= kLn2;
        join(all[h], found[h]);
        if (kStore && place.lane % 4 == 0 && row(h) < form.a.rows)
          form.plan.exponents[first / kColumns * form.a.rows + row(h)] = found[h].k;
      }
    }

    // Raw scores to logits in units of ln 2.
    __device__ __forceinline__ void transform(float (&z)[128]) const {
      if (form.head.capped) {
#pragma unroll
        for (int i = 0; i < 128; ++i) z[i] = form.head(z[i]).x * kLog2e;
      } else {
        const float factor = form.head.outer * kLog2e;
#pragma unroll
        for (int i = 0; i < 128; ++i) z[i] *= factor;
      }
    }

    // Of every 64 columns a thread has 16, which are neighbours in the workspace: it has the same ones of the left operand
    // of a product, where Means reads them back.
    __device__ __forceinline__ void store(const float (&x)[16], int64_t column) const {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (row(h) >= form.a.rows) continue;
        Chunk chunk;
#pragma unroll
        for (int j = 0; j < 4; ++j) chunk.at[j] = pack(x[4 * j + 2 * h], x[4 * j + 2 * h + 1]);
        *reinterpret_cast<Chunk *>(form.plan.exps + row(h) * form.plan.tiles * kColumns + column) = chunk;
      }
    }

    __device__ __forceinline__ void finish() {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int offset = 1; offset < 4; offset *= 2) {  // all four have the same k
          all[h].sum += __shfl_xor_sync(0xffffffffu, all[h].sum, offset);
          all[h].moment += __shfl_xor_sync(0xffffffffu, all[h].moment, offset);
        }
        if (place.lane % 4 != 0 || row(h) >= form.a.rows) continue;
        float *out = form.plan.sums + blockIdx.x / form.token_blocks * 3 * form.a.rows + row(h);
        out[0] = all[h].k, out[form.a.rows] = all[h].sum, out[2 * form.a.rows] = all[h].moment;
      }
    }
  };
};

__device__ __forceinline__ double softplus(double x) { return fmax(x, 0.) + log1p(exp(-fabs(x))); }

__global__ void __launch_bounds__(kMergeThreads) logprob_merge(lr_logprob_args a, Plan plan) {
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x) / 32;
  if (n >= a.rows) return;  // whole warps leave together
  float top = -infinity();
  for (int64_t part = threadIdx.x % 32; part < plan.parts; part += 32) top = fmaxf(top, plan.sums[part * 3 * a.rows + n]);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
  if (top == -infinity()) top = 0.f;
  double total = 0., moment = 0.;  // sum of 2^(x - top) over the logits x / ln 2 of the others, and of that times (x - top) ln 2
  for (int64_t part = threadIdx.x % 32; part < plan.parts; part += 32) {
    const float *from = plan.sums + part * 3 * a.rows + n;
    const double shift = static_cast<double>(from[0]) - top, factor = exp2(shift), sum = from[a.rows];
    total += factor * sum;
    if (factor > 0.) moment += factor * (from[2 * a.rows] + shift * 0.69314718055994531 * sum);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    total += __shfl_xor_sync(0xffffffffu, total, offset);
    moment += __shfl_xor_sync(0xffffffffu, moment, offset);
  }
  if (threadIdx.x % 32) return;
  const int64_t y = a.targets[n];
  const double nan = __longlong_as_double(0x7ff8000000000000LL);
  const double target = y >= 0 && y < a.vocab ? plan.targets[n] : nan;  // nobody wrote it for an id outside the table
  double odds = top * 0.69314718055994531 + log(total) - target;  // of the others against the target
  if (target == static_cast<double>(infinity())) odds = nan;
  const double rest = 1 / (1 + exp(-odds)), logp = -softplus(odds);
  a.logp[n] = static_cast<float>(logp);
  if (a.entropy != nullptr) {
    const double mine = logp > -745. || logp != logp ? -exp(logp) * logp : 0.;
    const double others = rest * (softplus(-odds) + log(total) - moment / total);
    a.entropy[n] = static_cast<float>(rest > 0. || rest != rest ? mine + others : mine);
  }
  if (a.gradient == nullptr) return;
  const double factor = rest * (a.scale / a.temperature);
  plan.tokens[n] = top;
  plan.tokens[a.rows + n] = static_cast<float>(factor * plan.targets[a.rows + n]);
  plan.tokens[2 * a.rows + n] = static_cast<float>(total > 0. || total != total ? factor / total : 0.);
}

// A block has 128 tokens, 256 columns and one part of the vocabulary.
struct Means {
  int64_t token_blocks;
  lr_logprob_args a;
  Plan plan;
  static constexpr int kBoxes = kColumns / kDepth, kUnroll = kTileSteps, kBoxRows = kDepth;

  __device__ __forceinline__ int64_t column(int64_t block) const {
    return block / token_blocks % ceil_div(a.dim, kColumns) * kColumns;
  }
  __device__ __forceinline__ int64_t part(int64_t block) const {
    return block / token_blocks / ceil_div(a.dim, kColumns);
  }
  __device__ __forceinline__ Work work(int64_t block) const {
    const int64_t begin = part(block) * plan.mean_tiles, end = min(begin + plan.mean_tiles, plan.tiles);
    return {static_cast<int>(block % token_blocks) * kTokens, 1, static_cast<int>(end - begin) * kTileSteps,
            static_cast<int>(begin) * kColumns, static_cast<int>(end) * kColumns};
  }
  __device__ __forceinline__ int left(const Work &work, int step) const { return work.begin + step * kDepth; }
  __device__ __forceinline__ Corner right(const Work &work, int step, int i) const {
    return {static_cast<int>(column(blockIdx.x)) + i * kDepth, work.begin + step * kDepth};
  }

  struct Consumer {
    const Means &form;
    const Work work;
    const Place place;
    uint32_t x[2][16];      // the left operands of a stage and the next: a thread's 16 columns of row h from 8h on
    float top[2], next[2];  // the rows' k, the next tile's
    __nv_bfloat162 factor[2];
    __device__ __forceinline__ Consumer(const Means &form, const Work &work, const Place &place)
        : form(form), work(work), place(place) {
#pragma unroll
      for (int h = 0; h < 2; ++h) top[h] = row(h) < form.a.rows ? form.plan.tokens[row(h)] : 0.f;
      fetch(work.begin);
    }
    __device__ __forceinline__ int64_t row(int h) const { return work.token + place.row(h); }
    __device__ __forceinline__ void fetch(int v) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
        next[h] = row(h) < form.a.rows && v < work.end ? form.plan.exponents[v / kColumns * form.a.rows + row(h)] : 0.f;
    }

    __device__ __forceinline__ void begin(int inner) {
#pragma unroll
      for (int h = 0; h < 2; ++h) factor[h] = __float2bfloat162_rn(exp2_fast(next[h] - top[h]));
      fetch(work.begin + inner * kDepth + kColumns);
    }

    __device__ __forceinline__ void multiply(float (&sums)[128], int i, uint32_t left, uint32_t right, bool more) {
      uint32_t(&mine)[16] = x[i % 2];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int h = j / 2, row = place.row(h) % 64;
        uint32_t loaded[4];
        load16(loaded, left + row * 128 + ((place.lane % 4 * 2 + j % 2) ^ (row & 7)) * 16);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const __nv_bfloat162 scaled = __hmul2(reinterpret_cast<__nv_bfloat162 &>(loaded[k]), factor[h]);
          mine[4 * j + k] = reinterpret_cast<const uint32_t &>(scaled);
        }
      }
      open_multiplications();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k)
        multiply_rows(sums, mine[2 * k], mine[8 + 2 * k], mine[2 * k + 1], mine[9 + 2 * k],
                      describe_columns(right + k * 16 * 128, kDepth * 128), more || k > 0);
    }

    __device__ __forceinline__ void fold(float (&sums)[128], int) {
      const int64_t first = form.column(blockIdx.x), part = form.part(blockIdx.x);
#pragma unroll
      for (int i = 0; i < 128; i += 2) {
        const int64_t n = row(i / 2 % 2), j = first + place.column(i);
        if (n < form.a.rows && j < form.a.dim)
          *reinterpret_cast<float2 *>(form.plan.means + (part * form.a.rows + n) * form.a.dim + j) =
              make_float2(sums[i], sums[i + 1]);
      }
    }
    __device__ __forceinline__ void finish() {}
  };
};

__global__ void __launch_bounds__(kMergeThreads) logprob_finish(lr_logprob_args a, Plan plan) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x, n = i / a.dim, j = i % a.dim;
  if (n >= a.rows) return;
  float sum = 0.f;
  for (int64_t part = 0; part < plan.mean_parts; ++part) sum += plan.means[(part * a.rows + n) * a.dim + j];
  const int64_t y = a.targets[n];
  const float row = y >= 0 && y < a.vocab ? widen(static_cast<const __nv_bfloat16 *>(a.table)[y * a.table_stride + j])
                                          : __int_as_float(0x7fc00000);
  a.gradient[i] = plan.tokens[a.rows + n] * row - plan.tokens[2 * a.rows + n] * sum;
}

template <typename Kernel>
int launch(Kernel kernel, int64_t blocks, const lr_logprob_args &a, const Plan &plan, cudaStream_t stream) {
  if (blocks > INT32_MAX) return fail(LR_UNSUPPORTED, "linear_logprob: too many rows for one launch");
  kernel<<<static_cast<unsigned>(blocks), kMergeThreads, 0, stream>>>(a, plan);
  return launched("linear_logprob");
}

template <bool kStore>
int launch_scores(const lr_logprob_args &a, const Plan &plan, const CUtensorMap &queries, const CUtensorMap &table,
                  cudaStream_t stream) {
  const LogProbs<kStore> form{{plan.token_blocks, plan.part_rows, a.vocab, a.dim}, a, plan, Transform(a)};
  return launch_loop("linear_logprob", form, queries, table, plan.token_blocks * plan.parts, stream);
}

int check(const lr_logprob_args *a) {
  if (a == nullptr || a->size < sizeof(lr_logprob_args))
    return fail(LR_INVALID_ARGUMENT, "lr_logprob_args is missing or from an older header");
  if (a->rows < 0 || a->dim < 1 || a->vocab < 1 || a->vocab > INT32_MAX || a->table_stride < a->dim || a->blocks < 1)
    return fail(LR_INVALID_ARGUMENT, "bad shape: rows %lld, dim %lld, vocab %lld, blocks %d", (long long)a->rows,
                (long long)a->dim, (long long)a->vocab, a->blocks);
  if (a->queries_dtype != LR_BFLOAT16 || a->table_dtype != LR_BFLOAT16)
    return fail(LR_UNSUPPORTED, "the CUDA log-probs take bfloat16");
  if (a->dim % 8 || a->table_stride % 8 || a->queries_stride % 8 || !aligned16(a->table) || !aligned16(a->queries))
    return fail(LR_UNSUPPORTED, "the CUDA log-probs need rows of whole 16-byte chunks, aligned to 16 bytes");
  return LR_OK;
}

int run(const lr_logprob_args *a, cudaStream_t stream) {
  if (const int status = check(a)) return status;
  if (a->rows == 0) return LR_OK;
  if (a->rows > INT32_MAX) return fail(LR_UNSUPPORTED, "linear_logprob: too many rows for one launch");
  const Plan plan(*a);
  if (!a->queries || !a->table || !a->targets || !a->logp || !a->workspace || a->workspace_bytes < plan.bytes)
    return fail(LR_INVALID_ARGUMENT, "a required pointer is null, or the workspace has fewer than %lld bytes",
                (long long)plan.bytes);
  CUtensorMap queries, table;
  if (const int status = describe_matrix(&queries, a->queries, a->rows, a->dim, a->queries_stride, kTokens)) return status;
  if (const int status = describe_matrix(&table, a->table, a->vocab, a->dim, a->table_stride, Scores::kBoxRows))
    return status;
  const auto scores = a->gradient ? launch_scores<true> : launch_scores<false>;
  if (const int status = scores(*a, plan, queries, table, stream)) return status;
  if (const int status = launch(logprob_merge, ceil_div(a->rows * 32, kMergeThreads), *a, plan, stream)) return status;
  if (a->gradient == nullptr) return LR_OK;
  CUtensorMap exps;
  const int64_t columns = plan.tiles * kColumns;
  if (const int status = describe_matrix(&exps, plan.exps, a->rows, columns, columns, kTokens)) return status;
  if (const int status = describe_matrix(&table, a->table, a->vocab, a->dim, a->table_stride, Means::kBoxRows))
    return status;
  const int64_t blocks = plan.token_blocks * ceil_div(a->dim, kColumns) * plan.mean_parts;
  if (const int status = launch_loop("linear_logprob", Means{plan.token_blocks, *a, plan}, exps, table, blocks, stream))
    return status;
  return launch(logprob_finish, ceil_div(a->rows * a->dim, kMergeThreads), *a, plan, stream);
}

}  // namespace
}  // namespace latentrevise::cuda

extern "C" int lr_cuda_linear_logprob_workspace(const lr_logprob_args *a, int64_t *bytes) {
  using namespace latentrevise::cuda;
  if (const int status = check(a)) return status;
  *bytes = Plan(*a).bytes;
  return LR_OK;
}

extern "C" int lr_cuda_linear_logprob(const lr_logprob_args *a, void *stream) {
  return latentrevise::cuda::run(a, static_cast<cudaStream_t>(stream));
}
