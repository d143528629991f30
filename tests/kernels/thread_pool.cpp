// What csrc/cpu/thread_pool.cpp promises, for test_cpu.py: exits with 0 and says so, or with what went wrong. A pool that
// does not keep its promises hangs here, and the test's limit ends it.
#include "cpu/thread_pool.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>

using latentrevise::cpu::parallel_ranges;

namespace {

void expect(bool held, const char *what) {
  if (held) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

template <typename Error, typename Body>
bool throws(Body &&body) {
  try {
    body();
  } catch (const Error &) {
    return true;
  }
  return false;
}

int64_t sum_to(int threads, int64_t n) {
  std::atomic<int64_t> sum{0};
  parallel_ranges(threads, n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sum += i;
  });
  return sum;
}

}  // namespace

int main() {
  for (int threads : {1, 2, 5}) {
    const auto nested = [&] { parallel_ranges(threads, 8, [&](int64_t, int64_t) { sum_to(2, 4); }); };
    expect(throws<std::logic_error>(nested), "a region inside a region throws");
    expect(sum_to(threads, 1000) == 499500, "and the pool lives on");
    const auto fails = [&] {
      parallel_ranges(threads, 8, [](int64_t begin, int64_t end) {
        if (begin <= 5 && 5 < end) throw std::runtime_error("one part");
      });
    };
    expect(throws<std::runtime_error>(fails), "what a task throws reaches the caller");
    expect(sum_to(threads, 1000) == 499500, "and the pool lives on after that");
  }

  // Each caller's tasks wait for a task of every other: regions that took turns would wait for ever.
  constexpr int kCallers = 3;
  std::atomic<int> started{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < kCallers; ++c)
    callers.emplace_back([&] {
      std::atomic<bool> first{true};
      parallel_ranges(2, 2, [&](int64_t, int64_t) {
        if (first.exchange(false)) ++started;
        while (started < kCallers) std::this_thread::yield();
      });
    });
  for (auto &caller : callers) caller.join();

  std::atomic<bool> right{true};
  callers.clear();
  for (int c = 0; c < kCallers; ++c)
    callers.emplace_back([&, c] {
      for (int i = 0; i < 2000; ++i)
        if (sum_to(1 + (c + i) % 4, 100 + i) != (100 + i) * (99 + i) / 2) right = false;
    });
  for (auto &caller : callers) caller.join();
  expect(right, "every caller gets its own parts, each once");
  std::puts("held");
}
