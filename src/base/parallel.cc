#include "base/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace torpor {

void parallel_for(size_t count, size_t max_threads, const std::function<void(size_t)>& fn) {
  std::atomic<size_t> next{0};
  std::mutex mutex;
  std::exception_ptr first_error;
  auto work = [&] {
    for (size_t i; (i = next.fetch_add(1)) < count;) {
      try {
        fn(i);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!first_error) first_error = std::current_exception();
        next.store(count);
      }
    }
  };
  std::vector<std::thread> threads;  // libc++ has no std::jthread before version 18
  threads.reserve(std::min(count, max_threads));
  for (size_t i = 1; i < std::min(count, max_threads); ++i) {
    try {
      threads.emplace_back(work);
    } catch (const std::exception&) {
      break;  // no more threads to be had: the ones there are do the work
    }
  }
  work();
  for (std::thread& thread : threads) thread.join();
  if (first_error) std::rethrow_exception(first_error);
}

size_t reader_threads() { return std::clamp<size_t>(std::thread::hardware_concurrency(), 1, 8); }

}  // namespace torpor
