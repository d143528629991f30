// The one main loop of the Hopper kernels: products of 128 tokens with 256 columns, in bfloat16 with float32 sums, by
// wgmma fed by the tensor copy engine. What is multiplied, and what becomes of the sums, is a form (below).
//
// A block is three warpgroups. One thread of the first copies: boxes of 64 coordinates, in 128-byte rows that the engine
// swizzles as wgmma wants them, into a ring of four stages; `full` barriers count the bytes, `empty` ones the two other
// warpgroups, which own 64 tokens by 256 columns each, 128 sums a thread. The multiplications of a stage run while the
// next one's are issued; a stage is given back when the group before the last is done. The first consumer is kLead stages
// ahead of the second (`lead`), so that each one's epilogue runs beside the other's products: the tensor cores are idle
// only where the ring has run dry.
//
// Two blocks of neighbouring tokens are a cluster: each copies half of the right operand into both, and a stage is given
// back to both, so that L2 hands out a tile once for 256 tokens. One block of tokens alone has none.
//
// A form is the kernel's argument. It has
//   kBoxes                 of how many boxes a stage's right operand is made; kUnroll: stages a turn of the loop
//   work(block)            a Work
//   left(work, step)       the column where the step's box of the tokens' operand begins
//   right(work, step, i)   the corner of box i of the right operand
//   Consumer(form, work, place), of a thread: begin(inner) before each kUnroll stages; multiply(sums, i, left, right, more)
//                          issues the products of stage i of these; fold(sums, tile) may use the sums up; finish()
// Not yet measured on a GPU.
#pragma once

#include "cuda/common.cuh"
#include "cuda/ptx90.cuh"

namespace latentrevise::cuda {

constexpr int kTokens = 128, kColumns = 256, kDepth = 64, kStages = 4, kLead = 2, kThreads = 384;
constexpr int kTokenBytes = kTokens * kDepth * 2, kRightBytes = kColumns * kDepth * 2, kStageBytes = kTokenBytes + kRightBytes;
constexpr int kSharedBytes = 1024 + kStages * kStageBytes + (kStages * 2 + 1) * 8;  // the first to align the stages

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of the tokens' dimension: an even number, or one.
inline int64_t count_token_blocks(int64_t rows) { return rows > kTokens ? ceil_div(rows, 2 * kTokens) * 2 : 1; }

// A block's first token, tiles, steps a tile, and its range of table rows.
struct Work {
  int token, tiles, steps, begin, end;
};

struct Corner {
  int column, row;
};

// Where a consuming thread's sums belong: sum i is of row(i / 2 % 2) and column(i) of the tile.
struct Place {
  int group, lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  __device__ __forceinline__ int row(int h) const { return group * 64 + warp * 16 + h * 8 + lane / 4; }
  __device__ __forceinline__ int column(int i) const { return lane % 4 * 2 + i / 4 * 8 + i % 2; }
};

// Of forms whose right operand is the table's rows, tile after tile: scores.
struct Scores {
  int64_t token_blocks, part_rows, vocab, dim;
  static constexpr int kBoxes = 2, kUnroll = 1, kBoxRows = kColumns / kBoxes;

  __device__ __forceinline__ Work work(int64_t block) const {
    const int64_t begin = min(block / token_blocks * part_rows, vocab), end = min(begin + part_rows, vocab);
    return {static_cast<int>(block % token_blocks) * kTokens, static_cast<int>(ceil_div(end - begin, kColumns)),
            static_cast<int>(ceil_div(dim, kDepth)), static_cast<int>(begin), static_cast<int>(end)};
  }
  __device__ __forceinline__ int left(const Work &work, int step) const { return step % work.steps * kDepth; }
  __device__ __forceinline__ Corner right(const Work &work, int step, int i) const {
    return {step % work.steps * kDepth, work.begin + step / work.steps * kColumns + i * kBoxRows};
  }

  struct Consumer {
    __device__ __forceinline__ void begin(int) {}
    __device__ __forceinline__ void multiply(float (&sums)[128], int, uint32_t left, uint32_t right, bool more) {
      open_multiplications();
      const uint64_t tokens = describe_tile(left), rows = describe_tile(right);
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) multiply_tiles(sums, tokens + 2 * k, rows + 2 * k, more || k > 0);
    }
  };
};

