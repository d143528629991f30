// Log-probs of given tokens from bfloat16 hidden states, their entropy and their gradient, 2*N*V*d FLOP, 4*N*V*d with
// the gradient; the scheme is that of kernels/linear_logprob/triton.py.
//
// logprob_parts   A block owns kM tokens and one part of the vocabulary. Each tile's scores (tiles.cuh) are transformed in
//                 registers, the target's taken out and stored exactly. A strip is the 32 table rows that one warp has of
//                 a tile: per token and strip an integer k with 2^k >= max exp(z), and the sum of x = 2^(z log2(e) - k),
//                 which joins a running sum by a power of two, that is exactly. For the gradient x * slope goes to the
//                 workspace in bfloat16 (relative error 2^-9 everywhere), and k beside it.
// logprob_merge   A warp a token merges the parts in float64 in fixed order: log p, entropy, the token's largest k, and the
//                 two factors of the gradient.
// logprob_means   sum over strips of 2^(k_strip - k_token) X_strip W_strip, a matmul whose left operand is scaled in
//                 registers; the power of two is exact. Parts of the vocabulary go to the workspace.
// logprob_finish  d log p / dH = (1 - p_y) scale / temperature (slope_y W_y - mean of the others), parts added in order.
//
// Everything is a function of the shapes and of `blocks` alone: no atomics, bitwise the same every time.

#include <algorithm>
#include <type_traits>

#include "cuda/tiles.cuh"

namespace latentrevise::cuda {
namespace {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kStrip = 32;
static_assert(kStrip == kK, "logprob_means takes one strip a step");

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the vocabulary is cut, and where things are in the workspace.
struct Plan {
  int64_t token_blocks, parts, part_rows, strips, mean_blocks, mean_parts, mean_strips;
  float *sums;               // [parts, 3, rows]: k, sum, moment
  float *targets;            // [2, rows]: logit, slope
  float *tokens;             // [3, rows]: largest k, factor of the target's row, factor of the others
  float *exponents;          // [strips, rows]
  float *means;              // [mean_parts, rows, dim]
  __nv_bfloat16 *exps;       // [rows, strips * kStrip]
  int64_t bytes;

