#define LR_ISA avx2
#define LR_LANES 8
#include "kernels.inl"
