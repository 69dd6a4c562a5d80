/// torpor.json: which directory is a store, what limits it keeps; and what in a store is somebody else's.

#include <functional>
#include <thread>
#include <utility>

#include "base/json.h"
#include "counting_env.h"
#include "fault_env.h"
#include "store_fixture.h"

namespace torpor::testing {
namespace {

/// A safetensors file of somebody else's.
const std::string kForeign = [] {
  const std::string json = R"({"__metadata__":{"format":"mlx"},"weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})";
  std::string file(8, '\0');
  file[0] = char(json.size());
  return file + json + std::string(4, 'w');
}();

class StoreMarker : public ::testing::Test {
 protected:
  std::string marker() const { return read_all(root_ / "torpor.json"); }
  ErrorCode refused(const std::function<void()>& call, const std::string& word) {
    std::string message;
    const auto code = code_of(call, &message);
    EXPECT_NE(message.find(word), std::string::npos) << message;
    return code.value_or(ErrorCode::kInternal);
  }
  /// A store as it was before there were markers.
  void make_old() {
    Store(root_).save_agent_cache("ada", make_snapshot(300), "m");
    fs::remove(root_ / "torpor.json");
  }

  TemporaryDirectory directory_;
  const fs::path root_ = directory_.path() / "store";
};

TEST_F(StoreMarker, TheFirstSaveMarksTheStore) {
  Store store(root_);
  EXPECT_FALSE(fs::exists(root_ / "torpor.json"));
  EXPECT_TRUE(store.list_cached_agents().empty()) << "a new store is empty, and no error";
  store.save_agent_cache("ada", make_snapshot(3), "m");
  EXPECT_EQ(marker(), "{\n  \"torpor_store\": 3\n}\n");
  EXPECT_EQ(fs::status(root_ / "torpor.json").permissions(), fs::perms::owner_read | fs::perms::owner_write);
  store.delete_agent_cache("ada");
  store.gc();
  EXPECT_EQ(marker(), "{\n  \"torpor_store\": 3\n}\n");
  EXPECT_EQ(store.get_cache_disk_usage().total_bytes, 0);
}

TEST_F(StoreMarker, TheMarkerIsOnTheDiskBeforeTheFirstAgentIs) {
  for (const Lost lost : {Lost::kData, Lost::kAll, Lost::kRootNames, Lost::kSegmentNames}) {
    for (int k = 1;; ++k) {
      fs::remove_all(root_);
      fs::create_directory(root_);
      FaultEnv env(root_, directory_.path() / "attic");
      env.fail_at(k, EIO, /*for_good=*/true);
      (void)code_of([&] { Store(root_, &env).save_agent_cache("ada", make_snapshot(300), "m"); });
      env.lose(lost);
      if (Store again(root_); again.contains("ada")) {
        EXPECT_EQ(marker(), "{\n  \"torpor_store\": 3\n}\n");
      }
      EXPECT_NO_THROW(Store(root_).list_cached_agents()) << "call " << k;
      if (!env.triggered()) break;
    }
  }
}

TEST_F(StoreMarker, APowerCutAfterASaveThatFlushesNothingLeavesAStoreThatGoesOn) {
  for (const Lost lost : {Lost::kData, Lost::kAll, Lost::kRootNames, Lost::kSegmentNames}) {
    fs::remove_all(root_);
    fs::create_directory(root_);
    FaultEnv env(root_, directory_.path() / "attic");
    Store(root_, &env).save_agent_cache("ada", make_snapshot(300), "m", {}, Durability::kRename);
    env.lose(lost);
    Store again(root_);
    EXPECT_NO_THROW(again.list_cached_agents());
    again.save_agent_cache("bob", make_snapshot(300), "m");
    EXPECT_EQ(marker(), "{\n  \"torpor_store\": 3\n}\n");
    EXPECT_TRUE(again.verify("bob")[0].problems.empty());
  }
}

