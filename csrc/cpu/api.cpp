// The CPU library's C entry points: check, choose the instruction set, cut the work into tasks, merge what they found.
//
// Nothing a caller can see depends on the number of threads: a score is computed the same way in any task, the best of a
// row is associative, and where sums are split (the softmax operations) the split follows from the shapes alone and is
// merged in order.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/thread_pool.h"
#include "error.h"

namespace latentrevise::cpu {

Combination hull_combination(const lr_hull_args &a) {
  return {{a.gold, a.gold_stride, a.gold_dtype}, {a.away, a.away_stride, a.away_dtype}, static_cast<float>(a.alpha),
          static_cast<float>(a.beta), a.normalized != 0, a.dim};
}

Combination entropic_combination(const lr_entropic_args &a) {
  return {{a.gold, a.gold_stride, a.gold_dtype}, {a.away, a.away_stride, a.away_dtype}, static_cast<float>(a.alpha),
          static_cast<float>(a.beta), a.normalized != 0, a.dim};
}

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kPackedFloats = int64_t{4} << 20;  // tokens worked on together: 16 MiB of panels
constexpr int64_t kMostHits = int64_t{2} << 20;       // rows that screening may leave in all: 24 MiB
constexpr int64_t kMeanFloats = int64_t{6} << 20;    // partial sums of all tasks together: 24 MiB

int check(const lr_mixture_args *a, bool backward) {
  if (const int status = check_mixture(a, backward)) return status;
  if (a->table_dtype == LR_FLOAT16) return fail(LR_UNSUPPORTED, "the CPU library has no float16 kernels");
  if (a->threads < 1) return fail(LR_INVALID_ARGUMENT, "threads must be >= 1, got %d", a->threads);
  for (int64_t i = 0; i < a->rows * a->atoms; ++i) {
    const int64_t id = a->ids_dtype == LR_INT64 ? static_cast<const int64_t *>(a->ids)[i]
                                                : static_cast<const int32_t *>(a->ids)[i];
    if (id < 0 || id >= a->vocab)
      return fail(LR_OUT_OF_RANGE, "ids[%lld, %lld] = %lld is outside the table of %lld rows", (long long)(i / a->atoms),
                  (long long)(i % a->atoms), (long long)id, (long long)a->vocab);
  }
  return LR_OK;
}

// What every vocabulary-sized operation demands of its struct.
template <typename Args>
int check_table(const Args *a, const char *name) {
  if (a == nullptr || a->size < sizeof(Args))
    return fail(LR_INVALID_ARGUMENT, "%s: the argument struct is missing or from an older header", name);
  if (a->rows < 0 || a->dim < 1 || a->vocab < 1 || INT32_MAX < a->vocab || a->table_stride < a->dim)
    return fail(LR_INVALID_ARGUMENT, "%s: bad shape: rows %lld, dim %lld, vocab %lld, table stride %lld", name,
                (long long)a->rows, (long long)a->dim, (long long)a->vocab, (long long)a->table_stride);
  if (a->threads < 1) return fail(LR_INVALID_ARGUMENT, "%s: threads must be >= 1, got %d", name, a->threads);
  if (a->table_dtype != LR_FLOAT32 && a->table_dtype != LR_BFLOAT16)
    return fail(LR_UNSUPPORTED, "%s: the table must be float32 or bfloat16, got code %d", name, a->table_dtype);
  if (a->table == nullptr) return fail(LR_INVALID_ARGUMENT, "%s: the table pointer is null", name);
  return LR_OK;
}

int check_operand(const char *name, const char *what, const void *data, int32_t dtype, int64_t rows) {
  if (dtype != LR_FLOAT32 && dtype != LR_BFLOAT16)
    return fail(LR_UNSUPPORTED, "%s: %s must be float32 or bfloat16, got code %d", name, what, dtype);
  if (rows > 0 && data == nullptr) return fail(LR_INVALID_ARGUMENT, "%s: the pointer of %s is null", name, what);
  return LR_OK;
}

// No exception may cross the C boundary.
template <typename Body>
int guarded(Body &&body) {
  try {
    body();
    return LR_OK;
  } catch (const std::bad_alloc &) {
    return fail(LR_OUT_OF_MEMORY, "not enough memory");
  } catch (const std::exception &error) {
    return fail(LR_INVALID_ARGUMENT, "%s", error.what());
  }
}

template <typename Body>
void parallel_tasks(int threads, int64_t count, Body &&body) {
  run_parts(
      threads, static_cast<int>(count),
      [](void *context, int part) { (*static_cast<std::remove_reference_t<Body> *>(context))(int64_t{part}); }, &body);
}

struct Aligned {
  explicit Aligned(int64_t floats) : owner(new float[static_cast<size_t>(floats) + 16]) {
    void *p = owner.get();
    size_t room = (static_cast<size_t>(floats) + 16) * sizeof(float);
    data = static_cast<float *>(std::align(64, static_cast<size_t>(floats) * sizeof(float), p, room));
  }
  std::unique_ptr<float[]> owner;
  float *data;
};

// Tokens [first, first + rows) packed for the micro-kernel, in chunks that bound the memory.
struct Packed {
  Packed(int64_t rows, int64_t depth, bool pairs = false)
      : vectors(rows > active().lanes || (pairs && active().tiles) ? 2 : 1), width(vectors * active().lanes), depth(depth), pairs(pairs),
        chunk(std::max(width, kPackedFloats / depth / width * width)),
        buffer((std::min(chunk, rows) + width - 1) / width * width * depth) {}
  Panels panels(int64_t count) const { return {buffer.data, depth, count, vectors, pairs}; }
  int64_t padded(int64_t count) const { return (count + width - 1) / width * width; }
  void fill(int threads, const Combination &c, int64_t first, int64_t count, int64_t offset) const {
    const Panels x = panels(count);
    parallel_ranges(threads, padded(count) / width,
                    [&](int64_t begin, int64_t end) { active().pack(c, x, first, offset, begin, end); });
  }
  int32_t vectors;
  int64_t width, depth;
  bool pairs;
  int64_t chunk;
  Aligned buffer;
};

Combination plain(const void *data, int64_t stride, int32_t dtype, int64_t dim) {
  return {{data, stride, dtype}, {nullptr, 0, LR_FLOAT32}, 1.f, 0.f, false, dim};
}

bool native_pairs(int32_t queries_dtype, int32_t table_dtype, int64_t dim) {
  return active().bf16_pairs && queries_dtype == LR_BFLOAT16 && table_dtype == LR_BFLOAT16 && dim % 2 == 0;
}

// ids and values of the tokens in `x`, from one task per part of the vocabulary.
void find_vertices(int threads, const Panels &x, int64_t padded, const Matrix &table, const Matrix &second, int64_t dim,
                   int64_t dim2, int64_t vocab, const uint8_t *allowed, int64_t *ids, float *values) {
  // Some more parts than threads, so that a thread that is held up does not hold up the rest; at least 256 rows each.
  const int64_t parts = threads == 1 ? 1 : std::clamp<int64_t>(vocab / 256, 1, 8 * threads);
  std::vector<float> best(parts * padded, kInf);
  std::vector<int32_t> found(parts * padded, -1);
  parallel_tasks(threads, parts, [&](int64_t part) {
    active().oracle({x, {table, second}, {dim, dim2}, allowed, vocab * part / parts, vocab * (part + 1) / parts,
                     best.data() + part * padded, found.data() + part * padded});
  });
  for (int64_t t = 0; t < x.rows; ++t) {
    float value = kInf;
    int64_t id = -1;
    for (int64_t part = 0; part < parts; ++part) {
      const float other = best[part * padded + t];
      const int64_t other_id = found[part * padded + t];
      if (other_id >= 0 && (id < 0 || (!(other >= value) && !std::isnan(value)))) value = other, id = other_id;
    }
    ids[t] = id;
    if (values) values[t] = value;
  }
}

// The same by certified screening: ids and values identical to those of find_vertices, bit for bit. The number of rows
// scored exactly, or -1 where the bounds do not help (too many rows left, inputs that cannot be bounded); nothing is
// written then.
int64_t screen_vertices(int threads, const Combination &c, int64_t first, int64_t rows, const Matrix &table, int64_t vocab,
                        const uint8_t *allowed, int64_t *ids, float *values) {
  struct Hit {
    int32_t token, id;
    float lower;
  };
  struct Hits {
    std::vector<Hit> list;
    size_t most;
  };
  const int64_t width = 2 * active().lanes, padded = (rows + width - 1) / width * width, depth = (c.dim + 3) / 4;
  Aligned words(padded * depth), tokens(rows * c.dim), numbers(3 * padded);
  std::vector<int32_t> sums(padded);
  const ScreenPanels x{reinterpret_cast<int32_t *>(words.data), tokens.data,    numbers.data,
                       numbers.data + padded,                   numbers.data + 2 * padded, sums.data(), depth, c.dim, rows};
  std::atomic<bool> fine{true};
  parallel_ranges(threads, padded / width, [&](int64_t begin, int64_t end) {
    if (!active().screen_pack(c, x, first, begin, end)) fine = false;
  });
  if (!fine) return -1;
  const int64_t parts = threads == 1 ? 1 : 4 * threads;
  std::vector<float> upper(parts * padded, kInf);
  std::vector<Hits> hits(parts);
  parallel_tasks(threads, parts, [&](int64_t part) {
    if (!fine) return;
    hits[part].most = static_cast<size_t>(kMostHits / parts);
    const auto emit = [](void *context, int64_t token, int64_t v, float lower) {
      auto &h = *static_cast<Hits *>(context);
      h.list.push_back({static_cast<int32_t>(token), static_cast<int32_t>(v), lower});
      return h.list.size() < h.most;
    };
    if (!active().screen({x, table, allowed, vocab * part / parts, vocab * (part + 1) / parts,
                          upper.data() + part * padded, emit, &hits[part]}))
      fine = false;
  });
  if (!fine) return -1;
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t part = 1; part < parts; ++part) upper[t] = std::min(upper[t], upper[part * padded + t]);
  std::vector<std::vector<int32_t>> left(rows);  // by rising id
  for (const Hits &part : hits)
    for (const Hit &hit : part.list)
      if (hit.lower <= upper[hit.token]) left[hit.token].push_back(hit.id);
  int64_t count = 0;
  for (const auto &ids_left : left) count += static_cast<int64_t>(ids_left.size());
  parallel_ranges(threads, rows, [&](int64_t begin, int64_t end) {
    std::vector<float> scores;
    for (int64_t t = begin; t < end; ++t) {
      scores.resize(left[t].size());
      active().exact_scores(tokens.data + t * c.dim, table, c.dim, left[t].data(), left[t].size(), scores.data());
      const auto best = std::min_element(scores.begin(), scores.end());  // the first of equal ones
      ids[t] = best == scores.end() ? -1 : left[t][best - scores.begin()];
      if (values) values[t] = best == scores.end() ? kInf : *best;
    }
  });
  return count;
}

