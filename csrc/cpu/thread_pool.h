// A persistent pool without spin-waiting. Not OpenMP: torch's wheels carry their own renamed libgomp, and a second
// runtime means a second pool fighting the first for the cores.
#pragma once

#include <cstdint>

namespace latentrevise::cpu {

using Task = void (*)(void *context, int part);

// Runs task(context, part) for part = 0 .. parts-1 on at most `threads` threads, the caller among them, and returns
// when all are done. Parts are claimed in order, so which thread runs a part is not fixed: results must not depend on it.
// The first exception of a task is thrown again here, when no thread works on the parts any more. Regions of several
// callers run side by side and share the workers. Throws std::logic_error from inside a task, under any number of threads:
// a region in a region would wait for workers that wait for it.
void run_parts(int threads, int parts, Task task, void *context);

// Splits [0, n) into at most `threads` contiguous ranges and runs body(begin, end) on each.
template <typename Body>
void parallel_ranges(int threads, int64_t n, Body &&body) {
  struct Range {
    Body &body;
    int64_t n;
    int parts;
  } range{body, n, static_cast<int>(n < threads ? n : threads)};
  run_parts(
      threads, range.parts,
      [](void *context, int part) {
        auto &r = *static_cast<Range *>(context);
        r.body(r.n * part / r.parts, r.n * (part + 1) / r.parts);
      },
      &range);
}

}  // namespace latentrevise::cpu
