#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "coterie.h"

namespace coterie {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<GompParallel> gomp_parallel{nullptr};
// A child of fork has none of its parent's OpenMP workers and would wait for them for ever.
std::atomic<bool> forked{false};

const int fork_watch = pthread_atfork(nullptr, nullptr, [] { forked = true; });

struct Work {
  std::atomic<long> next{0};
  long tasks;
  void (*fn)(void*, long);
  void* context;
};

void take_tasks(void* p) {
  auto& work = *static_cast<Work*>(p);
  for (long task; (task = work.next.fetch_add(1, std::memory_order_relaxed)) < work.tasks;) {
    work.fn(work.context, task);
  }
}

void run_on_own_threads(Work& work, int threads) {
  std::vector<std::thread> team;
  try {
    team.reserve(threads - 1);
    for (int i = 1; i < threads; ++i) team.emplace_back(take_tasks, &work);
  } catch (const std::system_error&) {
    // Fewer threads than asked for: the ones there are finish the work.
  }
  take_tasks(&work);
  for (auto& thread : team) thread.join();
}

}  // namespace

void run_tasks(long tasks, int threads, void (*fn)(void*, long), void* context) {
  Work work;
  work.tasks = tasks, work.fn = fn, work.context = context;
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    take_tasks(&work);
  } else if (auto parallel = gomp_parallel.load(); parallel && !forked) {
    parallel(take_tasks, &work, static_cast<unsigned>(threads), 0);
  } else {
    run_on_own_threads(work, threads);
  }
}

}  // namespace coterie

void coterie_use_openmp(void* parallel) {
  coterie::gomp_parallel = reinterpret_cast<coterie::GompParallel>(parallel);
}
