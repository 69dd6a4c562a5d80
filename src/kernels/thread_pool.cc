#include "kernels/thread_pool.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include <pthread.h>

#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sched.h>
#endif

#include "kernels/cpu_target.h"
#include "kernels/usable_cores.h"
#include "torpor/compute_options.h"
#include "torpor/error.h"

namespace torpor::kernels {
namespace {

constexpr int kMaxThreads = 256;
/// How long a worker without work stays awake. Within a decoded token kernels follow each other faster than this.
constexpr auto kSpin = std::chrono::microseconds(50);

inline void cpu_relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int default_cores() {
  int count = 0;
#if defined(__APPLE__)
  size_t size = sizeof(count);
  if (sysctlbyname("hw.perflevel0.physicalcpu", &count, &size, nullptr, 0) != 0) {
    size = sizeof(count);
    if (sysctlbyname("hw.physicalcpu", &count, &size, nullptr, 0) != 0) count = 0;
  }
#elif defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    std::vector<int> allowed;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &set)) allowed.push_back(cpu);
    }
    count = usable_cores(allowed);
  }
#endif
  if (count <= 0) count = int(std::thread::hardware_concurrency());
  return count <= 0 ? 1 : count > kMaxThreads ? kMaxThreads : count;
}

int default_threads() {
  const int threads = with_environment({}).threads;
  return threads > 0 ? threads : default_cores();
}

/// What one thread fetches while it waits: the part of some memory that it is likely to read first.
class Fetching {
 public:
  /// Of `ahead`, of which each two of `n_threads` threads share a stretch, that at the end where `worker` begins.
  void begin(std::span<const std::byte> ahead, int worker, int n_threads) {
    if (ahead.data() == of_ || ahead.empty()) return;
    of_ = ahead.data();
    const size_t share = ahead.size() / size_t((n_threads + 1) / 2);
    const bool front = worker % 2 == 0;
    at_ = reinterpret_cast<uintptr_t>(of_) + size_t(worker / 2 + (front ? 0 : 1)) * share;
    step_ = front ? kLine : -kLine;
    lines_ = int(std::min(share / 2, kMost) / kLine);
  }
  /// Fetches a little of it, so that a call which begins meanwhile is seen soon; false when nothing is left.
  bool go_on() {
    if (lines_ <= 0) return false;
    for (int i = 0; i < kLinesAtOnce; ++i, at_ += uintptr_t(step_)) fetch(reinterpret_cast<const void*>(at_));
    lines_ -= kLinesAtOnce;
    return true;
  }

 private:
  static constexpr intptr_t kLine = 64;
  static constexpr int kLinesAtOnce = 4;
  /// A small part of a core's second-level cache: should the next call read something else, little is lost.
  static constexpr size_t kMost = size_t{128} << 10;

  const std::byte* of_ = nullptr;
  uintptr_t at_ = 0;
  intptr_t step_ = 0;
  int lines_ = 0;
};

/// How often fork(2) has made this process another one. A pool's workers are only in the process that made it.
std::atomic<uint32_t> forks{0};

uint32_t count_forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  return registered == 0 ? forks.load() : 0;
}

}  // namespace

// One atomic word tells workers everything: the job's generation, whether it still admits workers, and how many are in.
// The caller waits only for workers that came in, never for one that the system has not yet scheduled.
struct ThreadPool::Impl {
  static constexpr uint64_t kActiveMask = 0xffff;
  static constexpr uint64_t kOpen = 1u << 16;
  static constexpr uint64_t kGeneration = 1u << 17;

  explicit Impl(int n) : n_threads(n) {
    threads.reserve(size_t(n) - 1);
    try {
      for (int worker = 1; worker < n; ++worker) threads.emplace_back([this, worker] { run(worker); });
    } catch (...) {
      stop_all();
      throw;
    }
  }
  ~Impl() { stop_all(); }