thread_local int64_t rescored = -1;  // what lr_cpu_rescored() answers

bool screened(int64_t left) {
  rescored = left < 0 || rescored < 0 ? -1 : rescored + left;
  return left >= 0;
}

// Worth it where products outweigh the quantisation of the table, and only where scores are float32 chains.
bool worth_screening(int64_t rows, int64_t vocab, bool pairs) {
  return active().screen != nullptr && !pairs && rows >= 64 && vocab >= 4096;
}

// ---------------------------------------------------------------------------------------------------------- softmax

// Running sums of `tokens` tokens in one part of the vocabulary, to be merged.
struct Partial {
  Partial(int64_t tokens, bool moment, int64_t mean_stride)
      : max(tokens, -kInf), sum(tokens, 0), moment(moment ? tokens : 0, 0), target_logit(tokens, -kInf),
        target_slope(tokens, 0), mean(tokens * mean_stride) {
    std::fill_n(mean.data, tokens * mean_stride, 0.f);
  }
  std::vector<float> max, sum, moment, target_logit, target_slope;
  Aligned mean;
};

struct Merged {
  double max, sum, moment, target_logit, target_slope;
};

Merged merge(const std::vector<Partial> &parts, size_t begin, size_t end, int64_t i) {
  Merged m{-kInf, 0, 0, -kInf, 0};
  for (size_t s = begin; s < end; ++s) m.max = std::max<double>(m.max, parts[s].max[i]);
  const double safe = std::isinf(m.max) && m.max < 0 ? 0 : m.max;
  for (size_t s = begin; s < end; ++s) {
    const Partial &p = parts[s];
    if (p.target_slope[i] != 0 || p.target_logit[i] > -kInf || std::isnan(p.target_logit[i]))
      m.target_logit = p.target_logit[i], m.target_slope = p.target_slope[i];
    if (p.sum[i] == 0) continue;
    const double shift = p.max[i] - safe, factor = std::exp(shift);
    m.sum += factor * p.sum[i];
    if (!p.moment.empty() && factor > 0) m.moment += factor * (p.moment[i] + shift * p.sum[i]);
  }
  m.max = safe;
  return m;
}