TEST_F(StoreMarker, AMarkerThatAPowerCutEmptiedIsNone) {
  Store(root_).save_agent_cache("ada", make_snapshot(3), "m");
  for (const std::string& text : {std::string(), std::string(24, '\0')}) {
    write_all(root_ / "torpor.json", text);
    Store store(root_);
    EXPECT_EQ(store.list_cached_agents().size(), 1u);
    EXPECT_EQ(store.kept_disk_limits().budget, 0);
    EXPECT_EQ(marker(), text) << "nothing was saved";
    store.save_agent_cache("ada", make_snapshot(4), "m");
    EXPECT_EQ(marker(), "{\n  \"torpor_store\": 3\n}\n");
  }
}

TEST_F(StoreMarker, ADirectoryThatIsNoStoreIsRefusedAndKeepsItsFiles) {
  fs::create_directory(root_);
  write_all(root_ / "model.safetensors", kForeign);
  write_all(root_ / "config.json", "{}");
  write_all(root_ / ".tmp-1-1", "somebody's");
  const auto before = tree(root_);
  Store store(root_);
  for (const std::function<void()>& call : std::vector<std::function<void()>>{
           [&] { store.list_cached_agents(); }, [&] { store.get_cache_disk_usage(); }, [&] { store.verify(); }, [&] { store.gc(); },
           [&] { store.agent_info("model"); }, [&] { store.load_agent_cache("model"); }, [&] { store.delete_agent_cache("model"); },
           [&] { store.delete_agent_cache("model", true); }, [&] { store.rename_agent_cache("model", "m"); },
           [&] { store.upgrade_agent("model"); }, [&] { store.copy_agent_cache("model", "m"); },
           [&] { store.keep_disk_limits({.budget = 1}); }, [&] { store.kept_disk_limits(); }}) {
    EXPECT_EQ(refused(call, "is no store"), ErrorCode::kInvalidArgument);
    EXPECT_EQ(tree(root_), before);
  }
  EXPECT_FALSE(store.contains("model"));
}

TEST_F(StoreMarker, AStoreAmongOtherFilesLeavesThemAlone) {
  fs::create_directory(root_);
  write_all(root_ / "model.safetensors", kForeign);
  write_all(root_ / "config.json", "{\"model_type\": \"llama\"}");
  write_all(root_ / "notes.json", "no json");
  write_all(root_ / ".tmp-x", "somebody's");
  const auto before = tree(root_);
  Store store(root_);
  store.save_agent_cache("config", make_snapshot(300), "m");
  EXPECT_EQ(store.get_cache_disk_usage().total_bytes, int64_t(tree(root_).at("config.safetensors").size() + fs::file_size(root_ / "config.json") +
                                                              store.get_cache_disk_usage().segment_bytes));
  store.save_agent_cache("config", make_snapshot(310), "m");
  ASSERT_EQ(store.list_cached_agents().size(), 1u);
  EXPECT_EQ(store.list_cached_agents()[0].cache_size, 310);
  EXPECT_EQ(store.verify().size(), 1u);
  EXPECT_EQ(refused([&] { store.agent_info("model"); }, "no agent 'model'"), ErrorCode::kNotFound);
  EXPECT_EQ(refused([&] { store.save_agent_cache("model", make_snapshot(3), "m"); }, "somebody else's"), ErrorCode::kInvalidArgument);
  EXPECT_EQ(refused([&] { store.copy_agent_cache("config", "model", {.replace = true}); }, "somebody else's"), ErrorCode::kInvalidArgument);
  EXPECT_EQ(refused([&] { store.rename_agent_cache("config", "model"); }, "somebody else's"), ErrorCode::kInvalidArgument);
  EXPECT_EQ(refused([&] { (void)store.lock_agent("model"); }, "somebody else's"), ErrorCode::kInvalidArgument);
  EXPECT_EQ(refused([&] { store.delete_agent_cache("model"); }, "no header"), ErrorCode::kInvalidArgument);
  store.delete_agent_cache("config");
  store.gc();
  EXPECT_EQ(tree(root_), before);
  store.delete_agent_cache("model", /*whatever_it_is=*/true);
  EXPECT_FALSE(fs::exists(root_ / "model.safetensors"));
}