  explicit Plan(const lr_logprob_args &a) {
    token_blocks = ceil_div(a.rows, kM);
    const int64_t tiles = ceil_div(a.vocab, kN);
    part_rows = ceil_div(tiles, std::max<int64_t>(1, std::min(tiles, a.blocks / std::max<int64_t>(1, token_blocks)))) * kN;
    parts = ceil_div(a.vocab, part_rows);
    strips = tiles * (kN / kStrip);
    mean_blocks = token_blocks * ceil_div(a.dim, kN);
    mean_strips = ceil_div(strips, std::max<int64_t>(1, std::min<int64_t>(32, a.blocks / std::max<int64_t>(1, mean_blocks))));
    mean_parts = ceil_div(strips, mean_strips);
    bytes = 0;
    const auto take = [&](auto *&pointer, int64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(static_cast<char *>(a.workspace) + bytes);
      bytes += ceil_div(count * static_cast<int64_t>(sizeof(*pointer)), 16) * 16;
    };
    take(sums, parts * 3 * a.rows), take(targets, 2 * a.rows), take(tokens, 3 * a.rows);
    if (a.gradient == nullptr) return;
    take(exponents, strips * a.rows), take(means, mean_parts * a.rows * a.dim), take(exps, a.rows * strips * kStrip);
  }
};

// Logits from raw scores, and d logit / d raw over scale / temperature.
struct Transform {
  float scale, softcap, inverse_temperature;
  __device__ __forceinline__ float2 operator()(float raw) const {
    raw *= scale;
    if (!(softcap > 0.f)) return make_float2(raw * inverse_temperature, 1.f);
    const float e = expf(-2.f * fabsf(raw / softcap)), over = 1.f / (1.f + e);
    return make_float2(copysignf((1.f - e) * over, raw) * (softcap * inverse_temperature), 4.f * e * over * over);
  }
  // The slope from the logit: near saturation with an absolute error of float32, enough for the mean of the others.
  __device__ __forceinline__ float slope(float logit) const {
    const float t = softcap > 0.f ? logit / (softcap * inverse_temperature) : 0.f;
    return 1.f - t * t;
  }
};

// A sum of 2^(k + x) over some x, and of 2^(k + x) * x * ln 2.
struct Sum {
  float k = -infinity(), sum = 0.f, moment = 0.f;
};

// `into` and `more` on a common k; the larger one's, so that nothing overflows. Exact but for the addition.
template <bool kMoment>
__device__ __forceinline__ void join(Sum &into, const Sum &more) {
  const float k = fmaxf(into.k, more.k), base = k == -infinity() ? 0.f : k;
  const float a = exp2f(into.k - base), b = exp2f(more.k - base);
  if constexpr (kMoment) {
    const float x = a > 0.f ? a * (into.moment + (into.k - base) * kLn2 * into.sum) : 0.f;
    const float y = b > 0.f ? b * (more.moment + (more.k - base) * kLn2 * more.sum) : 0.f;
    into.moment = x + y;
  }
  into.sum = a * into.sum + b * more.sum;
  into.k = k;
}

// Behind the stages: the block's targets, and the running sums, which would cost the registers that the tiles need.
constexpr int kPartsBytes = kStages * kTileBytes + kM * 4 + 4 * kM * static_cast<int>(sizeof(Sum));

template <bool kStore, bool kMoment>
__global__ void __launch_bounds__(kThreads, 1) logprob_parts(lr_logprob_args a, Plan plan) {
  extern __shared__ __align__(128) unsigned char shared[];
  const Place at;
  const int64_t part = blockIdx.x / plan.token_blocks, token = blockIdx.x % plan.token_blocks * kM;
  const int64_t begin = part * plan.part_rows, end = min(begin + plan.part_rows, a.vocab);
  const Matrix queries{static_cast<const __nv_bfloat16 *>(a.queries), a.rows, a.dim, a.queries_stride};
  const Matrix table{static_cast<const __nv_bfloat16 *>(a.table), end, a.dim, a.table_stride};
  const Transform head{static_cast<float>(a.scale), static_cast<float>(a.softcap),
                       static_cast<float>(1 / a.temperature)};
  auto *targets = reinterpret_cast<int *>(shared + kStages * kTileBytes);
  for (int i = threadIdx.x; i < kM; i += kThreads)
    targets[i] = token + i < a.rows ? static_cast<int>(a.targets[token + i]) : -1;
  auto *found = reinterpret_cast<Sum *>(targets + kM);  // [4 column warps][kM], each touched by one lane
  for (int i = threadIdx.x; i < 4 * kM; i += kThreads) found[i] = Sum();
  __syncthreads();

  walk_scores(queries, token, table, begin, shared_address(shared), at, [&](Scores &acc, int64_t first) {
    const int column = static_cast<int>(first) + at.column(0), strip = static_cast<int>(first) / kStrip + at.warp_n;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = at.row(i / 2, i % 2), target = targets[row] - column;  // in the numbering of columns here
      float top = -infinity(), mine = 0.f;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int v = j / 2 * 8 + j % 2;
        float &z = acc[i / 2][j / 2][i % 2 * 2 + j % 2];
        if (a.bias != nullptr && column + v < end) z += a.bias[column + v];
        if (v == target) mine = z;
        z = column + v < end && v != target ? head(z).x : -infinity();
        top = fmaxf(top, z);
      }
      if (target >= 0 && target < 32 && target % 8 < 2) {
        plan.targets[token + row] = head(mine).x;
        plan.targets[a.rows + token + row] = head(mine).y;
      }
#pragma unroll
      for (int offset = 1; offset < 4; offset *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
      Sum strip_sum;
      strip_sum.k = ceilf(top * kLog2e);
      const float base = top == -infinity() ? 0.f : strip_sum.k;
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        float x[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float &z = acc[i / 2][j / 2][i % 2 * 2 + c];
          const float p = exp2f(z * kLog2e - base);
          strip_sum.sum += p;
          if constexpr (kMoment) strip_sum.moment += p > 0.f ? p * (z - base * kLn2) : p;
          x[c] = p > 0.f ? p * head.slope(z) : p;
          z = 0.f;
        }
        if constexpr (kStore)
          if (token + row < a.rows)
            *reinterpret_cast<__nv_bfloat162 *>(plan.exps + (token + row) * plan.strips * kStrip + column + j / 2 * 8) =
                __floats2bfloat162_rn(x[0], x[1]);
      }
#pragma unroll
      for (int offset = 1; offset < 4; offset *= 2) {
        strip_sum.sum += __shfl_xor_sync(0xffffffffu, strip_sum.sum, offset);
        if constexpr (kMoment) strip_sum.moment += __shfl_xor_sync(0xffffffffu, strip_sum.moment, offset);
      }
      if (at.lane % 4 == 0) {
        if (kStore && token + row < a.rows) plan.exponents[strip * a.rows + token + row] = strip_sum.k;
        join<kMoment>(found[at.warp_n * kM + row], strip_sum);
      }
    }
  });
  const int row = threadIdx.x;
  if (row >= kM || token + row >= a.rows) return;
  Sum all = found[row];
  for (int w = 1; w < 4; ++w) join<kMoment>(all, found[w * kM + row]);
  float *out = plan.sums + part * 3 * a.rows + token + row;
  out[0] = all.k, out[a.rows] = all.sum, out[2 * a.rows] = all.moment;
}

