// Rows of a table or of a combination of gradients as float32, and tokens packed into panels; included by kernels.inl.

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
