/// States of recurrent layers: files that agents share, of which an agent names those that it can go on from.

#include <fcntl.h>
#include <unistd.h>

#include "counting_env.h"
#include "fault_env.h"
#include "store/agent_file.h"
#include "store/state_file.h"
#include "store/store_locks.h"
#include "store_fixture.h"
#include "torpor/exchange.h"

namespace torpor::testing {
namespace {

class StoreStates : public ::testing::Test {
 protected:
  /// The first `n` tokens of the agents below, with states after these numbers of tokens.
  static KvSnapshot make(int n, std::vector<int64_t> positions = {}) { return with_states(make_snapshot(n), positions); }
  LoadedAgent load(const std::string& id, const LoadOptions& options = {}) {
    return Store(root_).load_agent_cache(id, options);
  }
  fs::path path_of(const std::string& state) const {
    return root_ / "states" / state.substr(0, 2) / (state + ".safetensors");
  }
  static std::vector<int64_t> positions_of(const AgentInfo& info) {
    std::vector<int64_t> positions;
    for (const StateRef& state : info.states.value()) positions.push_back(state.position);
    return positions;
  }
  static std::set<std::string> state_files(const fs::path& root) {
    std::set<std::string> files;
    for (const auto& [name, bytes] : tree(root)) {
      if (name.starts_with("states/")) files.insert(name);
    }
    return files;
  }

