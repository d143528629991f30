#include "cuda/common.cuh"

extern "C" int lr_cuda_device_count(int *count) {
  const cudaError_t error = cudaGetDeviceCount(count);
  if (error == cudaSuccess) return LR_OK;
  *count = 0;
  cudaGetLastError();  // the runtime keeps it otherwise, and the next launch would report it
  return latentrevise::fail(LR_CUDA_ERROR, "%s", cudaGetErrorString(error));
}

extern "C" const char *lr_last_error(void) { return latentrevise::error_buffer(); }
