// Registers of float32: loads, stores and sums of rows of float32 or bfloat16; included by kernels.inl.

constexpr int kLanes = LR_LANES;
typedef float vfloat __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vuint __attribute__((vector_size(4 * kLanes)));
typedef int32_t vint __attribute__((vector_size(4 * kLanes)));
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
