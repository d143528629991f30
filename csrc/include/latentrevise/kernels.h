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
  LR_CUDA_ERROR = 4,       /* the CUDA runtime refused; the message carries its reason */
  LR_OUT_OF_MEMORY = 5     /* the host has too little */
} lr_status;

typedef enum lr_dtype { LR_FLOAT32 = 0, LR_BFLOAT16 = 1, LR_FLOAT16 = 2, LR_INT32 = 3, LR_INT64 = 4 } lr_dtype;

/* z[t] = sum_a weights[t, a] * table[ids[t, a]]; float32 accumulation in the order of a, output in the table's dtype.
 * Slots of weight 0 are skipped. Backward: grad_weights[t, a] = <grad_z[t], table[ids[t, a]]> for every slot. Either is
 * 2 * rows * atoms * dim operations over table rows that are read once a slot, and bound by that. */
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

/* The operations below run on the CPU library unless a CUDA form is declared further down. Tables are float32 or
 * bfloat16 and so are queries; sums are float32. A score <x_t, row_v> is summed in an order that follows from the shapes
 * alone, whatever the block, thread or split, so results are bitwise the same under all of them. */

/* ids[t] = argmin over allowed v of <queries[t], table[v]> (+ <queries2[t], table2[v]>), lowest id on ties, NaN below
 * everything; -1 and +inf where nothing competes. With candidates (padded with -1) only those compete.
 * 2 * rows * vocab * dim operations. The table is read once for every 16 MiB of queries in float32 (CPU) or 256 queries
 * (CUDA), a gathered row once a candidate. */
typedef struct lr_oracle_args {
  size_t size;
  const void *queries, *table;   /* [rows, dim], [vocab, dim] */
  const void *queries2, *table2; /* [rows, dim2], [vocab, dim2], or both null with dim2 0 */
  const uint8_t *allowed;        /* [vocab] or null */
  const void *candidates;        /* [rows, candidate_count] of candidates_dtype, or null */
  int64_t *ids;
  float *values;
  int64_t rows, vocab, dim, dim2, candidate_count;
  int64_t queries_stride, table_stride, queries2_stride, table2_stride;
  int32_t queries_dtype, table_dtype, queries2_dtype, table2_dtype, candidates_dtype;
  int32_t splits; /* CUDA: how many parts the vocabulary is cut into; CPU: ignored */
  void *workspace; /* CUDA: rows * splits * 8 bytes; CPU: ignored */
  int32_t threads;
} lr_oracle_args;

/* Softmax over the vocabulary of z = softcap * tanh(scale * (<queries, table> + bias) / softcap) / temperature.
 *   logp[n] = log p(targets[n]); entropy[n] in nats (or null);
 *   gradient[n] = d logp[n] / d queries[n] [rows, dim] (or null).
 * 2 * rows * vocab * dim operations, twice that with the gradient. On the CPU the table is read once for every 256
 * queries and serves both products; on CUDA once for every 256 queries and product, with the exponentials in the
 * workspace between. */
typedef struct lr_logprob_args {
  size_t size;
  const void *queries, *table;
  const float *bias; /* [vocab] or null */
  const int64_t *targets;
  float *logp, *entropy, *gradient;
  int64_t rows, vocab, dim, queries_stride, table_stride;
  double scale, softcap, temperature; /* softcap 0: no tanh */
  int32_t queries_dtype, table_dtype, threads;
  int32_t blocks;          /* CUDA: how many thread blocks run at once; CPU: ignored, as what follows */
  void *workspace;         /* CUDA: aligned to 16 bytes */
  int64_t workspace_bytes; /* at least what lr_cuda_linear_logprob_workspace says */
} lr_logprob_args;

/* Tokens with log p >= log_p_min under the same softmax, most probable first, equal ones by rising id. Operations and
 * bytes of linear_logprob without its gradient. */
typedef struct lr_plausible_args {
  size_t size;
  const void *queries, *table;
  const float *bias;
  const uint8_t *allowed;
  int64_t *ids;  /* [rows, max_candidates], padded with -1 */
  float *logps;  /* [rows, max_candidates], padded with -inf */
  int64_t *counts;
  int64_t rows, vocab, dim, max_candidates, queries_stride, table_stride;
  double scale, softcap, temperature, log_p_min;
  int32_t queries_dtype, table_dtype, threads;
} lr_plausible_args;

