#pragma once
/// A mutex, its locks and its condition variable, known to clang's thread safety analysis (-Wthread-safety). A member
/// names the mutex that guards it. Clang refuses an access without it. Other compilers see the classes of std alone.
///
/// A mutex of a function's own guards no member: there std::mutex does.

#include <chrono>
#include <condition_variable>
#include <mutex>

#if defined(__clang__)
#define TORPOR_THREAD_SAFETY(attribute) __attribute__((attribute))
#else
#define TORPOR_THREAD_SAFETY(attribute)
#endif

/// Of a member: it is read and written under `mutex` only.
#define TORPOR_GUARDED_BY(mutex) TORPOR_THREAD_SAFETY(guarded_by(mutex))
/// Of a function: its caller holds `mutex`.
#define TORPOR_REQUIRES(mutex) TORPOR_THREAD_SAFETY(requires_capability(mutex))

namespace torpor {

class TORPOR_THREAD_SAFETY(capability("mutex")) Mutex {
 public:
  void lock() TORPOR_THREAD_SAFETY(acquire_capability()) { mutex_.lock(); }
  void unlock() TORPOR_THREAD_SAFETY(release_capability()) { mutex_.unlock(); }

 private:
  friend class MutexLock;
  std::mutex mutex_;
};

/// Holds a mutex until it is destroyed, or until `unlock`.
class TORPOR_THREAD_SAFETY(scoped_lockable) MutexLock {
 public:
  explicit MutexLock(Mutex& mutex) TORPOR_THREAD_SAFETY(acquire_capability(mutex)) : lock_(mutex.mutex_) {}
  ~MutexLock() TORPOR_THREAD_SAFETY(release_capability()) = default;
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

  void lock() TORPOR_THREAD_SAFETY(acquire_capability()) { lock_.lock(); }
  void unlock() TORPOR_THREAD_SAFETY(release_capability()) { lock_.unlock(); }

 private:
  friend class CondVar;
  std::unique_lock<std::mutex> lock_;
};

/// Lets go of a mutex that is held, and takes it again when it is destroyed.
class TORPOR_THREAD_SAFETY(scoped_lockable) MutexUnlock {
 public:
  explicit MutexUnlock(Mutex& held) TORPOR_THREAD_SAFETY(release_capability(held)) : mutex_(held) { mutex_.unlock(); }
  ~MutexUnlock() TORPOR_THREAD_SAFETY(release_capability()) { mutex_.lock(); }  // clang's word for taking it again
  MutexUnlock(const MutexUnlock&) = delete;
  MutexUnlock& operator=(const MutexUnlock&) = delete;

 private:
  Mutex& mutex_;
};

/// Waits may end without cause, so each stands in a loop: `while (!condition) changed.wait(lock);`.
class CondVar {
 public:
  void wait(MutexLock& lock) { changed_.wait(lock.lock_); }
  void wait_for(MutexLock& lock, std::chrono::nanoseconds time) { changed_.wait_for(lock.lock_, time); }
  void notify_one() noexcept { changed_.notify_one(); }
  void notify_all() noexcept { changed_.notify_all(); }

 private:
  std::condition_variable changed_;
};

}  // namespace torpor
