#pragma once
/// The locks in ROOT/.locks (docs/format.md, "Locks"): who owns an agent, who saves, who removes.

#include <chrono>
#include <filesystem>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/env.h"
#include "base/mutex.h"

namespace torpor {

/// First come, first served.
class FairMutex {
 public:
  void lock();
  void unlock();

 private:
  Mutex mutex_;
  CondVar served_;
  uint64_t next_ TORPOR_GUARDED_BY(mutex_) = 0;
  uint64_t now_serving_ TORPOR_GUARDED_BY(mutex_) = 0;
};

/// The store's own lock, held for moments only. Whoever holds it looks at names and unlinks; nothing is flushed, read through,
/// hashed or listed under it.
struct StoreLock {
  std::optional<FileLock> gate;  ///< of the exclusive holder: nobody passes it to wait for another shared hold
  FileLock lock;
};

/// An agent's lock. Where there is no such agent when it is let go of, its file goes too: what came to nothing leaves none.
class AgentFileLock {
 public:
  AgentFileLock(Env& env, FileLock lock, std::filesystem::path agent_file)
      : env_(&env), lock_(std::move(lock)), agent_file_(std::move(agent_file)) {}
  AgentFileLock(AgentFileLock&& other) noexcept = default;
  ~AgentFileLock();

 private:
  Env* env_;
  FileLock lock_;
  std::filesystem::path agent_file_;
};

/// The right to measure the store and to take room in it.
struct LimitsLock {
  std::unique_lock<FairMutex> turn;  ///< in this process
  FileLock lock;
};

/// Thread-safe. All of them throw kBusy, naming who has it, when they can't be had in time.
class StoreLocks {
 public:
  StoreLocks(Env& env, std::filesystem::path root) : env_(env), directory_(root / ".locks"), root_(std::move(root)) {}

  const std::filesystem::path& root() const { return root_; }

  /// At once, or kBusy: the agent is awake elsewhere.
  AgentFileLock agent(const std::string& id, const std::filesystem::path& agent_file);
  /// At once, or kBusy: another step of the team is under way.
  AgentFileLock team(const std::string& id, const std::filesystem::path& team_file);
  /// Whether someone has the agent's lock.
  bool is_awake(const std::string& id) const;

  /// Shared by all who add files, from before their first until after their commit. Nobody waits for it but who removes.
  FileLock saving();
  /// The store's lock, shared: while names are looked up and claimed.
  StoreLock claiming();
  /// The store's lock, exclusive: to look again and unlink. nullopt when it is not free in time.
  std::optional<StoreLock> removing(std::chrono::milliseconds timeout);
  LimitsLock limits();

  /// Held by the one who removes, from before it looks for what may go. nullopt when it is not free in time.
  std::optional<FileLock> sweeping(std::chrono::milliseconds timeout);
  bool is_swept() const;
  /// Waits until every `saving` that was held when this was called has been released; those taken meanwhile are not waited
  /// for. False when that took longer than `timeout`. The caller holds `sweeping`.
  bool wait_for_saves(std::chrono::milliseconds timeout);

  /// Agents of which there are locks, held or not.
  std::vector<std::string> agents() const;

  /// Names that saves will need while someone sweeps; a line each.
  std::filesystem::path claims_path() const { return directory_ / ".claims"; }
  std::filesystem::path counter_path() const { return directory_ / ".bytes_written"; }

 private:
  std::filesystem::path path(const std::string& name);
  bool is_held(const std::filesystem::path& path) const;

  Env& env_;
  const std::filesystem::path directory_, root_;
  FairMutex limits_;
};

}  // namespace torpor
