/// Forks, rewinds, renames, and prefixes of no agent: none of them reads a sealed row it need not read.

#include "counting_env.h"
#include "store_fixture.h"

namespace torpor::testing {
namespace {

const KvLayout kLayout = small_layout(KvDtype::kBF16, 2, 2, 4);

class StoreCopy : public ::testing::Test {
 protected:
  StoreCopy() { store_.save_agent_cache("a", kWhole, "some/model", {{"k", "v"}}, Durability::kRename); }

  int count_segments() const {
    int n = 0;
    for (const auto& [name, bytes] : tree(root_)) n += name.starts_with("segments/");
    return n;
  }

  const KvSnapshot kWhole = make_snapshot(1100, kLayout);
  TemporaryDirectory directory_;
  fs::path root_ = directory_.path() / "store";
  CountingEnv env_;
  Store store_{root_, &env_};
};

TEST_F(StoreCopy, AForkAtAnyTokenIsThatPrefix) {
  for (int n : {0, 1, 255, 256, 257, 700, 1024, 1025, 1099, 1100}) {
    const std::string id = "f" + std::to_string(n);
    const auto result = Store(root_).copy_agent_cache("a", id, {.n_tokens = n, .durability = Durability::kRename});
    EXPECT_EQ(result.segments_written, 0);
    EXPECT_EQ(result.segments_shared, n / 256);
    EXPECT_EQ(result.segments.size(), size_t(n / 256));
    const auto loaded = Store(root_).load_agent_cache(id);
    EXPECT_TRUE(same(loaded.snapshot, make_snapshot(n, kLayout))) << n;
    EXPECT_EQ(loaded.info.model, "some/model");
    EXPECT_EQ(loaded.info.user, (UserMetadata{{"k", "v"}}));
  }
  EXPECT_EQ(count_segments(), 4);
  EXPECT_EQ(store_.gc().files_removed, 0);
  EXPECT_EQ(code_of([&] { store_.copy_agent_cache("a", "b", {.n_tokens = 1101}); }), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of([&] { store_.copy_agent_cache("a", "b", {.n_tokens = -1}); }), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of([&] { store_.copy_agent_cache("none", "b"); }), ErrorCode::kNotFound);
  EXPECT_EQ(code_of([&] { store_.copy_agent_cache("a", "f0"); }), ErrorCode::kInvalidArgument);
}

TEST_F(StoreCopy, AForkReadsAndWritesNoSealedRow) {
  env_.reset();
  const auto result = store_.copy_agent_cache("a", "b", {.durability = Durability::kRename});
  EXPECT_EQ(env_.opened_segments(), 0);
  EXPECT_EQ(result.bytes_written, int64_t(fs::file_size(root_ / "b.safetensors") + fs::file_size(root_ / "b.json")));
  // Inside a segment: that one is read, and only its first rows are written.
  env_.reset();
  const auto cut = store_.copy_agent_cache("a", "c", {.n_tokens = 600, .durability = Durability::kRename});
  EXPECT_EQ(env_.opened_segments(), 1);
  EXPECT_LT(env_.bytes_read, int64_t(kLayout.bytes_per_token() * 256 + 1100 * 4 + 3 * 32 * 1024));
}

TEST_F(StoreCopy, ARewindReplacesTheAgentItself) {
  const auto before = store_.agent_info("a");
  EXPECT_EQ(code_of([&] { store_.copy_agent_cache("a", "a", {.n_tokens = 300}); }), ErrorCode::kInvalidArgument);
  store_.copy_agent_cache("a", "a", {.n_tokens = 300, .user = UserMetadata{{"k", "w"}, {"l", ""}}, .replace = true});
  const auto loaded = Store(root_).load_agent_cache("a");
  EXPECT_TRUE(same(loaded.snapshot, make_snapshot(300, kLayout)));
  EXPECT_EQ(loaded.info.user, (UserMetadata{{"k", "w"}, {"l", ""}}));
  EXPECT_EQ(loaded.info.created_at, before.created_at);
  EXPECT_LT(before.updated_at, loaded.info.updated_at);
  EXPECT_EQ(store_.list_cached_agents()[0].hash, loaded.info.hash);
  EXPECT_EQ(store_.get_cache_disk_usage().orphan_segments, 3);
  store_.gc();
  EXPECT_TRUE(same(store_.load_agent_cache("a").snapshot, make_snapshot(300, kLayout)));
  EXPECT_EQ(code_of([&] { store_.copy_agent_cache("a", "a", {.user = UserMetadata{{"k", "\xff"}}, .replace = true}); }),
            ErrorCode::kInvalidArgument);
  EXPECT_EQ(store_.agent_info("a").hash, loaded.info.hash);
}

TEST_F(StoreCopy, WhatIsDamagedIsNotCopied) {
  const auto segment = store_.agent_info("a").segments[2];
  const auto path = root_ / "segments" / segment.substr(0, 2) / (segment + ".safetensors");
  std::string bytes = read_all(path);
  bytes[bytes.size() / 2] ^= 1;
  write_all(path, bytes);
  EXPECT_EQ(code_of([&] { store_.copy_agent_cache("a", "b", {.n_tokens = 600}); }), ErrorCode::kCorruption);
  fs::remove(path);
  EXPECT_EQ(code_of([&] { store_.copy_agent_cache("a", "b"); }), ErrorCode::kCorruption);
  EXPECT_FALSE(store_.contains("b"));
  EXPECT_NO_THROW(store_.copy_agent_cache("a", "b", {.n_tokens = 500}));
  EXPECT_TRUE(same(store_.load_agent_cache("b").snapshot, make_snapshot(500, kLayout)));
}

TEST_F(StoreCopy, ARenamedAgentIsTheSameUnderAnotherId) {
  const auto before = store_.agent_info("a");
  store_.rename_agent_cache("a", "b");
  EXPECT_FALSE(store_.contains("a"));
  EXPECT_FALSE(fs::exists(root_ / "a.json"));
  EXPECT_FALSE(fs::exists(root_ / ".locks/a.lock"));
  const auto loaded = Store(root_).load_agent_cache("b");
  EXPECT_TRUE(same(loaded.snapshot, kWhole));
  EXPECT_EQ(loaded.info.created_at, before.created_at);
  EXPECT_EQ(loaded.info.updated_at, before.updated_at);
  EXPECT_EQ(loaded.info.user, before.user);
  EXPECT_EQ(store_.verify("b")[0].problems.size(), 0u);
  EXPECT_EQ(code_of([&] { store_.rename_agent_cache("a", "c"); }), ErrorCode::kNotFound);
  EXPECT_EQ(code_of([&] { store_.rename_agent_cache("b", "b"); }), ErrorCode::kInvalidArgument);
  store_.save_agent_cache("c", make_snapshot(3, kLayout), "m");
  EXPECT_EQ(code_of([&] { store_.rename_agent_cache("b", "c"); }), ErrorCode::kInvalidArgument);
  {
    const auto awake = store_.lock_agent("b");
    EXPECT_EQ(code_of([&] { store_.rename_agent_cache("b", "d"); }), ErrorCode::kBusy);
  }
  {
    const auto taken = store_.lock_agent("d");
    EXPECT_EQ(code_of([&] { store_.rename_agent_cache("b", "d"); }), ErrorCode::kBusy);
  }
  EXPECT_TRUE(same(store_.load_agent_cache("b").snapshot, kWhole));
}

TEST_F(StoreCopy, APrefixIsFoundWhoeverSavedIt) {
  const Store fresh(root_);
  auto tokens = kWhole.tokens;
  tokens.resize(900);
  EXPECT_EQ(fresh.find_prefix(kWhole.identity, kWhole.lineage, kLayout, tokens), 768);
  tokens[700] += 1;
  EXPECT_EQ(fresh.find_prefix(kWhole.identity, kWhole.lineage, kLayout, tokens), 512);
  EXPECT_EQ(fresh.find_prefix(kWhole.identity, kWhole.lineage, kLayout, std::span(tokens).first(255)), 0);
  EXPECT_EQ(fresh.find_prefix(test_identity("w1"), kWhole.lineage, kLayout, tokens), 0);
  EXPECT_EQ(fresh.find_prefix(kWhole.identity, kWhole.lineage, small_layout(), tokens), 0);
  for (const bool map : {false, true}) {
    const auto loaded = Store(root_).load_prefix(kWhole.identity, kWhole.lineage, kLayout, tokens, {.map_rows = map});
    EXPECT_TRUE(same(loaded.snapshot, make_snapshot(512, kLayout)));
    EXPECT_EQ(loaded.segments.size(), 2u);
    EXPECT_GT(loaded.bytes_read, int64_t(kLayout.bytes_per_token()) * 512);
  }
  // Damage ends it, and is repaired by the next who computes those rows.
  const auto segment = fresh.agent_info("a").segments[1];
  const auto path = root_ / "segments" / segment.substr(0, 2) / (segment + ".safetensors");
  const std::string good = read_all(path);
  std::string bytes = good;
  bytes[bytes.size() / 2] ^= 1;
  write_all(path, bytes);
  EXPECT_EQ(Store(root_).load_prefix(kWhole.identity, kWhole.lineage, kLayout, tokens).snapshot.tokens.size(), 256u);
  EXPECT_EQ(Store(root_).save_prefix(kWhole).segments_written, 1);
  EXPECT_EQ(read_all(path), good);
}

TEST_F(StoreCopy, APrefixIsFoundWhereItReachesFurthestAlsoOfRowsThatWereComputedOtherwise) {
  // The same tokens as those of "a": other rows from the first run on, and from the second.
  const auto other = make_snapshot(1100, kLayout, 2);
  KvSnapshot mixed = other;
  mixed.sealed[0] = kWhole.sealed[0];
  store_.save_agent_cache("other", other, "m");
  store_.save_agent_cache("mixed", mixed, "m");
  store_.copy_agent_cache("a", "a", {.n_tokens = 600, .replace = true});
  store_.gc();
  const auto expect_found = [&](const KvSnapshot& rows, int64_t n) {
    const Store fresh(root_);
    EXPECT_EQ(fresh.find_prefix(rows.identity, rows.lineage, kLayout, rows.tokens), n);
    const auto loaded = fresh.load_prefix(rows.identity, rows.lineage, kLayout, rows.tokens);
    ASSERT_EQ(int64_t(loaded.snapshot.n_runs()), n / kSegmentTokens);
    for (size_t i = 0; i < loaded.snapshot.n_runs(); ++i) {
      EXPECT_TRUE(std::ranges::equal(loaded.snapshot.run_bytes(i), rows.run_bytes(i))) << i;
    }
  };
  const auto both = Store(root_).load_prefix(other.identity, other.lineage, kLayout, other.tokens).segments;
  EXPECT_TRUE(both == store_.agent_info("other").segments || both == store_.agent_info("mixed").segments);
  store_.delete_agent_cache("other");
  expect_found(mixed, 1024);
  store_.save_agent_cache("other", other, "m");
  store_.delete_agent_cache("mixed");
  expect_found(other, 1024);
  store_.delete_agent_cache("a");
  store_.gc();
  expect_found(other, 1024);
  // The notes that lead there go with the variants.
  EXPECT_FALSE(fs::is_empty(root_ / "variants"));
  store_.delete_agent_cache("other");
  store_.gc();
  expect_found(other, 0);
  EXPECT_TRUE(fs::is_empty(root_ / "variants"));
}

TEST_F(StoreCopy, ASavedPrefixBelongsToNoAgent) {
  auto other = make_snapshot(600, kLayout, 1, 5000);
  const auto result = store_.save_prefix(other);
  EXPECT_EQ(result.segments_written, 2);
  EXPECT_EQ(result.segments.size(), 2u);
  EXPECT_EQ(Store(root_).find_prefix(other.identity, other.lineage, kLayout, other.tokens), 512);
  EXPECT_EQ(store_.list_cached_agents().size(), 1u);
  EXPECT_EQ(store_.save_prefix(other).segments_written, 0);
  EXPECT_EQ(store_.save_agent_cache("b", other, "m").segments_shared, 2);
  store_.delete_agent_cache("b");
  EXPECT_EQ(Store(root_).find_prefix(other.identity, other.lineage, kLayout, other.tokens), 0);
}

TEST_F(StoreCopy, WhatWasSavedCanBeMapped) {
  const auto info = store_.agent_info("a");
  for (size_t i = 0; i < info.segments.size(); ++i) {
    const auto run = store_.map_segment(info.segments[i]);
    ASSERT_NE(run, nullptr);
    EXPECT_TRUE(run->mapped());
    EXPECT_EQ(run->segment()->name, info.segments[i]);
    EXPECT_TRUE(std::ranges::equal(run->bytes(), kWhole.run_bytes(i)));
    const auto again = store_.map_segment(info.segments[i]);
    EXPECT_EQ(again, run) << "one mapping serves all";
  }
  EXPECT_FALSE(Store(root_).map_segment(info.segments[0])) << "nothing this process has seen";
  EXPECT_FALSE(store_.map_segment("none"));
  // A run that is mapped now is saved without being read.
  auto snapshot = kWhole;
  for (size_t i = 0; i < info.segments.size(); ++i) snapshot.sealed[i] = store_.map_segment(info.segments[i]);
  env_.reset();
  EXPECT_EQ(store_.save_agent_cache("b", snapshot, "m", {}, Durability::kRename).segments_shared, 4);
  EXPECT_EQ(env_.opened_segments(), 0);
  const auto path = root_ / "segments" / info.segments[0].substr(0, 2) / (info.segments[0] + ".safetensors");
  fs::copy(path, directory_.path() / "copy");
  fs::rename(directory_.path() / "copy", path);
  EXPECT_FALSE(store_.map_segment(info.segments[0])) << "not the file it was";
}

}  // namespace
}  // namespace torpor::testing
