/// Every call to the disk that the store makes is refused once, and the power is cut at every change; agents are old or new.

#include "fault_env.h"
#include "store/agent_file.h"
#include "store_fixture.h"
#include "torpor/exchange.h"

namespace torpor::testing {
namespace {

const KvSnapshot kOld = make_snapshot(300, small_layout(), 1);
const KvSnapshot kNew = with_state(make_snapshot(600, small_layout(), 1));
const KvSnapshot kOther = make_snapshot(520, small_layout(), 7, 5000);

const KvSnapshot kShort = make_snapshot(100, small_layout(), 1);  // a cut inside the first segment
const KvSnapshot kEmpty = make_snapshot(0);
const KvSnapshot kTurn = make_snapshot(309, small_layout(), 1);   // leaves the parts that there are
const KvSnapshot kSeal = make_snapshot(530, small_layout(), 1);   // seals their rows
const KvSnapshot kMerge = make_snapshot(350, small_layout(), 1);  // takes the last one in
const KvSnapshot kInTail = make_snapshot(285, small_layout(), 1);

bool rotates_none(const std::string&) { return false; }

/// What a store holds of agent "a" is one of these; nullptr stands for no agent.
using States = std::vector<const KvSnapshot*>;

struct Scenario {
  const char* name;
  std::function<void(Store&)> act;
  States before, after;
};

class StoreFaults : public ::testing::Test {
 protected:
  StoreFaults() {
    fs::create_directory(exported_.parent_path());
    Store store(template_);
    for (const int n : {200, 278, 300}) store.save_agent_cache("a", make_snapshot(n, small_layout(), 1), "m", {}, Durability::kRename);
    store.save_agent_cache("bystander", kOther, "m", {}, Durability::kRename);
    store.save_agent_cache("leaves-orphans", make_snapshot(512, small_layout(), 3, 9000), "m", {}, Durability::kRename);
    store.export_agent("a", export_);
    export_prompt_cache(store, "a", prompt_cache_, rotates_none);
    fs::remove(template_ / "leaves-orphans.safetensors");
    fs::remove(template_ / "leaves-orphans.json");
    write_all(template_ / ".torpor-tmp-left-by-a-crash", "x");
  }

  std::vector<Scenario> scenarios() {
    return {
        {"save", [](Store& s) { s.save_agent_cache("a", kNew, "m"); }, {&kOld}, {&kNew}},
        {"save pieces", [](Store& s) {
           Scattered apart(kNew);
           const auto names = s.agent_info("a").segments;
           for (size_t i = 0; i < std::min(names.size(), apart.rows.runs.size()); ++i) apart.rows.runs[i].segment = names[i];
           apart.save(s, "a");
         }, {&kOld}, {&kNew}},
        {"turn", [](Store& s) { s.save_agent_cache("a", kTurn, "m"); }, {&kOld}, {&kTurn}},
        {"merge", [](Store& s) { s.save_agent_cache("a", kMerge, "m"); }, {&kOld}, {&kMerge}},
        {"seal", [](Store& s) { s.save_agent_cache("a", kSeal, "m"); }, {&kOld}, {&kSeal}},
        {"rewind inside the tail", [](Store& s) { s.copy_agent_cache("a", "a", {.n_tokens = 285, .replace = true}); }, {&kOld}, {&kInTail}},
        {"shorten", [](Store& s) { s.save_agent_cache("a", kInTail, "m"); }, {&kOld}, {&kInTail}},
        {"fork inside the tail", [](Store& s) { s.copy_agent_cache("a", "forked", {.n_tokens = 285}); }, {&kOld}, {&kOld}},
        {"shrink", [](Store& s) { s.save_agent_cache("a", make_snapshot(0), "m"); }, {&kOld}, {&kEmpty}},
        {"delete", [](Store& s) { s.delete_agent_cache("a"); }, {&kOld}, {nullptr}},
        {"import", [this](Store& s) { s.import_agent(export_, "imported"); }, {&kOld}, {&kOld}},
        {"gc", [](Store& s) { s.gc(); }, {&kOld}, {&kOld}},
        {"load", [](Store& s) { expect_loads(s, {.salvage = true}); }, {&kOld}, {&kOld}},
        {"map", [](Store& s) { expect_loads(s, {.salvage = true, .map_rows = true}); }, {&kOld}, {&kOld}},
        {"sink", [](Store& s) {
           CollectingSink sink;
           s.load_into("a", sink);
           EXPECT_TRUE(same(sink.snapshot, kOld));
         }, {&kOld}, {&kOld}},
        {"fork", [](Store& s) { s.copy_agent_cache("a", "forked", {.n_tokens = 100}); }, {&kOld}, {&kOld}},
        {"rewind", [](Store& s) { s.copy_agent_cache("a", "a", {.n_tokens = 100, .replace = true}); }, {&kOld}, {&kShort}},
        {"rename", [](Store& s) { s.rename_agent_cache("a", "renamed"); }, {&kOld}, {nullptr}},
        {"export", [this](Store& s) { s.export_agent("a", exported_); }, {&kOld}, {&kOld}},
        {"export for mlx-lm", [this](Store& s) { export_prompt_cache(s, "a", exported_, rotates_none); }, {&kOld}, {&kOld}},
        {"read of mlx-lm", [this](Store& s) { expect_prompt_cache(s, prompt_cache_); }, {&kOld}, {&kOld}},
        {"prefix", [](Store& s) { s.save_prefix(kNew); }, {&kOld}, {&kOld}},
        {"evict", [](Store& s) {
           // Room for the new state only without what no agent names.
           s.set_disk_limits({.budget = s.get_cache_disk_usage().total_bytes + 2000});
           s.save_agent_cache("a", kNew, "m");
         }, {&kOld}, {&kNew}},
    };
  }

