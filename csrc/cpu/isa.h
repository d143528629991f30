// What one instruction set provides. Each csrc/cpu/isa/*.cpp defines one table; active() picks the best the machine
// runs, or what LATENTREVISE_ISA names.
#pragma once

#include <cstdint>

#include "latentrevise/kernels.h"

namespace latentrevise::cpu {

struct Isa {
  const char *name;
  // Rows [begin, end) of the op; ids are checked before.
  void (*mixture_embed)(const lr_mixture_args &, int64_t begin, int64_t end);
  void (*mixture_embed_backward)(const lr_mixture_args &, int64_t begin, int64_t end);
};

extern const Isa scalar_isa;
#ifdef LATENTREVISE_X86
extern const Isa avx2_isa;
extern const Isa avx512_isa;
#endif

const Isa &active();

}  // namespace latentrevise::cpu
