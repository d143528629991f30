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

// ------------------------------------------------------------------------------------------------ rows of a table

struct Scratch {  // 64-byte aligned
  explicit Scratch(int64_t floats) {
    void *p = nullptr;
    if (posix_memalign(&p, 64, static_cast<size_t>(floats > 0 ? floats : 1) * sizeof(float)) != 0) out_of_memory();
    data = static_cast<float *>(p);
  }
  ~Scratch() { free(data); }
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  float *data;
};

template <typename Scalar>
inline void copy_row(const Scalar *from, int64_t n, float *to) {
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) store(to + k, load(from + k));
  for (; k < n; ++k) to[k] = widen(from[k]);
}

inline void read_row(const Matrix &m, int64_t row, int64_t n, float *to) {
  if (m.dtype == LR_FLOAT32)
    copy_row(static_cast<const float *>(m.data) + row * m.stride, n, to);
  else
    copy_row(static_cast<const bf16 *>(m.data) + row * m.stride, n, to);
}

inline float dot_row(const float *x, const Matrix &m, int64_t row, int64_t n) {
  if (m.dtype == LR_FLOAT32) return dot(x, static_cast<const float *>(m.data) + row * m.stride, n);
  return dot(x, static_cast<const bf16 *>(m.data) + row * m.stride, n);
}

// <g, row - low>: the difference of the rows, not of two large sums
template <typename Scalar>
inline float dot_difference_of(const float *g, const Scalar *row, const float *low, int64_t n) {
  vfloat acc = {};
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) acc += load(g + k) * (load(row + k) - load(low + k));
  float tail = 0;
  for (; k < n; ++k) tail += g[k] * (widen(row[k]) - low[k]);
  return sum(acc) + tail;
}

inline float dot_difference(const float *g, const Matrix &m, int64_t row, const float *low, int64_t n) {
  if (m.dtype == LR_FLOAT32) return dot_difference_of(g, static_cast<const float *>(m.data) + row * m.stride, low, n);
  return dot_difference_of(g, static_cast<const bf16 *>(m.data) + row * m.stride, low, n);
}

inline int64_t read_id(const void *ids, int32_t dtype, int64_t i) {
  return dtype == LR_INT64 ? static_cast<const int64_t *>(ids)[i] : static_cast<const int32_t *>(ids)[i];
}

inline void scale_row(float *x, int64_t n, float factor) {
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) store(x + k, load(x + k) * factor);
  for (; k < n; ++k) x[k] *= factor;
}

// One row of g = alpha * gold + beta * away into `out`; `other` is room for one more row.
inline void combine_row(const Combination &c, int64_t row, float *out, float *other) {
  float alpha = c.alpha, beta = c.beta;
  read_row(c.gold, row, c.dim, out);
  if (c.normalized) {
    const float norm = __builtin_sqrtf(dot(out, out, c.dim));
    alpha = norm > 0 ? alpha / norm : norm == 0 ? 0 : norm;  // NaN stays NaN
  }
  if (alpha != 1) scale_row(out, c.dim, alpha);
  if (!c.away.data) return;
  read_row(c.away, row, c.dim, other);
  if (c.normalized) {
    const float norm = __builtin_sqrtf(dot(other, other, c.dim));
    beta = norm > 0 ? beta / norm : norm == 0 ? 0 : norm;
  }
  int64_t k = 0;
  for (; k + kLanes <= c.dim; k += kLanes) store(out + k, load(out + k) + beta * load(other + k));
  for (; k < c.dim; ++k) out[k] += beta * other[k];
}

void pack(const Combination &c, const Panels &x, int64_t first, int64_t offset, int64_t begin, int64_t end) {
  const int64_t width = x.vectors * kLanes;
  Scratch rows(2 * c.dim);
  for (int64_t panel = begin; panel < end; ++panel) {
    float *to = x.packed + (panel * x.depth + offset) * width;
    for (int64_t lane = 0; lane < width; ++lane) {
      const int64_t t = panel * width + lane;
      if (t < x.rows)
        combine_row(c, first + t, rows.data, rows.data + c.dim);
      else
        for (int64_t k = 0; k < c.dim; ++k) rows.data[k] = 0;
      if (!x.pairs) {
        for (int64_t k = 0; k < c.dim; ++k) to[k * width + lane] = rows.data[k];
        continue;
      }
      bf16 *halves = reinterpret_cast<bf16 *>(x.packed + panel * (x.depth / 2) * width);
      for (int64_t k = 0; k < c.dim; ++k) store(halves + (k / 2 * width + lane) * 2 + k % 2, rows.data[k]);
    }
  }
}

// --------------------------------------------------------------------------------------------------- micro-kernels

#define LR_UNROLL _Pragma("GCC unroll 32")

// Registers: M * N accumulators, N panel vectors, one broadcast row element.
#if LR_LANES == 16
constexpr int kRows2 = 14, kRows1 = 20, kTokens = 8, kColumns = 3;
#elif LR_LANES == 8
constexpr int kRows2 = 6, kRows1 = 12, kTokens = 4, kColumns = 3;
#else
constexpr int kRows2 = 4, kRows1 = 8, kTokens = 4, kColumns = 2;
#endif

constexpr int64_t kSlice = kColumns * kLanes;      // columns of a table that lie together in a staged block
constexpr int64_t kDepth = 144 / kSlice * kSlice;  // columns a pass over a block: what it rereads stays in L1
constexpr int64_t kPanels = 8;                     // panels a block is scored for before the scores are used
template <int N>
constexpr int64_t kBlock = 128 / (N == 2 ? kRows2 : kRows1) * (N == 2 ? kRows2 : kRows1);  // rows a block

// Table rows as the micro-kernels read them: element (r, k) is rows[r * stride + k / kSlice * jump + k % kSlice].
struct View {
  const float *rows;
  int64_t stride, jump;
  View at(int64_t r, int64_t k) const { return {rows + r * stride + k / kSlice * jump, stride, jump}; }  // k: slices
};

