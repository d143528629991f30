// What the two forms of the vertex oracle share: keys whose minimum is the result, and who computes a part's.
#pragma once

#include "cuda/common.cuh"

namespace latentrevise::cuda {

constexpr unsigned long long kNothing = ~0ull;

// The score's bits made order-preserving, then the id: ties go to the lowest id, NaN (0) is below everything.
__device__ __forceinline__ unsigned long long score_key(float score, int64_t id) {
  uint32_t bits = __float_as_uint(score == 0.f ? 0.f : score);  // -0 ties with 0
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  if (score != score) bits = 0;
  return (static_cast<unsigned long long>(bits) << 32) | static_cast<uint32_t>(id);
}

// Keys [parts, rows] into args.workspace, part p over table rows [p * part_rows, (p + 1) * part_rows).
constexpr int kHopperTile = 256;  // part_rows is a multiple of it
int launch_hopper_parts(const lr_oracle_args &args, int64_t part_rows, cudaStream_t stream);

}  // namespace latentrevise::cuda
