/// State: tensors of an agent that are not one row per token, and are those after its last token.

#include "counting_env.h"
#include "store_fixture.h"
#include "torpor/exchange.h"

namespace torpor::testing {
namespace {

class StoreState : public ::testing::Test {
 protected:
  KvSnapshot load(const std::string& id, const LoadOptions& options = {}) { return Store(root_).load_agent_cache(id, options).snapshot; }

  TemporaryDirectory directory_;
  fs::path root_ = directory_.path() / "store";
  CountingEnv env_;
  Store store_{root_, &env_};
};

TEST_F(StoreState, ComesBackBesideAnyNumberOfRows) {
  for (const int n : {0, 3, 256, 600}) {
    const auto whole = with_state(make_snapshot(n));
    store_.save_agent_cache("a", whole, "m");
    EXPECT_TRUE(same(load("a"), whole)) << n;
    EXPECT_TRUE(same(load("a", {.map_rows = true}), whole)) << n;
    EXPECT_TRUE(same(load("a", {.salvage = true}), whole)) << n;
    CollectingSink sink;
    const auto loaded = Store(root_).load_into("a", sink).snapshot;
    EXPECT_TRUE(same(sink.snapshot, whole)) << n;
    EXPECT_EQ(loaded.state.size(), 2u);
    EXPECT_TRUE(store_.verify("a")[0].problems.empty());
  }
  // Of a cache that has nothing else.
  KvSnapshot alone = with_state({});
  alone.identity = test_identity();
  store_.save_agent_cache("alone", alone, "m");
  EXPECT_TRUE(same(load("alone"), alone));
}

TEST_F(StoreState, IsAllThatASaveWritesWhereTheRowsAreThere) {
  store_.save_agent_cache("a", with_state(make_snapshot(600)), "m");
  const auto changed = with_state(make_snapshot(600), 99);
  env_.reset();
  const auto result = store_.save_agent_cache("a", changed, "m");
  EXPECT_EQ(result.segments_written, 0);
  EXPECT_EQ(result.segments_shared, 2);
  EXPECT_TRUE(same(load("a"), changed));
  // An agent without state shares the segments.
  EXPECT_EQ(store_.save_agent_cache("plain", make_snapshot(600), "m").segments_written, 0);
}

TEST_F(StoreState, GoesWithCopiesOfTheWholeAgentOnly) {
  const auto whole = with_state(make_snapshot(600));
  store_.save_agent_cache("a", whole, "m");
  store_.copy_agent_cache("a", "b");
  store_.rename_agent_cache("a", "c");
  EXPECT_TRUE(same(load("b"), whole));
  EXPECT_TRUE(same(load("c"), whole));
  std::string message;
  for (const int n : {0, 256, 599}) {
    EXPECT_EQ(code_of([&] { store_.copy_agent_cache("b", "d", {.n_tokens = n}); }, &message), ErrorCode::kInvalidArgument);
    EXPECT_NE(message.find("'b' holds state"), std::string::npos) << message;
    EXPECT_EQ(code_of([&] { load("b", {.n_tokens = n}); }, &message), ErrorCode::kInvalidArgument);
    EXPECT_NE(message.find("'b' holds state"), std::string::npos) << message;
  }
  EXPECT_EQ(code_of([&] { store_.copy_agent_cache("b", "b", {.n_tokens = 5, .replace = true}); }), ErrorCode::kInvalidArgument);
  EXPECT_TRUE(same(load("b", {.n_tokens = 600}), whole));
}

TEST_F(StoreState, IsExportedAndImported) {
  const auto whole = with_state(make_snapshot(600));
  store_.save_agent_cache("a", whole, "m");
  store_.export_agent("a", directory_.path() / "a.safetensors");
  Store other(directory_.path() / "other");
  other.import_agent(directory_.path() / "a.safetensors", "b");
  EXPECT_TRUE(same(other.load_agent_cache("b").snapshot, whole));
  EXPECT_EQ(code_of([&] { export_prompt_cache(store_, "a", directory_.path() / "p.safetensors", [](const auto&) { return false; }); }), ErrorCode::kIncompatible);
  std::string bytes = read_all(directory_.path() / "a.safetensors");
  bytes[bytes.size() - 600 * 4 - 1] ^= 1;  // the last byte of the state
  write_all(directory_.path() / "a.safetensors", bytes);
  EXPECT_EQ(code_of([&] { other.import_agent(directory_.path() / "a.safetensors", "c"); }), ErrorCode::kCorruption);
}

TEST_F(StoreState, DamagedItIsLostAndTheRowsAreNot) {
  const auto whole = with_state(make_snapshot(600));
  store_.save_agent_cache("a", whole, "m");
  std::string bytes = read_all(root_ / "a.safetensors");
  bytes[bytes.size() - 600 * 4 - 1] ^= 1;
  write_all(root_ / "a.safetensors", bytes);
  std::string message;
  EXPECT_EQ(code_of([&] { load("a"); }, &message), ErrorCode::kCorruption);
  EXPECT_NE(message.find("layer_9_flags"), std::string::npos) << message;
  const auto salvaged = Store(root_).load_agent_cache("a", {.salvage = true});
  EXPECT_TRUE(salvaged.damage);
  EXPECT_TRUE(same(salvaged.snapshot, make_snapshot(600)));
  const auto report = Store(root_).verify("a")[0];
  EXPECT_EQ(report.intact_tokens, 600);
  EXPECT_EQ(report.problems.size(), 1u);
}

TEST_F(StoreState, WhatCantBeStoredIsRefused) {
  const auto refused = [&](auto change) {
    auto snapshot = with_state(make_snapshot(3));
    change(snapshot.state[0]);
    return code_of([&] { store_.save_agent_cache("a", snapshot, "m"); }) == ErrorCode::kInvalidArgument;
  };
  for (const char* name : {"", "tokens", "__metadata__", "layer_0_keys", "layer_9_flags", "a b", "a,b"}) {
    EXPECT_TRUE(refused([&](KvState& state) { state.name = name; })) << name;
  }
  EXPECT_TRUE(refused([](KvState& state) { state.dtype = "F17"; }));
  EXPECT_TRUE(refused([](KvState& state) { state.shape = {1, 2, 4}; }));
  EXPECT_TRUE(refused([](KvState& state) { state.shape = {uint64_t(1) << 63, 4}; }));
  EXPECT_TRUE(refused([](KvState& state) { state.shape = {0}, state.bytes = {}; }));
  EXPECT_FALSE(fs::exists(root_ / "a.safetensors"));
  EXPECT_FALSE(refused([](KvState& state) { state.name = "fine", state.shape = {6}; }));
}

}  // namespace
}  // namespace torpor::testing