// scores[r][lane] (+)= sum_k rows[r][k] * x[k][lane], in the order of k. Three rows hang off one pointer, which is what
// x86 addressing can scale.
template <int M, int N, bool kFirst>
void score_rows(const View &table, const float *x, int64_t depth, float *scores) {
  constexpr int kBases = (M + 2) / 3;
  vfloat acc[M][N];
  LR_UNROLL for (int r = 0; r < M; ++r)
    LR_UNROLL for (int u = 0; u < N; ++u) acc[r][u] = kFirst ? vfloat{} : load(scores + (r * N + u) * kLanes);
  for (const float *rows = table.rows; depth > 0; depth -= kSlice, rows += table.jump) {
    const float *base[kBases];
    LR_UNROLL for (int i = 0; i < kBases; ++i) base[i] = rows + 3 * i * table.stride;
    const int64_t count = depth < kSlice ? depth : kSlice;
    for (int64_t k = 0; k < count; ++k) {
      vfloat xv[N];
      LR_UNROLL for (int u = 0; u < N; ++u) xv[u] = load(x + u * kLanes);
      x += N * kLanes;
      LR_UNROLL for (int r = 0; r < M; ++r) {
        const float w = base[r / 3][(r % 3) * table.stride];
        LR_UNROLL for (int u = 0; u < N; ++u) acc[r][u] += w * xv[u];
      }
      LR_UNROLL for (int i = 0; i < kBases; ++i) ++base[i];
    }
  }
  LR_UNROLL for (int r = 0; r < M; ++r)
    LR_UNROLL for (int u = 0; u < N; ++u) store(scores + (r * N + u) * kLanes, acc[r][u]);
}

#ifdef LR_BF16_DOT
constexpr bool kPairs = true;

// The same with bfloat16 rows and panels of pairs: two multiply-adds an instruction, float32 sums.
template <int M, int N, bool kFirst = true>
void score_row_pairs(const bf16 *rows, int64_t stride, const float *x, int64_t depth, float *scores) {
  __m512 acc[M][N];
  LR_UNROLL for (int r = 0; r < M; ++r)
    LR_UNROLL for (int u = 0; u < N; ++u)
      acc[r][u] = kFirst ? _mm512_setzero_ps() : _mm512_loadu_ps(scores + (r * N + u) * kLanes);
  for (int64_t k = 0; k < depth / 2; ++k) {
    __m512bh xv[N];
    LR_UNROLL for (int u = 0; u < N; ++u) xv[u] = (__m512bh)_mm512_loadu_ps(x + u * kLanes);
    x += N * kLanes;
    LR_UNROLL for (int r = 0; r < M; ++r) {
      int word;
      __builtin_memcpy(&word, rows + r * stride + 2 * k, 4);
      const __m512bh w = (__m512bh)_mm512_set1_epi32(word);
      LR_UNROLL for (int u = 0; u < N; ++u) acc[r][u] = _mm512_dpbf16_ps(acc[r][u], w, xv[u]);
    }
  }
  LR_UNROLL for (int r = 0; r < M; ++r)
    LR_UNROLL for (int u = 0; u < N; ++u) _mm512_storeu_ps(scores + (r * N + u) * kLanes, acc[r][u]);
}

template <int N>
void score_pairs(const Matrix &table, int64_t v, int64_t count, const float *x, int64_t depth, float *scores) {
  constexpr int M = N == 2 ? kRows2 : kRows1;
  const bf16 *rows = static_cast<const bf16 *>(table.data) + v * table.stride;
  int64_t r = 0;
  for (; r + M <= count; r += M) score_row_pairs<M, N>(rows + r * table.stride, table.stride, x, depth, scores + r * N * kLanes);
  for (; r < count; ++r) score_row_pairs<1, N>(rows + r * table.stride, table.stride, x, depth, scores + r * N * kLanes);
}
#else
constexpr bool kPairs = false;
template <int N>
void score_pairs(const Matrix &, int64_t, int64_t, const float *, int64_t, float *) {}  // Isa::bf16_pairs is false
#endif

// scores[panel][r][lane] = (or, with `add`, +=) <row r, token>. kDepth columns at a time: a panel's part stays in L1 over all
// rows, the rows' part in L2 over all panels; a score is one chain all the same. A panel of tokens is `panel` floats long,
// one of scores kBlock<N> rows.
template <int N, bool kFirst>
void score_slices(const View &block, int64_t k, int64_t count, const float *x, int64_t panel, int64_t panels, int64_t depth,
                  float *scores) {
  constexpr int M = N == 2 ? kRows2 : kRows1, width = N * kLanes;
  for (int64_t p = 0; p < panels; ++p, x += panel, scores += kBlock<N> * width) {
    int64_t r = 0;
    for (; r + M <= count; r += M) score_rows<M, N, kFirst>(block.at(r, k), x, depth, scores + r * width);
    for (; r + 4 <= count; r += 4) score_rows<4, N, kFirst>(block.at(r, k), x, depth, scores + r * width);
    for (; r < count; ++r) score_rows<1, N, kFirst>(block.at(r, k), x, depth, scores + r * width);
  }
}

template <int N>
void score_block(const View &block, int64_t count, const float *x, int64_t panel, int64_t panels, int64_t depth, bool add,
                 float *scores) {
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t n = depth - k < kDepth ? depth - k : kDepth;
    const float *xk = x + k * N * kLanes;
    k == 0 && !add ? score_slices<N, true>(block, k, count, xk, panel, panels, n, scores)
                   : score_slices<N, false>(block, k, count, xk, panel, panels, n, scores);
  }
}

