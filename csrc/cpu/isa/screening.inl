// Certified screening of the vertex oracle by 8-bit products (isa.h); included by kernels.inl.

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
