#pragma once
/// The pool every kernel shares; workers are parked between calls. No kernel's result depends on how many there are.

#include <cstddef>
#include <functional>
#include <span>

namespace torpor::kernels {

class ThreadPool {
 public:
  /// The process-wide pool, made at first use.
  static ThreadPool& shared();
  /// Makes it with so many threads if it is not there yet. kInvalidArgument when it has another number of them.
  static void settle_shared(int n_threads);
  /// Replaces the process-wide pool by one of `n_threads` (tests, benchmarks). No kernel may be running.
  static void resize_shared(int n_threads);
  explicit ThreadPool(int n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  /// Workers, the calling thread included.
  int size() const noexcept;
  /// Calls `body(task, worker)` for every task in [0, n_tasks), worker in [0, size()); returns when all are done.
  /// The first exception thrown by a body is rethrown here. Callers wait for each other; not reentrant. kInvalidArgument in a
  /// process that was forked from the one that made the pool.
  void parallel_for(size_t n_tasks, const std::function<void(size_t task, int worker)>& body);
  /// Calls `body(task, next)` for every task in [0, n_tasks), else as parallel_for. Two threads take the tasks of a
  /// stretch from its two ends, until they meet. So each thread reads memory in order. Then both help with other
  /// stretches, so that all threads end together. `next` is the task that the thread is likely to take after this one, or
  /// this one at a stretch's end.
  ///
  /// `ahead` is memory that a later call is likely to read by its tasks, in their order. Threads that wait meanwhile
  /// bring a part of it into their caches: those tasks that each of them would take first. It is not read, and may be
  /// gone by then. Empty: what was named last still counts.
  void parallel_ends(int n_tasks, const std::function<void(int task, int next)>& body,
                     std::span<const std::byte> ahead = {});

 private:
  struct Impl;
  Impl* impl_;
};

}  // namespace torpor::kernels