// mean[i][j] += sum_v p[v][i] * rows[v][j] for M tokens and one slice of columns.
template <int M>
void add_rows(const float *rows, int64_t stride, int64_t count, const float *p, int64_t width, float *mean,
              int64_t mean_stride) {
  vfloat acc[M][kColumns] = {};
  LR_UNROLL for (int i = 0; i < M; ++i)  // needed at the end, and seldom in a near cache
    LR_UNROLL for (int u = 0; u < kColumns; ++u) __builtin_prefetch(mean + i * mean_stride + u * kLanes, 1);
  for (int64_t v = 0; v < count; ++v) {
    vfloat w[kColumns];
    LR_UNROLL for (int u = 0; u < kColumns; ++u) w[u] = load(rows + u * kLanes);
    LR_UNROLL for (int i = 0; i < M; ++i)
      LR_UNROLL for (int u = 0; u < kColumns; ++u) acc[i][u] += p[i] * w[u];
    rows += stride;
    p += width;
  }
  LR_UNROLL for (int i = 0; i < M; ++i)
    LR_UNROLL for (int u = 0; u < kColumns; ++u) {
      float *to = mean + i * mean_stride + u * kLanes;
      store(to, load(to) + acc[i][u]);
    }
}

// The same for all tokens and whole slices of a staged block: `mean` has room for them.
template <int N>
void add_block(const View &block, int64_t count, int64_t dim, const float *p, int64_t tokens, float *mean,
               int64_t mean_stride) {
  constexpr int64_t width = N * kLanes;
  for (int64_t j = 0; j < dim; j += kSlice) {
    const float *rows = block.at(0, j).rows;
    for (int64_t first = 0; first < tokens; first += width) {
      const int64_t n = tokens - first < width ? tokens - first : width;
      const float *at = p + first * kBlock<N>;
      float *to = mean + first * mean_stride + j;
      int64_t i = 0;
      for (; i + kTokens <= n; i += kTokens)
        add_rows<kTokens>(rows, block.stride, count, at + i, width, to + i * mean_stride, mean_stride);
      for (; i < n; ++i) add_rows<1>(rows, block.stride, count, at + i, width, to + i * mean_stride, mean_stride);
    }
  }
}

// A block of table rows as float32: where they are, or staged as slices of kSlice columns, each row after row, the last
// slice filled up with zeros. A staged block has no two rows a power of two apart and few pages.
template <int N>
struct Block {
  Block(const Matrix &m, int64_t dim, bool staged)
      : table(m), dim(dim), staged(staged || m.dtype != LR_FLOAT32),
        stage(this->staged ? kBlock<N> * ((dim + kSlice - 1) / kSlice * kSlice) : 0) {}
  View read(int64_t v, int64_t count) {
    if (!staged) return {static_cast<const float *>(table.data) + v * table.stride, table.stride, kSlice};
    table.dtype == LR_FLOAT32 ? fill(static_cast<const float *>(table.data) + v * table.stride, count)
                              : fill(static_cast<const bf16 *>(table.data) + v * table.stride, count);
    return {stage.data, kSlice, kBlock<N> * kSlice};
  }
  template <typename Scalar>
  void fill(const Scalar *rows, int64_t count) {
    for (int64_t r = 0; r < count; ++r, rows += table.stride) {
      float *to = stage.data + r * kSlice;
      int64_t k = 0;
      for (; k + kSlice <= dim; k += kSlice, to += kBlock<N> * kSlice)
        LR_UNROLL for (int u = 0; u < kColumns; ++u) store(to + u * kLanes, load(rows + k + u * kLanes));
      if (k == dim) continue;
      copy_row(rows + k, dim - k, to);
      for (int64_t c = dim - k; c < kSlice; ++c) to[c] = 0;
    }
  }
  const Matrix &table;
  int64_t dim;
  bool staged;
  Scratch stage;
};

#ifdef LR_AMX
#include "tiles.inl"
#else
constexpr bool kTiles = false;
#endif

// ---------------------------------------------------------------------------------------------------- vertex oracle

template <int N>
void oracle_blocks(const OracleTask &a) {
  constexpr int64_t width = N * kLanes, next = kBlock<N> * width;
  const int64_t panels = (a.x.rows + width - 1) / width;
  const int64_t panel = (a.x.pairs ? a.x.depth / 2 : a.x.depth) * width, group = panels < kPanels ? panels : kPanels;
  Block<N> first(a.tables[0], a.dims[0], panels > 1), second(a.tables[1], a.dims[1], panels > 1);
  Scratch scores(group * next);
  for (int64_t v = a.begin; v < a.end; v += kBlock<N>) {
    const int64_t count = a.end - v < kBlock<N> ? a.end - v : kBlock<N>;
    const View rows = a.x.pairs ? View{} : first.read(v, count), others = a.dims[1] ? second.read(v, count) : View{};
    for (int64_t from = 0; from < panels; from += group) {
      const int64_t here = panels - from < group ? panels - from : group;
      const float *x = a.x.packed + from * panel;
      if (a.x.pairs)
        for (int64_t p = 0; p < here; ++p)
          score_pairs<N>(a.tables[0], v, count, x + p * panel, a.dims[0], scores.data + p * next);
      else
        score_block<N>(rows, count, x, panel, here, a.dims[0], false, scores.data);
      if (a.dims[1]) score_block<N>(others, count, x + a.dims[0] * width, panel, here, a.dims[1], true, scores.data);
      for (int64_t vector = 0; vector < here * N; ++vector) {
        const float *at = scores.data + vector / N * next + vector % N * kLanes;
        float *values = a.values + (from * N + vector) * kLanes;
        int32_t *ids = a.ids + (from * N + vector) * kLanes;
        vfloat best = load(values);
        vint id;
        __builtin_memcpy(&id, ids, sizeof id);
        for (int64_t r = 0; r < count; ++r) {
          if (a.allowed && !a.allowed[v + r]) continue;
          const vfloat score = load(at + r * width);
          // below the best, or NaN over a number; or the first one at all, which may be +inf
          const vint better = (~(score >= best) & (best == best)) | (id < 0);
          best = better ? score : best;
          id = better ? static_cast<int32_t>(v + r) - vint{} : id;
        }
        store(values, best);
        __builtin_memcpy(ids, &id, sizeof id);
      }
    }
  }
}

void oracle(const OracleTask &a) { a.x.vectors == 2 ? oracle_blocks<2>(a) : oracle_blocks<1>(a); }

// As the vector code does it: left to itself the compiler multiplies eight at a time, then adds, rounding twice.
inline float multiply_add(float x, float y, float sum) {
#ifdef __FMA__
  return __builtin_fmaf(x, y, sum);
#else
  return sum + x * y;
#endif
}