TEST_F(StoreMarker, AnOldStoreGoesOnAndIsMarkedByTheNextSave) {
  make_old();
  {
    Store store(root_);
    EXPECT_EQ(store.list_cached_agents().size(), 1u);
    EXPECT_TRUE(store.verify()[0].problems.empty());
    store.gc();
    EXPECT_FALSE(fs::exists(root_ / "torpor.json")) << "nothing was saved";
    store.save_agent_cache("ada", make_snapshot(310), "m");
    EXPECT_FALSE(marker().empty());
  }
  // Segments alone say so too.
  fs::remove(root_ / "torpor.json");
  fs::remove(root_ / "ada.safetensors");
  EXPECT_GT(Store(root_).gc().files_removed, 0);
}

TEST_F(StoreMarker, AnExportIsNoStore) {
  Store(root_).save_agent_cache("ada", make_snapshot(300), "m");
  const fs::path downloads = directory_.path() / "downloads";
  fs::create_directory(downloads);
  Store(root_).export_agent("ada", downloads / "ada.safetensors");
  EXPECT_EQ(refused([&] { Store(downloads).gc(); }, "is no store"), ErrorCode::kInvalidArgument);
}

TEST_F(StoreMarker, ANewerStoreIsRefusedAndADamagedMarkerTold) {
  Store(root_).save_agent_cache("ada", make_snapshot(3), "m");
  write_all(root_ / "torpor.json", "{\"torpor_store\": 4, \"limits\": {\"disk_budget\": \"new kind\"}}");
  EXPECT_EQ(refused([&] { Store store(root_); }, "version 4"), ErrorCode::kIncompatible);
  for (const std::string& text : std::vector<std::string>{
           "{", "[]", "{}", "null", "{\"torpor_store\": 0}", "{\"torpor_store\": \"3\"}", "{\"torpor_store\": 2.5}",
           "{\"torpor_store\": 3, \"limits\": []}", "{\"torpor_store\": 3, \"limits\": {\"disk_budget\": -1}}",
           "{\"torpor_store\": 3, \"limits\": {\"min_free\": 9223372036854775808}}", std::string(5000, '['), std::string(5000, '\0'), std::string("\0{", 2)}) {
    write_all(root_ / "torpor.json", text);
    EXPECT_EQ(refused([&] { Store store(root_); }, "torpor.json"), ErrorCode::kCorruption) << text;
  }
  fs::remove(root_ / "torpor.json");
  EXPECT_EQ(Store(root_).list_cached_agents().size(), 1u);
}

TEST_F(StoreMarker, LimitsAreKeptForEveryoneAndAnOwnOneCountsInstead) {
  Store store(root_), other(root_);
  store.save_agent_cache("ada", make_snapshot(300), "m");
  const int64_t used = store.get_cache_disk_usage().total_bytes;
  store.keep_disk_limits({.budget = used + 100, .min_free = 1});
  EXPECT_EQ(other.kept_disk_limits().budget, used + 100);
  EXPECT_EQ(refused([&] { other.save_agent_cache("bob", make_snapshot(900, small_layout(), 2, 5000), "m"); }, "of its budget"),
            ErrorCode::kResourceExhausted);
  EXPECT_EQ(refused([&] { other.copy_agent_cache("ada", "eve"); }, "of its budget"), ErrorCode::kResourceExhausted);
  other.set_disk_limits({.budget = 1 << 30});
  other.copy_agent_cache("ada", "eve");
  other.set_disk_limits({});
  EXPECT_EQ(refused([&] { other.copy_agent_cache("ada", "bob"); }, "of its budget"), ErrorCode::kResourceExhausted);
  store.keep_disk_limits({});
  EXPECT_EQ(marker(), "{\n  \"torpor_store\": 3\n}\n");
  other.copy_agent_cache("ada", "bob");
  EXPECT_EQ(refused([&] { store.keep_disk_limits({.budget = -1}); }, "no limit"), ErrorCode::kInvalidArgument);
}

