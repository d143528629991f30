// AVX-512 with 8-bit products, which screen the vertex oracle; everything else as in avx512.cpp.
#define LR_ISA avx512vnni
#define LR_LANES 16
#define LR_INT8_DOT
#include "kernels.inl"