  fs::path fresh_store() {
    const auto root = directory_.path() / ("s" + std::to_string(counter_++));
    fs::copy(template_, root, fs::copy_options::recursive);
    return root;
  }

  static void expect_loads(const Store& store, const LoadOptions& options) {
    const auto loaded = store.load_agent_cache("a", options);
    EXPECT_FALSE(loaded.damage.has_value()) << "a disk that can't be read is not damage: " << *loaded.damage;
    EXPECT_TRUE(same(loaded.snapshot, kOld));
  }

  static void expect_prompt_cache(const Store& store, const fs::path& path) {
    PromptCache cache = read_prompt_cache(path, {"m", test_identity(), {}, 0, [](const KvFormat&) { return small_layout(); }}, &store.env());
    cache.snapshot.tokens = kOld.tokens;
    EXPECT_TRUE(same(cache.snapshot, kOld));
  }

  static fs::path attic_of(const fs::path& root) { return root.string() + "-attic"; }

  static void expect_state(const fs::path& root, const States& allowed, const std::string& where) {
    Store store(root);
    expect_one_of(store, "a", store.contains("renamed") ? States{&kOld, nullptr} : allowed, where);
    expect_one_of(store, "bystander", {&kOther}, where);
    expect_one_of(store, "imported", {&kOld, nullptr}, where);
    expect_one_of(store, "forked", {&kShort, &kInTail, nullptr}, where);
    expect_one_of(store, "renamed", {&kOld, nullptr}, where);
    // A prefix that is found is whole.
    const auto prefix = store.load_prefix(kNew.identity, kNew.lineage, kNew.layout, kNew.tokens);
    EXPECT_TRUE(is_prefix(prefix.snapshot, kNew)) << where;
  }

  static void expect_one_of(Store& store, const std::string& id, const States& allowed, const std::string& where) {
    if (!store.contains(id)) {
      EXPECT_TRUE(std::find(allowed.begin(), allowed.end(), nullptr) != allowed.end()) << where << ": " << id << " is gone";
      return;
    }
    std::optional<LoadedAgent> loaded;
    ASSERT_NO_THROW(loaded = store.load_agent_cache(id)) << where << ": " << id;
    EXPECT_TRUE(std::any_of(allowed.begin(), allowed.end(), [&](const KvSnapshot* state) {
      return state != nullptr && same(loaded->snapshot, *state);
    })) << where << ": " << id << " has " << loaded->snapshot.tokens.size() << " tokens";
  }

  /// gc leaves the agents, their sidecars and the segments they name, and nothing else.
  static void expect_gc_cleans(const fs::path& root, const std::string& where) {
    FaultEnv env(root, attic_of(root));  // fails at nothing, and spares the disk thousands of fsyncs
    Store store(root, &env);
    ASSERT_NO_THROW(store.gc()) << where;
    std::set<std::string> expected;
    for (const auto& agent : store.list_cached_agents()) {
      EXPECT_FALSE(agent.hash.empty()) << where;
      expected.insert(agent.agent_id + ".safetensors");
      expected.insert(agent.agent_id + ".json");
      for (const auto& name : agent.segments) expected.insert("segments/" + name.substr(0, 2) + "/" + name + ".safetensors");
      const std::string file = read_all(root / (agent.agent_id + ".safetensors"));
      const AgentFile parsed = parse_agent_file(std::as_bytes(std::span(file)), file.size(), agent.agent_id);
      for (const PartRef& part : parsed.parts) expected.insert("parts/" + parsed.uid + "-" + part.name + ".safetensors");
    }
    std::set<std::string> found;
    for (const auto& [name, bytes] : tree(root)) found.insert(name);
    EXPECT_EQ(found, expected) << where;
    EXPECT_EQ(store.get_cache_disk_usage().orphan_segments, 0) << where;
  }

