// mixture_embed and its gradient; included by kernels.inl.

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
