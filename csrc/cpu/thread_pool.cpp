#include "cpu/thread_pool.h"

#include <pthread.h>

#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace latentrevise::cpu {
namespace {

class Pool {
 public:
  void run(int threads, int parts, Task task, void *context) {
    std::lock_guard<std::mutex> one_region_at_a_time(region_);
    std::unique_lock<std::mutex> lock(mutex_);
    while (static_cast<int>(workers_.size()) < threads - 1) {
      const int index = static_cast<int>(workers_.size());
      workers_.emplace_back([this, index, seen = generation_] { work(index, seen); });
    }
    task_ = task, context_ = context, parts_ = parts, next_ = 0, unfinished_ = parts, helpers_ = threads - 1;
    ++generation_;
    wake_.notify_all();
    claim(lock);
    done_.wait(lock, [this] { return unfinished_ == 0; });
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  void work(int index, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (index < helpers_) claim(lock);
    }
  }

  void claim(std::unique_lock<std::mutex> &lock) {
    while (next_ < parts_) {
      const int part = next_++;
      lock.unlock();
      std::exception_ptr failure;
      try {
        task_(context_, part);
      } catch (...) {
        failure = std::current_exception();
      }
      lock.lock();
      if (!failure_) failure_ = failure;
      if (--unfinished_ == 0) done_.notify_one();
    }
  }

  std::mutex region_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Task task_ = nullptr;
  void *context_ = nullptr;
  std::exception_ptr failure_;
  uint64_t generation_ = 0;
  int parts_ = 0, next_ = 0, unfinished_ = 0, helpers_ = 0;
};

// Never destroyed: joining at exit can deadlock with the interpreter's own teardown. After fork() the child has no
// workers and maybe locked mutexes, so it starts over with a pool of its own.
Pool *pool = nullptr;
std::once_flag created;

Pool &the_pool() {
  std::call_once(created, [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  });
  return *pool;
}

}  // namespace

void run_parts(int threads, int parts, Task task, void *context) {
  if (threads <= 1 || parts <= 1) {
    for (int part = 0; part < parts; ++part) task(context, part);
    return;
  }
  the_pool().run(threads < parts ? threads : parts, parts, task, context);
}

}  // namespace latentrevise::cpu
