// Baseline of the platform (SSE2 on x86-64, NEON on AArch64): always built.
#define LR_ISA scalar
#define LR_LANES 4
#include "kernels.inl"