void exact_scores(const float *query, const Matrix &table, int64_t dim, const int32_t *ids, int64_t count, float *scores) {
  constexpr int kChains = 8;  // in flight together; each is one chain, as in score_block
  const bool wide = table.dtype == LR_FLOAT32;
  for (int64_t i = 0; i < count; i += kChains) {
    const float *rows[kChains];
    const bf16 *narrow[kChains];
    float acc[kChains] = {};
    for (int c = 0; c < kChains; ++c) {
      const int64_t at = ids[i + c < count ? i + c : i] * table.stride;
      rows[c] = static_cast<const float *>(table.data) + (wide ? at : 0);
      narrow[c] = static_cast<const bf16 *>(table.data) + (wide ? 0 : at);
    }
    if (wide)
      for (int64_t k = 0; k < dim; ++k)
        LR_UNROLL for (int c = 0; c < kChains; ++c) acc[c] = multiply_add(rows[c][k], query[k], acc[c]);
    else
      for (int64_t k = 0; k < dim; ++k)
        LR_UNROLL for (int c = 0; c < kChains; ++c) acc[c] = multiply_add(widen(narrow[c][k]), query[k], acc[c]);
    for (int c = 0; c < kChains && i + c < count; ++c) scores[i + c] = acc[c];
  }
}

#ifdef LR_INT8_DOT
struct Quantised {
  float scale, rest, norm, whole;  // |x - q * scale|, |q * scale|, |x|: upper bounds but for `whole`'s rounding
  int32_t sum;
};

// Bytes of a row, `offset` added; q gets 4 * words bytes. False if it cannot be bounded.
inline bool quantise(const float *x, int64_t dim, int64_t words, int offset, uint8_t *q, Quantised &out) {
  // The largest magnitude by its bits, among which NaN is above infinity: a comparison of floats would lose it.
  vint top = {};
  int64_t k = 0;
  for (; k + kLanes <= dim; k += kLanes) {
    const vint size = (vint)load(x + k) & 0x7fffffff;
    top = size > top ? size : top;
  }
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits = top[i] > bits ? top[i] : bits;
  for (; k < dim; ++k) {
    int32_t size;
    __builtin_memcpy(&size, x + k, 4);
    size &= 0x7fffffff;
    bits = size > bits ? size : bits;
  }
  float most;
  __builtin_memcpy(&most, &bits, 4);
  if (!(most < 1e15f)) return false;
  if (most != 0 && most < 1e-15f) return false;  // squares would underflow
  const float scale = most / 127, inverse = most > 0 ? 127 / most : 0;
  const vfloat shift = vfloat{} + 12582912.f;
  vfloat rest = {}, norm = {}, whole = {};
  vint sums = {};
  for (k = 0; k + kLanes <= dim; k += kLanes) {
    const vfloat v = load(x + k), rounded = (v * inverse + shift) - shift;
    const vfloat back = rounded * scale, away = v - rounded * scale;
    const vint byte = (vint)_mm512_cvtps_epi32((__m512)rounded);
    rest += away * away, norm += back * back, whole += v * v, sums += byte;
    _mm_storeu_si128(reinterpret_cast<__m128i *>(q + k), _mm512_cvtepi32_epi8((__m512i)(byte + offset)));
  }
  float r = sum(rest), n = sum(norm), w = sum(whole);
  int32_t s = 0;
  for (int i = 0; i < kLanes; ++i) s += sums[i];
  for (; k < dim; ++k) {
    const float rounded = (x[k] * inverse + 12582912.f) - 12582912.f, away = x[k] - rounded * scale;
    r += away * away, n += rounded * scale * (rounded * scale), w += x[k] * x[k], s += static_cast<int32_t>(rounded);
    q[k] = static_cast<uint8_t>(static_cast<int32_t>(rounded) + offset);
  }
  for (; k < 4 * words; ++k) q[k] = 0;  // the other side has zeros there, or here
  const float up = 1 + static_cast<float>(dim + 16) * 2.4e-7f;  // rounding of these sums
  out = {scale, __builtin_sqrtf(r) * up, __builtin_sqrtf(n) * up, __builtin_sqrtf(w) * up, s};
  return true;
}

bool screen_pack(const Combination &c, const ScreenPanels &x, int64_t first, int64_t begin, int64_t end) {
  constexpr int64_t width = 2 * kLanes;
  Scratch other(c.dim), bytes(x.depth);
  const float slack = static_cast<float>(c.dim + 16) * 2.4e-7f;
  for (int64_t panel = begin; panel < end; ++panel) {
    int32_t *to = x.words + panel * x.depth * width;
    for (int64_t lane = 0; lane < width; ++lane) {
      const int64_t t = panel * width + lane;
      if (t >= x.rows) {
        for (int64_t k = 0; k < x.depth; ++k) to[k * width + lane] = 0;
        x.scale[t] = x.bound[t] = x.norm[t] = 0, x.sums[t] = 0;
        continue;
      }
      float *row = x.rows_data + t * c.dim;
      Quantised q;
      combine_row(c, first + t, row, other.data);
      if (!quantise(row, c.dim, x.depth, 0, reinterpret_cast<uint8_t *>(bytes.data), q)) return false;
      for (int64_t k = 0; k < x.depth; ++k) __builtin_memcpy(to + k * width + lane, bytes.data + k, 4);
      x.scale[t] = q.scale, x.bound[t] = q.rest + slack * q.whole, x.norm[t] = q.norm, x.sums[t] = 128 * q.sum;
    }
  }
  return true;
}

