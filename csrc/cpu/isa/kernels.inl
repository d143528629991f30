// The CPU kernels, compiled once per instruction set. The including file defines LR_ISA (name of the table) and LR_LANES
// (float32 lanes of a register) and is compiled with the matching -m flags. Only compiler vector extensions and
// builtins are used here, no standard library templates: an inline function instantiated with AVX-512 flags could be
// the copy the linker keeps for the whole program.

#include <cstdint>

#include "cpu/isa.h"

namespace latentrevise::cpu {
namespace {

constexpr int kLanes = LR_LANES;
typedef float vfloat __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vuint __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vhalf __attribute__((vector_size(2 * kLanes)));

struct bf16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

inline vfloat load(const float *p) {
  vfloat v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline vfloat load(const bf16 *p) {
  vhalf h;
  __builtin_memcpy(&h, p, sizeof h);
  const vuint u = __builtin_convertvector(h, vuint) << 16;
  return (vfloat)u;
}

inline void store(float *p, float x) { *p = x; }
inline void store(bf16 *p, float x) {  // round to nearest even; NaN stays NaN
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  p->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void store(float *p, vfloat v) { __builtin_memcpy(p, &v, sizeof v); }
inline void store(bf16 *p, vfloat v) {
  const vuint u = (vuint)v;
  const vuint rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const vuint is_nan = (vuint)(v != v);
  const vhalf h = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), vhalf);
  __builtin_memcpy(p, &h, sizeof h);
}

inline float sum(vfloat v) {  // fixed order
  float s = 0;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
}

// ------------------------------------------------------------------------------------------------- mixture_embed

template <typename Scalar, typename Id>
void mixture_rows(const lr_mixture_args &a, int64_t begin, int64_t end) {
  constexpr int kUnroll = 4, kBlock = kUnroll * kLanes;
  const Scalar *table = static_cast<const Scalar *>(a.table);
  for (int64_t t = begin; t < end; ++t) {
    const Id *ids = static_cast<const Id *>(a.ids) + t * a.atoms;
    const float *weights = a.weights + t * a.atoms;
    Scalar *z = static_cast<Scalar *>(a.z) + t * a.dim;
    int64_t j = 0;
    for (; j + kBlock <= a.dim; j += kBlock) {  // the accumulators stay in registers over all atoms
      vfloat acc[kUnroll] = {};
      for (int64_t i = 0; i < a.atoms; ++i) {
        if (weights[i] == 0) continue;
        const Scalar *row = table + static_cast<int64_t>(ids[i]) * a.table_stride + j;
        for (int u = 0; u < kUnroll; ++u) acc[u] += weights[i] * load(row + u * kLanes);
      }
      for (int u = 0; u < kUnroll; ++u) store(z + j + u * kLanes, acc[u]);
    }
    for (; j < a.dim; ++j) {
      float acc = 0;
      for (int64_t i = 0; i < a.atoms; ++i)
        if (weights[i] != 0) acc += weights[i] * widen(table[static_cast<int64_t>(ids[i]) * a.table_stride + j]);
      store(z + j, acc);
    }
  }
}

template <typename X, typename Y>
inline float dot(const X *x, const Y *y, int64_t n) {
  constexpr int kUnroll = 4, kBlock = kUnroll * kLanes;
  vfloat acc[kUnroll] = {};
  int64_t j = 0;
  for (; j + kBlock <= n; j += kBlock)
    for (int u = 0; u < kUnroll; ++u) acc[u] += load(x + j + u * kLanes) * load(y + j + u * kLanes);
  float tail = 0;
  for (; j < n; ++j) tail += widen(x[j]) * widen(y[j]);
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3])) + tail;
}

template <typename Scalar, typename Id>
void mixture_backward_rows(const lr_mixture_args &a, int64_t begin, int64_t end) {
  const Scalar *table = static_cast<const Scalar *>(a.table);
  for (int64_t t = begin; t < end; ++t) {
    const Id *ids = static_cast<const Id *>(a.ids) + t * a.atoms;
    const Scalar *grad = static_cast<const Scalar *>(a.z) + t * a.dim;
    for (int64_t i = 0; i < a.atoms; ++i)
      a.grad_weights[t * a.atoms + i] = dot(grad, table + static_cast<int64_t>(ids[i]) * a.table_stride, a.dim);
  }
}

void mixture_embed(const lr_mixture_args &a, int64_t begin, int64_t end) {
  const bool wide = a.ids_dtype == LR_INT64;
  if (a.table_dtype == LR_FLOAT32)
    wide ? mixture_rows<float, int64_t>(a, begin, end) : mixture_rows<float, int32_t>(a, begin, end);
  else
    wide ? mixture_rows<bf16, int64_t>(a, begin, end) : mixture_rows<bf16, int32_t>(a, begin, end);
}

void mixture_embed_backward(const lr_mixture_args &a, int64_t begin, int64_t end) {
  const bool wide = a.ids_dtype == LR_INT64;
  if (a.table_dtype == LR_FLOAT32)
    wide ? mixture_backward_rows<float, int64_t>(a, begin, end) : mixture_backward_rows<float, int32_t>(a, begin, end);
  else
    wide ? mixture_backward_rows<bf16, int64_t>(a, begin, end) : mixture_backward_rows<bf16, int32_t>(a, begin, end);
}

}  // namespace

#define LR_STRING_(x) #x
#define LR_STRING(x) LR_STRING_(x)
#define LR_TABLE_(x) x##_isa
#define LR_TABLE(x) LR_TABLE_(x)
extern const Isa LR_TABLE(LR_ISA) = {LR_STRING(LR_ISA), mixture_embed, mixture_embed_backward};

}  // namespace latentrevise::cpu
