// entropic_step; included by kernels.inl.

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