double softplus(double x) { return std::max(x, 0.) + std::log1p(std::exp(-std::fabs(x))); }

// Tasks of the softmax operations: token blocks of `panels` panels times parts of the vocabulary, from shapes alone.
struct SoftmaxPlan {
  SoftmaxPlan(int64_t panels, int64_t width, int64_t mean_stride, int64_t vocab)
      : width(width), block(8), blocks((panels + block - 1) / block), parts(16) {
    // Halved, not divided: an even number of equal parts keeps two, four or eight threads equally busy.
    while (parts > 1 && (parts * blocks > 16 || parts * panels * width * mean_stride > kMeanFloats || parts * 256 > vocab))
      parts /= 2;
  }
  int64_t width, block, blocks, parts;
};

template <typename Prepare>
std::vector<Partial> run_softmax(int threads, const SoftmaxPlan &plan, int64_t panels, int64_t vocab, bool moment,
                                 int64_t mean_stride, SoftmaxTask task, Prepare &&prepare) {
  std::vector<Partial> parts;
  parts.reserve(plan.blocks * plan.parts);
  for (int64_t i = 0; i < plan.blocks * plan.parts; ++i)
    parts.emplace_back(std::min(plan.block, panels - i / plan.parts * plan.block) * plan.width, moment, mean_stride);
  parallel_tasks(threads, plan.blocks * plan.parts, [&](int64_t i) {
    const int64_t block = i / plan.parts, part = i % plan.parts;
    Partial &p = parts[i];
    SoftmaxTask t = task;
    t.panel_begin = block * plan.block, t.panel_end = std::min(panels, t.panel_begin + plan.block);
    t.begin = vocab * part / plan.parts, t.end = vocab * (part + 1) / plan.parts;
    t.max = p.max.data(), t.sum = p.sum.data(), t.moment = moment ? p.moment.data() : nullptr;
    t.target_logit = p.target_logit.data(), t.target_slope = p.target_slope.data();
    t.mean = mean_stride ? p.mean.data : nullptr, t.mean_stride = mean_stride;
    prepare(i, t);
    active().softmax(t);
  });
  return parts;
}