  void stop_all() {
    {
      std::lock_guard lock(mutex);
      stop.store(true);
    }
    wake.notify_all();
    for (std::thread& thread : threads) thread.join();
  }

  static bool joinable(uint64_t s, uint64_t last) { return (s & kOpen) != 0 && s / kGeneration != last; }

  void run(int worker) {
    uint64_t last = 0;
    Fetching fetching;
    for (;;) {
      const auto deadline = std::chrono::steady_clock::now() + kSpin;
      uint64_t s = state.load(std::memory_order_acquire);
      for (int i = 0; !joinable(s, last); ++i) {
        if (stop.load(std::memory_order_relaxed)) return;
        if (!fetching.go_on()) cpu_relax();
        if (i % 64 == 63 && std::chrono::steady_clock::now() >= deadline) break;
        s = state.load(std::memory_order_acquire);
      }
      if (!joinable(s, last)) {
        std::unique_lock lock(mutex);
        parked.fetch_add(1);
        wake.wait(lock, [&] { return stop.load() || joinable(s = state.load(), last); });
        parked.fetch_sub(1);
        if (stop.load()) return;
      }
      if (!state.compare_exchange_strong(s, s + 1, std::memory_order_acq_rel)) continue;
      last = s / kGeneration;
      work(worker);
      fetching.begin(ahead, worker, n_threads);  // while the caller has not gone on
      const uint64_t after = state.fetch_sub(1, std::memory_order_acq_rel) - 1;
      if ((after & (kActiveMask | kOpen)) == 0) state.notify_all();
    }
  }

  void work(int worker) {
    for (;;) {
      const size_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= n_tasks) return;
      try {
        (*body)(task, worker);
      } catch (...) {
        std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
        next.store(n_tasks, std::memory_order_relaxed);
      }
    }
  }

  void call(size_t count, const std::function<void(size_t, int)>& function, std::span<const std::byte> then = {}) {
    if (elsewhere()) {
      throw Error(ErrorCode::kInvalidArgument, "The threads that compute were not taken along by fork(2); start a new process "
                                               "instead of forking this one.");
    }
    std::lock_guard one_caller(callers);
    body = &function;
    n_tasks = count;
    if (!then.empty()) ahead = then;
    error = nullptr;
    next.store(0, std::memory_order_relaxed);
    // No worker is in and none can come in, so the word is ours to write.
    state.store((++generation) * kGeneration | kOpen);
    if (parked.load() > 0) {
      { std::lock_guard lock(mutex); }
      wake.notify_all();
    }
    work(0);
    uint64_t s = state.fetch_and(~kOpen, std::memory_order_acq_rel) & ~kOpen;
    callers_fetching.begin(ahead, 0, n_threads);
    for (int i = 0; (s & kActiveMask) != 0; ++i) {
      if (i < 4096) {
        if (!callers_fetching.go_on()) cpu_relax();
      } else {
        state.wait(s, std::memory_order_acquire);
      }
      s = state.load(std::memory_order_acquire);
    }
    if (error) std::rethrow_exception(std::exchange(error, nullptr));
  }

  /// Whether the workers are in another process, which was forked.
  bool elsewhere() const { return forks.load(std::memory_order_relaxed) != made_at; }

  const int n_threads;
  const uint32_t made_at = count_forks();
  std::vector<std::thread> threads;
  std::mutex callers;
  std::mutex mutex;  ///< guards parking and `error`
  std::condition_variable wake;
  alignas(64) std::atomic<uint64_t> state{0};
  alignas(64) std::atomic<size_t> next{0};
  alignas(64) std::atomic<int> parked{0};
  std::atomic<bool> stop{false};
  uint64_t generation = 0;
  const std::function<void(size_t, int)>* body = nullptr;
  size_t n_tasks = 0;
  std::span<const std::byte> ahead;
  Fetching callers_fetching;
  std::exception_ptr error;
};

namespace {
std::mutex shared_mutex;
std::atomic<ThreadPool*> shared_pool{nullptr};  // never freed at exit: MLX's stream threads may still be using it
}  // namespace

