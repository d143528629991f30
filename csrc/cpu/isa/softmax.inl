// Online softmax over the vocabulary, and the gradient of softmax_mixture; included by kernels.inl.

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
  constexpr int64_t width = N * kLanes, kRows = kTiled ? Tiles::kRows : kBlock<N>;
  const int64_t panels = a.panel_end - a.panel_begin, panel = (a.x.pairs ? a.x.depth / 2 : a.x.depth) * width;
  const int64_t all = a.x.rows - a.panel_begin * width;
  const float inf = __builtin_inff();
  const bool dense = a.theta.data != nullptr, scored = !kTiled && !dense && !a.x.pairs;
  Block<N> block(a.table, kTiled ? 0 : a.dim, a.mean || panels > 1);
  Scratch scores((kTiled ? 1 : panels) * kRows * width), slopes(a.softcap > 0 ? kRows * width : 0);
  Tiles tiles(kTiled, a.table, a.dim, a.mean != nullptr);
  for (int64_t v = a.begin; v < a.end; v += kRows) {
    const int64_t count = a.end - v < kRows ? a.end - v : kRows;
    const View rows = !kTiled && (scored || a.mean) ? block.read(v, count) : View{};
    if (kTiled && a.mean) tiles.stage(v, count);
    if (scored) score_block<N>(rows, count, a.x.packed + a.panel_begin * panel, panel, panels, a.dim, false, scores.data);
    for (int64_t p = 0; p < panels; ++p) {
      float *z = scores.data + (kTiled ? 0 : p * kRows * width);
      const int64_t local = p * width, token = a.panel_begin * width + local;
      const int64_t tokens = all - local < width ? all - local : width;
      if (dense)
        read_theta<N>(a, a.panel_begin + p, v, count, z);
      else if (kTiled)
        tiles.score(v, count, a.x.packed + (a.panel_begin + p) * panel, z);
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
      if (kTiled && a.mean) tiles.add(count, z, a.mean + local * a.mean_stride, a.mean_stride);
    }
    if (a.mean && !kTiled)
      add_block<N>(rows, count, a.dim, scores.data, all < panels * width ? all : panels * width, a.mean, a.mean_stride);
  }
}

void softmax(const SoftmaxTask &a) {
  const bool dense_means = a.theta.data != nullptr && a.table.dtype == LR_BFLOAT16 && a.x.vectors == 2;
  if (kTiles && (a.x.pairs || dense_means) && a.dim >= 32) return softmax_blocks<2, kTiles>(a);
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