template <int M>
void screen_rows(const int32_t *rows, int64_t stride, const int32_t *x, int64_t depth, int32_t *scores) {
  constexpr int N = 2, kBases = (M + 2) / 3;
  __m512i acc[M][N];
  LR_UNROLL for (int r = 0; r < M; ++r)
    LR_UNROLL for (int u = 0; u < N; ++u) acc[r][u] = _mm512_setzero_si512();
  const int32_t *base[kBases];
  LR_UNROLL for (int i = 0; i < kBases; ++i) base[i] = rows + 3 * i * stride;
  for (int64_t k = 0; k < depth; ++k) {
    __m512i xv[N];
    LR_UNROLL for (int u = 0; u < N; ++u) xv[u] = _mm512_loadu_si512(x + u * kLanes);
    x += N * kLanes;
    LR_UNROLL for (int r = 0; r < M; ++r) {
      const __m512i w = _mm512_set1_epi32(base[r / 3][(r % 3) * stride]);
      LR_UNROLL for (int u = 0; u < N; ++u) acc[r][u] = _mm512_dpbusd_epi32(acc[r][u], w, xv[u]);
    }
    LR_UNROLL for (int i = 0; i < kBases; ++i) ++base[i];
  }
  LR_UNROLL for (int r = 0; r < M; ++r)
    LR_UNROLL for (int u = 0; u < N; ++u) _mm512_storeu_si512(scores + (r * N + u) * kLanes, acc[r][u]);
}

bool screen(const ScreenTask &a) {
  constexpr int64_t width = 2 * kLanes;
  // Twice: the sum here and the chain of the full pass may err to either side.
  const float slack = 2 * static_cast<float>(a.x.dim + 16) * 2.4e-7f;
  const int64_t panels = (a.x.rows + width - 1) / width, most = 8 * kRows2, stride = a.x.depth + 16;
  Scratch bytes(most * stride), row(a.x.dim), lower(most * width);
  int32_t *words = reinterpret_cast<int32_t *>(bytes.data), *scores = reinterpret_cast<int32_t *>(lower.data);
  Quantised q[most];
  const auto values_of = [&](int64_t v) -> const float * {
    if (a.table.dtype == LR_FLOAT32) return static_cast<const float *>(a.table.data) + v * a.table.stride;
    read_row(a.table, v, a.x.dim, row.data);
    return row.data;
  };
  for (int64_t v = a.begin; v < a.end; v += most) {
    const int64_t count = a.end - v < most ? a.end - v : most;
    for (int64_t r = 0; r < count; ++r) {
      if (!quantise(values_of(v + r), a.x.dim, a.x.depth, 128, reinterpret_cast<uint8_t *>(words + r * stride), q[r])) return false;
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int32_t *x = a.x.words + panel * a.x.depth * width;
      int64_t r = 0;
      for (; r + kRows2 <= count; r += kRows2) screen_rows<kRows2>(words + r * stride, stride, x, a.x.depth, scores + r * width);
      for (; r < count; ++r) screen_rows<1>(words + r * stride, stride, x, a.x.depth, scores + r * width);
      for (int u = 0; u < 2; ++u) {
        const int64_t at = panel * width + u * kLanes;
        const vfloat scale = load(a.x.scale + at), bound = load(a.x.bound + at), norm = load(a.x.norm + at);
        vint sums;
        __builtin_memcpy(&sums, a.x.sums + at, sizeof sums);
        vfloat upper = load(a.upper + at), best = vfloat{} + __builtin_inff();
        vint which = {};
        for (r = 0; r < count; ++r) {
          if (a.allowed && !a.allowed[v + r]) continue;
          vint product;
          __builtin_memcpy(&product, scores + r * width + u * kLanes, sizeof product);
          const vfloat score = (vfloat)_mm512_cvtepi32_ps((__m512i)(product - sums)) * (q[r].scale * scale);
          const vfloat room = (q[r].whole * bound + q[r].rest * norm) * 1.0001f;  // and the rounding of this line
          store(lower.data + r * width + u * kLanes, score - room);
          const vint better = score < best;
          best = better ? score : best;
          which = better ? vint{} + static_cast<int32_t>(r) : which;
        }
        // What looks best is scored in float32, a few times a token in all: a bound without the 8 bits' room.
        unsigned nearer = _mm512_cmp_ps_mask((__m512)best, (__m512)upper, _CMP_LT_OQ);
        for (; nearer; nearer &= nearer - 1) {
          const int lane = __builtin_ctz(nearer);
          const int64_t t = at + lane;
          if (t >= a.x.rows) break;
          const float reach = dot(a.x.rows_data + t * a.x.dim, values_of(v + which[lane]), a.x.dim) +
                              slack * (a.x.norm[t] + a.x.bound[t]) * q[which[lane]].whole;
          upper[lane] = reach < upper[lane] ? reach : upper[lane];
        }
        store(a.upper + at, upper);
        for (r = 0; r < count; ++r) {
          if (a.allowed && !a.allowed[v + r]) continue;
          const vfloat low = load(lower.data + r * width + u * kLanes);
          unsigned hits = _mm512_cmp_ps_mask((__m512)low, (__m512)upper, _CMP_LE_OQ);
          for (; hits; hits &= hits - 1) {
            const int lane = __builtin_ctz(hits);
            if (at + lane < a.x.rows && !a.emit(a.context, at + lane, v + r, low[lane])) return false;
          }
        }
      }
    }
  }
  return true;
}
constexpr auto kScreenPack = &screen_pack;
constexpr auto kScreen = &screen;
#else
constexpr bool (*kScreenPack)(const Combination &, const ScreenPanels &, int64_t, int64_t, int64_t) = nullptr;
constexpr bool (*kScreen)(const ScreenTask &) = nullptr;
#endif

struct Best {
  float value = __builtin_inff();
  int64_t id = -1;
  void offer(float score, int64_t v) {  // any order of ids
    const bool nan = score != score, held = value != value;
    const bool better = id < 0 || (nan ? !held : !held && score < value);
    const bool tie = id >= 0 && (nan ? held : score == value);
    if (better || (tie && v < id)) value = score, id = v;
  }
};

