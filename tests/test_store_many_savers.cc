/// Many savers beside a gc loop and a disk limit: nobody is told that the store is busy, and what is done under the store's
/// lock is looking at names and unlinking. With TORPOR_SOAK 10,000 segments and 200 agents, else fewer.

#include <atomic>
#include <set>
#include <thread>

#include "counting_env.h"
#include "store_fixture.h"

namespace torpor::testing {
namespace {

const KvLayout kLayout = small_layout(KvDtype::kF16, 1, 1, 4);

/// Watches each thread between its locking and unlocking of the store's lock.
class WatchingEnv : public CountingEnv {
 public:
  std::atomic<int> holds = 0, exclusive_holds = 0, most_unlinks = 0;
  std::vector<std::string> violations() const {
    const std::lock_guard lock(mutex_);
    return violations_;
  }

  int raw_open(const char* path, OpenMode mode) override {
    const int fd = CountingEnv::raw_open(path, mode);
    const std::lock_guard lock(mutex_);
    if (fd >= 0) paths_[fd] = path;
    return fd;
  }
  int raw_close(int fd) override {
    {
      const std::lock_guard lock(mutex_);
      paths_.erase(fd);
    }
    return CountingEnv::raw_close(fd);
  }
  int raw_lock(int fd, LockMode mode) override {
    const int result = CountingEnv::raw_lock(fd, mode);
    if (result >= 0 && is_store_lock(fd)) {
      held_ = true;
      unlinks_ = 0;
      ++(mode == LockMode::kExclusive ? exclusive_holds : holds);
    }
    return result;
  }
  int raw_unlock(int fd) override {
    if (is_store_lock(fd)) {
      held_ = false;
      for (int most = most_unlinks; most < unlinks_ && !most_unlinks.compare_exchange_weak(most, unlinks_);) {
      }
    }
    return CountingEnv::raw_unlock(fd);
  }
  int64_t raw_read(int fd, void* bytes, size_t size, uint64_t offset) override {
    if (held_ && !path_of(fd).ends_with(".claims")) violate("read of " + path_of(fd));
    return CountingEnv::raw_read(fd, bytes, size, offset);
  }
  int raw_sync(int fd) override { return under_lock("fsync"), CountingEnv::raw_sync(fd); }
  int raw_sync_directory(const char* path) override { return under_lock("fsync of a directory"), CountingEnv::raw_sync_directory(path); }
  int raw_list(const char* path, std::vector<std::string>& names) override {
    return under_lock("listing"), CountingEnv::raw_list(path, names);
  }
  std::shared_ptr<const std::byte> raw_map(int fd, uint64_t size) override { return under_lock("mapping"), CountingEnv::raw_map(fd, size); }
  int raw_remove(const char* path) override { return unlinks_ += held_, CountingEnv::raw_remove(path); }

 private:
  std::string path_of(int fd) const {
    const std::lock_guard lock(mutex_);
    const auto found = paths_.find(fd);
    return found == paths_.end() ? "" : found->second;
  }
  bool is_store_lock(int fd) const { return path_of(fd).ends_with("/.store.lock"); }
  void under_lock(const char* what) {
    if (held_) violate(what);
  }
  void violate(const std::string& what) {
    const std::lock_guard lock(mutex_);
    violations_.push_back(what);
  }