  TemporaryDirectory directory_{TemporaryDirectory::in_memory()};
  fs::path root_ = directory_.path() / "store";
  CountingEnv env_;
  Store store_{root_, &env_};
};

TEST_F(StoreStates, AnAgentComesBackAtEachOfThemAndBetweenThemAtTheOneBefore) {
  for (const int n : {1, 255, 256, 257, 600}) {
    const std::vector<int64_t> kept = n == 600 ? std::vector<int64_t>{100, 256, 300, 512} : std::vector<int64_t>{};
    const KvSnapshot whole = make(n, kept);
    const SaveResult saved = store_.save_agent_cache("a", whole, "m");
    EXPECT_EQ(saved.states.size(), kept.size() + 1) << n;
    for (const LoadOptions& options : {LoadOptions{}, LoadOptions{.map_rows = true}, LoadOptions{.salvage = true}}) {
      const LoadedAgent loaded = load("a", options);
      EXPECT_TRUE(same(loaded.snapshot, whole)) << n;
      EXPECT_NO_THROW(loaded.snapshot.validate());
      EXPECT_FALSE(loaded.damage);
    }
    CollectingSink sink;
    Store(root_).load_into("a", sink);
    EXPECT_TRUE(same(sink.snapshot, whole)) << n;
    EXPECT_TRUE(store_.verify("a")[0].problems.empty()) << n;
    EXPECT_EQ(store_.verify("a")[0].intact_tokens, n);
  }
  for (const int n : {0, 50, 100, 101, 256, 299, 300, 512, 599, 600}) {
    const int at = n < 100 ? 0 : n < 256 ? 100 : n < 300 ? 256 : n < 512 ? 300 : n < 600 ? 512 : 600;
    EXPECT_EQ(resumable_tokens(store_.agent_info("a"), n), at);
    for (const bool in_run : {false, true}) {
      LoadedAgent loaded = load("a", {.n_tokens = n, .tail_in_run = in_run});
      EXPECT_TRUE(same(in_run ? packed(loaded.snapshot) : loaded.snapshot, at == 0 ? make_snapshot(0) : make(at))) << n;
      EXPECT_EQ(loaded.tokens.size(), size_t(n)) << "all ids, to compute the rest again";
      EXPECT_FALSE(loaded.damage);
    }
  }
}

TEST_F(StoreStates, ASaveAfterATurnWritesItsRowsAndOneState) {
  const KvLayout layout = small_layout(KvDtype::kF16, 2, 2, 64);
  const auto of = [&](int n, std::vector<int64_t> positions) { return with_states(make_snapshot(n, layout), positions); };
  const SaveResult first = store_.save_agent_cache("a", of(600, {512}), "m");
  const SaveResult second = store_.save_agent_cache("a", of(640, {}), "m", {}, Durability::kFull, {{}, {}, first.states});
  EXPECT_EQ(second.states_written, 1);
  EXPECT_EQ(positions_of(store_.agent_info("a")), (std::vector<int64_t>{512, 600, 640}));
  const int64_t rows = 40 * int64_t(layout.bytes_per_token()), headers = 8192;
  EXPECT_GE(second.bytes_written, rows + int64_t(small_state_layout().bytes()));
  EXPECT_LE(second.bytes_written, rows + int64_t(small_state_layout().bytes()) + headers);
  // What the snapshot still holds is not written again either.
  KvSnapshot held = of(640, {512, 600});
  EXPECT_EQ(store_.save_agent_cache("a", held, "m").states_written, 0);
  EXPECT_EQ(held.states[0]->file(), first.states[0].file) << "and says where it is";
}

TEST_F(StoreStates, AgentsShareThemAndForksAndRewindsWriteNone) {
  store_.save_agent_cache("a", make(600, {256, 300}), "m");
  EXPECT_EQ(store_.save_agent_cache("b", make(600, {256}), "m").states_written, 0);
  const auto files = state_files(root_);
  EXPECT_EQ(files.size(), 3u);
  for (const auto& [n, at] : {std::pair(600, 600), std::pair(300, 300), std::pair(290, 256), std::pair(200, 0)}) {
    const std::string id = "fork-" + std::to_string(n);
    store_.copy_agent_cache("a", id, {.n_tokens = n});
    const LoadedAgent loaded = load(id);
    EXPECT_TRUE(same(loaded.snapshot, at == 0 ? make_snapshot(0) : make(at))) << n;
    EXPECT_EQ(loaded.tokens.size(), size_t(n));
    EXPECT_TRUE(store_.verify(id)[0].problems.empty());
    EXPECT_EQ(store_.verify(id)[0].intact_tokens, at);
    // Whoever has computed the rest again goes on.
    store_.save_agent_cache(id, make(n), "m", {}, Durability::kFull, {{}, {}, *loaded.info.states});
    EXPECT_TRUE(same(load(id).snapshot, make(n))) << n;
  }
  store_.rename_agent_cache("a", "c");
  EXPECT_TRUE(same(load("c").snapshot, make(600)));
  EXPECT_EQ(positions_of(store_.agent_info("c")), (std::vector<int64_t>{256, 300, 600}));
  store_.copy_agent_cache("c", "c", {.n_tokens = 280, .replace = true});
  EXPECT_EQ(positions_of(store_.agent_info("c")), (std::vector<int64_t>{256}));
  EXPECT_EQ(store_.list_cached_agents().front().states->size(), 2u) << "of b, from its sidecar";
  // Other tokens after the same segment are another state, and so is another model's.
  KvSnapshot other = make(300);
  other.tokens[299] = 5;
  EXPECT_EQ(store_.save_agent_cache("d", other, "m").states_written, 1);
  KvSnapshot stranger = make(300);
  stranger.identity.weights = "w1";
  EXPECT_EQ(store_.save_agent_cache("e", stranger, "m").states_written, 1);
}

TEST_F(StoreStates, OnesReadLaterAreCheckedAgainstTheirPlace) {
  store_.save_agent_cache("a", make(600, {256, 300}), "m");
  const AgentInfo info = store_.agent_info("a");
  const KvSnapshot whole = make(600);
  for (const StateRef& ref : *info.states) {
    const auto state = store_.load_state(whole, info.segments, ref);
    EXPECT_TRUE(std::ranges::equal(state->bytes(), make_state(ref.position)->bytes()));
    EXPECT_EQ(state->file(), ref.file);
  }
  const StateRef& ref = (*info.states)[1];
  const auto refused = [&](auto change, ErrorCode code = ErrorCode::kCorruption) {
    KvSnapshot other = whole;
    StateRef wanted = ref;
    change(other, wanted);
    return code_of([&] { store_.load_state(other, info.segments, wanted); }) == code;
  };
  EXPECT_TRUE(refused([](KvSnapshot& other, StateRef&) { other.tokens[299] = 5; }));
  EXPECT_TRUE(refused([](KvSnapshot& other, StateRef&) { other.identity.weights = "w1"; }));
  EXPECT_TRUE(refused([](KvSnapshot& other, StateRef&) { other.lineage.salt = "t"; }));
  EXPECT_TRUE(refused([](KvSnapshot& other, StateRef&) { other.layout.tensors.pop_back(); }));
  EXPECT_TRUE(refused([](KvSnapshot& other, StateRef&) { other.state_layout.tensors.pop_back(); }));
  EXPECT_TRUE(refused([](KvSnapshot&, StateRef& wanted) { wanted.position = 301; }));
  EXPECT_TRUE(refused([&](KvSnapshot&, StateRef& wanted) { wanted.file = (*info.states)[0].file; }));
  EXPECT_TRUE(refused([](KvSnapshot&, StateRef& wanted) { wanted.file = std::string(32, 'a'); }, ErrorCode::kNotFound));
  EXPECT_TRUE(refused([](KvSnapshot&, StateRef& wanted) { wanted.position = 601; }, ErrorCode::kInvalidArgument));
  // An agent that went on in other numerics has what it had before.
  KvSnapshot later = whole;
  later.lineage.ranges.push_back({256, "f32/test/l2"});
  EXPECT_NO_THROW(store_.load_state(later, info.segments, ref));
}

TEST_F(StoreStates, EveryDamageOfOneIsFoundAndCostsTheTokensBehindTheOneBefore) {
  store_.save_agent_cache("a", make(300, {280}), "m");
  const AgentInfo info = store_.agent_info("a");
  const std::string last = info.states->back().file, earlier = info.states->front().file;
  const auto expect_found = [&](const std::string& name, bool is_last, const std::string& where) {
    const Store store(root_);
    std::string message;
    const auto code = code_of([&] { store.load_agent_cache("a"); }, &message);
    EXPECT_EQ(code, is_last ? std::optional(ErrorCode::kCorruption) : std::nullopt) << where;
    if (is_last) {
      EXPECT_NE(message.find(name), std::string::npos) << where << ": " << message;
    }
    const LoadedAgent salvaged = store.load_agent_cache("a", {.salvage = true});
    EXPECT_EQ(salvaged.damage.has_value(), is_last) << where;
    EXPECT_TRUE(same(salvaged.snapshot, make(is_last ? 280 : 300))) << where;
    EXPECT_EQ(salvaged.tokens.size(), 300u) << where;
    const VerifyReport report = store.verify("a")[0];
    EXPECT_EQ(report.problems.size(), 1u) << where;
    EXPECT_EQ(report.intact_tokens, is_last ? 280 : 300) << where;
  };
  for (const bool is_last : {true, false}) {
    const std::string name = is_last ? last : earlier, bytes = read_all(path_of(name));
    const int fd = ::open(path_of(name).c_str(), O_RDWR);
    for (size_t at = 0; at < bytes.size() && !HasFailure(); ++at) {
      for (const int mask : {1 << (at % 8), 0x20}) {
        const char damaged = char(bytes[at] ^ mask);
        ASSERT_EQ(::pwrite(fd, &damaged, 1, off_t(at)), 1);
        expect_found(name, is_last, "byte " + std::to_string(at));
        ASSERT_EQ(::pwrite(fd, &bytes[at], 1, off_t(at)), 1);
      }
    }
    ::close(fd);
    for (size_t length = bytes.size(); length-- > 0 && !HasFailure();) {
      fs::resize_file(path_of(name), length);
      expect_found(name, is_last, "cut to " + std::to_string(length));
    }
    fs::remove(path_of(name));
    expect_found(name, is_last, "missing");
    EXPECT_EQ(store_.count_missing_files(store_.list_cached_agents())[0], 1);
    write_all(path_of(name), bytes + "x");
    expect_found(name, is_last, "with a byte more");
    // The next save has the good bytes.
    EXPECT_EQ(Store(root_).save_agent_cache("a", make(300, {280}), "m").states_written, 1);
    EXPECT_EQ(read_all(path_of(name)), bytes);
    EXPECT_TRUE(store_.verify("a")[0].problems.empty());
  }
  // Without any all of it is computed again. Damaged rows cost what is behind the state before them.
  fs::remove(path_of(last));
  fs::remove(path_of(earlier));
  const LoadedAgent nothing = load("a", {.salvage = true});
  EXPECT_TRUE(nothing.snapshot.tokens.empty());
  EXPECT_EQ(nothing.tokens.size(), 300u);
  store_.save_agent_cache("b", make(600, {200, 300, 512}), "m");
  const std::string segment = store_.agent_info("b").segments[1];
  fs::resize_file(root_ / "segments" / segment.substr(0, 2) / (segment + ".safetensors"), 100);
  EXPECT_TRUE(same(load("b", {.salvage = true}).snapshot, make(200)));
  EXPECT_EQ(store_.verify("b")[0].intact_tokens, 200);
}

TEST_F(StoreStates, OneThatIsGoneIsNoLongerNamedByTheNextSave) {
  const auto saved = store_.save_agent_cache("a", make(600, {256, 300}), "m");
  fs::remove(path_of(saved.states[0].file));
  store_.save_agent_cache("a", make(610), "m", {}, Durability::kFull, {{}, {}, saved.states});
  EXPECT_EQ(positions_of(store_.agent_info("a")), (std::vector<int64_t>{300, 600, 610}));
  store_.copy_agent_cache("a", "b");
  fs::remove(path_of(saved.states[1].file));
  store_.copy_agent_cache("a", "c");
  EXPECT_EQ(positions_of(store_.agent_info("c")), (std::vector<int64_t>{600, 610}));
}

TEST_F(StoreStates, GoWhenNoAgentNamesThem) {
  store_.save_agent_cache("a", make(600, {256, 300}), "m");
  store_.copy_agent_cache("a", "b", {.n_tokens = 300});
  EXPECT_EQ(store_.get_cache_disk_usage().states, 3);
  EXPECT_EQ(store_.get_cache_disk_usage().orphan_states, 0);
  EXPECT_EQ(store_.gc().files_removed, 0);
  store_.copy_agent_cache("a", "a", {.n_tokens = 10, .replace = true});
  const DiskUsage usage = store_.get_cache_disk_usage();
  EXPECT_EQ(usage.orphan_states, 1);
  EXPECT_EQ(usage.total_bytes, usage.agent_bytes + usage.segment_bytes + usage.state_bytes);
  EXPECT_GE(usage.orphan_bytes, int64_t(small_state_layout().bytes()));
  store_.gc();
  EXPECT_EQ(state_files(root_).size(), 2u);
  EXPECT_TRUE(same(load("b").snapshot, make(300)));
  store_.delete_agent_cache("b");
  EXPECT_TRUE(state_files(root_).empty());
}

TEST_F(StoreStates, WhatAnAgentNoLongerNamesGoesSomeAtATimeAndWithTheStore) {
  for (int n = 1; n <= 3; ++n) {
    Store(root_).save_agent_cache("a", make(n), "m", {}, Durability::kRename);
    EXPECT_EQ(state_files(root_).size(), 1u) << "a program that saves once";
    EXPECT_EQ(store_.get_cache_disk_usage().orphan_states, 0);
  }
  const auto most_files = [&](const std::string& id) {
    size_t most = 0;
    Store store(root_);
    for (int n = 1; n <= 40; ++n) {
      store.save_agent_cache(id, make(n), "m", {}, Durability::kRename);
      most = std::max(most, state_files(root_).size());
    }
    EXPECT_TRUE(same(store.load_agent_cache(id).snapshot, make(40)));
    return most;
  };
  EXPECT_LE(most_files("a"), 5u);
  EXPECT_EQ(state_files(root_).size(), 1u);
  // Each sweep looks at all agents, so the more there are the more states wait for one.
  for (int i = 0; i < 160; ++i) {
    store_.save_agent_cache("other-" + std::to_string(i), make(0), "m", {}, Durability::kNone);
  }
  const size_t most = most_files("a");
  EXPECT_GE(most, 20u);
  EXPECT_LE(most, 21u);
  EXPECT_EQ(state_files(root_).size(), 1u);
}

TEST_F(StoreStates, WhatAnAgentNoLongerNamesWaitsForOthersWhoRemove) {
  StoreLocks locks(env_, root_);
  std::optional<FileLock> sweep;
  {
    Store store(root_);
    store.save_agent_cache("a", make(1), "m", {}, Durability::kRename);
    sweep = locks.sweeping(std::chrono::milliseconds(0));
    ASSERT_TRUE(sweep);
    for (int n = 2; n <= 8; ++n) store.save_agent_cache("a", make(n), "m", {}, Durability::kRename);
    EXPECT_EQ(state_files(root_).size(), 8u);
    sweep.reset();
    store.save_agent_cache("a", make(9), "m", {}, Durability::kRename);
    EXPECT_EQ(state_files(root_).size(), 1u) << "none was forgotten";
    sweep = locks.sweeping(std::chrono::milliseconds(0));
    store.save_agent_cache("a", make(10), "m", {}, Durability::kRename);
  }
  EXPECT_EQ(state_files(root_).size(), 2u) << "left to gc";
  sweep.reset();
  store_.gc();
  EXPECT_EQ(state_files(root_).size(), 1u);
}

TEST_F(StoreStates, AreEvictedBeforeTheSegmentsThatLeadToThem) {
  const KvLayout layout = small_layout(KvDtype::kF16, 2, 2, 64);
  KvSnapshot prefix = with_states(make_snapshot(512, layout, 2, 5000), {256});
  store_.save_prefix(prefix);
  EXPECT_EQ(state_files(root_).size(), 2u);
  const DiskUsage before = store_.get_cache_disk_usage();
  EXPECT_EQ(before.orphan_states, 2);
  // Room for all but one state.
  store_.save_agent_cache("warm", make_snapshot(1), "m");
  store_.set_disk_limits({.budget = store_.get_cache_disk_usage().total_bytes + 3000});
  store_.save_agent_cache("a", make_snapshot(2), "m");
  EXPECT_EQ(store_.get_cache_disk_usage().segments, 2) << "a state is a leaf, and older than nothing";
  const StatesSought sought{small_state_layout(), {}};
  const int64_t found = store_.find_prefix(prefix.identity, prefix.lineage, layout, prefix.tokens, &sought);
  EXPECT_TRUE(found == 512 || found == 256) << found;
  // Named ones stay, whatever is asked for.
  store_.set_disk_limits({});
  store_.save_agent_cache("b", with_states(make_snapshot(512, layout, 2, 5000), {256}), "m");
  store_.set_disk_limits({.budget = store_.get_cache_disk_usage().total_bytes + 10});
  EXPECT_EQ(code_of([&] { store_.save_agent_cache("c", make(600), "m"); }), ErrorCode::kResourceExhausted);
  EXPECT_TRUE(same(load("b").snapshot, with_states(make_snapshot(512, layout, 2, 5000))));
}

TEST_F(StoreStates, APrefixEndsAtTheLastOneThatIsThere) {
  const KvSnapshot whole = make(1000, {256, 700});
  store_.save_prefix(whole);
  EXPECT_EQ(state_files(root_).size(), 2u) << "none behind its segments";
  const auto find = [&](const StatesSought* sought) {
    return store_.find_prefix(whole.identity, whole.lineage, whole.layout, whole.tokens, sought);
  };
  const auto load_it = [&](const StatesSought* sought) {
    return store_.load_prefix(whole.identity, whole.lineage, whole.layout, whole.tokens, {.states = sought});
  };
  const StatesSought ends{small_state_layout(), {}}, known{small_state_layout(), {300, 700, 900}}, other{{}, {700}};
  EXPECT_EQ(find(nullptr), 768);
  EXPECT_EQ(find(&ends), 256);
  EXPECT_EQ(find(&known), 700);
  EXPECT_EQ(find(&other), 0) << "of another layout";
  LoadedPrefix loaded = load_it(&known);
  EXPECT_TRUE(same(loaded.snapshot, make(700)));
  EXPECT_EQ(loaded.rows, 768);
  EXPECT_EQ(loaded.segments.size(), 2u);
  loaded = load_it(&other);
  EXPECT_TRUE(loaded.snapshot.tokens.empty());
  EXPECT_EQ(loaded.rows, 768);
  // A damaged one, or damaged rows, leave what is before.
  const auto files = state_files(root_);
  const auto damage = [&](const std::string& name) {
    std::string bytes = read_all(root_ / name);
    bytes[bytes.size() / 2] ^= 1;
    write_all(root_ / name, bytes);
  };
  for (const auto& name : files) {
    const std::string bytes = read_all(root_ / name);
    damage(name);
    const auto n = load_it(&known).snapshot.tokens.size();
    EXPECT_TRUE(n == 256 || n == 700) << n;
    write_all(root_ / name, bytes);
  }
  const std::string segment = loaded.segments.empty() ? load_it(&known).segments[1] : loaded.segments[1];
  damage("segments/" + segment.substr(0, 2) + "/" + segment + ".safetensors");
  EXPECT_TRUE(same(Store(root_).load_prefix(whole.identity, whole.lineage, whole.layout, whole.tokens,
                                            {.states = &known}).snapshot, make(256)));
}

TEST_F(StoreStates, AnExportHasTheLastOne) {
  const fs::path file = directory_.path() / "a.safetensors";
  store_.save_agent_cache("a", make(600, {256}), "m");
  store_.export_agent("a", file);
  Store other(directory_.path() / "other");
  other.import_agent(file, "b");
  EXPECT_TRUE(same(other.load_agent_cache("b").snapshot, make(600)));
  EXPECT_EQ(positions_of(other.agent_info("b")), (std::vector<int64_t>{600}));
  EXPECT_EQ(store_.import_agent(file, "again").states_written, 0);
  const auto rotates = [](const auto&) { return false; };
  std::string refused;  // these states are none of the engine's
  EXPECT_EQ(code_of([&] { export_prompt_cache(store_, "a", directory_.path() / "p.safetensors", rotates); }, &refused),
            ErrorCode::kIncompatible);
  EXPECT_NE(refused.find("was not made by Torpor's engine"), std::string::npos) << refused;
  store_.copy_agent_cache("a", "between", {.n_tokens = 500});
  std::string message;
  EXPECT_EQ(code_of([&] { store_.export_agent("between", file); }, &message), ErrorCode::kInvalidArgument);
  EXPECT_NE(message.find("go on from 256 of its 500 tokens"), std::string::npos) << message;
  // One without tokens has none.
  store_.save_agent_cache("empty", make(0), "m");
  store_.export_agent("empty", file);
  EXPECT_TRUE(other.import_agent(file, "empty").states.empty());
}

TEST_F(StoreStates, DifferentBitsAfterTheSameTokensAreKeptApart) {
  store_.save_agent_cache("a", make(300), "m");
  const KvSnapshot other = with_states(make_snapshot(300), {}, 9);
  EXPECT_EQ(store_.save_agent_cache("b", other, "m").states_written, 1);
  EXPECT_TRUE(same(load("a").snapshot, make(300)));
  EXPECT_TRUE(same(load("b").snapshot, other));
  EXPECT_EQ(Store(root_).save_agent_cache("b", other, "m").states_written, 0);
  EXPECT_TRUE(store_.verify("b")[0].problems.empty());
}

TEST_F(StoreStates, OneThatCameFromAnotherStoreIsNotTakenForThatOfItsName) {
  store_.save_agent_cache("a", make(300), "m");
  Store other(directory_.path() / "other");
  const KvSnapshot theirs = with_states(make_snapshot(300), {}, 9);
  const SaveResult held = other.save_agent_cache("theirs", theirs, "m");
  const KvSnapshot ours = store_.load_agent_cache("a").snapshot;
  ASSERT_EQ(ours.states.back()->file(), held.states.back().file) << "the same name, other bits";
  EXPECT_EQ(other.save_agent_cache("ours", ours, "m").states_written, 1);
  EXPECT_TRUE(same(other.load_agent_cache("ours").snapshot, make(300)));
  EXPECT_TRUE(same(other.load_agent_cache("theirs").snapshot, theirs));
}

TEST_F(StoreStates, WhatCantBeStoredIsRefused) {
  const auto refused = [&](auto change) {
    KvSnapshot snapshot = make(300, {200});
    change(snapshot);
    const Scattered scattered(snapshot);
    const auto code = code_of([&] { store_.save_agent_cache("a", snapshot, "m"); });
    EXPECT_EQ(code_of([&] { scattered.save(store_, "borrowed"); }), code);
    return code == ErrorCode::kInvalidArgument;
  };
  EXPECT_FALSE(refused([](KvSnapshot&) {}));
  EXPECT_TRUE(refused([](KvSnapshot& s) { s.states.pop_back(); }));
  EXPECT_TRUE(refused([](KvSnapshot& s) { std::swap(s.states[0], s.states[1]); }));
  EXPECT_TRUE(refused([](KvSnapshot& s) { s.state_layout.tensors[0].name = "layer_0_keys"; }));
  EXPECT_TRUE(refused([](KvSnapshot& s) { s.state_layout.tensors[0].name = "a,b"; }));
  EXPECT_TRUE(refused([](KvSnapshot& s) { s.state_layout.tensors[0].shape = {2, 2}; }));
  EXPECT_TRUE(refused([](KvSnapshot& s) { s.state_layout.tensors[0].shape = {-3, -2}; }));
  EXPECT_TRUE(refused([](KvSnapshot& s) { s.state = with_state({}).state; }));
}

/// Every call to the disk refused once, and the power cut at every change: a save that writes states leaves the agent old
/// or new, and gc whole.
TEST_F(StoreStates, AnyRefusedCallAndAnyPowerCutLeaveOldOrNew) {
  const fs::path source = directory_.path() / "template";
  const SaveResult saved = Store(source).save_agent_cache("a", make(300, {280}), "m");
  const KvSnapshot before = make(300), after = make(330);
  const std::vector<std::pair<const char*, std::function<void(Store&)>>> acts = {
      {"save", [&](Store& s) { s.save_agent_cache("a", make(330, {310}), "m", {}, Durability::kFull, {{}, {}, saved.states}); }},
      {"evict", [&](Store& s) {
         s.set_disk_limits({.budget = s.get_cache_disk_usage().total_bytes + 100'000});
         s.save_agent_cache("a", make(330, {310}), "m", {}, Durability::kFull, {{}, {}, saved.states});
       }},
      {"gc", [&](Store& s) { s.gc(); s.save_agent_cache("a", make(330), "m"); }},
      {"rewind", [&](Store& s) { s.copy_agent_cache("a", "b", {.n_tokens = 280}); s.save_agent_cache("a", make(330), "m"); }}};
  int counter = 0;
  for (const auto& [name, act] : acts) {
    for (const int lost : {-1, int(Lost::kNothing), int(Lost::kData), int(Lost::kAll), int(Lost::kSegmentNames), int(Lost::kRootNames)}) {
      int k = 1;
      for (bool triggered = true; triggered; ++k) {
        ASSERT_LT(k, 1000);
        const fs::path root = directory_.path() / ("s" + std::to_string(counter++)), attic = root.string() + "-attic";
        fs::copy(source, root, fs::copy_options::recursive);
        const std::string where = std::string(name) + ", call " + std::to_string(k) + ", lost " + std::to_string(lost);
        FaultEnv env(root, attic);
        std::optional<ErrorCode> code;
        {
          Store store(root, &env);
          lost < 0 ? env.fail_at(k, EIO, false, Calls::kAll) : env.fail_at(k, EIO, true);
          code = code_of([&] { act(store); });
        }
        triggered = env.triggered();  // by what the store does at its end, too
        if (lost >= 0) env.lose(Lost(lost));
        for (const bool collected : {false, true}) {
          if (collected) {
            FaultEnv spared(root, attic);
            Store(root, &spared).gc();
          }
          std::optional<LoadedAgent> loaded;
          ASSERT_NO_THROW(loaded = Store(root).load_agent_cache("a")) << where;
          EXPECT_TRUE(same(loaded->snapshot, after) || (code && same(loaded->snapshot, before))) << where;
        }
        std::set<std::string> named;
        for (const auto& agent : Store(root).list_cached_agents()) {
          for (const StateRef& state : agent.states.value()) {
            named.insert("states/" + state.file.substr(0, 2) + "/" + state.file + ".safetensors");
          }
        }
        EXPECT_EQ(state_files(root), named) << where;
        fs::remove_all(root), fs::remove_all(attic);
      }
      EXPECT_GT(k, 4) << name;
    }
  }
}

}  // namespace
}  // namespace torpor::testing
