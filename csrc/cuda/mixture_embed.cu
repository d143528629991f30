// Sparse mixture of table rows and its gradient with respect to the weights.
//
// Memory-bound: rows * atoms * dim * sizeof(scalar) bytes of gathered rows. Forward: a block per (row, slice of dim); each
// thread owns 16 bytes of z and walks the atoms, so the accumulators stay in registers and nothing is combined. Backward: a
// warp per (row, atom), shuffled down once. Grids are 1-D (the y limit of 65535 is small); row offsets are 64-bit before they
// are multiplied. An id outside the table poisons its row with NaN instead of reading elsewhere.

#include "cuda/common.cuh"

namespace latentrevise::cuda {
namespace {

constexpr int kThreads = 128;

template <typename Scalar, typename Id, int kSize>
__global__ void __launch_bounds__(kThreads) mixture_forward(lr_mixture_args a, int64_t slices) {
  struct alignas(sizeof(Scalar) * kSize) Chunk { Scalar at[kSize]; };
  const int64_t t = blockIdx.x / slices;
  const int64_t j = ((blockIdx.x % slices) * kThreads + threadIdx.x) * kSize;
  if (j >= a.dim) return;
  const Id *ids = static_cast<const Id *>(a.ids) + t * a.atoms;
  const float *weights = a.weights + t * a.atoms;
  float acc[kSize] = {};
  for (int64_t i = 0; i < a.atoms; ++i) {
    const float w = weights[i];
    const int64_t id = ids[i];
    if (w == 0.f) continue;
    if (id < 0 || id >= a.vocab) {
      for (int u = 0; u < kSize; ++u) acc[u] = __int_as_float(0x7fc00000);
      break;
    }
    const Chunk row = *reinterpret_cast<const Chunk *>(static_cast<const Scalar *>(a.table) + id * a.table_stride + j);
#pragma unroll
    for (int u = 0; u < kSize; ++u) acc[u] = fmaf(w, widen(row.at[u]), acc[u]);
  }
  Chunk out;
#pragma unroll
  for (int u = 0; u < kSize; ++u) out.at[u] = narrow<Scalar>(acc[u]);
  *reinterpret_cast<Chunk *>(static_cast<Scalar *>(a.z) + t * a.dim + j) = out;
}

template <typename Scalar, typename Id, int kSize>
__global__ void __launch_bounds__(kThreads) mixture_backward(lr_mixture_args a) {
  struct alignas(sizeof(Scalar) * kSize) Chunk { Scalar at[kSize]; };
  const int64_t pair = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (pair >= a.rows * a.atoms) return;  // whole warps leave together
  const int64_t id = static_cast<const Id *>(a.ids)[pair];
  float acc = 0.f;
  if (id < 0 || id >= a.vocab) {
    acc = __int_as_float(0x7fc00000);
  } else {
    const Scalar *row = static_cast<const Scalar *>(a.table) + id * a.table_stride;
    const Scalar *grad = static_cast<const Scalar *>(a.z) + pair / a.atoms * a.dim;
    for (int64_t j = lane * kSize; j < a.dim; j += 32 * kSize) {
      const Chunk x = *reinterpret_cast<const Chunk *>(grad + j), y = *reinterpret_cast<const Chunk *>(row + j);
#pragma unroll
      for (int u = 0; u < kSize; ++u) acc = fmaf(widen(x.at[u]), widen(y.at[u]), acc);
    }
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) acc += __shfl_xor_sync(0xffffffffu, acc, offset);
  if (lane == 0) a.grad_weights[pair] = acc;
}

template <typename Scalar, typename Id, int kSize>
int launch(const lr_mixture_args &a, bool backward, cudaStream_t stream) {
  if (backward) {
    const int64_t blocks = (a.rows * a.atoms * 32 + kThreads - 1) / kThreads;
    if (blocks > INT32_MAX) return fail(LR_UNSUPPORTED, "rows * atoms is too large for one launch");
    mixture_backward<Scalar, Id, kSize><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(a);
    return launched("mixture_embed_backward");
  }
  const int64_t slices = (a.dim + kThreads * kSize - 1) / (kThreads * kSize);
  if (a.rows * slices > INT32_MAX) return fail(LR_UNSUPPORTED, "rows * dim is too large for one launch");
  mixture_forward<Scalar, Id, kSize><<<static_cast<unsigned>(a.rows * slices), kThreads, 0, stream>>>(a, slices);
  return launched("mixture_embed");
}

template <typename Scalar>
int dispatch(const lr_mixture_args &a, bool backward, cudaStream_t stream) {
  constexpr int kPack = 16 / sizeof(Scalar);
  const bool packed =
      aligned16(a.table) && aligned16(a.z) && a.dim % kPack == 0 && a.table_stride % kPack == 0;
  if (a.ids_dtype == LR_INT64)
    return packed ? launch<Scalar, int64_t, kPack>(a, backward, stream) : launch<Scalar, int64_t, 1>(a, backward, stream);
  return packed ? launch<Scalar, int32_t, kPack>(a, backward, stream) : launch<Scalar, int32_t, 1>(a, backward, stream);
}

int run(const lr_mixture_args *a, bool backward, void *stream) {
  if (const int status = check_mixture(a, backward)) return status;
  if (a->rows == 0) return LR_OK;
  const auto s = static_cast<cudaStream_t>(stream);
  if (a->table_dtype == LR_FLOAT32) return dispatch<float>(*a, backward, s);
  if (a->table_dtype == LR_BFLOAT16) return dispatch<__nv_bfloat16>(*a, backward, s);
  return dispatch<__half>(*a, backward, s);
}

}  // namespace
}  // namespace latentrevise::cuda

extern "C" int lr_cuda_mixture_embed(const lr_mixture_args *a, void *stream) {
  return latentrevise::cuda::run(a, false, stream);
}

extern "C" int lr_cuda_mixture_embed_backward(const lr_mixture_args *a, void *stream) {
  return latentrevise::cuda::run(a, true, stream);
}