void oracle_candidates(const lr_oracle_args &a, int64_t begin, int64_t end) {
  const Matrix q{a.queries, a.queries_stride, a.queries_dtype}, q2{a.queries2, a.queries2_stride, a.queries2_dtype};
  const Matrix table{a.table, a.table_stride, a.table_dtype}, table2{a.table2, a.table2_stride, a.table2_dtype};
  Scratch row(a.dim), row2(a.dim2);
  for (int64_t t = begin; t < end; ++t) {
    read_row(q, t, a.dim, row.data);
    if (a.dim2) read_row(q2, t, a.dim2, row2.data);
    Best best;
    for (int64_t c = 0; c < a.candidate_count; ++c) {
      const int64_t v = read_id(a.candidates, a.candidates_dtype, t * a.candidate_count + c);
      if (v < 0 || (a.allowed && !a.allowed[v])) continue;
      float score = dot_row(row.data, table, v, a.dim);
      if (a.dim2) score += dot_row(row2.data, table2, v, a.dim2);
      best.offer(score, v);
    }
    a.ids[t] = best.id, a.values[t] = best.value;
  }
}

// -------------------------------------------------------------------------------------------------- online softmax

// exp(x) for x <= 0 within 2 ulp; 0 below -87.3, NaN for NaN.
inline vfloat exp_nonpositive(vfloat x) {
  const vfloat shift = vfloat{} + 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const vfloat t = x * 1.44269504f + shift;
  const vint n = (vint)t - (vint)shift;
  const vfloat nf = t - shift;
  const vfloat r = (x - nf * 0.693359375f) + nf * 2.12194440e-4f;
  vfloat p = vfloat{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  const vfloat e = (vfloat)((vint)p + (n << 23));
  const vfloat kept = x < -87.3f ? vfloat{} : e;
  return x != x ? x : kept;
}

inline vfloat select_max(vfloat a, vfloat b) { return a > b ? a : b; }  // NaN in b is kept, in a only if b is NaN

template <int N>
void read_theta(const SoftmaxTask &a, int64_t panel, int64_t v, int64_t count, float *scores) {
  constexpr int64_t width = N * kLanes;
  Scratch row(count);
  for (int64_t lane = 0; lane < width; ++lane) {
    const int64_t t = panel * width + lane;
    if (t < a.x.rows) {
      const Matrix part{a.theta.dtype == LR_FLOAT32
                            ? static_cast<const void *>(static_cast<const float *>(a.theta.data) + v)
                            : static_cast<const void *>(static_cast<const bf16 *>(a.theta.data) + v),
                        a.theta.stride, a.theta.dtype};
      read_row(part, t, count, row.data);
    } else {
      for (int64_t r = 0; r < count; ++r) row.data[r] = 0;
    }
    for (int64_t r = 0; r < count; ++r) scores[r * width + lane] = row.data[r];
  }
}

// kTiled: scores and means by tile products, panel after panel (tiles.inl).
template <int N, bool kTiled>
void softmax_blocks(const SoftmaxTask &a) {
  constexpr int64_t width = N * kLanes, kRows = kTiled ? 128 : kBlock<N>;
  const int64_t panels = a.panel_end - a.panel_begin, panel = (a.x.pairs ? a.x.depth / 2 : a.x.depth) * width;
  const int64_t all = a.x.rows - a.panel_begin * width;
  const float inf = __builtin_inff();
  const bool dense = a.theta.data != nullptr, scored = !dense && !a.x.pairs;
  Block<N> block(a.table, kTiled ? 0 : a.dim, a.mean || panels > 1);
  Scratch scores((kTiled ? 1 : panels) * kRows * width), slopes(a.softcap > 0 ? kRows * width : 0);
#ifdef LR_AMX
  Tiles tiles(kTiled, a.table, a.dim, a.mean != nullptr);
#endif
  for (int64_t v = a.begin; v < a.end; v += kRows) {
    const int64_t count = a.end - v < kRows ? a.end - v : kRows;
    const View rows = !kTiled && (scored || a.mean) ? block.read(v, count) : View{};
#ifdef LR_AMX
    if (kTiled && a.mean) tiles.stage(v, count);
#endif
    if (scored) score_block<N>(rows, count, a.x.packed + a.panel_begin * panel, panel, panels, a.dim, false, scores.data);
    for (int64_t p = 0; p < panels; ++p) {
      float *z = scores.data + (kTiled ? 0 : p * kRows * width);
      const int64_t local = p * width, token = a.panel_begin * width + local;
      const int64_t tokens = all - local < width ? all - local : width;
#ifdef LR_AMX
      if (kTiled)
        tiles.score(v, count, a.x.packed + (a.panel_begin + p) * panel, z);
      else
#endif
      if (dense)
        read_theta<N>(a, a.panel_begin + p, v, count, z);
      else if (a.x.pairs)
        score_pairs<N>(a.table, v, count, a.x.packed + (a.panel_begin + p) * panel, a.dim, z);

      const float slope = a.scale * a.inverse_temperature;
      if (a.softcap > 0) {
        for (int64_t r = 0; r < count; ++r)
          for (int u = 0; u < N; ++u) {
            float *at = z + r * width + u * kLanes;
            const vfloat raw = (load(at) + (a.bias ? a.bias[v + r] : 0.f)) * (a.scale / a.softcap);
            const vfloat e = exp_nonpositive(raw > 0 ? -2 * raw : 2 * raw);  // of |raw|: no overflow
            const vfloat tanh = (1 - e) / (1 + e);
            store(at, (raw > 0 ? tanh : -tanh) * (a.softcap * a.inverse_temperature));
            store(slopes.data + (at - z), 4 * e / ((1 + e) * (1 + e)));
          }
      } else if (a.bias || slope != 1) {
        for (int64_t r = 0; r < count; ++r)
          for (int u = 0; u < N; ++u) {
            float *at = z + r * width + u * kLanes;
            store(at, (load(at) + (a.bias ? a.bias[v + r] : 0.f)) * slope);
          }
      }

      if (a.targets)
        for (int64_t lane = 0; lane < tokens; ++lane) {
          const int64_t r = a.targets[token + lane] - v;
          if (r < 0 || r >= count) continue;
          a.target_logit[local + lane] = z[r * width + lane];
          a.target_slope[local + lane] = a.softcap > 0 ? slopes.data[r * width + lane] : 1.f;
          z[r * width + lane] = -inf;
        }

      for (int u = 0; u < N; ++u) {
        float *zu = z + u * kLanes;
        const vfloat old = load(a.max + local + u * kLanes);
        vfloat peak = old;
        for (int64_t r = 0; r < count; ++r) peak = select_max(peak, load(zu + r * width));
        const vfloat safe = peak == -inf ? vfloat{} : peak;
        const vfloat delta = old == -inf ? vfloat{} - inf : old - safe;
        const vfloat factor = exp_nonpositive(delta);
        store(a.max + local + u * kLanes, peak);
        vfloat sum = load(a.sum + local + u * kLanes), part = {};
        if (a.moment) {
          vfloat moment = load(a.moment + local + u * kLanes), add = {};
          moment = factor > 0 ? factor * (moment + delta * sum) : vfloat{};
          for (int64_t r = 0; r < count; ++r) {
            const vfloat x = load(zu + r * width) - safe, p = exp_nonpositive(x);
            add += p > 0 ? p * x : p;
          }
          store(a.moment + local + u * kLanes, moment + add);
        }
        if (a.mean) {
          for (int64_t r = 0; r < count; ++r) {
            const vfloat p = exp_nonpositive(load(zu + r * width) - safe);
            part += p;
            store(zu + r * width, a.softcap > 0 ? p * load(slopes.data + r * width + u * kLanes) : p);
          }
          for (int64_t lane = 0; lane < kLanes && u * kLanes + lane < tokens; ++lane)
            if (factor[lane] != 1) scale_row(a.mean + (local + u * kLanes + lane) * a.mean_stride, a.dim, factor[lane]);
        } else {
          for (int64_t r = 0; r < count; ++r) part += exp_nonpositive(load(zu + r * width) - safe);
        }
        sum = sum * factor + part;
        store(a.sum + local + u * kLanes, sum);

        if (a.emit) {  // the sums only grow: what is below this floor stays below
          float floor[kLanes];
          for (int lane = 0; lane < kLanes; ++lane)
            floor[lane] = peak[lane] + __builtin_logf(sum[lane]) + a.log_floor - 1e-3f;
          const vfloat least = load(floor);
          for (int64_t r = 0; r < count; ++r) {
            const vint above = load(zu + r * width) >= least;
            int any = 0;
            for (int lane = 0; lane < kLanes; ++lane) any |= above[lane];
            if (!any || (a.allowed && !a.allowed[v + r])) continue;
            for (int lane = 0; lane < kLanes && u * kLanes + lane < tokens; ++lane)
              if (above[lane]) a.emit(a.context, local + u * kLanes + lane, v + r, zu[r * width + lane]);
          }
        }
      }
#ifdef LR_AMX
      if (kTiled && a.mean) tiles.add(count, z, a.mean + local * a.mean_stride, a.mean_stride);
#endif
    }
    if (a.mean && !kTiled)
      add_block<N>(rows, count, a.dim, scores.data, all < panels * width ? all : panels * width, a.mean, a.mean_stride);
  }
}

void softmax(const SoftmaxTask &a) {
  if (kTiles && a.x.pairs && a.x.vectors == 2 && a.dim >= 32) return softmax_blocks<2, kTiles>(a);
  a.x.vectors == 2 ? softmax_blocks<2, false>(a) : softmax_blocks<1, false>(a);
}

template <int N>
void softmax_backward_blocks(const lr_softmax_args &a, const Panels &x, int64_t first, int64_t begin, int64_t end) {
  constexpr int64_t width = N * kLanes;
  constexpr int64_t next = kBlock<N> * width;
  const int64_t panels = (x.rows + width - 1) / width, group = panels < kPanels ? panels : kPanels;
  const Matrix table{a.table, a.table_stride, a.table_dtype};
  const float inverse_tau = static_cast<float>(1 / a.tau);
  Block<N> block(table, a.dim, panels > 1);
  Scratch scores(group * next), row(kBlock<N> + kLanes), theta(kBlock<N> + kLanes);
  for (int64_t v = begin; v < end; v += kBlock<N>) {
    const int64_t count = end - v < kBlock<N> ? end - v : kBlock<N>;
    const View rows = block.read(v, count);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const float *z = scores.data + panel % group * next;
      if (panel % group == 0)
        score_block<N>(rows, count, x.packed + panel * x.depth * width, x.depth * width,
                       panels - panel < group ? panels - panel : group, a.dim, false, scores.data);
      for (int64_t lane = 0; lane < width && panel * width + lane < x.rows; ++lane) {
        const int64_t t = first + panel * width + lane;
        const bool wide = a.theta_dtype == LR_FLOAT32;
        if (wide)
          copy_row(static_cast<const float *>(a.theta) + t * a.theta_stride + v, count, theta.data);
        else
          copy_row(static_cast<const bf16 *>(a.theta) + t * a.theta_stride + v, count, theta.data);
        for (int64_t r = 0; r < count; ++r) row.data[r] = z[r * width + lane] - a.dots[t];
        for (int64_t r = 0; r < count; r += kLanes) {
          const vfloat x = load(theta.data + r) * inverse_tau - a.lse[t];
          const vfloat p = exp_nonpositive(x > 0 ? vfloat{} : x);
          store(row.data + r, p * load(row.data + r) * inverse_tau);
        }
        if (wide)
          for (int64_t r = 0; r < count; ++r) store(static_cast<float *>(a.grad_theta) + t * a.vocab + v + r, row.data[r]);
        else
          for (int64_t r = 0; r < count; ++r) store(static_cast<bf16 *>(a.grad_theta) + t * a.vocab + v + r, row.data[r]);
      }
    }
  }
}

