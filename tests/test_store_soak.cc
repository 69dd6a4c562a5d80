/// Processes killed at random moments while they save, fork, rewind, rename, delete and sweep one store together. After
/// every kill each agent is as it was before or after what was in flight, and whole.
///
/// TORPOR_SOAK_KILLS processes are killed (`make soak` asks for many); TORPOR_SOAK_SEED repeats a run's choices, though
/// not its timing.

#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
#include <optional>
#include <thread>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

#include "store_fixture.h"

namespace torpor::testing {
namespace {

constexpr int kAgents = 10, kWorkers = 3, kFamilies = 3;
const KvLayout kLayout = small_layout(KvDtype::kF16, 1, 1, 4);

/// What an agent is to be on disk. Agents of one family begin alike.
struct State {
  int64_t version = 0;
  int length = 0, family = 0;
  bool exists = false;
};

KvSnapshot snapshot_of(const State& state) {
  return make_snapshot(state.length, kLayout, uint32_t(state.family + 1), 1000 * (state.family + 1));
}
UserMetadata user_of(const State& state) { return {{"version", std::to_string(state.version)}}; }

/// In memory that outlives any worker. `phase` 2v: at rest in states[v % 2]; 2v + 1: on the way from there to the other.
/// It is changed by whoever holds the slot's lock, with one store, so a kill finds it in one phase or the next.
struct Slot {
  std::atomic<int64_t> phase;
  State states[2];

  const State& current() const { return states[phase / 2 % 2]; }
  const State& next() const { return states[(phase / 2 + 1) % 2]; }
  void begin(State state) {
    state.version = phase / 2 + 1;
    states[state.version % 2] = state;
    ++phase;
  }
  void end() { ++phase; }
  void cancel() { --phase; }
};

struct Board {
  Slot slots[kAgents];
  std::atomic<int64_t> operations, busy;
  std::atomic<bool> failed;
  char failure[1000];
};

/// Held by one process at a time, and dropped by the kernel when that one dies. Not the agent's own lock, which `delete`
/// and `rename` want for themselves.
class SlotLock {
 public:
  SlotLock(const fs::path& directory, int k) {
    fd_ = ::open((directory / std::to_string(k)).c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    held_ = ::flock(fd_, LOCK_EX | LOCK_NB) == 0;
  }
  ~SlotLock() { ::close(fd_); }
  explicit operator bool() const { return held_; }

 private:
  int fd_;
  bool held_;
};

std::string id_of(int k) { return "agent-" + std::to_string(k); }
std::string moved_id_of(int k) { return "moved-" + std::to_string(k); }

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what); }

bool on_disk(const Store& store, int k, const State& state) {
  if (!store.contains(id_of(k))) return !state.exists;
  if (!state.exists) return false;
  const auto loaded = store.load_agent_cache(id_of(k), {.map_rows = true});
  return loaded.info.user == user_of(state) && same(loaded.snapshot, snapshot_of(state));
}

/// Makes the slot agree with what a killed process left, which must be one of two things. Its lock is held.
void settle(Store& store, Slot& slot, int k) {
  if (store.contains(moved_id_of(k))) {  // a rename to there and back was cut short
    if (store.contains(id_of(k))) {
      store.delete_agent_cache(moved_id_of(k));
    } else {
      store.rename_agent_cache(moved_id_of(k), id_of(k));
    }
  }
  if (slot.phase % 2 == 1) {
    if (on_disk(store, k, slot.next())) {
      slot.end();
    } else if (on_disk(store, k, slot.current())) {
      slot.cancel();
    } else {
      fail(id_of(k) + " is neither as before nor as after the operation that was killed");
    }
  } else if (!on_disk(store, k, slot.current())) {
    fail(id_of(k) + " is not what was saved last");
  }
}

class Worker {
 public:
  Worker(const fs::path& root, const fs::path& locks, Board& board, uint64_t seed, bool limited)
      : store_(root), locks_(locks), board_(board), random_(seed) {
    if (limited) store_.set_disk_limits({.budget = 400'000});
  }

  void step() {
    const int k = pick(kAgents);
    const SlotLock lock(locks_, k);
    if (!lock) return touch();
    Slot& slot = board_.slots[k];
    try {
      settle(store_, slot, k);
      operate(k, slot);
      ++board_.operations;
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kBusy && error.code() != ErrorCode::kResourceExhausted) throw;
      ++board_.busy;
      if (slot.phase % 2 == 1) slot.cancel();  // refused, so nothing happened: the next to settle will see
    }
  }

 private:
  int pick(int n) { return std::uniform_int_distribution<int>(0, n - 1)(random_); }
  Durability durability() {
    return std::array{Durability::kFull, Durability::kRename, Durability::kRename, Durability::kNone}[size_t(pick(4))];
  }

  /// What readers and rivals do, beside whoever works on the agent.
  void touch() {
    const int k = pick(kAgents);
    switch (pick(6)) {
      case 0: store_.list_cached_agents(); break;
      case 1: store_.get_cache_disk_usage(); break;
      case 2:
        for (const auto& report : store_.verify()) {
          if (!report.problems.empty()) fail(report.problems[0]);
        }
        break;
      default:
        try {
          const auto lock = store_.lock_agent(id_of(k));
          std::this_thread::sleep_for(std::chrono::microseconds(300));
        } catch (const Error& error) {
          if (error.code() != ErrorCode::kBusy) throw;
        }
    }
  }

  void operate(int k, Slot& slot) {
    const std::string id = id_of(k);
    State state = slot.current();
    switch (pick(12)) {
      case 0:
        store_.gc();
        break;
      case 1:
        if (!state.exists) return;
        slot.begin({});
        store_.delete_agent_cache(id);
        slot.end();
        break;
      case 2: {
        if (!state.exists) return;
        state.length = pick(state.length + 1);
        const auto lock = store_.lock_agent(id);
        slot.begin(state);
        store_.copy_agent_cache(id, id, {.n_tokens = state.length, .user = user_of(slot.next()), .replace = true, .durability = durability()});
        slot.end();
        break;
      }
      case 3: {
        const int j = pick(kAgents);
        const SlotLock other(locks_, j);  // not even this process's own, when j is k
        if (!other) return;
        settle(store_, board_.slots[j], j);
        state = board_.slots[j].current();
        if (!state.exists) return;
        const auto lock = store_.lock_agent(id);
        slot.begin(state);
        store_.copy_agent_cache(id_of(j), id, {.user = user_of(slot.next()), .replace = true, .durability = durability()});
        slot.end();
        break;
      }
      case 4:
        if (!state.exists) return;
        store_.rename_agent_cache(id, moved_id_of(k));
        store_.rename_agent_cache(moved_id_of(k), id);
        break;
      case 5:
        store_.save_prefix(snapshot_of({.length = pick(1500), .family = pick(kFamilies)}), durability());
        break;
      default: {
        if (!state.exists || pick(8) == 0) state.family = pick(kFamilies);
        state.length = state.length > 1200 ? pick(600) : state.length + 1 + pick(300);
        state.exists = true;
        const auto lock = store_.lock_agent(id);
        slot.begin(state);
        store_.save_agent_cache(id, snapshot_of(state), "m", user_of(slot.next()), durability());
        slot.end();
      }
    }
  }

  Store store_;
  const fs::path locks_;
  Board& board_;
  std::mt19937_64 random_;
};

int64_t number_from_environment(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoll(text);
}

class StoreSoak : public ::testing::Test {
 protected:
  StoreSoak() {
    fs::create_directories(locks_);
    void* memory = ::mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    board_ = new (memory) Board();
  }
  ~StoreSoak() override { ::munmap(board_, sizeof(Board)); }

