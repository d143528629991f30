#include "cpu/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

namespace latentrevise::cpu {
namespace {

thread_local bool in_task = false;

struct Inside {
  Inside() { in_task = true; }
  ~Inside() { in_task = false; }
};

struct Region {  // on its caller's stack
  Task task;
  void *context;
  int parts, helpers;  // helpers: how many more workers may join
  int next = 0, unfinished = parts;
  std::exception_ptr failure = nullptr;
  std::condition_variable done{};
};

class Pool {
 public:
  void run(Region &region) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (static_cast<int>(workers_.size()) < region.helpers) workers_.emplace_back([this] { work(); });
    open_.push_back(&region);
    for (int i = 0; i < region.helpers; ++i) wake_.notify_one();
    claim(region, lock);
    region.done.wait(lock, [&] { return region.unfinished == 0; });
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      const auto found = std::find_if(open_.begin(), open_.end(), [](const Region *r) { return r->helpers > 0; });
      if (found == open_.end()) {
        wake_.wait(lock);
        continue;
      }
      --(*found)->helpers;
      claim(**found, lock);
    }
  }

  // The region is gone once its last part is counted and the lock is given up.
  void claim(Region &region, std::unique_lock<std::mutex> &lock) {
    while (region.next < region.parts) {
      const int part = region.next++;
      if (region.next == region.parts) open_.erase(std::find(open_.begin(), open_.end(), &region));
      lock.unlock();
      std::exception_ptr failure;
      try {
        const Inside here;
        region.task(region.context, part);
      } catch (...) {
        failure = std::current_exception();
      }
      lock.lock();
      if (!region.failure) region.failure = failure;
      if (--region.unfinished == 0) {
        region.done.notify_one();
        return;
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Region *> open_;  // with parts that nobody has claimed, oldest first
  std::vector<std::thread> workers_;
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
  if (in_task) throw std::logic_error("a parallel region was entered from inside another one");
  if (threads <= 1 || parts <= 1) {
    const Inside here;
    for (int part = 0; part < parts; ++part) task(context, part);
    return;
  }
  Region region{task, context, parts, std::min(threads, parts) - 1};
  the_pool().run(region);
  if (region.failure) std::rethrow_exception(region.failure);
}

}  // namespace latentrevise::cpu