void softmax_backward(const lr_softmax_args &a, const Panels &x, int64_t first, int64_t begin, int64_t end) {
  x.vectors == 2 ? softmax_backward_blocks<2>(a, x, first, begin, end)
                 : softmax_backward_blocks<1>(a, x, first, begin, end);
}

// --------------------------------------------------------------------------------- steps on the atoms of a mixture

void hull_candidates(const lr_hull_args &a, int64_t begin, int64_t end) {
  const Combination c = hull_combination(a);
  const Matrix table{a.table, a.table_stride, a.table_dtype};
  Scratch rows(2 * a.dim);
  for (int64_t t = begin; t < end; ++t) {
    combine_row(c, t, rows.data, rows.data + a.dim);
    Best best;
    for (int64_t i = 0; i < a.candidate_count; ++i) {
      const int64_t v = read_id(a.candidates, a.candidates_dtype, t * a.candidate_count + i);
      if (v >= 0 && (!a.allowed || a.allowed[v])) best.offer(dot_row(rows.data, table, v, a.dim), v);
    }
    a.vertex[t] = best.id;
  }
}

// z of the new atoms, by the code of mixture_embed.
inline void embed_rows(const void *table, int32_t table_dtype, int64_t table_stride, int64_t vocab, int64_t dim,
                       const void *ids, int32_t ids_dtype, const float *weights, int64_t rows, int64_t atoms, void *z,
                       int64_t begin, int64_t end) {
  lr_mixture_args m{};
  m.size = sizeof m, m.table = table, m.table_dtype = table_dtype, m.table_stride = table_stride, m.vocab = vocab;
  m.dim = dim, m.ids = ids, m.ids_dtype = ids_dtype, m.weights = weights, m.rows = rows, m.atoms = atoms, m.z = z;
  mixture_embed(m, begin, end);
}