template <int kCluster, typename Form>
__global__ void __launch_bounds__(kThreads, 1)
    hopper_loop(const __grid_constant__ Form form, const __grid_constant__ CUtensorMap left,
                const __grid_constant__ CUtensorMap right) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const int group = threadIdx.x / 128;
  const Work work = form.work(blockIdx.x);
  const int total = work.tiles * work.steps;
  const uint32_t stages = (shared_base() + 1023) / 1024 * 1024, full = stages + kStages * kStageBytes;
  const uint32_t empty = full + kStages * 8, lead = empty + kStages * 8;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) init_barrier(full + 8 * i, 1), init_barrier(empty + 8 * i, 2 * kCluster);
    init_barrier(lead, 1);
    publish_barriers();
  }
  if constexpr (kCluster > 1)
    synchronise_cluster();
  else
    __syncthreads();

  if (group == 0) {
    give_registers<40>();
    if (threadIdx.x == 0)
      for (int step = 0; step < total; ++step) {
        const int stage = step % kStages, round = step / kStages;
        const uint32_t to = stages + stage * kStageBytes, arrived = full + 8 * stage;
        await_phase(empty + 8 * stage, (round & 1) ^ 1);  // at once in the first round
        arrive_expecting(arrived, kStageBytes);
        copy_box(to, left, form.left(work, step), work.token, arrived);
        constexpr int kOwn = Form::kBoxes / kCluster, kBoxBytes = kRightBytes / Form::kBoxes;
        const int first = kCluster > 1 ? static_cast<int>(cluster_rank()) * kOwn : 0;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const Corner at = form.right(work, step, first + i);
          const uint32_t box = to + kTokenBytes + (first + i) * kBoxBytes;
          if constexpr (kCluster == 1)
            copy_box(box, right, at.column, at.row, arrived);
          else
            copy_box_to((1 << kCluster) - 1, box, right, at.column, at.row, arrived);
        }
      }
  } else {
    take_registers<232>();
    const auto release = [&](int step) {  // the stage, to all who write to it
      const uint32_t barrier = empty + 8 * (step % kStages);
      if constexpr (kCluster == 1)
        arrive(barrier);
      else
        for (uint32_t block = 0; block < kCluster; ++block) arrive_at(barrier, block);
    };
    const uint32_t own = (group - 1) * 64 * kDepth * 2;  // this warpgroup's tokens in a stage
    const bool speaks = threadIdx.x % 128 == 0, apart = work.steps > kStages;
    typename Form::Consumer consumer(form, work, Place{group - 1});
    float sums[128];
    int step = 0;
    for (int tile = 0; tile < work.tiles; ++tile) {
      if (group == 2 && apart) await_phase(lead, tile & 1);
      // Two loops, not one with a condition: sums used in the loop that makes them would be waited for in each round.
      for (int inner = 0; inner < work.steps; inner += Form::kUnroll) {
        consumer.begin(inner);
#pragma unroll
        for (int i = 0; i < Form::kUnroll; ++i, ++step) {
          const int stage = step % kStages;
          const uint32_t from = stages + stage * kStageBytes;
          await_phase(full + 8 * stage, step / kStages & 1);
          consumer.multiply(sums, i, from + own, from + kTokenBytes, inner + i > 0);
          commit_multiplications();
          await_multiplications<1>();  // the group before
          if (speaks && inner + i > 0) release(step - 1);
          if (speaks && group == 1 && apart && inner + i == kLead) arrive(lead);
        }
      }
      await_multiplications<0>();
      settle(sums);
      if (speaks) release(step - 1);
      consumer.fold(sums, tile);
    }
    consumer.finish();
  }
  if constexpr (kCluster > 1) synchronise_cluster();  // nobody writes to a block that has ended
#else
  __trap();  // the launcher refuses to get here
#endif
}

// A matrix of bfloat16 seen through boxes of `box_rows` rows and 64 columns, zeros outside.
inline int describe_matrix(CUtensorMap *map, const void *data, int64_t rows, int64_t columns, int64_t stride,
                           int box_rows) {
  using Encode = CUresult (*)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                              const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  void *symbol = nullptr;  // from the driver at run time: the library is not linked against it
  cudaDriverEntryPointQueryResult query;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &query);
  if (error != cudaSuccess || query != cudaDriverEntryPointSuccess)
    return fail(LR_CUDA_ERROR, "the driver has no cuTensorMapEncodeTiled");
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {kDepth, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const CUresult result = reinterpret_cast<Encode>(symbol)(
      map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void *>(data), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? LR_OK : fail(LR_CUDA_ERROR, "cuTensorMapEncodeTiled: error %d", (int)result);
}

template <int kCluster, typename Form>
int launch_cluster(const char *what, const Form &form, const CUtensorMap &left, const CUtensorMap &right, int64_t blocks,
                   cudaStream_t stream) {
  const auto kernel = hopper_loop<kCluster, Form>;
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess && (major != 9 || minor != 0 || attributes.ptxVersion < 90))
    return fail(LR_UNSUPPORTED, "%s needs compute capability 9.0 (this is %d.%d) and a build for sm_90a", what, major, minor);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error == cudaSuccess) {
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = kCluster, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t how{};
    how.gridDim = dim3(static_cast<unsigned>(blocks)), how.blockDim = dim3(kThreads);
    how.dynamicSmemBytes = kSharedBytes, how.stream = stream, how.attrs = &cluster, how.numAttrs = 1;
    error = cudaLaunchKernelEx(&how, kernel, form, left, right);
  }
  return error == cudaSuccess ? launched(what) : fail(LR_CUDA_ERROR, "%s: %s", what, cudaGetErrorString(error));
}

// `blocks` blocks of a form; neighbours have neighbouring blocks of tokens (count_token_blocks).
template <typename Form>
int launch_loop(const char *what, const Form &form, const CUtensorMap &left, const CUtensorMap &right, int64_t blocks,
                cudaStream_t stream) {
  if (blocks > INT32_MAX) return fail(LR_UNSUPPORTED, "%s: too many rows for one launch", what);
  return form.token_blocks > 1 ? launch_cluster<2>(what, form, left, right, blocks, stream)
                               : launch_cluster<1>(what, form, left, right, blocks, stream);
}

}  // namespace latentrevise::cuda
