/* Flat C ABI of the latentrevise kernels. No torch, no Python, no C++ types: raw pointers, sizes and a stream.
 *
 * Conventions
 *   - Every function takes one argument struct whose `size` field the caller sets to sizeof(struct); new fields go to the
 *     end, and a library accepts any caller whose struct is at least as large as the fields it reads.
 *   - Every function returns an lr_status; on failure lr_last_error() gives the sentence for this thread.
 *   - Nothing is allocated on the device and nothing synchronises; CUDA work is launched on the given stream only.
 *   - Strides are in elements. The last dimension of every matrix is contiguous.
 */
#ifndef LATENTREVISE_KERNELS_H
#define LATENTREVISE_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum lr_status {
  LR_OK = 0,
  LR_INVALID_ARGUMENT = 1, /* a pointer, size, stride or code that breaks the contract */
  LR_OUT_OF_RANGE = 2,     /* an id outside the table (found on the CPU only) */
  LR_UNSUPPORTED = 3,      /* a case this library has no code for */
  LR_CUDA_ERROR = 4        /* the CUDA runtime refused; the message carries its reason */
} lr_status;

typedef enum lr_dtype { LR_FLOAT32 = 0, LR_BFLOAT16 = 1, LR_FLOAT16 = 2, LR_INT32 = 3, LR_INT64 = 4 } lr_dtype;

/* z[t] = sum_a weights[t, a] * table[ids[t, a]]; float32 accumulation in the order of a, output in the table's dtype.
 * Slots of weight 0 are skipped. Backward: grad_weights[t, a] = <grad_z[t], table[ids[t, a]]> for every slot. */
typedef struct lr_mixture_args {
  size_t size;
  const void *table;    /* [vocab, dim] of table_dtype, row stride table_stride */
  const void *ids;      /* [rows, atoms] of ids_dtype, contiguous */
  const float *weights; /* [rows, atoms] contiguous; unused by backward */
  void *z;              /* forward: output [rows, dim]; backward: input grad_z; table_dtype, contiguous */
  float *grad_weights;  /* backward: output [rows, atoms] */
  int64_t vocab, dim, table_stride, rows, atoms;
  int32_t table_dtype; /* LR_FLOAT32, LR_BFLOAT16, LR_FLOAT16 (CUDA only) */
  int32_t ids_dtype;   /* LR_INT32, LR_INT64 */
  int32_t threads;     /* CPU: how many threads to use, >= 1; CUDA: ignored */
} lr_mixture_args;

/* CPU library */
int lr_cpu_mixture_embed(const lr_mixture_args *args);
int lr_cpu_mixture_embed_backward(const lr_mixture_args *args);
const char *lr_cpu_isa(void); /* "scalar", "avx2", "avx512": what this machine (or LATENTREVISE_ISA) selects */

/* CUDA library; `stream` is a cudaStream_t */
int lr_cuda_mixture_embed(const lr_mixture_args *args, void *stream);
int lr_cuda_mixture_embed_backward(const lr_mixture_args *args, void *stream);
int lr_cuda_device_count(int *count);

const char *lr_last_error(void);

#ifdef __cplusplus
}
#endif
#endif
