// Micro-kernels: scores of table rows for panels of tokens, and weighted sums of rows; included by kernels.inl.

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
