// The CPU kernels, compiled once per instruction set. The including file defines LR_ISA (name of the table) and LR_LANES
// (float32 lanes of a register) and is compiled with the matching -m flags. Only compiler vector extensions and
// builtins are used here, no standard library templates: an inline function instantiated with AVX-512 flags could be
// the copy the linker keeps for the whole program.

#include <cstdint>

#include "cpu/isa.h"

#if defined(LR_BF16_DOT) || defined(LR_INT8_DOT)
#include <immintrin.h>
#endif
#include <stdlib.h>

namespace latentrevise::cpu {
namespace {

#include "vector.inl"
#include "mixture_embed.inl"
#include "rows.inl"
#include "products.inl"
#include "tiles.inl"
#include "vertex_oracle.inl"
#include "screening.inl"
#include "softmax.inl"
#include "hull_step.inl"
#include "entropic_step.inl"

}  // namespace

#define LR_STRING_(x) #x
#define LR_STRING(x) LR_STRING_(x)
#define LR_TABLE_(x) x##_isa
#define LR_TABLE(x) LR_TABLE_(x)
extern const Isa LR_TABLE(LR_ISA) = {LR_STRING(LR_ISA),
                                     kLanes,
                                     kSlice,
                                     kPairs,
                                     kTiles,
                                     mixture_embed,
                                     mixture_embed_backward,
                                     pack,
                                     oracle,
                                     kScreenPack,
                                     kScreen,
                                     exact_scores,
                                     oracle_candidates,
                                     softmax,
                                     softmax_backward,
                                     hull_candidates,
                                     hull_rows,
                                     entropic_scores,
                                     entropic_rows};

}  // namespace latentrevise::cpu