  static thread_local bool held_;
  static thread_local int unlinks_;
  mutable std::mutex mutex_;
  std::map<int, std::string> paths_;
  std::vector<std::string> violations_;
};

thread_local bool WatchingEnv::held_ = false;
thread_local int WatchingEnv::unlinks_ = 0;

TEST(StoreManySavers, NobodyIsBusyBesideGcAndALimit) {
  const bool full = std::getenv("TORPOR_SOAK") != nullptr;
  const int agents = full ? 200 : 40, segments = full ? 10'000 : 800, savers = 64, rounds = full ? 20 : 4;
  TemporaryDirectory directory(TemporaryDirectory::in_memory());
  const auto root = directory.path() / "store";
  WatchingEnv env;
  Store store(root, &env);
  for (int a = 0; a < agents; ++a) {
    const int n = kSegmentTokens * segments / agents;
    store.save_agent_cache("base-" + std::to_string(a), make_snapshot(n, kLayout, uint32_t(a + 1), 10'000 * (a + 1)), "m", {},
                           Durability::kRename);
  }
  const int64_t budget = store.get_cache_disk_usage().total_bytes + 6'000'000;
  store.set_disk_limits({.budget = budget});
  env.reset();

  std::atomic<int> busy = 0, refused = 0, done = 0;
  std::atomic<bool> over = false;
  std::mutex mutex;
  std::string message;
  const auto attempt = [&](const auto& work) {
    std::string why;
    const auto code = code_of(work, &why);
    if (!code) return ++done, true;
    ++(*code == ErrorCode::kResourceExhausted ? refused : busy);
    const std::lock_guard lock(mutex);
    if (*code != ErrorCode::kResourceExhausted) message = why;
    return false;
  };
  const auto last = [](int t, int round) { return make_snapshot(300 + 100 * round, kLayout, uint32_t(t + 1000), 5'000'000 + 10'000 * t); };
  std::vector<int> saved(size_t(savers), -1);
  int sweeps = 0;
  {
    std::vector<std::jthread> threads;
    for (int t = 0; t < savers; ++t) {
      threads.emplace_back([&, t] {
        for (int round = 0; round < rounds; ++round) {
          // A prefix that no agent names: what gc and the limit are there for.
          attempt([&] { store.save_prefix(make_snapshot(512, kLayout, uint32_t(t + 2000), 9'000'000 + 10'000 * t + round), Durability::kFull); });
          if (attempt([&] { store.save_agent_cache("saver-" + std::to_string(t), last(t, round), "m"); })) saved[size_t(t)] = round;
        }
      });
    }
    std::jthread gc([&] {
      while (!over) {
        attempt([&] { store.gc(); });
        ++sweeps;
      }
    });
    for (auto& thread : threads) thread.join();
    over = true;
  }
  EXPECT_EQ(busy, 0) << message;
  EXPECT_GT(sweeps, 2);
  EXPECT_GT(done, savers * rounds) << refused << " were refused";
  const auto violations = env.violations();
  EXPECT_TRUE(violations.empty()) << violations.size() << " times, first: " << violations[0];
  EXPECT_GT(env.exclusive_holds, 0);
  EXPECT_GT(env.holds, 0);
  EXPECT_LE(env.most_unlinks, 64);
  EXPECT_GT(env.most_unlinks, 0);
  EXPECT_LE(store.get_cache_disk_usage().total_bytes, budget);
  // Nothing that an agent names is gone, and every saver finds what it saved last.
  for (const auto& report : store.verify()) EXPECT_TRUE(report.problems.empty()) << report.agent_id << ": " << report.problems[0];
  for (int t = 0; t < savers; ++t) {
    if (saved[size_t(t)] < 0) continue;
    EXPECT_TRUE(same(Store(root).load_agent_cache("saver-" + std::to_string(t)).snapshot, last(t, saved[size_t(t)]))) << t;
  }
  store.gc();
  EXPECT_EQ(store.get_cache_disk_usage().orphan_segments, 0);
}

TEST(StoreManySavers, UnlinksAreAtMost64AHold) {
  TemporaryDirectory directory(TemporaryDirectory::in_memory());
  WatchingEnv env;
  Store store(directory.path() / "store", &env);
  store.save_prefix(make_snapshot(150 * kSegmentTokens, kLayout), Durability::kRename);
  store.save_agent_cache("a", make_snapshot(150 * kSegmentTokens, kLayout, 2, 50'000), "m", {}, Durability::kRename);
  EXPECT_EQ(store.gc().files_removed, 150);
  EXPECT_EQ(env.most_unlinks, 64);
  store.delete_agent_cache("a");
  EXPECT_EQ(env.most_unlinks, 64);
  EXPECT_EQ(store.get_cache_disk_usage().segments, 0);
  EXPECT_TRUE(env.violations().empty());
}

TEST(StoreManySavers, TwoSavesAtOnceDoNotTakeTheSameRoom) {
  TemporaryDirectory directory(TemporaryDirectory::in_memory());
  const auto root = directory.path() / "store";
  Store one(root), two(root);
  one.save_agent_cache("a", make_snapshot(10, kLayout), "m");
  const auto snapshot = [](int k, int round) { return make_snapshot(1000, kLayout, uint32_t(k), 100'000 * k + 1000 * round); };
  Store probe(directory.path() / "probe");
  const int64_t need = probe.save_agent_cache("x1", snapshot(1, 0), "m").bytes_written;
  for (int round = 0; round < 40; ++round) {
    const int64_t budget = one.get_cache_disk_usage().total_bytes + need + 100;  // room for one of the two
    one.set_disk_limits({.budget = budget});
    two.set_disk_limits({.budget = budget});
    std::optional<ErrorCode> codes[2];
    {
      std::jthread first([&] { codes[0] = code_of([&] { one.save_agent_cache("x1", snapshot(1, round), "m", {}, Durability::kRename); }); });
      std::jthread second([&] { codes[1] = code_of([&] { two.save_agent_cache("x2", snapshot(2, round), "m", {}, Durability::kRename); }); });
    }
    EXPECT_TRUE(codes[0].has_value() != codes[1].has_value()) << "one has room, round " << round;
    EXPECT_LE(one.get_cache_disk_usage().total_bytes, budget);
    for (const char* id : {"x1", "x2"}) {
      if (one.contains(id)) one.delete_agent_cache(id);
    }
  }
}

TEST(StoreManySavers, ASegmentThatASaveFoundIsNotRemovedBeforeItsAgentNamesIt) {
  // gc sweeps at each call that the save makes.
  class Sweeping : public CountingEnv {
   public:
    Store* other = nullptr;
    bool counting = false;
    int at = 0, calls = 0;
    int raw_stat(const char* path, FileStat& out) override { return sweep(), CountingEnv::raw_stat(path, out); }
    int raw_open(const char* path, OpenMode mode) override { return sweep(), CountingEnv::raw_open(path, mode); }
    int raw_sync_directory(const char* path) override { return sweep(), CountingEnv::raw_sync_directory(path); }

   private:
    void sweep() {
      if (!counting || ++calls != at) return;
      Store* sweeper = std::exchange(other, nullptr);
      // From a thread of its own, for the save may be waited for.
      sweeper_ = std::jthread([sweeper] { sweeper->gc(); });
      std::this_thread::sleep_for(std::chrono::milliseconds(3));
    }
    std::jthread sweeper_;
  };
  for (int at = 1, calls = 1; at <= calls; ++at) {
    TemporaryDirectory directory(TemporaryDirectory::in_memory());
    const auto root = directory.path() / "store";
    const auto snapshot = make_snapshot(800, kLayout);
    Store other(root);
    other.save_prefix(make_snapshot(600, kLayout), Durability::kRename);
    Sweeping env;
    {
      Store store(root, &env);
      env.at = at;
      env.other = &other;
      env.counting = true;
      store.save_agent_cache("a", snapshot, "m");
      calls = env.calls;
      env.counting = false;
    }
    ASSERT_TRUE(same(Store(root).load_agent_cache("a").snapshot, snapshot)) << "gc at call " << at;
  }
}

}  // namespace
}  // namespace torpor::testing