  /// Scenarios that may be told to do it again.
  static bool same_twice(const Scenario& s) {
    return std::set<std::string>{"save", "turn", "merge", "seal", "shorten", "rewind inside the tail", "shrink", "gc", "load", "map", "export", "export for mlx-lm", "read of mlx-lm", "prefix"}.contains(s.name);
  }

  void expect_export_whole(const std::string& where) {
    if (fs::exists(exported_)) {
      const auto root = directory_.path() / "other";
      FaultEnv env(root, attic_of(root));  // for want of fsyncs
      Store other(root, &env);
      if (is_prompt_cache(exported_)) {
        expect_prompt_cache(other, exported_);
      } else {
        EXPECT_NO_THROW(other.import_agent(exported_, "e")) << where;
        EXPECT_TRUE(same(other.load_agent_cache("e").snapshot, kOld)) << where;
      }
    }
    fs::remove_all(exported_.parent_path());
    fs::create_directory(exported_.parent_path());
    fs::remove_all(directory_.path() / "other");
    fs::remove_all(attic_of(directory_.path() / "other"));
  }

  static States either(const Scenario& s) {
    States states = s.before;
    states.insert(states.end(), s.after.begin(), s.after.end());
    return states;
  }

  TemporaryDirectory directory_{TemporaryDirectory::in_memory()};
  fs::path template_ = directory_.path() / "template", export_ = directory_.path() / "export.safetensors";
  fs::path prompt_cache_ = directory_.path() / "prompt_cache.safetensors";
  fs::path exported_ = directory_.path() / "out" / "export.safetensors";
  int counter_ = 0;
};

TEST_F(StoreFaults, AnyRefusedCallLeavesOldOrNew) {
  for (const auto& scenario : scenarios()) {
    for (int error_number : {EIO, EINTR, ENOSPC}) {
      int k = 1;
      for (bool triggered = true; triggered; k += int(every())) {
        ASSERT_LT(k, 1000);
        const auto root = fresh_store();
        const std::string where = std::string(scenario.name) + ", errno " + std::to_string(error_number) + " at call " + std::to_string(k);
        FaultEnv env(root, attic_of(root));
        {
          Store store(root, &env);
          env.fail_at(k, error_number, false, error_number == ENOSPC ? Calls::kChanges : Calls::kAll);
          const auto code = code_of([&] { scenario.act(store); });
          triggered = env.triggered();
          if (code) {
            EXPECT_EQ(*code, ErrorCode::kIo) << where;
          }
          if (!triggered || error_number == EINTR) {
            EXPECT_FALSE(code.has_value()) << where;
          }
          expect_state(root, code ? either(scenario) : scenario.after, where);
          // What failed half-way does not stand in the way of the next attempt.
          if (code && same_twice(scenario)) {
            EXPECT_NO_THROW(scenario.act(store)) << where;
            expect_state(root, scenario.after, where + ", again");
          }
        }
        expect_gc_cleans(root, where);
        expect_state(root, either(scenario), where + ", after gc");
        expect_export_whole(where);
        fs::remove_all(root), fs::remove_all(attic_of(root));
      }
      if (error_number != ENOSPC) {
        EXPECT_GT(k, 4) << scenario.name << ": hardly any call was counted";
      }
    }
  }
}

TEST_F(StoreFaults, APowerCutAnywhereLeavesOldOrNew) {
  for (const auto& scenario : scenarios()) {
    for (Lost lost : {Lost::kNothing, Lost::kData, Lost::kAll, Lost::kSegmentNames, Lost::kRootNames}) {
      for (int k = 1, triggered = 1; triggered; k += int(every())) {
        ASSERT_LT(k, 500);
        const auto root = fresh_store();
        const std::string where = std::string(scenario.name) + ", power cut at change " + std::to_string(k) + ", lost " + std::to_string(int(lost));
        FaultEnv env(root, attic_of(root));
        std::optional<ErrorCode> code;
        {
          Store store(root, &env);
          env.fail_at(k, EIO, /*for_good=*/true);
          code = code_of([&] { scenario.act(store); });
          triggered = env.triggered();
        }
        env.lose(lost);
        // What returned without an error has happened, whatever the disk forgets afterwards.
        expect_state(root, code ? either(scenario) : scenario.after, where);
        expect_gc_cleans(root, where);
        expect_state(root, either(scenario), where + ", after gc");
        expect_export_whole(where);
        fs::remove_all(root), fs::remove_all(attic_of(root));
      }
    }
  }
}

TEST_F(StoreFaults, APowerCutAnywhereLeavesARecordOldOrNew) {
  const Record record{"team-" + std::string(32, '1'), 0};
  struct Act {
    const char *name, *before, *after;  // nullptr: none
  };
  for (const Act& act : {Act{"first", nullptr, "new"}, Act{"replace", "old", "new"}, Act{"drop", "old", nullptr}}) {
    for (Lost lost : {Lost::kNothing, Lost::kData, Lost::kAll, Lost::kSegmentNames, Lost::kRootNames}) {
      for (int k = 1, triggered = 1; triggered; ++k) {
        ASSERT_LT(k, 100);
        const auto root = fresh_store();
        if (act.before != nullptr) Store(root).keep_record(record, act.before, Durability::kRename);
        FaultEnv env(root, attic_of(root));
        std::optional<ErrorCode> code;
        {
          Store store(root, &env);
          env.fail_at(k, EIO, /*for_good=*/true);
          code = code_of([&] {
            if (act.after != nullptr) store.keep_record(record, act.after);
            else store.drop_record(record);
          });
          triggered = env.triggered();
        }
        env.lose(lost);
        Store store(root);
        const std::string where = std::string(act.name) + ", change " + std::to_string(k) + ", lost " + std::to_string(int(lost));
        const auto is = [&](const char* text) {
          return text == nullptr ? store.records().empty() : !store.records().empty() && store.read_record(record) == text;
        };
        EXPECT_TRUE(is(act.after) || (code && is(act.before))) << where;
        store.gc();
        EXPECT_TRUE(is(act.after) || (code && is(act.before))) << where << ", after gc";
        EXPECT_EQ(code_of([&] { store.load_agent_cache("a"); }), std::nullopt) << where;
        fs::remove_all(root), fs::remove_all(attic_of(root));
      }
    }
  }
}

TEST_F(StoreFaults, GcWaitsForTheDiskBeforeItRemovesWhatAnUnflushedSaveDropped) {
  // A save without fsync drops the segments, gc removes them; then the power cut must not bring the old agent back.
  for (Lost lost : {Lost::kData, Lost::kAll, Lost::kRootNames, Lost::kSegmentNames}) {
    const auto root = fresh_store();
    FaultEnv env(root, attic_of(root));
    {
      Store store(root, &env);
      store.save_agent_cache("a", kEmpty, "m", {}, Durability::kRename);
      store.gc();
    }
    env.lose(lost);
    expect_state(root, {&kEmpty}, "lost " + std::to_string(int(lost)));
  }
}

TEST_F(StoreFaults, AFullSaveFlushesSegmentsThatAnUnflushedOneWrote) {
  for (Lost lost : {Lost::kData, Lost::kAll, Lost::kSegmentNames}) {
    const auto root = fresh_store();
    FaultEnv env(root, attic_of(root));
    {
      Store store(root, &env);
      store.save_agent_cache("other", kNew, "m", {}, Durability::kRename);
    }
    {
      Store store(root, &env);
      store.save_agent_cache("a", kNew, "m", {}, Durability::kFull);
    }
    env.lose(lost);
    expect_state(root, {&kNew}, "lost " + std::to_string(int(lost)));
  }
}

TEST_F(StoreFaults, ShortAndInterruptedTransfersChangeNothing) {
  const auto root = fresh_store();
  FaultEnv env(root, attic_of(root));
  env.stutter(true);
  Store store(root, &env);
  store.save_agent_cache("a", kNew, "m");
  EXPECT_TRUE(same(store.load_agent_cache("a").snapshot, kNew));
  store.gc();
  store.import_agent(export_, "imported");
  expect_state(root, {&kNew}, "stutter");
  expect_gc_cleans(root, "stutter");
}

TEST_F(StoreFaults, AReadOnlyStoreListsAndLoads) {
  const auto root = fresh_store();
  fs::remove(root / "a.json");
  FaultEnv env(root, attic_of(root));
  Store store(root, &env);
  env.fail_at(1, EROFS, false);
  EXPECT_EQ(store.list_cached_agents().size(), 2u);
  EXPECT_TRUE(env.triggered()) << "the sidecar should have been tried";
  EXPECT_FALSE(fs::exists(root / "a.json"));
  EXPECT_TRUE(same(store.load_agent_cache("a").snapshot, kOld));
}

}  // namespace
}  // namespace torpor::testing