/* z[t] = softmax(theta[t] / tau) @ table in the table's dtype, lse[t] the log of the normaliser. Backward:
 * grad_theta[t, v] = p_tv * (<grad_z[t], table[v]> - <grad_z[t], z[t]>) / tau, with dots[t] = <grad_z[t], z[t]>.
 * Either is 2 * rows * vocab * dim operations; theta is read (and its gradient written) once, the table as above. */
typedef struct lr_softmax_args {
  size_t size;
  const void *theta, *table;
  void *z;             /* forward output [rows, dim] of table_dtype */
  const float *grad_z; /* backward input [rows, dim] */
  const float *dots;   /* backward input [rows] */
  void *grad_theta;    /* backward output [rows, vocab] of theta_dtype, contiguous */
  float *lse;          /* forward output, backward input [rows] */
  int64_t rows, vocab, dim, theta_stride, table_stride;
  double tau;
  int32_t theta_dtype, table_dtype, threads;
} lr_softmax_args;

/* One Frank-Wolfe step on mixtures: g = alpha * gold + beta * away (each row divided by its norm first if normalized),
 * vertex as in lr_oracle_args, gap sum_a w_a <g, row_a - row_vertex>, then the step of size gamma and z = mixture of
 * the new atoms. Operations and bytes of the oracle, and 4 * rows * atoms * dim with every atom's row read twice. */
typedef struct lr_hull_args {
  size_t size;
  const void *gold, *away; /* [rows, dim]; away may be null */
  const void *table;
  const void *ids;      /* [rows, atoms] of ids_dtype */
  const float *weights; /* [rows, atoms] */
  const float *gamma;   /* [rows] */
  const uint8_t *allowed;
  const void *candidates;
  void *new_ids;
  float *new_weights;
  void *z; /* [rows, dim] of table_dtype */
  int64_t *vertex;
  float *gap;
  int64_t rows, vocab, dim, atoms, slot, candidate_count, gold_stride, away_stride, table_stride;
  double alpha, beta;
  int32_t gold_dtype, away_dtype, table_dtype, ids_dtype, candidates_dtype, normalized, threads;
} lr_hull_args;

/* One exponentiated-gradient step over the candidates of positive weight; segment[t] in [0, segments) labels rows that
 * share their scale (null: each row its own). 4 * rows * atoms * dim operations, every candidate's row read twice. */
typedef struct lr_entropic_args {
  size_t size;
  const void *gold, *away, *table, *ids;
  const float *weights;
  const int64_t *segment;
  float *new_weights;
  void *z;
  float *gap;
  int64_t rows, vocab, dim, atoms, segments, gold_stride, away_stride, table_stride;
  double alpha, beta, eta;
  int32_t gold_dtype, away_dtype, table_dtype, ids_dtype, normalized, threads;
} lr_entropic_args;

/* CPU library */
int lr_cpu_vertex_oracle(const lr_oracle_args *args);
int lr_cpu_linear_logprob(const lr_logprob_args *args);
int lr_cpu_plausible_vertices(const lr_plausible_args *args);
int lr_cpu_softmax_mixture(const lr_softmax_args *args);
int lr_cpu_softmax_mixture_backward(const lr_softmax_args *args);
int lr_cpu_hull_step(const lr_hull_args *args);
int lr_cpu_entropic_step(const lr_entropic_args *args);
int lr_cpu_mixture_embed(const lr_mixture_args *args);
int lr_cpu_mixture_embed_backward(const lr_mixture_args *args);
/* Rows that screening left to be scored exactly in this thread's last oracle or hull_step, all tokens together; -1 if
 * any of its tokens had the full pass. */
int64_t lr_cpu_rescored(void);
const char *lr_cpu_isa(void);  /* one of lr_cpu_isas(): as this machine (or LATENTREVISE_ISA) selects */
const char *lr_cpu_isas(void); /* all that the library was built with, separated by spaces */

/* CUDA library; `stream` is a cudaStream_t. The oracle and the log-probs need compute capability 9.0. */
int lr_cuda_mixture_embed(const lr_mixture_args *args, void *stream);
int lr_cuda_mixture_embed_backward(const lr_mixture_args *args, void *stream);
int lr_cuda_vertex_oracle(const lr_oracle_args *args, void *stream); /* bfloat16, one table, no candidates */
int lr_cuda_linear_logprob(const lr_logprob_args *args, void *stream); /* bfloat16 */
int lr_cuda_linear_logprob_workspace(const lr_logprob_args *args, int64_t *bytes); /* pointers matter by being null or not */
int lr_cuda_device_count(int *count);

const char *lr_last_error(void);

#ifdef __cplusplus
}
#endif
#endif