TEST_F(StoreMarker, WhatElseTheMarkerSaysIsKept) {
  Store store(root_);
  store.save_agent_cache("ada", make_snapshot(3), "m");
  write_all(root_ / "torpor.json", "{\"torpor_store\": 2, \"later\": [1, {\"x\": null}], \"limits\": {\"other\": 5, \"min_free\": 7}}");
  EXPECT_EQ(store.kept_disk_limits().min_free, 7);
  store.keep_disk_limits({.budget = 1000});
  EXPECT_EQ(parse_json<nlohmann::json>(marker()), parse_json<nlohmann::json>(
      "{\"torpor_store\": 2, \"later\": [1, {\"x\": null}], \"limits\": {\"other\": 5, \"disk_budget\": 1000}}"));
}

TEST_F(StoreMarker, AnAgentCalledTorporHasNoSidecarAndNoMarkerInItsWay) {
  {
    Store store(root_);
    store.save_agent_cache("torpor", make_snapshot(300), "m");
    store.save_agent_cache("torpor", make_snapshot(310), "m");
    EXPECT_EQ(store.list_cached_agents()[0].cache_size, 310);
    EXPECT_EQ(marker(), "{\n  \"torpor_store\": 3\n}\n");
    store.delete_agent_cache("torpor");
    EXPECT_FALSE(marker().empty());
    store.save_agent_cache("torpor", make_snapshot(3), "m");
    store.save_agent_cache("ada", make_snapshot(3), "m");
  }
  // An older Torpor wrote that agent's sidecar there.
  std::string sidecar = read_all(root_ / "ada.json");
  write_all(root_ / "torpor.json", sidecar);
  Store store(root_);
  EXPECT_EQ(store.list_cached_agents().size(), 2u);
  EXPECT_EQ(marker(), sidecar);
  store.save_agent_cache("ada", make_snapshot(4), "m");
  EXPECT_EQ(marker(), "{\n  \"torpor_store\": 3\n}\n");
}

TEST_F(StoreMarker, ManyWhoMakeOneStoreAllSucceed) {
  fs::create_directory(root_);
  std::vector<std::jthread> savers;
  for (int i = 0; i < 8; ++i) {
    savers.emplace_back([&, i] { EXPECT_NO_THROW(Store(root_).save_agent_cache("a" + std::to_string(i), make_snapshot(3), "m")); });
  }
  savers.clear();
  EXPECT_EQ(marker(), "{\n  \"torpor_store\": 3\n}\n");
  EXPECT_EQ(Store(root_).list_cached_agents().size(), 8u);
}

TEST_F(StoreMarker, ADirectoryThatBecomesAStoreWhileItIsLookedAtIsOne) {
  struct Late final : CountingEnv {
    int raw_list(const char* path, std::vector<std::string>& names) override {
      if (!std::exchange(made, true)) Store(path).make_team("b", "{\n\"members\": []}");
      return CountingEnv::raw_list(path, names);
    }
    bool made = false;
  } env;
  fs::create_directories(root_);
  EXPECT_NO_THROW(Store(root_, &env).make_team("a", "{\n\"members\": []}"));
  EXPECT_TRUE(env.made);
}

TEST_F(StoreMarker, AFileThatWasRenamedByHandIsNeitherReplacedNorRemoved) {
  Store store(root_);
  store.save_agent_cache("ada", make_snapshot(300), "m");
  fs::rename(root_ / "ada.safetensors", root_ / "bob.safetensors");
  const auto before = tree(root_);
  EXPECT_EQ(refused([&] { store.delete_agent_cache("bob"); }, "was renamed"), ErrorCode::kCorruption);
  EXPECT_EQ(refused([&] { store.save_agent_cache("bob", make_snapshot(3), "m"); }, "was renamed"), ErrorCode::kCorruption);
  EXPECT_EQ(refused([&] { store.gc(); }, "was renamed"), ErrorCode::kCorruption);
  EXPECT_EQ(tree(root_).at("bob.safetensors"), before.at("bob.safetensors"));
  EXPECT_EQ(store.list_cached_agents().size(), 1u) << "told as damaged";
  store.delete_agent_cache("bob", /*whatever_it_is=*/true);
  EXPECT_FALSE(fs::exists(root_ / "bob.safetensors"));
}

}  // namespace
}  // namespace torpor::testing