template <typename Args>
void set_transform(SoftmaxTask &task, const Args &a) {
  task.bias = a.bias, task.scale = static_cast<float>(a.scale), task.softcap = static_cast<float>(a.softcap);
  task.inverse_temperature = static_cast<float>(1 / a.temperature);
}

// factor * (mean of the parts / sum), the caller adds its own term: out[j] = target[j] - mean
void merge_mean(const std::vector<Partial> &parts, size_t begin, size_t end, int64_t i, const Merged &m, int64_t dim,
                int64_t stride, std::vector<double> &mean) {
  std::fill(mean.begin(), mean.end(), 0.);
  for (size_t s = begin; s < end; ++s) {
    if (parts[s].sum[i] == 0) continue;
    const double factor = std::exp(parts[s].max[i] - m.max) / m.sum;
    const float *row = parts[s].mean.data + i * stride;
    for (int64_t j = 0; j < dim; ++j) mean[j] += factor * row[j];
  }
}

float element(const Matrix &m, int64_t row, int64_t j) {
  if (m.dtype == LR_FLOAT32) return static_cast<const float *>(m.data)[row * m.stride + j];
  const uint32_t bits = uint32_t{static_cast<const uint16_t *>(m.data)[row * m.stride + j]} << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

void store_element(void *data, int32_t dtype, int64_t i, float x) {
  if (dtype == LR_FLOAT32) {
    static_cast<float *>(data)[i] = x;
    return;
  }
  uint32_t u;
  std::memcpy(&u, &x, 4);
  static_cast<uint16_t *>(data)[i] =
      std::isnan(x) ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// Whole slices, and rows on different cache sets.
int64_t mean_stride_of(int64_t dim) {
  const int64_t slice = active().slice, stride = (dim + slice - 1) / slice * slice;
  return stride % 64 == 0 ? stride + 16 : stride;
}

void logprob_rows(const lr_logprob_args &a, const Packed &packed, int64_t first, int64_t rows) {
  const Matrix table{a.table, a.table_stride, a.table_dtype};
  packed.fill(a.threads, plain(a.queries, a.queries_stride, a.queries_dtype, a.dim), first, rows, 0);
  const int64_t panels = packed.padded(rows) / packed.width, stride = a.gradient ? mean_stride_of(a.dim) : 0;
  const SoftmaxPlan plan(panels, packed.width, stride, a.vocab);
  SoftmaxTask task{};
  task.x = packed.panels(rows), task.table = table, task.dim = a.dim, task.targets = a.targets + first;
  set_transform(task, a);
  const auto parts = run_softmax(a.threads, plan, panels, a.vocab, a.entropy != nullptr, stride, task,
                                 [](int64_t, SoftmaxTask &) {});
  const double slope = a.scale / a.temperature;
  parallel_ranges(a.threads, rows, [&](int64_t begin, int64_t end) {
    std::vector<double> mean(a.gradient ? a.dim : 0);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t block = n / (plan.block * plan.width), i = n - block * plan.block * plan.width;
      const size_t from = block * plan.parts, to = from + plan.parts;
      const Merged m = merge(parts, from, to, i);
      // With the target left out of the sums: log odds against it, accurate for p_y near 1 as well as near 0.
      const double odds = m.target_logit == kInf ? NAN : m.max + std::log(m.sum) - m.target_logit;
      const double logp = -softplus(odds), rest = std::exp(-softplus(-odds));
      a.logp[first + n] = static_cast<float>(logp);
      if (a.entropy) {
        const double p = std::exp(logp);
        double entropy = p > 0 ? -p * logp : 0;
        if (rest > 0) entropy += rest * (softplus(-odds) + std::log(m.sum) - m.moment / m.sum);
        a.entropy[first + n] = static_cast<float>(std::isnan(logp) ? logp : entropy);
      }
      if (!a.gradient) continue;
      float *out = a.gradient + (first + n) * a.dim;
      merge_mean(parts, from, to, i, m, a.dim, stride, mean);
      const int64_t y = a.targets[first + n];
      if (m.sum == 0)
        std::fill_n(out, a.dim, 0.f);  // the target is the whole distribution
      else
        for (int64_t j = 0; j < a.dim; ++j)
          out[j] = static_cast<float>(slope * rest * (m.target_slope * element(table, y, j) - mean[j]));
    }
  });
}

struct Listed {
  int64_t id;
  float z;
};

void plausible_rows(const lr_plausible_args &a, const Packed &packed, int64_t first, int64_t rows) {
  packed.fill(a.threads, plain(a.queries, a.queries_stride, a.queries_dtype, a.dim), first, rows, 0);
  const int64_t panels = packed.padded(rows) / packed.width;
  const SoftmaxPlan plan(panels, packed.width, 0, a.vocab);
  SoftmaxTask task{};
  task.x = packed.panels(rows), task.table = {a.table, a.table_stride, a.table_dtype}, task.dim = a.dim;
  set_transform(task, a);
  task.allowed = a.allowed, task.log_floor = static_cast<float>(a.log_p_min);
  using Lists = std::vector<std::vector<Listed>>;
  std::vector<Lists> lists(plan.blocks * plan.parts, Lists(plan.block * plan.width));
  const auto parts =
      run_softmax(a.threads, plan, panels, a.vocab, false, 0, task, [&](int64_t i, SoftmaxTask &t) {
        t.context = &lists[i];
        t.emit = [](void *context, int64_t token, int64_t v, float z) {
          (*static_cast<Lists *>(context))[token].push_back({v, z});
        };
      });
  parallel_ranges(a.threads, rows, [&](int64_t begin, int64_t end) {
    std::vector<Listed> kept;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t block = n / (plan.block * plan.width), i = n - block * plan.block * plan.width;
      const size_t from = block * plan.parts, to = from + plan.parts;
      const Merged m = merge(parts, from, to, i);
      const float floor = static_cast<float>(a.log_p_min), lse = static_cast<float>(m.max + std::log(m.sum));
      kept.clear();
      for (size_t s = from; s < to; ++s)
        for (const Listed &item : lists[s][i])
          if (item.z - lse >= floor) kept.push_back(item);
      std::sort(kept.begin(), kept.end(),
                [](const Listed &x, const Listed &y) { return x.z > y.z || (x.z == y.z && x.id < y.id); });
      a.counts[first + n] = static_cast<int64_t>(kept.size());
      int64_t *ids = a.ids + (first + n) * a.max_candidates;
      float *logps = a.logps + (first + n) * a.max_candidates;
      for (int64_t c = 0; c < a.max_candidates; ++c) {
        const bool there = c < static_cast<int64_t>(kept.size());
        ids[c] = there ? kept[c].id : -1, logps[c] = there ? kept[c].z - lse : -kInf;
      }
    }
  });
}

