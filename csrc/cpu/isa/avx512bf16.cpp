// AVX-512 with native bfloat16 products for the scores of a bfloat16 table; everything else as in avx512vnni.cpp.
#define LR_ISA avx512bf16
#define LR_LANES 16
#define LR_BF16_DOT
#define LR_INT8_DOT
#include "kernels.inl"
