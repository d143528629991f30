// The CPU library's C entry points: check, choose the instruction set, split the rows over threads.
#include "cpu/isa.h"
#include "cpu/thread_pool.h"
#include "error.h"

namespace {

using latentrevise::fail;
using latentrevise::cpu::active;
using latentrevise::cpu::parallel_ranges;

int check(const lr_mixture_args *a, bool backward) {
  if (const int status = latentrevise::check_mixture(a, backward)) return status;
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

}  // namespace

extern "C" {

int lr_cpu_mixture_embed(const lr_mixture_args *a) {
  if (const int status = check(a, false)) return status;
  parallel_ranges(a->threads, a->rows, [a](int64_t begin, int64_t end) { active().mixture_embed(*a, begin, end); });
  return LR_OK;
}

int lr_cpu_mixture_embed_backward(const lr_mixture_args *a) {
  if (const int status = check(a, true)) return status;
  parallel_ranges(a->threads, a->rows,
                  [a](int64_t begin, int64_t end) { active().mixture_embed_backward(*a, begin, end); });
  return LR_OK;
}

const char *lr_cpu_isa(void) { return active().name; }

const char *lr_last_error(void) { return latentrevise::error_buffer(); }
}
