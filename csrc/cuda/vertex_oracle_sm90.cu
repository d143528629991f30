// The vertex oracle's parts on Hopper: the same keys as vertex_oracle.cu, from wgmma fed by the tensor copy engine.
//
// A block is three warpgroups. One thread of the first copies: boxes of 64 coordinates, 128 tokens and 256 table rows, in
// 128-byte rows that the engine swizzles as wgmma wants them, into a ring of four stages; `full` barriers count the
// bytes, `empty` ones the two other warpgroups, which own 64 tokens by 256 rows each, 128 sums a thread. The multiplications
// of a stage run while the next one's are issued; a stage is given back when the group before the last is done. The first
// consumer is kLead stages ahead of the second (`lead`), so that each one's epilogue runs beside the other's products: the
// tensor cores are idle only where the ring has run dry.
//
// Two blocks of neighbouring tokens are a cluster: each copies half of the table's tile into both, and a stage is given back
// to both, so that L2 hands out a tile once for 256 tokens. One block of tokens alone has none.
//
// The epilogue has no branch that data decides but for NaN and infinity: a thread's least score of each of its two tokens,
// the first column that has it, one key. Not yet measured on a GPU.

#include "cuda/oracle.cuh"
#include "cuda/ptx90.cuh"

namespace latentrevise::cuda {
namespace {

constexpr int kTokens = 128, kRows = kHopperTile, kDepth = 64, kStages = 4, kThreads = 384;
constexpr int kTokenBytes = kTokens * kDepth * 2, kStageBytes = kTokenBytes + kRows * kDepth * 2;
constexpr int kSharedBytes = 1024 + kStages * kStageBytes + (kStages * 2 + 1) * 8;  // the first to align the stages

// kCluster blocks of neighbouring tokens share the table's tiles: each copies its part of one for all of them.
template <int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    hopper_parts(lr_oracle_args a, const __grid_constant__ CUtensorMap queries, const __grid_constant__ CUtensorMap table,
                 int64_t token_blocks, int64_t part_rows) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char shared[];
  const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
  const int64_t part = blockIdx.x / token_blocks;
  const int token = static_cast<int>(blockIdx.x % token_blocks) * kTokens;
  const int begin = static_cast<int>(min(part * part_rows, a.vocab));
  const int end = static_cast<int>(min(begin + part_rows, a.vocab));
  const int steps = static_cast<int>((a.dim + kDepth - 1) / kDepth), total = (end - begin + kRows - 1) / kRows * steps;
  const uint32_t stages = (shared_address(shared) + 1023) / 1024 * 1024, full = stages + kStages * kStageBytes;
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
  const auto release = [&](int step) {  // the stage, to all who write to it
    const uint32_t barrier = empty + 8 * (step % kStages);
    if constexpr (kCluster == 1)
      arrive(barrier);
    else
      for (uint32_t block = 0; block < kCluster; ++block) arrive_at(barrier, block);
  };

  if (group == 0) {
    give_registers<40>();
    if (threadIdx.x == 0)
      for (int step = 0; step < total; ++step) {
        const int stage = step % kStages, round = step / kStages;
        const uint32_t to = stages + stage * kStageBytes;
        await_phase(empty + 8 * stage, (round & 1) ^ 1);  // at once in the first round
        arrive_expecting(full + 8 * stage, kStageBytes);
        copy_box(to, queries, step % steps * kDepth, token, full + 8 * stage);
        const int column = step % steps * kDepth, row = begin + step / steps * kRows;
        if constexpr (kCluster == 1) {
          copy_box(to + kTokenBytes, table, column, row, full + 8 * stage);
        } else {
          const int rank = static_cast<int>(cluster_rank()), rows = kRows / kCluster;
          copy_box_to((1 << kCluster) - 1, to + kTokenBytes + rank * rows * kDepth * 2, table, column, row + rank * rows,
                      full + 8 * stage);
        }
      }
    return;
  }

