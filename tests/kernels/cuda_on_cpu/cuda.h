// The driver's tensor maps, as much as csrc/cuda/hopper.cuh uses.
#pragma once

#include "cuda_runtime.h"

#define __grid_constant__
#define __CUDA_ARCH_FEAT_SM90_ALL

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct CUtensorMap {
  const unsigned char *data;
  uint64_t columns, rows, stride;
  uint32_t box_columns, box_rows;
};

namespace emulated {
inline CUresult encode(CUtensorMap *map, CUtensorMapDataType, cuuint32_t, void *data, const cuuint64_t *sizes,
                       const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *, CUtensorMapInterleave,
                       CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[0] % 16 == 0 && box[0] * 2 <= 128 &&
                    box[0] <= 256 && box[1] <= 256;
  *map = {static_cast<const unsigned char *>(data), sizes[0], sizes[1], strides[0], box[0], box[1]};
  return fits ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
}  // namespace emulated

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
constexpr unsigned long long cudaEnableDefault = 0;
inline cudaError_t cudaGetDriverEntryPointByVersion(const char *, void **symbol, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult *query) {
  *symbol = reinterpret_cast<void *>(&emulated::encode);
  *query = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
struct cudaFuncAttributes { int ptxVersion; };
inline cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
  return *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0, cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, Kernel) { return attributes->ptxVersion = 90, cudaSuccess; }

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct { struct { unsigned x, y, z; } clusterDim; } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute *attrs;
  unsigned numAttrs;
};
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *how, void (*kernel)(Parameters...), Arguments... arguments) {
  emulated::launch(how->gridDim.x, how->blockDim.x, [=] { kernel(arguments...); }, how->attrs->val.clusterDim.x);
  return cudaSuccess;
}
