#define LR_ISA avx512
#define LR_LANES 16
#include "kernels.inl"