  pid_t spawn(uint64_t seed, bool limited) {
    const pid_t pid = ::fork();
    if (pid != 0) return pid;
#ifdef __linux__
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
    try {
      Worker worker(root_, locks_, *board_, seed, limited);
      for (;;) worker.step();
    } catch (const std::exception& error) {
      std::snprintf(board_->failure, sizeof board_->failure, "%s", error.what());
      board_->failed = true;
    }
    ::_exit(1);
  }

  /// With nobody at work: every agent is where its slot says, nothing else is left, and nothing is damaged.
  void expect_sound() {
    Store store(root_);
    for (int k = 0; k < kAgents; ++k) ASSERT_NO_THROW(settle(store, board_->slots[k], k));
    ASSERT_NO_THROW(store.gc());
    for (const auto& report : store.verify()) {
      ASSERT_TRUE(report.problems.empty()) << report.agent_id << ": " << report.problems[0];
    }
    for (int k = 0; k < kAgents; ++k) ASSERT_TRUE(on_disk(store, k, board_->slots[k].current())) << id_of(k) << " after gc";
    const auto usage = store.get_cache_disk_usage();
    ASSERT_EQ(usage.orphan_segments, 0);
    ASSERT_EQ(usage.total_bytes, usage.agent_bytes + usage.segment_bytes) << "something was left behind";
  }

  TemporaryDirectory directory_{TemporaryDirectory::in_memory()};
  fs::path root_ = directory_.path() / "store", locks_ = directory_.path() / "slots";
  Board* board_;
};

TEST_F(StoreSoak, KilledProcessesLoseNothingButWhatWasInFlight) {
  const int64_t kills = number_from_environment("TORPOR_SOAK_KILLS", 300);
  const int64_t seed = number_from_environment("TORPOR_SOAK_SEED", int64_t(std::random_device()()));
  SCOPED_TRACE("TORPOR_SOAK_SEED=" + std::to_string(seed));
  std::mt19937_64 random{uint64_t(seed)};
  std::vector<pid_t> workers(kWorkers);
  for (size_t w = 0; w < workers.size(); ++w) workers[w] = spawn(random(), w == 0);
  auto kill = [&](size_t w) {
    ::kill(workers[w], SIGKILL);
    int status = 0;
    ::waitpid(workers[w], &status, 0);
  };
  for (int64_t i = 1; i <= kills && !board_->failed && !HasFatalFailure(); ++i) {
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 40'000));
    const bool all = i % 20 == 0;
    const size_t victim = random() % workers.size();
    for (size_t w = 0; w < workers.size(); ++w) {
      if (all || w == victim) kill(w);
    }
    if (all) expect_sound();
    for (size_t w = 0; w < workers.size(); ++w) {
      if (all || w == victim) workers[w] = spawn(random(), w == 0);
    }
  }
  for (size_t w = 0; w < workers.size(); ++w) kill(w);
  EXPECT_FALSE(board_->failed) << board_->failure;
  expect_sound();
  std::printf("%lld kills, %lld operations, %lld refused\n", (long long)kills, (long long)board_->operations.load(),
              (long long)board_->busy.load());
  EXPECT_GT(board_->operations, kills) << "hardly anything was going on";
}

}  // namespace
}  // namespace torpor::testing