void softmax_mixture_rows(const lr_softmax_args &a, int64_t first, int64_t rows) {
  const int32_t vectors = rows > active().lanes ? 2 : 1;
  const int64_t width = vectors * active().lanes, panels = (rows + width - 1) / width, stride = mean_stride_of(a.dim);
  const SoftmaxPlan plan(panels, width, stride, a.vocab);
  const int64_t element_size = a.theta_dtype == LR_FLOAT32 ? 4 : 2;
  SoftmaxTask task{};
  task.x = {nullptr, 0, rows, vectors, false};
  task.theta = {static_cast<const char *>(a.theta) + first * a.theta_stride * element_size, a.theta_stride, a.theta_dtype};
  task.table = {a.table, a.table_stride, a.table_dtype}, task.dim = a.dim;
  task.scale = static_cast<float>(1 / a.tau), task.inverse_temperature = 1;
  const auto parts =
      run_softmax(a.threads, plan, panels, a.vocab, false, stride, task, [](int64_t, SoftmaxTask &) {});
  parallel_ranges(a.threads, rows, [&](int64_t begin, int64_t end) {
    std::vector<double> mean(a.dim);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t block = n / (plan.block * width), i = n - block * plan.block * width;
      const size_t from = block * plan.parts, to = from + plan.parts;
      const Merged m = merge(parts, from, to, i);
      merge_mean(parts, from, to, i, m, a.dim, stride, mean);
      const bool empty = m.sum == 0;
      for (int64_t j = 0; j < a.dim; ++j)
        store_element(a.z, a.table_dtype, (first + n) * a.dim + j, empty ? NAN : static_cast<float>(mean[j]));
      a.lse[first + n] = static_cast<float>(m.max + std::log(m.sum));
    }
  });
}