__device__ __forceinline__ double softplus(double x) { return fmax(x, 0.) + log1p(exp(-fabs(x))); }

__global__ void __launch_bounds__(kThreads) logprob_merge(lr_logprob_args a, Plan plan) {
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
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

// Byte offset of 16-byte chunk `chunk` (0..15) of row `row` in a tile of 256-byte rows.
__device__ __forceinline__ uint32_t wide_offset(int row, int chunk) { return row * 256 + (chunk ^ (row & 7)) * 16; }

constexpr int kMeanStage = kTileBytes + kM * 4, kMeansBytes = kStages * kMeanStage + kM * 4;

__global__ void __launch_bounds__(kThreads, 2) logprob_means(lr_logprob_args a, Plan plan) {
  extern __shared__ __align__(128) unsigned char shared[];
  const Place at;
  const int64_t part = blockIdx.x / plan.mean_blocks, block = blockIdx.x % plan.mean_blocks;
  const int64_t token = block % plan.token_blocks * kM, column = block / plan.token_blocks * kN;
  const int64_t begin = part * plan.mean_strips;
  const int total = static_cast<int>(min(begin + plan.mean_strips, plan.strips) - begin);
  const Matrix exps{plan.exps, a.rows, plan.strips * kStrip, plan.strips * kStrip};
  const auto *table = static_cast<const __nv_bfloat16 *>(a.table);
  const uint32_t base = shared_address(shared);

  // A thread copies chunk `chunk` of two rows of each strip, and one exponent.
  const int chunk = threadIdx.x % 16;
  const bool inside = column + chunk * 8 < a.dim;
  const auto fetch = [&](int step) {
    if (step < total) {
      const uint32_t stage = base + step % kStages * kMeanStage;
      const int64_t strip = begin + step;
      copy_tile(stage, exps, token, strip * kStrip);
#pragma unroll
      for (int row = threadIdx.x / 16; row < kStrip; row += kThreads / 16) {
        const int64_t v = strip * kStrip + row;
        const bool there = inside && v < a.vocab;
        copy16(stage + kM * kK * 2 + wide_offset(row, chunk),
               there ? table + v * a.table_stride + column + chunk * 8 : table, there);
      }
      if (threadIdx.x < kM) {
        const bool there = token + threadIdx.x < a.rows;
        copy4(stage + kTileBytes + threadIdx.x * 4,
              plan.exponents + strip * a.rows + (there ? token + threadIdx.x : 0), there);
      }
    }
    commit_copies();
  };

  auto *top = reinterpret_cast<float *>(shared + kStages * kMeanStage);
  for (int i = threadIdx.x; i < kM; i += kThreads) top[i] = token + i < a.rows ? plan.tokens[token + i] : 0.f;
  Scores acc = {};
  for (int step = 0; step < kStages - 1; ++step) fetch(step);
  for (int step = 0; step < total; ++step) {
    await_copies<kStages - 2>();
    __syncthreads();
    fetch(step + kStages - 1);
    const uint32_t stage = base + step % kStages * kMeanStage, rows = stage + kM * kK * 2;
    const auto *k = reinterpret_cast<const float *>(shared + step % kStages * kMeanStage + kTileBytes);
#pragma unroll
    for (int slice = 0; slice < 2; ++slice) {
      uint32_t b[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n)  // (rows 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15)
        load_transposed(b[n], rows + wide_offset(slice * 16 + at.lane % 16, at.warp_n * 4 + n * 2 + at.lane / 16));
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        uint32_t x[4];  // registers 0 and 2 are of token lane / 4, 1 and 3 of that + 8
        load_tokens(x, stage, at, m, slice);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = at.row(m, h);
          const __nv_bfloat162 factor = __float2bfloat162_rn(exp2f(k[row] - top[row]));
#pragma unroll
          for (int j = h; j < 4; j += 2) {
            const __nv_bfloat162 scaled = __hmul2(reinterpret_cast<__nv_bfloat162 &>(x[j]), factor);
            x[j] = reinterpret_cast<const uint32_t &>(scaled);
          }
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) multiply(acc[m][n], x, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }
    }
  }
  await_copies<0>();
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int64_t row = token + at.row(i / 2, i % 2), j = column + at.column(n);
      if (row < a.rows && j < a.dim)
        *reinterpret_cast<float2 *>(plan.means + (part * a.rows + row) * a.dim + j) =
            make_float2(acc[i / 2][n][i % 2 * 2], acc[i / 2][n][i % 2 * 2 + 1]);
    }
}

