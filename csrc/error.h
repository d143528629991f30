// Status codes with a sentence: the message is kept per thread, so concurrent callers never read each other's.
#pragma once

#include <cstdarg>
#include <cstdio>

#include "latentrevise/kernels.h"

namespace latentrevise {

inline char *error_buffer() {
  static thread_local char buffer[512] = "";
  return buffer;
}

inline int fail(lr_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));
inline int fail(lr_status status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error_buffer(), 512, format, arguments);
  va_end(arguments);
  return status;
}

// The part of the mixture contract that both libraries check before they touch memory.
inline int check_mixture(const lr_mixture_args *a, bool backward) {
  if (a == nullptr || a->size < sizeof(lr_mixture_args))
    return fail(LR_INVALID_ARGUMENT, "lr_mixture_args is missing or from an older header");
  if (a->rows < 0 || a->atoms < 1 || a->dim < 1 || a->vocab < 1 || a->table_stride < a->dim)
    return fail(LR_INVALID_ARGUMENT, "bad shape: rows %lld, atoms %lld, dim %lld, vocab %lld, table stride %lld",
                (long long)a->rows, (long long)a->atoms, (long long)a->dim, (long long)a->vocab,
                (long long)a->table_stride);
  if (a->ids_dtype != LR_INT32 && a->ids_dtype != LR_INT64)
    return fail(LR_INVALID_ARGUMENT, "ids must be int32 or int64, got code %d", a->ids_dtype);
  if (a->table_dtype < LR_FLOAT32 || a->table_dtype > LR_FLOAT16)
    return fail(LR_INVALID_ARGUMENT, "the table must be float32, bfloat16 or float16, got code %d", a->table_dtype);
  if (a->rows > 0 && (!a->table || !a->ids || !a->z || (backward ? !a->grad_weights : !a->weights)))
    return fail(LR_INVALID_ARGUMENT, "a required pointer is null");
  return LR_OK;
}

}  // namespace latentrevise