int check_ids(const char *name, const void *ids, int32_t dtype, int64_t count, int64_t vocab, int64_t lowest) {
  if (dtype != LR_INT32 && dtype != LR_INT64)
    return fail(LR_INVALID_ARGUMENT, "%s must be int32 or int64, got code %d", name, dtype);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = dtype == LR_INT64 ? static_cast<const int64_t *>(ids)[i] : static_cast<const int32_t *>(ids)[i];
    if (id < lowest || id >= vocab)
      return fail(LR_OUT_OF_RANGE, "%s holds %lld, outside the table of %lld rows", name, (long long)id, (long long)vocab);
  }
  return LR_OK;
}

template <typename Args>
int check_combination(const Args *a, const char *name) {
  if (const int status = check_operand(name, "G_gold", a->gold, a->gold_dtype, a->rows)) return status;
  if (a->away)
    if (const int status = check_operand(name, "G_away", a->away, a->away_dtype, a->rows)) return status;
  return check_ids("ids", a->ids, a->ids_dtype, a->rows * a->atoms, a->vocab, 0);
}

}  // namespace
}  // namespace latentrevise::cpu

using namespace latentrevise;
using namespace latentrevise::cpu;

extern "C" {

int lr_cpu_mixture_embed(const lr_mixture_args *a) {
  if (const int status = check(a, false)) return status;
  return guarded([a] {
    parallel_ranges(a->threads, a->rows, [a](int64_t begin, int64_t end) { active().mixture_embed(*a, begin, end); });
  });
}

int lr_cpu_mixture_embed_backward(const lr_mixture_args *a) {
  if (const int status = check(a, true)) return status;
  return guarded([a] {
    parallel_ranges(a->threads, a->rows,
                    [a](int64_t begin, int64_t end) { active().mixture_embed_backward(*a, begin, end); });
  });
}

int lr_cpu_vertex_oracle(const lr_oracle_args *a) {
  if (const int status = check_table(a, "vertex_oracle")) return status;
  if (const int status = check_operand("vertex_oracle", "G", a->queries, a->queries_dtype, a->rows)) return status;
  if (a->dim2) {
    if (const int status = check_operand("vertex_oracle", "Q2", a->queries2, a->queries2_dtype, a->rows)) return status;
    if (const int status = check_operand("vertex_oracle", "W2", a->table2, a->table2_dtype, 1)) return status;
  }
  if (a->candidates)
    if (const int status = check_ids("candidates", a->candidates, a->candidates_dtype, a->rows * a->candidate_count,
                                     a->vocab, -1))
      return status;
  return guarded([a] {
    if (a->candidates) {
      parallel_ranges(a->threads, a->rows,
                      [a](int64_t begin, int64_t end) { active().oracle_candidates(*a, begin, end); });
      return;
    }
    if (a->rows == 0) return;
    rescored = 0;
    const Packed packed(a->rows, a->dim + a->dim2,
                        a->dim2 == 0 && native_pairs(a->queries_dtype, a->table_dtype, a->dim));
    for (int64_t first = 0; first < a->rows; first += packed.chunk) {
      const int64_t rows = std::min(packed.chunk, a->rows - first);
      const Combination queries = plain(a->queries, a->queries_stride, a->queries_dtype, a->dim);
      const bool worth = a->dim2 == 0 && worth_screening(rows, a->vocab, packed.pairs);
      const Matrix table{a->table, a->table_stride, a->table_dtype};
      if (screened(worth ? screen_vertices(a->threads, queries, first, rows, table, a->vocab, a->allowed, a->ids + first,
                                           a->values + first)
                         : -1))
        continue;
      packed.fill(a->threads, queries, first, rows, 0);
      if (a->dim2)
        packed.fill(a->threads, plain(a->queries2, a->queries2_stride, a->queries2_dtype, a->dim2), first, rows, a->dim);
      find_vertices(a->threads, packed.panels(rows), packed.padded(rows), table,
                    {a->table2, a->table2_stride, a->table2_dtype}, a->dim, a->dim2, a->vocab, a->allowed,
                    a->ids + first, a->values + first);
    }
  });
}

int lr_cpu_linear_logprob(const lr_logprob_args *a) {
  if (const int status = check_table(a, "linear_logprob")) return status;
  if (const int status = check_operand("linear_logprob", "H", a->queries, a->queries_dtype, a->rows)) return status;
  if (const int status = check_ids("y", a->targets, LR_INT64, a->rows, a->vocab, 0)) return status;
  return guarded([a] {
    if (a->rows == 0) return;
    const Packed packed(a->rows, a->dim, native_pairs(a->queries_dtype, a->table_dtype, a->dim));
    for (int64_t first = 0; first < a->rows; first += packed.chunk)
      logprob_rows(*a, packed, first, std::min(packed.chunk, a->rows - first));
  });
}

int lr_cpu_plausible_vertices(const lr_plausible_args *a) {
  if (const int status = check_table(a, "plausible_vertices")) return status;
  if (const int status = check_operand("plausible_vertices", "H", a->queries, a->queries_dtype, a->rows)) return status;
  return guarded([a] {
    if (a->rows == 0) return;
    const Packed packed(a->rows, a->dim, native_pairs(a->queries_dtype, a->table_dtype, a->dim));
    for (int64_t first = 0; first < a->rows; first += packed.chunk)
      plausible_rows(*a, packed, first, std::min(packed.chunk, a->rows - first));
  });
}

int lr_cpu_softmax_mixture(const lr_softmax_args *a) {
  if (const int status = check_table(a, "softmax_mixture")) return status;
  if (const int status = check_operand("softmax_mixture", "theta", a->theta, a->theta_dtype, a->rows)) return status;
  return guarded([a] {
    const int64_t chunk = std::max<int64_t>(64, kMeanFloats / mean_stride_of(a->dim) / 64 * 64);
    for (int64_t first = 0; first < a->rows; first += chunk)
      softmax_mixture_rows(*a, first, std::min(chunk, a->rows - first));
  });
}

int lr_cpu_softmax_mixture_backward(const lr_softmax_args *a) {
  if (const int status = check_table(a, "softmax_mixture_backward")) return status;
  if (const int status = check_operand("softmax_mixture_backward", "theta", a->theta, a->theta_dtype, a->rows))
    return status;
  return guarded([a] {
    if (a->rows == 0) return;
    const Packed packed(a->rows, a->dim);
    for (int64_t first = 0; first < a->rows; first += packed.chunk) {
      const int64_t rows = std::min(packed.chunk, a->rows - first);
      packed.fill(a->threads, plain(a->grad_z, a->dim, LR_FLOAT32, a->dim), first, rows, 0);
      const Panels x = packed.panels(rows);
      const int64_t parts = std::clamp<int64_t>(a->vocab / 256, 1, 8 * a->threads);
      parallel_tasks(a->threads, parts, [&](int64_t part) {
        active().softmax_backward(*a, x, first, a->vocab * part / parts, a->vocab * (part + 1) / parts);
      });
    }
  });
}

int lr_cpu_hull_step(const lr_hull_args *a) {
  if (const int status = check_table(a, "hull_step")) return status;
  if (a->atoms < 1 || a->slot < 0 || a->slot >= a->atoms)
    return fail(LR_INVALID_ARGUMENT, "hull_step: slot %lld is not one of %lld columns", (long long)a->slot,
                (long long)a->atoms);
  if (const int status = check_combination(a, "hull_step")) return status;
  if (a->candidates)
    if (const int status = check_ids("candidates", a->candidates, a->candidates_dtype, a->rows * a->candidate_count,
                                     a->vocab, -1))
      return status;
  return guarded([a] {
    if (a->rows == 0) return;
    const Combination c = hull_combination(*a);
    if (a->candidates) {
      parallel_ranges(a->threads, a->rows, [a](int64_t begin, int64_t end) { active().hull_candidates(*a, begin, end); });
    } else {
      const Packed packed(a->rows, a->dim);
      const Matrix table{a->table, a->table_stride, a->table_dtype};
      rescored = 0;
      for (int64_t first = 0; first < a->rows; first += packed.chunk) {
        const int64_t rows = std::min(packed.chunk, a->rows - first);
        if (screened(worth_screening(rows, a->vocab, false)
                         ? screen_vertices(a->threads, c, first, rows, table, a->vocab, a->allowed, a->vertex + first, nullptr)
                         : -1))
          continue;
        packed.fill(a->threads, c, first, rows, 0);
        find_vertices(a->threads, packed.panels(rows), packed.padded(rows), table, {}, a->dim, 0, a->vocab, a->allowed, a->vertex + first, nullptr);
      }
    }
    parallel_ranges(a->threads, a->rows, [a](int64_t begin, int64_t end) { active().hull_rows(*a, begin, end); });
  });
}

int lr_cpu_entropic_step(const lr_entropic_args *a) {
  if (const int status = check_table(a, "entropic_step")) return status;
  if (const int status = check_combination(a, "entropic_step")) return status;
  return guarded([a] {
    std::vector<float> rel(a->rows * a->atoms), span(a->rows), shared(a->segment ? a->segments : 0, 0.f);
    parallel_ranges(a->threads, a->rows, [&](int64_t begin, int64_t end) {
      active().entropic_scores(*a, rel.data(), span.data(), begin, end);
    });
    if (a->segment)
      for (int64_t t = 0; t < a->rows; ++t) {
        float &most = shared.at(a->segment[t]);
        if (span[t] > most || std::isnan(span[t])) most = span[t];
      }
    const float *scales = a->segment ? shared.data() : span.data();
    parallel_ranges(a->threads, a->rows, [&](int64_t begin, int64_t end) {
      active().entropic_rows(*a, rel.data(), scales, begin, end);
    });
  });
}

int64_t lr_cpu_rescored(void) { return rescored; }

const char *lr_cpu_isa(void) { return active().name; }

#ifdef LATENTREVISE_X86
const char *lr_cpu_isas(void) { return "scalar avx2 avx512 avx512vnni avx512bf16 amx"; }
#else
const char *lr_cpu_isas(void) { return "scalar"; }
#endif

const char *lr_last_error(void) { return error_buffer(); }
}