ThreadPool& ThreadPool::shared() {
  if (ThreadPool* pool = shared_pool.load(std::memory_order_acquire)) return *pool;
  std::lock_guard lock(shared_mutex);
  if (shared_pool.load() == nullptr) shared_pool.store(new ThreadPool(default_threads()), std::memory_order_release);
  return *shared_pool.load();
}

void ThreadPool::settle_shared(int n_threads) {
  std::lock_guard lock(shared_mutex);
  const ThreadPool* pool = shared_pool.load();
  if (pool == nullptr) {
    shared_pool.store(new ThreadPool(n_threads), std::memory_order_release);
  } else if (pool->size() != n_threads) {
    throw Error(ErrorCode::kInvalidArgument, "This process computes with " + std::to_string(pool->size()) + " threads already, not " +
                                                 std::to_string(n_threads) + "; give every model the same number.")
        .with_field("ComputeOptions::threads", std::to_string(pool->size()), std::to_string(n_threads));
  }
}

void ThreadPool::resize_shared(int n_threads) {
  auto pool = std::make_unique<ThreadPool>(n_threads);
  std::lock_guard lock(shared_mutex);
  delete shared_pool.exchange(pool.release());
}

ThreadPool::ThreadPool(int n_threads) {
  if (n_threads < 1 || n_threads > kMaxThreads) {
    throw Error(ErrorCode::kInvalidArgument, "A thread pool has 1 to " + std::to_string(kMaxThreads) + " threads, not " +
                                                 std::to_string(n_threads) + ".")
        .with_field("ComputeOptions::threads", "1 to " + std::to_string(kMaxThreads), std::to_string(n_threads));
  }
  impl_ = new Impl(n_threads);
}

ThreadPool::~ThreadPool() {
  if (!impl_->elsewhere()) delete impl_;  // else there is nobody to join
}

int ThreadPool::size() const noexcept { return impl_->n_threads; }

void ThreadPool::parallel_for(size_t n_tasks, const std::function<void(size_t task, int worker)>& body) {
  if (n_tasks == 0) return;
  if (n_tasks == 1 || impl_->n_threads == 1) {
    for (size_t task = 0; task < n_tasks; ++task) body(task, 0);
    return;
  }
  impl_->call(n_tasks, body);
}

void ThreadPool::parallel_ends(int n_tasks, const std::function<void(int task, int next)>& body,
                               std::span<const std::byte> ahead) {
  if (n_tasks <= 0) return;
  const int stretches = std::min((size() + 1) / 2, n_tasks);
  // How many tasks are taken from each end of a stretch: of the front in the low half, of the back in the high half.
  constexpr uint64_t kFront = 1, kBack = uint64_t{1} << 32;
  std::array<std::atomic<uint64_t>, kMaxThreads / 2> taken{};
  // A thread begins at the same end each time: there it has fetched what was told to come.
  auto end = [&](size_t, int worker) {
    const bool front = worker % 2 == 0;
    // Its own stretch first, then what the others have left.
    for (int i = 0; i < stretches; ++i) {
      const int stretch = (worker / 2 + i) % stretches;
      const int first = int(int64_t(stretch) * n_tasks / stretches);
      const int last = int(int64_t(stretch + 1) * n_tasks / stretches) - 1;
      for (;;) {
        const uint64_t before = taken[size_t(stretch)].fetch_add(front ? kFront : kBack, std::memory_order_relaxed);
        const int from_front = int(before % kBack), from_back = int(before / kBack);
        if (from_front + from_back > last - first) break;
        const int task = front ? first + from_front : last - from_back;
        body(task, std::clamp(front ? task + 1 : task - 1, first, last));
      }
    }
  };
  const int ends = std::min(size(), 2 * stretches);
  if (ends == 1) return end(0, 0);
  impl_->call(size_t(ends), std::ref(end), ahead);
}

}  // namespace torpor::kernels
