/// Files of teams, as the store keeps them: made once, counted, verified, locked and removed.

#include "store_fixture.h"

#include <atomic>
#include <thread>

namespace torpor::testing {
namespace {

class StoreTeams : public ::testing::Test {
 protected:
  TemporaryDirectory directory_;
  fs::path root_ = directory_.path() / "store";
  Store store_{root_};
};

TEST_F(StoreTeams, TeamsAreMadeOnceCountedVerifiedAndRemoved) {
  const std::string json = "{\n  \"team\": \"crew\"\n}\n", later = "{\n  \"team\": \"later\"\n}\n";
  store_.make_team("crew", json);
  EXPECT_EQ(code_of([&] { store_.make_team("crew", later); }), ErrorCode::kInvalidArgument);
  const std::string kept = store_.read_team("crew");
  EXPECT_TRUE(kept.starts_with("{\n  \"team_checksum\": \"")) << kept;
  EXPECT_TRUE(kept.ends_with("\",\n  \"team\": \"crew\"\n}\n")) << kept;
  store_.save_team("crew", later);
  EXPECT_TRUE(Store(root_).read_team("crew").ends_with(later.substr(1)));
  store_.make_team("other", json);
  EXPECT_EQ(store_.teams(), (std::vector<std::string>{"crew", "other"}));
  const DiskUsage usage = store_.get_cache_disk_usage();
  EXPECT_EQ(usage.teams, 2);
  EXPECT_EQ(usage.team_bytes, int64_t(kept.size() + 1 + kept.size()));
  EXPECT_GE(usage.total_bytes, usage.team_bytes);
  // Not the store's, but for what a crash has left.
  write_all(root_ / "teams" / "notes.txt", "x");
  write_all(root_ / "teams" / ".torpor-tmp-1-2", "left over");
  EXPECT_EQ(store_.gc().files_removed, 1);
  EXPECT_EQ(store_.teams().size(), 2u);
  EXPECT_TRUE(fs::exists(root_ / "teams" / "notes.txt"));
  for (const char* id : {"", "-", ".x", "../etc", "a/b"}) {
    EXPECT_EQ(code_of([&] { store_.make_team(id, json); }), ErrorCode::kInvalidArgument) << id;
    EXPECT_EQ(code_of([&] { store_.read_team(id); }), ErrorCode::kInvalidArgument) << id;
  }
  EXPECT_EQ(code_of([&] { store_.make_team("list", "[]"); }), ErrorCode::kInvalidArgument);
  EXPECT_TRUE(store_.remove_team("other"));
  EXPECT_FALSE(store_.remove_team("other"));
  EXPECT_EQ(code_of([&] { store_.read_team("other"); }), ErrorCode::kNotFound);
}

TEST_F(StoreTeams, DamageOfATeamIsFound) {
  store_.make_team("crew", "{\n  \"team\": \"crew\"\n}\n");
  const fs::path path = root_ / "teams" / "crew.json";
  const std::string good = read_all(path);
  for (size_t at = 0; at < good.size(); ++at) {
    std::string bad = good;
    bad[at] = char(bad[at] ^ 1);
    for (const std::string& text : {bad, good.substr(0, at)}) {
      write_all(path, text);
      EXPECT_EQ(code_of([&] { store_.read_team("crew"); }), ErrorCode::kCorruption) << at;
      ASSERT_EQ(store_.verify_teams().size(), 1u);
      EXPECT_NE(store_.verify_teams().front().problem, "") << at;
    }
  }
  write_all(path, good);
  EXPECT_EQ(store_.verify_teams().front().problem, "");
}

TEST_F(StoreTeams, WhatIsKeptOfATeamCanBeReadAndWhatIsLargerIsDamage) {
  const auto of_size = [](size_t size) { return "{\n" + std::string(size - 4, ' ') + "}\n"; };
  constexpr size_t kMost = size_t(16) << 20;
  const size_t head = std::string("{\n  \"team_checksum\": \"\",\n").size() + 32 - 2;
  store_.make_team("crew", of_size(kMost - head), Durability::kNone);
  EXPECT_EQ(store_.read_team("crew").size(), kMost);
  EXPECT_EQ(code_of([&] { store_.save_team("crew", of_size(kMost - head + 1)); }), ErrorCode::kInvalidArgument);
  fs::resize_file(root_ / "teams" / "crew.json", kMost + 1);
  EXPECT_EQ(code_of([&] { store_.read_team("crew"); }), ErrorCode::kCorruption);
}

TEST_F(StoreTeams, OfManyMakersOfATeamOneSucceeds) {
  std::atomic<int> made{0};
  std::vector<std::thread> makers;
  for (int i = 0; i < 8; ++i) {
    makers.emplace_back([&] {
      try {
        Store(root_).make_team("crew", "{\n  \"team\": \"crew\"\n}\n", Durability::kNone);
        ++made;
      } catch (const Error& error) {
        EXPECT_EQ(error.field(), kTeamTaken) << error.what();
      }
    });
  }
  for (std::thread& maker : makers) maker.join();
  EXPECT_EQ(made, 1);
}

TEST_F(StoreTeams, ATeamIsLockedByOneAndItsLockGoesWithIt) {
  store_.make_team("crew", "{\n  \"team\": \"crew\"\n}\n");
  {
    const auto lock = store_.lock_team("crew");
    EXPECT_EQ(code_of([&] { (void)Store(root_).lock_team("crew"); }), ErrorCode::kBusy);
    store_.remove_team("crew");
  }
  EXPECT_FALSE(fs::exists(root_ / ".locks" / ".team-crew.lock"));
  store_.save_agent_cache("crew", make_snapshot(3), "m");  // no relation
  EXPECT_FALSE(store_.is_awake("crew"));
}

TEST_F(StoreTeams, TeamsGoThroughNoSymbolicLink) {
  store_.save_agent_cache("a", make_snapshot(3), "m");
  const fs::path elsewhere = root_.parent_path() / "elsewhere";
  fs::create_directory(elsewhere);
  write_all(elsewhere / "crew.json", "x");
  fs::create_directory_symlink(elsewhere, root_ / "teams");
  EXPECT_TRUE(store_.teams().empty());
  EXPECT_FALSE(store_.remove_team("crew"));
  EXPECT_EQ(code_of([&] { store_.save_team("crew", "{\n}\n"); }), ErrorCode::kIo);
  EXPECT_EQ(code_of([&] { store_.read_team("crew"); }), ErrorCode::kNotFound);
  EXPECT_EQ(read_all(elsewhere / "crew.json"), "x");
}

}  // namespace
}  // namespace torpor::testing