__global__ void __launch_bounds__(kThreads) logprob_finish(lr_logprob_args a, Plan plan) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, n = i / a.dim, j = i % a.dim;
  if (n >= a.rows) return;
  float sum = 0.f;
  for (int64_t part = 0; part < plan.mean_parts; ++part) sum += plan.means[(part * a.rows + n) * a.dim + j];
  const int64_t y = a.targets[n];
  const float row = y >= 0 && y < a.vocab ? widen(static_cast<const __nv_bfloat16 *>(a.table)[y * a.table_stride + j])
                                          : __int_as_float(0x7fc00000);
  a.gradient[i] = plan.tokens[a.rows + n] * row - plan.tokens[2 * a.rows + n] * sum;
}

template <typename Kernel>
int launch(Kernel kernel, int64_t blocks, int bytes, const lr_logprob_args &a, const Plan &plan, cudaStream_t stream) {
  if (blocks > INT32_MAX) return fail(LR_UNSUPPORTED, "too many rows for one launch");
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return fail(LR_CUDA_ERROR, "linear_logprob: %s", cudaGetErrorString(error));
  kernel<<<static_cast<unsigned>(blocks), kThreads, bytes, stream>>>(a, plan);
  return launched("linear_logprob");
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
  const Plan plan(*a);
  if (!a->queries || !a->table || !a->targets || !a->logp || !a->workspace || a->workspace_bytes < plan.bytes)
    return fail(LR_INVALID_ARGUMENT, "a required pointer is null, or the workspace has fewer than %lld bytes",
                (long long)plan.bytes);
  const auto parts = a->gradient ? (a->entropy ? logprob_parts<true, true> : logprob_parts<true, false>)
                                 : (a->entropy ? logprob_parts<false, true> : logprob_parts<false, false>);
  if (const int status = launch(parts, plan.token_blocks * plan.parts, kPartsBytes, *a, plan, stream)) return status;
  if (const int status = launch(logprob_merge, ceil_div(a->rows * 32, kThreads), 0, *a, plan, stream)) return status;
  if (a->gradient == nullptr) return LR_OK;
  if (const int status = launch(logprob_means, plan.mean_blocks * plan.mean_parts, kMeansBytes, *a, plan, stream))
    return status;
  return launch(logprob_finish, ceil_div(a->rows * a->dim, kThreads), 0, *a, plan, stream);
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