  take_registers<232>();
  const uint32_t own = (group - 1) * 64 * kDepth * 2;  // this warpgroup's tokens in a stage
  constexpr int kLead = 2;  // stages that the first consumer is ahead of the second
  const bool speaks = threadIdx.x % 128 == 0, apart = steps > kStages;
  unsigned long long key[2] = {kNothing, kNothing};
  const float infinity = __int_as_float(0x7f800000);
  float acc[128];
  for (int step = 0; step < total;) {
    if (group == 2 && apart) await_phase(lead, step / steps & 1);
    // Two loops, not one with a condition: sums used in the loop that makes them would be waited for in each round.
    for (int inner = 0; inner < steps; ++inner, ++step) {
      const int stage = step % kStages;
      const uint32_t x = stages + stage * kStageBytes;
      await_phase(full + 8 * stage, step / kStages & 1);
      open_multiplications();
      const uint64_t tokens = describe_tile(x + own), rows = describe_tile(x + kTokenBytes);
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) multiply_tiles(acc, tokens + 2 * k, rows + 2 * k, inner > 0 || k > 0);
      commit_multiplications();
      await_multiplications<1>();  // the group before
      if (speaks && inner > 0) release(step - 1);
      if (speaks && group == 1 && apart && inner == kLead) arrive(lead);
    }
    await_multiplications<0>();
    settle(acc);
    if (speaks) release(step - 1);
    const int first = begin + (step / steps - 1) * kRows + lane % 4 * 2;
    const auto valid = [&](int i) {
      const int v = first + i / 4 * 8 + i % 2;
      return v < end && (a.allowed == nullptr || a.allowed[v]);
    };
    if (a.allowed != nullptr || first - lane % 4 * 2 + kRows > end) {
#pragma unroll
      for (int i = 0; i < 128; ++i)
        if (!valid(i)) acc[i] = infinity;
    }
    float low[2] = {acc[0], acc[2]};
#pragma unroll
    for (int i = 1; i < 128; ++i) low[i / 2 % 2] = minimum_or_nan(low[i / 2 % 2], acc[i]);
    int column[2];  // of the first that is not larger
#pragma unroll
    for (int i = 127; i >= 0; --i)
      if (acc[i] == low[i / 2 % 2]) column[i / 2 % 2] = i / 4 * 8 + i % 2;
    if (low[0] < infinity && low[1] < infinity) {
      for (int h = 0; h < 2; ++h) key[h] = min(key[h], score_key(low[h], first + column[h]));
      continue;
    }
#pragma unroll
    for (int i = 0; i < 128; ++i)  // NaN, or nothing but infinity and what does not compete
      if (valid(i)) key[i / 2 % 2] = min(key[i / 2 % 2], score_key(acc[i], first + i / 4 * 8 + i % 2));
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) key[h] = min(key[h], __shfl_xor_sync(0xffffffffu, key[h], offset));
    const int64_t t = token + (group - 1) * 64 + threadIdx.x % 128 / 32 * 16 + h * 8 + lane / 4;
    if (lane % 4 == 0 && t < a.rows) static_cast<unsigned long long *>(a.workspace)[part * a.rows + t] = key[h];
  }
  if constexpr (kCluster > 1) synchronise_cluster();  // nobody writes to a block that has ended
#else
  __trap();  // the launcher refuses to get here
#endif
}

// A matrix of bfloat16 seen through boxes of `rows` rows and 64 coordinates.
int describe_matrix(CUtensorMap *map, const void *data, int64_t rows, int64_t dim, int64_t stride, int box_rows) {
  using Encode = CUresult (*)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                              const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  void *symbol = nullptr;  // from the driver at run time: the library is not linked against it
  cudaDriverEntryPointQueryResult query;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &query);
  if (error != cudaSuccess || query != cudaDriverEntryPointSuccess)
    return fail(LR_CUDA_ERROR, "the driver has no cuTensorMapEncodeTiled");
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {kDepth, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const CUresult result = reinterpret_cast<Encode>(symbol)(
      map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void *>(data), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? LR_OK : fail(LR_CUDA_ERROR, "cuTensorMapEncodeTiled: error %d", (int)result);
}

template <int kCluster>
int launch(const lr_oracle_args &a, int64_t part_rows, int64_t token_blocks, cudaStream_t stream) {
  CUtensorMap queries, table;
  if (const int status = describe_matrix(&queries, a.queries, a.rows, a.dim, a.queries_stride, kTokens)) return status;
  if (const int status = describe_matrix(&table, a.table, a.vocab, a.dim, a.table_stride, kRows / kCluster)) return status;
  cudaError_t error =
      cudaFuncSetAttribute(hopper_parts<kCluster>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return fail(LR_CUDA_ERROR, "vertex_oracle: %s", cudaGetErrorString(error));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kCluster, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t how{};
  how.gridDim = dim3(static_cast<unsigned>(token_blocks * a.splits)), how.blockDim = dim3(kThreads);
  how.dynamicSmemBytes = kSharedBytes, how.stream = stream, how.attrs = &cluster, how.numAttrs = 1;
  error = cudaLaunchKernelEx(&how, hopper_parts<kCluster>, a, queries, table, token_blocks, part_rows);
  return error == cudaSuccess ? launched("vertex_oracle")
                              : fail(LR_CUDA_ERROR, "vertex_oracle: %s", cudaGetErrorString(error));
}

}  // namespace

int launch_hopper_parts(const lr_oracle_args &a, int64_t part_rows, cudaStream_t stream) {
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaFuncAttributes attributes{};
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, hopper_parts<2>); error != cudaSuccess)
    return fail(LR_CUDA_ERROR, "vertex_oracle: %s", cudaGetErrorString(error));
  if (major != 9 || minor != 0 || attributes.ptxVersion < 90)
    return fail(LR_UNSUPPORTED, "the Hopper oracle needs compute capability 9.0 (this is %d.%d) and a build for sm_90a",
                major, minor);
  const int64_t token_blocks = (a.rows + kTokens - 1) / kTokens;
  return token_blocks > 1 ? launch<2>(a, part_rows, (token_blocks + 1) / 2 * 2, stream)
                          : launch<1>(a, part_rows, token_blocks, stream);
}

}  // namespace latentrevise::cuda
