// Products of bfloat16 in the tile registers of AMX, included by kernels.inl: 32 table rows against the 32 tokens of a
// panel of pairs, which is what a tile of a right operand looks like in memory, and weighted sums of a table's rows. A score
// is the same chain of products wherever its row is: rows that do not fill a tile are copied to where zeros do.
//
// A weight is the sum of two bfloat16 (its upper 16 bits, and the rest rounded), so that a product errs by 2^-17 of itself;
// sums are float32. Tile registers: 0 to 3 sums, 4 and 5 left operands, 6 and 7 right ones.

#ifdef LR_AMX
constexpr bool kTiles = true;

// gcc's tile loads do not tell the compiler that they read memory.
inline void written() { __asm__ volatile("" ::: "memory"); }

inline __m512i interleaved(__m512i a, __m512i b, bool upper) {  // a0 b0 a1 b1 ... of 16-bit words
  alignas(64) static const uint16_t order[2][32] = {
      {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
      {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62,
       31, 63}};
  return _mm512_permutex2var_epi16(a, _mm512_load_si512(order[upper]), b);
}

inline void transpose(__m512i *x) {  // 16 x 16 words of 32 bits
  __m512i y[16];
  LR_UNROLL for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  LR_UNROLL for (int i = 0; i < 16; i += 4)
    LR_UNROLL for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  LR_UNROLL for (int i = 0; i < 16; i += 8)
    LR_UNROLL for (int j = 0; j < 4; ++j) {
      y[i + j] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0x88);
      y[i + j + 4] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0xdd);
    }
  LR_UNROLL for (int j = 0; j < 8; ++j) {
    x[j] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0x88);
    x[j + 8] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0xdd);
  }
}

struct Tiles {
  static constexpr int64_t kRows = 128, kWidth = 2 * kLanes, kStep = 512;  // rows a block; bfloat16 a tile
  static constexpr int64_t kColumnsHere = 448;  // of a pass over the rows: a panel's part of them stays in L1

  Tiles(bool wanted, const Matrix &m, int64_t dim, bool mean)
      : wanted(wanted), table(m), dim(dim), columns((dim + 15) / 16),
        staged(wanted && mean ? columns * (kRows / 32) * kStep / 2 : 0),
        weights(wanted && mean ? kRows / 32 * 4 * kStep / 2 : 0), last(wanted ? 32 * dim / 2 : 0) {
    if (!wanted) return;
    __builtin_memset(last.data, 0, 64 * dim);
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    written();
    _tile_loadconfig(&shape);
  }
  ~Tiles() {
    if (wanted) _tile_release();
  }

  // scores[r][lane] of rows [v, v + count), and what is behind them up to a multiple of 32 rows. dim is even.
  void score(int64_t v, int64_t count, const float *x, float *scores) const {
    const bf16 *rows = static_cast<const bf16 *>(table.data) + v * table.stride;
    const int64_t tiled = count / 32 * 32;
    score_rows(rows, table.stride, tiled, x, scores);
    if (tiled == count) return;
    for (int64_t r = tiled; r < count; ++r)
      __builtin_memcpy(last.data + (r - tiled) * dim / 2, rows + r * table.stride, 2 * dim);
    score_rows(reinterpret_cast<const bf16 *>(last.data), dim, 32, x, scores + tiled * kWidth);
  }

