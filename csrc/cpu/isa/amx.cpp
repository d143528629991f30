// AVX-512 with tile products (AMX) of a bfloat16 table: scores, and means under a softmax; all else as in avx512bf16.cpp.
#define LR_ISA amx
#define LR_LANES 16
#define LR_BF16_DOT
#define LR_INT8_DOT
#define LR_AMX
#include "kernels.inl"
