// What one instruction set provides. Each csrc/cpu/isa/*.cpp defines one table; active() picks the best the machine
// runs, or what LATENTREVISE_ISA names.
//
// The vocabulary-sized operations are cut into tasks of (tokens, vocabulary range). Tokens are packed once into panels
// of `vectors` registers: panel p holds, for each dimension k, the k-th coordinates of its tokens side by side. A task
// walks its vocabulary range block by block: scores of the block for one panel at a time, then what the operation does
// with them, while the block is in cache.
#pragma once

#include <cstdint>

#include "latentrevise/kernels.h"

namespace latentrevise::cpu {

struct Matrix {
  const void *data;
  int64_t stride;
  int32_t dtype;
};

// g_t = alpha * gold_t + beta * away_t, each row divided by its 2-norm first if normalized; away.data may be null.
struct Combination {
  Matrix gold, away;
  float alpha, beta;
  bool normalized;
  int64_t dim;
};

struct Panels {
  float *packed;
  int64_t depth;    // coordinates a token has in a panel: all tables together
  int64_t rows;     // tokens; the last panel is filled up with zeros
  int32_t vectors;  // 1 or 2 registers a panel
  bool pairs;       // bfloat16 coordinates 2k and 2k + 1 side by side in one word, for native bfloat16 products
};

struct OracleTask {
  Panels x;
  Matrix tables[2];  // the second one is used when dims[1] > 0
  int64_t dims[2];
  const uint8_t *allowed;
  int64_t begin, end;  // vocabulary
  float *values;       // in and out: best so far of each token, padded to whole panels
  int32_t *ids;
};

// Certified screening: scores by 8-bit products, each with a rigorous bound on how far the float32 score can be from it.
// A token or row x is q * scale with |q| <= 127 and the rest x - q * scale, whose norm is known. By Cauchy-Schwarz
//   |<g, e> - <g', e'>| <= |g - g'| |e| + |g'| |e - e'|, and float32 rounding adds at most slack * |g| |e|.
// Rows whose lower bound is above the float32 score of any row cannot be the minimum.
struct ScreenPanels {
  int32_t *words;     // panels of 4 signed bytes a word
  float *rows_data;   // [rows, dim] the tokens themselves, for the exact scores of what is left
  float *scale, *bound, *norm;  // a token: its scale; |g - g'| + slack |g|; |g'|
  int32_t *sums;      // 128 * sum of its bytes: rows are stored with 128 added
  int64_t depth, dim, rows;  // words, coordinates, tokens
};

struct ScreenTask {
  ScreenPanels x;
  Matrix table;
  const uint8_t *allowed;
  int64_t begin, end;  // vocabulary
  float *upper;        // in and out: what some row's score is at most, of each token, padded to whole panels
  bool (*emit)(void *context, int64_t token, int64_t v, float lower);  // false: too many, give up
  void *context;
};

// Online softmax of one task. Arrays are indexed by the token within the task.
struct SoftmaxTask {
  Panels x;                // scores come from <x, table> ...
  Matrix theta;            // ... or, if theta.data is set, are theta[t, v] itself; x then only says vectors and rows
  int64_t panel_begin, panel_end;
  Matrix table;
  int64_t dim;
  const float *bias;
  float scale, softcap, inverse_temperature;
  const int64_t *targets;  // per token of x; its column is left out of all sums (or null)
  int64_t begin, end;      // vocabulary
  float *max, *sum;        // of exp(z - max)
  float *moment;           // sum of exp(z - max) * (z - max), or null
  float *target_logit, *target_slope;
  float *mean;             // [tokens, mean_stride] sum of exp(z - max) * slope * table row, in whole slices; or null
  int64_t mean_stride;
  // tokens at or above the floor, as far as the sums so far can tell (a superset); null: none are listed
  void (*emit)(void *context, int64_t token, int64_t v, float z);
  void *context;
  const uint8_t *allowed;
  float log_floor;
};

struct Isa {
  const char *name;
  int lanes;        // float32 lanes of a register
  int64_t slice;    // columns of a table that are worked on together: the sums in `mean` are whole slices
  bool bf16_pairs;  // scores of bfloat16 queries against a bfloat16 table by native products
  bool tiles;       // by those of AMX, on panels of two registers however few the tokens
  // Rows [begin, end) of the op; ids are checked before.
  void (*mixture_embed)(const lr_mixture_args &, int64_t begin, int64_t end);
  void (*mixture_embed_backward)(const lr_mixture_args &, int64_t begin, int64_t end);
  // Rows [first, first + x.rows) of a combination, written at coordinate `offset` of the panels' depth; panels [begin, end).
  void (*pack)(const Combination &, const Panels &x, int64_t first, int64_t offset, int64_t begin, int64_t end);
  void (*oracle)(const OracleTask &);
  // False where something is not finite or too large to be bounded; null on an instruction set without 8-bit products.
  bool (*screen_pack)(const Combination &, const ScreenPanels &x, int64_t first, int64_t begin, int64_t end);
  bool (*screen)(const ScreenTask &);
  // Scores of listed rows, by the same chain of operations as in `oracle`.
  void (*exact_scores)(const float *query, const Matrix &table, int64_t dim, const int32_t *ids, int64_t count, float *scores);
  void (*oracle_candidates)(const lr_oracle_args &, int64_t begin, int64_t end);
  void (*softmax)(const SoftmaxTask &);
  void (*softmax_backward)(const lr_softmax_args &, const Panels &x, int64_t first, int64_t begin, int64_t end);
  void (*hull_candidates)(const lr_hull_args &, int64_t begin, int64_t end);  // the vertices of ragged candidate sets
  void (*hull_rows)(const lr_hull_args &, int64_t begin, int64_t end);        // gap, step and z, given the vertices
  void (*entropic_scores)(const lr_entropic_args &, float *rel, float *span, int64_t begin, int64_t end);
  void (*entropic_rows)(const lr_entropic_args &, const float *rel, const float *span, int64_t begin, int64_t end);
};

[[noreturn]] void out_of_memory();  // throws std::bad_alloc, from a unit that every machine runs

Combination hull_combination(const lr_hull_args &);
Combination entropic_combination(const lr_entropic_args &);

extern const Isa scalar_isa;
#ifdef LATENTREVISE_X86
extern const Isa avx2_isa;
extern const Isa avx512_isa;
extern const Isa avx512vnni_isa;
extern const Isa avx512bf16_isa;
extern const Isa amx_isa;
#endif

const Isa &active();

}  // namespace latentrevise::cpu