  void score_rows(const bf16 *rows, int64_t stride, int64_t count, const float *x, float *scores) const {
    written();
    const int64_t whole = dim / 32 * 32, bytes = 2 * stride;
    for (int64_t k = 0; k < whole; k += kColumnsHere) {
      const int64_t end = whole - k < kColumnsHere ? whole : k + kColumnsHere;
      for (int64_t r = 0; r < count; r += 32) {
        float *to = scores + r * kWidth;
        if (k == 0) {
          _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        } else {
          _tile_loadd(0, to, 4 * kWidth); _tile_loadd(1, to + kLanes, 4 * kWidth);
          _tile_loadd(2, to + 16 * kWidth, 4 * kWidth); _tile_loadd(3, to + 16 * kWidth + kLanes, 4 * kWidth);
        }
        for (int64_t i = k; i < end; i += 32) {
          const float *tokens = x + i / 2 * kWidth;
          _tile_loadd(6, tokens, 4 * kWidth); _tile_loadd(4, rows + r * stride + i, bytes);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, tokens + kLanes, 4 * kWidth); _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, rows + (r + 16) * stride + i, bytes); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, to, 4 * kWidth); _tile_stored(1, to + kLanes, 4 * kWidth);
        _tile_stored(2, to + 16 * kWidth, 4 * kWidth); _tile_stored(3, to + 16 * kWidth + kLanes, 4 * kWidth);
      }
    }
    written();
    const float *rest = x + whole / 2 * kWidth;
    if (whole < dim)
      for (int64_t r = 0; r < count; r += 8)
        score_row_pairs<8, 2, false>(rows + r * stride + whole, stride, rest, dim - whole, scores + r * kWidth);
  }

  // Rows [v, v + count) as right operands for `add`: tile after tile of 32 rows and 16 columns, zeros around them.
  void stage(int64_t v, int64_t count) {
    const bf16 *rows = static_cast<const bf16 *>(table.data) + v * table.stride;
    bf16 *to = reinterpret_cast<bf16 *>(staged.data);
    const int64_t steps = (count + 31) / 32;
    for (int64_t pair = 0; pair < 16 * steps; ++pair)
      for (int64_t j = 0; j < dim; j += 32) {
        const uint32_t inside = dim - j < 32 ? (1u << (dim - j)) - 1 : ~0u;
        const uint32_t first = 2 * pair < count ? inside : 0, second = 2 * pair + 1 < count ? inside : 0;
        const bf16 *at = rows + 2 * pair * table.stride + j;
        const __m512i a = _mm512_maskz_loadu_epi16(first, at), b = _mm512_maskz_loadu_epi16(second, at + table.stride);
        bf16 *tile = to + (j / 16 * steps + pair / 16) * kStep + pair % 16 * 32;
        _mm512_store_si512(tile, interleaved(a, b, false));
        if (j + 16 < dim) _mm512_store_si512(tile + steps * kStep, interleaved(a, b, true));
      }
  }

  // mean[lane][j] += sum_r p[r][lane] * rows[r][j] for the 32 tokens of a panel. What p holds behind `count` is set to zero.
  void add(int64_t count, float *p, float *mean, int64_t mean_stride) {
    const int64_t steps = (count + 31) / 32;
    for (int64_t i = count * kWidth; i < steps * 32 * kWidth; i += kLanes) store(p + i, vfloat{});
    bf16 *weight = reinterpret_cast<bf16 *>(weights.data);
    for (int64_t step = 0; step < steps; ++step)
      for (int64_t u = 0; u < 2; ++u) {
        __m512i upper[16], rest[16];
        LR_UNROLL for (int i = 0; i < 16; ++i) {
          const vfloat a = load(p + (step * 32 + 2 * i) * kWidth + u * kLanes);
          const vfloat b = load(p + (step * 32 + 2 * i + 1) * kWidth + u * kLanes);
          const vuint high_a = (vuint)a & 0xffff0000u, high_b = (vuint)b & 0xffff0000u;
          const vuint low_a = (vuint)(a - (vfloat)high_a) + 0x8000u, low_b = (vuint)(b - (vfloat)high_b) + 0x8000u;
          upper[i] = (__m512i)(high_a >> 16 | high_b);
          rest[i] = (__m512i)(low_a >> 16 | (low_b & 0xffff0000u));
        }
        transpose(upper), transpose(rest);
        bf16 *tile = weight + (step * 4 + u) * kStep;
        LR_UNROLL for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + i * 32, upper[i]);
        LR_UNROLL for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + 2 * kStep + i * 32, rest[i]);
      }
    written();
    const bf16 *right = reinterpret_cast<const bf16 *>(staged.data);
    const int64_t bytes = 4 * mean_stride;
    for (int64_t j = 0; j < columns; j += 2, right += 2 * steps * kStep) {
      float *to = mean + j * 16, *below = to + 16 * mean_stride;
      const bool both = j + 1 < columns;
      _tile_loadd(0, to, bytes); _tile_loadd(2, below, bytes);
      if (both) {
        _tile_loadd(1, to + 16, bytes); _tile_loadd(3, below + 16, bytes);
      }
      for (int64_t step = 0; step < steps; ++step) {
        const bf16 *left = weight + step * 4 * kStep;
        _tile_loadd(6, right + step * kStep, 64);
        if (both) {
          _tile_loadd(7, right + (steps + step) * kStep, 64);
        }
        for (int half = 0; half < 2; ++half, left += 2 * kStep) {
          _tile_loadd(4, left, 64); _tile_loadd(5, left + kStep, 64);
          _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(2, 5, 6);
          if (both) {
            _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(3, 5, 7);
          }
        }
      }
      _tile_stored(0, to, bytes); _tile_stored(2, below, bytes);
      if (both) {
        _tile_stored(1, to + 16, bytes); _tile_stored(3, below + 16, bytes);
      }
    }
    written();
  }

  bool wanted;
  const Matrix &table;
  int64_t dim, columns;
  Scratch staged, weights, last;
};
#else
constexpr bool kTiles = false;
struct Tiles {  // never asked for anything
  static constexpr int64_t kRows = 128;
  Tiles(bool, const Matrix &, int64_t, bool) {}
  void score(int64_t, int64_t, const float *, float *) const {}
  void stage(int64_t, int64_t) {}
  void add(int64_t, float *, float *, int64_t) {}
};
#endif
