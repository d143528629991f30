// hull_step after its vertex is known, and over candidate sets; included by kernels.inl.

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
