#include "store/store_locks.h"

#include <cerrno>

#include "store/agent_file.h"
#include "torpor/error.h"

namespace torpor {
namespace {

using std::chrono::milliseconds, std::chrono::seconds;

// No agent id begins with '.', so these are free.
constexpr const char* kStore = ".store";
constexpr const char* kGate = ".gate";
constexpr const char* kSaving = ".saving";
constexpr const char* kSavingBefore = ".saving-before";
constexpr const char* kSweeping = ".sweeping";
constexpr const char* kLimits = ".limits";
const std::string kTeam = ".team-";  // and its id

bool is_unwritable(const Error& error) {
  return error.field() == "errno" &&
         (error.found() == std::to_string(EROFS) || error.found() == std::to_string(EACCES));
}

}  // namespace

void FairMutex::lock() {
  MutexLock lock(mutex_);
  const uint64_t mine = next_++;
  while (now_serving_ != mine) served_.wait(lock);
}

void FairMutex::unlock() {
  {
    const MutexLock lock(mutex_);
    ++now_serving_;
  }
  served_.notify_all();
}

std::filesystem::path StoreLocks::path(const std::string& name) {
  if (!env_.is_own_directory(directory_)) env_.make_directory(directory_);
  return directory_ / (name + ".lock");
}

bool StoreLocks::is_held(const std::filesystem::path& path) const {
  try {
    const File file = env_.open(path, OpenMode::kRead);  // works on a store that is read-only
    if (env_.raw_lock(file.fd(), LockMode::kShared) == -EWOULDBLOCK) return true;
    env_.raw_unlock(file.fd());
    return false;
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kNotFound) throw;
    return false;
  }
}

AgentFileLock::~AgentFileLock() {
  if (!lock_.is_held()) return;
  try {
    if (!env_->is_file(agent_file_)) env_->remove(lock_.path());
  } catch (const std::exception&) {
    // gc finds it.
  }
}

AgentFileLock StoreLocks::agent(const std::string& id, const std::filesystem::path& agent_file) {
  // Not quite at once: who looks whether an agent is awake holds its lock for a moment.
  constexpr milliseconds kMoment{20};
  std::optional<FileLock> lock;
  try {
    lock = env_.lock(path(id), LockMode::kExclusive, kMoment);
  } catch (const Error& error) {
    // Whoever can't make the lock can't save the agent either, but may read it.
    if (!is_unwritable(error) || !env_.is_file(agent_file)) throw;
    lock = env_.lock(agent_file, LockMode::kShared, kMoment, OpenMode::kRead);
  }
  if (!lock) {
    throw Error(ErrorCode::kBusy, "The agent '" + id + "' is awake elsewhere; let it go to sleep there first.")
        .with_agent(id);
  }
  return {env_, std::move(*lock), agent_file};
}

AgentFileLock StoreLocks::team(const std::string& id, const std::filesystem::path& team_file) {
  auto lock = env_.lock(path(kTeam + id), LockMode::kExclusive, milliseconds(0));
  if (!lock) throw Error(ErrorCode::kBusy, "The team '" + id + "' is being asked already; ask again when that is over.");
  return {env_, std::move(*lock), team_file};
}

std::vector<std::string> StoreLocks::agents() const {
  constexpr std::string_view kExtension = ".lock";
  std::vector<std::string> ids;
  for (const auto& name : env_.list(directory_)) {
    const std::string id = name.ends_with(kExtension) ? name.substr(0, name.size() - kExtension.size()) : "";
    if (is_agent_id(id) && env_.is_file(directory_ / name)) ids.push_back(id);
  }
  return ids;
}

bool StoreLocks::is_awake(const std::string& id) const { return is_held(directory_ / (id + ".lock")); }

FileLock StoreLocks::saving() {
  // Whoever removes renames the file before it takes it exclusively, so this one is free but for a moment.
  auto lock = env_.lock(path(kSaving), LockMode::kShared, seconds(10));
  if (!lock)
    throw Error(ErrorCode::kBusy, "The store '" + root_.string() + "' is in use by another process; try again later.");
  return std::move(*lock);
}

StoreLock StoreLocks::claiming() {
  const auto gate = env_.lock(path(kGate), LockMode::kShared, seconds(10));
  auto lock = gate ? env_.lock(path(kStore), LockMode::kShared, seconds(10)) : std::nullopt;
  if (!lock)
    throw Error(ErrorCode::kBusy, "The store '" + root_.string() + "' is in use by another process; try again later.");
  return {std::nullopt, std::move(*lock)};
}

std::optional<StoreLock> StoreLocks::removing(milliseconds timeout) {
  auto gate = env_.lock(path(kGate), LockMode::kExclusive, timeout);
  auto lock = gate ? env_.lock(path(kStore), LockMode::kExclusive, timeout) : std::nullopt;
  if (!lock) return std::nullopt;
  return StoreLock{std::move(gate), std::move(*lock)};
}

LimitsLock StoreLocks::limits() {
  std::unique_lock turn(limits_);
  auto lock = env_.lock(path(kLimits), LockMode::kExclusive, std::chrono::minutes(1));
  if (!lock) {
    throw Error(ErrorCode::kBusy,
                "Another process takes too long to make room in the store '" + root_.string() + "'; try again later.");
  }
  return {std::move(turn), std::move(*lock)};
}

std::optional<FileLock> StoreLocks::sweeping(milliseconds timeout) {
  return env_.lock(path(kSweeping), LockMode::kExclusive, timeout);
}

bool StoreLocks::is_swept() const { return is_held(directory_ / (std::string(kSweeping) + ".lock")); }

bool StoreLocks::wait_for_saves(milliseconds timeout) {
  const auto now = path(kSaving), before = path(kSavingBefore);
  const auto wait = [&] {
    if (!env_.exists(before)) return true;
    const auto lock = env_.lock(before, LockMode::kExclusive, timeout);
    if (!lock) return false;
    env_.remove(before);
    return true;
  };
  // The file keeps its name until the wait is over: a sweep that was killed or gave up leaves its saves to the next one.
  if (!wait()) return false;
  if (env_.exists(now)) env_.rename(now, before);
  return wait();
}

}  // namespace torpor
