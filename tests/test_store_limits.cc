/// Disk limits, and the counter of bytes written.

#include <thread>

#include <sys/stat.h>

#include "counting_env.h"
#include "store_fixture.h"

namespace torpor::testing {
namespace {

/// About 66 KB a segment.
const KvLayout kLayout = small_layout(KvDtype::kF16, 2, 2, 16);

class StoreLimits : public ::testing::Test {
 protected:
  int64_t used() { return store_.get_cache_disk_usage().total_bytes; }
  fs::path segment_path(const std::string& name) const {
    return root_ / "segments" / name.substr(0, 2) / (name + ".safetensors");
  }
  /// Makes the file older than all that are written now.
  void age(const std::string& segment, int hours) {
    fs::last_write_time(segment_path(segment), fs::file_time_type::clock::now() - std::chrono::hours(hours));
  }
  static KvSnapshot other_model(int n, const std::string& weights) {
    auto snapshot = make_snapshot(n, kLayout, 7);
    snapshot.identity = test_identity(weights);
    return snapshot;
  }

  TemporaryDirectory directory_;
  fs::path root_ = directory_.path() / "store";
  CountingEnv env_;
  Store store_{root_, &env_};
};

TEST_F(StoreLimits, ASaveThatDoesNotFitWritesNothing) {
  store_.save_agent_cache("a", make_snapshot(600, kLayout), "m");
  const auto before = tree(root_);
  store_.set_disk_limits({.budget = used() + 1000});
  std::string message;
  const auto bigger = make_snapshot(1200, kLayout);
  EXPECT_EQ(code_of([&] { store_.save_agent_cache("a", bigger, "m"); }, &message), ErrorCode::kResourceExhausted);
  EXPECT_NE(message.find("'a'"), std::string::npos) << message;
  EXPECT_NE(message.find(std::to_string(used())), std::string::npos) << message;
  EXPECT_NE(message.find(std::to_string(used() + 1000)), std::string::npos) << message;
  EXPECT_EQ(tree(root_), before);
  store_.set_disk_limits({});
  EXPECT_NO_THROW(store_.save_agent_cache("a", bigger, "m"));
}

TEST_F(StoreLimits, AReclaimerIsAskedUntilThereIsRoomOrItFreesNothing) {
  for (const char* agent : {"a", "b", "c"}) {
    store_.save_agent_cache(agent, make_snapshot(600, kLayout, 3, agent[0] * 1000), "m");
  }
  std::vector<std::string> spare = {"b", "a"};  // from the back
  int asked = 0;
  store_.set_reclaimer([&] {
    ++asked;
    if (spare.empty()) return false;
    const std::string agent = spare.back();
    spare.pop_back();
    EXPECT_FALSE(store_.delete_agent_cache_of(agent, "another one's"));
    return store_.delete_agent_cache_of(agent, store_.agent_info(agent).hash);
  });
  store_.set_disk_limits({.budget = used() + 1000});
  store_.save_agent_cache("d", make_snapshot(600, kLayout, 3, 9000), "m");
  EXPECT_EQ(asked, 1);
  EXPECT_FALSE(store_.contains("a"));
  EXPECT_TRUE(store_.contains("b"));
  const auto two = make_snapshot(1800, kLayout, 3, 90000);
  EXPECT_EQ(code_of([&] { store_.save_agent_cache("e", two, "m"); }), ErrorCode::kResourceExhausted);
  EXPECT_EQ(asked, 3);
  EXPECT_FALSE(store_.contains("b"));
  EXPECT_TRUE(store_.contains("c"));
}

TEST_F(StoreLimits, TheNeedIsCountedToTheByte) {
  for (const bool sealed : {false, true}) {
    const auto snapshot = make_snapshot(sealed ? 600 : 100, kLayout, sealed ? 3 : 4, sealed ? 100 : 4000);
    Store probe(directory_.path() / (sealed ? "p1" : "p0"));
    const int64_t need = probe.save_agent_cache("x", snapshot, "m").bytes_written;
    const int64_t before = used();
    // Room for the sidecar's longest numbers is asked for, so a little less than `need + 60` is too little.
    store_.set_disk_limits({.budget = before + need - 1});
    EXPECT_EQ(code_of([&] { store_.save_agent_cache("x", snapshot, "m"); }), ErrorCode::kResourceExhausted);
    store_.set_disk_limits({.budget = before + need + 60});
    EXPECT_EQ(code_of([&] { store_.save_agent_cache("x", snapshot, "m"); }), std::nullopt);
    EXPECT_EQ(used(), before + need);
    store_.delete_agent_cache("x");
  }
}

TEST_F(StoreLimits, TheBudgetHoldsAcrossModels) {
  // However many models take turns: the bound is on every file in the store.
  store_.set_disk_limits({.budget = 400'000});
  int refused = 0;
  for (int i = 0; i < 12; ++i) {
    const auto code = code_of([&] { store_.save_agent_cache("a" + std::to_string(i), other_model(300, "w" + std::to_string(i)), "m"); });
    if (code) {
      EXPECT_EQ(*code, ErrorCode::kResourceExhausted);
      ++refused;
    }
    EXPECT_LE(used(), 400'000);
  }
  EXPECT_GT(refused, 0);
  EXPECT_LT(refused, 12);
  for (const auto& report : store_.verify()) EXPECT_TRUE(report.problems.empty());
}

TEST_F(StoreLimits, UnnamedSegmentsGoOldestLeafFirst) {
  const auto named = make_snapshot(300, kLayout);
  store_.save_agent_cache("a", named, "m");
  const auto young = store_.save_prefix(make_snapshot(512, kLayout, 2, 2000)).segments;
  const auto old = store_.save_prefix(make_snapshot(768, kLayout, 3, 4000)).segments;
  write_all(root_ / ".torpor-tmp-left-by-a-crash", std::string(1000, 'x'));
  for (size_t i = 0; i < old.size(); ++i) age(old[i], 30 - int(i));  // the first of a chain is the oldest, and not a leaf
  for (const auto& name : young) age(name, 10);
  const auto exists = [&](const std::string& name) { return fs::exists(segment_path(name)); };
  const auto extra = make_snapshot(256, kLayout, 5, 6000);
  Store probe(directory_.path() / "probe");
  const int64_t need = probe.save_agent_cache("b", extra, "m").bytes_written;

  store_.set_disk_limits({.budget = used() + need - 500});
  store_.save_agent_cache("b", extra, "m");
  EXPECT_FALSE(fs::exists(root_ / ".torpor-tmp-left-by-a-crash")) << "what a crash left goes first";
  for (const auto& name : old) EXPECT_TRUE(exists(name));

  const auto third = make_snapshot(256, kLayout, 6, 8000);
  store_.set_disk_limits({.budget = used() + need - 500});
  store_.save_agent_cache("c", third, "m");
  EXPECT_TRUE(exists(old[0]) && exists(old[1]) && !exists(old[2])) << "the leaf of the oldest chain";
  EXPECT_TRUE(exists(young[0]) && exists(young[1]));

  const auto large = make_snapshot(3 * 256, kLayout, 8, 9000);
  store_.set_disk_limits({.budget = used() + 10'000});
  store_.save_agent_cache("d", large, "m");
  EXPECT_TRUE(!exists(old[0]) && !exists(old[1]));
  EXPECT_TRUE(exists(young[0]) && !exists(young[1]));
  for (const char* id : {"a", "b", "c", "d"}) EXPECT_TRUE(store_.verify(id)[0].problems.empty()) << id;
  EXPECT_TRUE(same(store_.load_agent_cache("a").snapshot, named));
}

TEST_F(StoreLimits, WhatASaveIsAboutToNameIsNotEvicted) {
  const auto prefix = make_snapshot(512, kLayout);
  store_.save_prefix(prefix);
  store_.set_disk_limits({.budget = used() + 1000});
  EXPECT_EQ(code_of([&] { store_.save_agent_cache("a", make_snapshot(700, kLayout), "m"); }), ErrorCode::kResourceExhausted);
  EXPECT_EQ(Store(root_).find_prefix(prefix.identity, prefix.lineage, kLayout, prefix.tokens), 512);
}

TEST_F(StoreLimits, ARefusedSaveEvictsNothing) {
  store_.save_prefix(make_snapshot(512, kLayout, 2, 2000));
  store_.set_disk_limits({.budget = used() + 1000});
  const auto before = tree(root_);
  EXPECT_EQ(code_of([&] { store_.save_agent_cache("a", make_snapshot(5000, kLayout), "m"); }), ErrorCode::kResourceExhausted);
  EXPECT_EQ(tree(root_), before);
}

TEST_F(StoreLimits, WithADamagedAgentNothingUnnamedIsKnown) {
  store_.save_agent_cache("a", make_snapshot(300, kLayout), "m");
  store_.save_prefix(make_snapshot(512, kLayout, 2, 2000));
  const auto path = root_ / "a.safetensors";
  write_all(path, read_all(path).substr(0, 300));
  const auto before = tree(root_);
  store_.set_disk_limits({.budget = used() + 1000});
  std::string message;
  EXPECT_EQ(code_of([&] { store_.save_agent_cache("b", make_snapshot(256, kLayout, 9, 9000), "m"); }, &message),
            ErrorCode::kResourceExhausted);
  EXPECT_NE(message.find("a.safetensors"), std::string::npos) << message;
  EXPECT_EQ(tree(root_), before);
}

TEST_F(StoreLimits, SomeOfTheDiskStaysFree) {
  env_.free_space = 1'000'000;
  store_.set_disk_limits({.min_free = 950'000});
  std::string message;
  EXPECT_EQ(code_of([&] { store_.save_agent_cache("a", make_snapshot(512, kLayout), "m"); }, &message), ErrorCode::kResourceExhausted);
  EXPECT_NE(message.find("1000000"), std::string::npos) << message;
  EXPECT_NE(message.find("950000"), std::string::npos) << message;
  EXPECT_NO_THROW(store_.save_agent_cache("a", make_snapshot(100, kLayout), "m"));
}

TEST_F(StoreLimits, CopiesPrefixesAndImportsObeyToo) {
  const auto snapshot = make_snapshot(300, kLayout);
  store_.save_agent_cache("a", snapshot, "m");
  const auto file = directory_.path() / "e.safetensors";
  store_.export_agent("a", file);
  const auto before = tree(root_);
  store_.set_disk_limits({.budget = used() + 100});
  EXPECT_EQ(code_of([&] { store_.copy_agent_cache("a", "b"); }), ErrorCode::kResourceExhausted);
  EXPECT_EQ(code_of([&] { store_.rename_agent_cache("a", "b"); }), ErrorCode::kResourceExhausted);
  EXPECT_EQ(code_of([&] { store_.import_agent(file, "b"); }), ErrorCode::kResourceExhausted);
  EXPECT_EQ(code_of([&] { store_.save_prefix(make_snapshot(256, kLayout, 2, 2000)); }), ErrorCode::kResourceExhausted);
  EXPECT_EQ(tree(root_), before);
  EXPECT_EQ(store_.save_prefix(snapshot).segments_written, 0) << "what is there needs no room";
}

TEST_F(StoreLimits, BytesWrittenAreCountedForever) {
  int64_t written = store_.save_agent_cache("a", make_snapshot(600, kLayout), "m").bytes_written;
  EXPECT_EQ(store_.get_cache_disk_usage().bytes_written, written);
  written += store_.copy_agent_cache("a", "b", {.n_tokens = 100}).bytes_written;
  {
    Store second(root_);
    written += second.save_agent_cache("c", make_snapshot(300, kLayout, 4, 3000), "m").bytes_written;
    written += second.save_prefix(make_snapshot(256, kLayout, 5, 4000)).bytes_written;
  }
  store_.delete_agent_cache("a");
  store_.gc();
  EXPECT_EQ(Store(root_).get_cache_disk_usage().bytes_written, written);
  // A counter that can't be read begins again, and is no reason for a save to fail.
  write_all(root_ / ".locks/.bytes_written", "nonsense");
  EXPECT_EQ(store_.get_cache_disk_usage().bytes_written, 0);
  written = store_.save_agent_cache("a", make_snapshot(10, kLayout), "m").bytes_written;
  EXPECT_EQ(store_.get_cache_disk_usage().bytes_written, written);
  fs::remove(root_ / ".locks/.bytes_written");
  fs::create_directory(root_ / ".locks/.bytes_written");
  EXPECT_NO_THROW(written = store_.save_agent_cache("a", make_snapshot(10, kLayout), "m").bytes_written);
  fs::remove(root_ / ".locks/.bytes_written");
  written += store_.save_agent_cache("a", make_snapshot(11, kLayout), "m").bytes_written;
  EXPECT_EQ(store_.get_cache_disk_usage().bytes_written, written) << "told later";
}

TEST_F(StoreLimits, ConcurrentWritersLoseNoCount) {
  std::atomic<int64_t> written = 0;
  {
    std::vector<std::jthread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        Store mine(root_);
        for (int i = 0; i < 20; ++i) {
          written += mine.save_agent_cache("t" + std::to_string(t), make_snapshot(i + 1), "m", {}, Durability::kRename).bytes_written;
        }
      });
    }
  }
  EXPECT_EQ(store_.get_cache_disk_usage().bytes_written, written);
}

}  // namespace
}  // namespace torpor::testing
