// Runs independent tasks on as many threads as asked for.
#pragma once

namespace coterie {

// Calls fn(context, task) once for every task in 0 … tasks-1, on at most `threads` threads, and
// returns when all are done. Threads take the next task when free: every output element belongs to
// one task, so the schedule cannot change a bit of the result.
void run_tasks(long tasks, int threads, void (*fn)(void*, long), void* context);

template <class Fn>
inline void parallel(long tasks, int threads, Fn& fn) {
  run_tasks(tasks, threads, [](void* f, long task) { (*static_cast<Fn*>(f))(task); }, &fn);
}

}  // namespace coterie
