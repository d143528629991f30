// The vertex oracle over the whole table and over candidate sets; included by kernels.inl.

// kTiled: scores of pairs by tile products (tiles.inl).
template <int N, bool kTiled>
void oracle_blocks(const OracleTask &a) {
  constexpr int64_t width = N * kLanes, kRows = kTiled ? Tiles::kRows : kBlock<N>, next = kRows * width;
  const int64_t panels = (a.x.rows + width - 1) / width;
  const int64_t panel = (a.x.pairs ? a.x.depth / 2 : a.x.depth) * width, group = panels < kPanels ? panels : kPanels;
  Block<N> first(a.tables[0], a.x.pairs ? 0 : a.dims[0], panels > 1), second(a.tables[1], a.dims[1], panels > 1);
  const Tiles tiles(kTiled, a.tables[0], a.dims[0], false);
  Scratch scores(group * next);
  for (int64_t v = a.begin; v < a.end; v += kRows) {
    const int64_t count = a.end - v < kRows ? a.end - v : kRows;
    const View rows = a.x.pairs ? View{} : first.read(v, count), others = a.dims[1] ? second.read(v, count) : View{};
    for (int64_t from = 0; from < panels; from += group) {
      const int64_t here = panels - from < group ? panels - from : group;
      const float *x = a.x.packed + from * panel;
      if (kTiled)
        for (int64_t p = 0; p < here; ++p) tiles.score(v, count, x + p * panel, scores.data + p * next);
      else if (a.x.pairs)
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

void oracle(const OracleTask &a) {
  if (kTiles && a.x.pairs && a.dims[0] >= 32) return oracle_blocks<2, kTiles>(a);
  a.x.vectors == 2 ? oracle_blocks<2, false>(a) : oracle_blocks<1, false>(a);
}

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