template <typename Id>
void hull_rows_of(const lr_hull_args &a, int64_t begin, int64_t end) {
  const Combination c = hull_combination(a);
  const Matrix table{a.table, a.table_stride, a.table_dtype};
  Scratch rows(2 * a.dim);
  float *g = rows.data, *low = rows.data + a.dim;
  for (int64_t t = begin; t < end; ++t) {
    const Id *ids = static_cast<const Id *>(a.ids) + t * a.atoms;
    const float *weights = a.weights + t * a.atoms;
    Id *new_ids = static_cast<Id *>(a.new_ids) + t * a.atoms;
    float *new_weights = a.new_weights + t * a.atoms;
    const int64_t vertex = a.vertex[t];
    const float gamma = a.gamma[t];
    int64_t column = a.slot;
    float gap = 0;
    combine_row(c, t, g, low);
    if (vertex >= 0) {
      read_row(table, vertex, a.dim, low);
      for (int64_t i = a.atoms - 1; i >= 0; --i) {
        if (weights[i] == 0) continue;
        if (ids[i] == vertex) column = i;  // the first one, walking down
      }
      for (int64_t i = 0; i < a.atoms; ++i) {
        if (weights[i] == 0 || ids[i] == vertex) continue;
        gap += weights[i] * dot_difference(g, table, ids[i], low, a.dim);
      }
    }
    for (int64_t i = 0; i < a.atoms; ++i) new_ids[i] = ids[i], new_weights[i] = gamma == 0 ? weights[i] : (1 - gamma) * weights[i];
    if (vertex >= 0 && gamma > 0) new_ids[column] = static_cast<Id>(vertex), new_weights[column] += gamma;
    a.gap[t] = gap;
  }
}

void hull_rows(const lr_hull_args &a, int64_t begin, int64_t end) {
  a.ids_dtype == LR_INT64 ? hull_rows_of<int64_t>(a, begin, end) : hull_rows_of<int32_t>(a, begin, end);
  embed_rows(a.table, a.table_dtype, a.table_stride, a.vocab, a.dim, a.new_ids, a.ids_dtype, a.new_weights, a.rows,
             a.atoms, a.z, begin, end);
}

void entropic_scores(const lr_entropic_args &a, float *rel, float *span, int64_t begin, int64_t end) {
  const Combination c = entropic_combination(a);
  const Matrix table{a.table, a.table_stride, a.table_dtype};
  Scratch rows(2 * a.dim);
  for (int64_t t = begin; t < end; ++t) {
    combine_row(c, t, rows.data, rows.data + a.dim);
    const float *weights = a.weights + t * a.atoms;
    float *r = rel + t * a.atoms, mean = 0, least = 0, most = 0;
    for (int64_t i = 0; i < a.atoms; ++i) {
      r[i] = weights[i] > 0 ? dot_row(rows.data, table, read_id(a.ids, a.ids_dtype, t * a.atoms + i), a.dim) : 0;
      mean += weights[i] * r[i];
    }
    for (int64_t i = 0; i < a.atoms; ++i) {
      if (!(weights[i] > 0)) continue;
      r[i] -= mean;
      const float size = __builtin_fabsf(r[i]);
      if (size > most || size != size) most = size;
      if (r[i] < least || r[i] != r[i]) least = r[i];
    }
    a.gap[t] = -least, span[t] = most;
  }
}

void entropic_rows(const lr_entropic_args &a, const float *rel, const float *span, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const float *weights = a.weights + t * a.atoms, *r = rel + t * a.atoms;
    float *out = a.new_weights + t * a.atoms;
    const float scale = span[a.segment ? a.segment[t] : t];
    float total = 0;
    for (int64_t i = 0; i < a.atoms; ++i) {
      // relative to the least score: the exponent is <= 0 and cannot overflow
      out[i] = scale > 0 && weights[i] > 0
                   ? weights[i] * __builtin_expf(static_cast<float>(-a.eta) * ((r[i] + a.gap[t]) / scale))
                   : 0;
      total += out[i];
    }
    const bool moves = scale > 0 && total > 0;
    for (int64_t i = 0; i < a.atoms; ++i) out[i] = moves ? out[i] / total : weights[i];
  }
  embed_rows(a.table, a.table_dtype, a.table_stride, a.vocab, a.dim, a.ids, a.ids_dtype, a.new_weights, a.rows, a.atoms,
             a.z, begin, end);
}

}  // namespace

#define LR_STRING_(x) #x
#define LR_STRING(x) LR_STRING_(x)
#define LR_TABLE_(x) x##_isa
#define LR_TABLE(x) LR_TABLE_(x)
extern const Isa LR_TABLE(LR_ISA) = {LR_STRING(LR_ISA),
                                     kLanes,
                                     kSlice,
                                     kPairs,
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
