/// Parts: what a save writes again, what it leaves in place, and what is read of it (docs/format.md, "Parts").

#include <algorithm>
#include <random>

#include "counting_env.h"
#include "store/messages.h"
#include "store/parts.h"
#include "store/torpor_file.h"
#include "store_fixture.h"

namespace torpor::testing {
namespace {

// ---- what goes where

/// Saves turns one after the other, in numbers alone.
struct Numbers {
  std::vector<HeldPart> parts;  ///< the agent file last
  int64_t n_tokens = 0, rows_written = 0;

  PartsPlan turn(int64_t n, bool has_state = false) {
    n_tokens += n;
    const int64_t sealed = n_tokens / kSegmentTokens * kSegmentTokens;
    const PartsPlan plan = plan_parts(parts, sealed, n_tokens, has_state);
    parts.resize(plan.keep);
    if (plan.history_end) parts.push_back({plan.history_first, *plan.history_end - plan.history_first, 0});
    parts.push_back({plan.first, n_tokens - plan.first, plan.rows});
    rows_written = plan.rows;
    return plan;
  }
  void check() const {
    int64_t position = 0, rows = 0;
    for (const HeldPart& part : parts) {
      ASSERT_EQ(part.first, position);
      ASSERT_LE(part.rows, part.tokens);
      position = part.end();
      rows += part.rows;
    }
    ASSERT_EQ(position, n_tokens);
    ASSERT_EQ(rows, n_tokens % kSegmentTokens);
  }
};

TEST(PartsPlan, ATurnThatSealsNothingWritesAtMost32RowsAgain) {
  std::mt19937 random(1);
  for (const int most : {1, 2, 7, 20, 40, 200}) {
    Numbers agent;
    for (int turn = 0; turn < 3000; ++turn) {
      const int64_t before = agent.n_tokens, n = 1 + int64_t(random()) % most;
      agent.turn(n);
      agent.check();
      ASSERT_FALSE(::testing::Test::HasFatalFailure());
      if (before / kSegmentTokens == agent.n_tokens / kSegmentTokens) {
        ASSERT_LE(agent.rows_written, n + kMostRowsAgain);
      }
      ASSERT_EQ(agent.parts.back().rows, agent.rows_written);
    }
  }
}

TEST(PartsPlan, PartsAreFewWhateverTheTurns) {
  for (const int first : {1, 2, 3, 20, 22}) {
    Numbers agent;
    for (int turn = 0; turn < 2000; ++turn) {
      agent.turn(first == 22 ? 1 + (22 - turn % 22) : first);
      const auto with_rows = std::count_if(agent.parts.begin(), agent.parts.end(), [](const HeldPart& part) { return part.rows > 0; });
      ASSERT_LE(with_rows, 13);
      ASSERT_LE(agent.parts.size() - size_t(with_rows), 20u);
    }
  }
}

TEST(PartsPlan, StateIsWrittenWithAllRowsPastTheSegments) {
  Numbers agent;
  agent.turn(100, true);
  agent.parts.back().again = true;
  const PartsPlan plan = agent.turn(20, true);
  EXPECT_EQ(plan.keep, 0u);
  EXPECT_EQ(plan.rows, 120);
}

TEST(PartsPlan, ListsOfPartsAreReadAsTheyWereWritten) {
  const std::string a(32, 'a'), b(32, 'b');
  const std::vector<PartRef> parts{{a, 0, 250, 0}, {b, 250, 20, 14}};
  EXPECT_EQ(decode_parts(encode_parts(parts)), parts);
  EXPECT_EQ(decode_parts(""), std::vector<PartRef>());
  for (const std::string& bad : {a, a + ":0:1", a + ":0:1:2", a + ":1:1:0", a + ":0:-1:0", a + ":0:1:0:", a + ":0:1:0,", a + ":0:99999999999999999:0",
                                a + ":0:5:0," + b + ":6:1:0", std::string(31, 'a') + "x:0:1:0"}) {
    EXPECT_EQ(decode_parts(bad), std::nullopt) << bad;
  }
}

// ---- messages

TEST(Messages, AreTakenApartAsTheyWerePutTogether) {
  const std::vector<StoredMessage> messages{{R"({"role":"user","content":"a \" ] } \\"})", 0, 4}, {"{}", 4, 4}, {R"({"x":[{"ids":[1,2]}]})", 4, 9}};
  const std::string json = encode_messages(messages);
  EXPECT_EQ(json, R"([{"role":"user","content":"a \" ] } \\","ids":[0,4]},{"ids":[4,4]},{"x":[{"ids":[1,2]}],"ids":[4,9]}])");
  EXPECT_EQ(decode_messages(json, "f"), messages);
  EXPECT_TRUE(decode_messages("", "f").empty());
  for (size_t length = 1; length < json.size(); ++length) {
    EXPECT_EQ(code_of([&] { decode_messages(json.substr(0, length), "f"); }), ErrorCode::kCorruption) << length;
  }
  for (const char* bad : {"[]", "[1]", "[{\"ids\":[2,1]}]", "[{\"ids\":[1,2]} ]", "[{\"ids\":[1]}]", "[{\"role\":\"user\"}]", "[{\"ids\":[-1,2]}]"}) {
    EXPECT_EQ(code_of([&] { decode_messages(bad, "f"); }), ErrorCode::kCorruption) << bad;
  }
}

// ---- files

const KvLayout kLayout = small_layout(KvDtype::kF16, 2, 2, 3);

/// One message for each 10 tokens.
AgentNotes notes_for(int n_tokens) {
  AgentNotes notes;
  for (int end = 10; end <= n_tokens; end += 10) {
    notes.messages.push_back({"{\"role\":\"user\",\"content\":\"to " + std::to_string(end) + "\"}", end - 10, end});
  }
  notes.record = {{"history_tokens", std::to_string(n_tokens)}};
  return notes;
}

class StoreParts : public ::testing::Test {
 protected:
  SaveResult save(const std::string& id, int n_tokens, uint32_t seed = 1, const KvLayout& layout = kLayout) {
    return store_.save_agent_cache(id, make_snapshot(n_tokens, layout, seed), "m", {}, Durability::kFull, notes_for(n_tokens));
  }
  /// In a store that has seen nothing yet.
  ::testing::AssertionResult holds(const std::string& id, int n_tokens, uint32_t seed = 1, const KvLayout& layout = kLayout) {
    const auto loaded = Store(root_).load_agent_cache(id);
    if (loaded.messages != notes_for(n_tokens).messages) return ::testing::AssertionFailure() << "messages differ";
    if (loaded.damage) return ::testing::AssertionFailure() << *loaded.damage;
    return same(loaded.snapshot, make_snapshot(n_tokens, layout, seed));
  }
  size_t parts() const {
    return size_t(std::distance(fs::directory_iterator(root_ / "parts"), fs::directory_iterator()));
  }
  /// Nothing but what agents name is there, and all of that is intact.
  void expect_tidy() {
    for (const auto& report : store_.verify()) EXPECT_TRUE(report.problems.empty()) << report.problems[0];
    const size_t before = parts();
    store_.gc();
    EXPECT_EQ(parts(), before);
  }

  TemporaryDirectory directory_{TemporaryDirectory::in_memory()};
  fs::path root_ = directory_.path() / "store";
  Store store_{root_};
};

TEST_F(StoreParts, TurnsAreHeldWhole) {
  std::mt19937 random(3);
  int n_tokens = 0;
  for (int turn = 0; turn < 70; ++turn) {
    n_tokens += 1 + int(random() % (turn % 20 == 0 ? 300 : 25));
    save("a", n_tokens);
    ASSERT_TRUE(holds("a", n_tokens)) << n_tokens;
  }
  EXPECT_GT(parts(), 1u);
  expect_tidy();
  store_.delete_agent_cache("a");
  EXPECT_EQ(parts(), 0u);
}

TEST_F(StoreParts, TheSidecarOfAnAgentWithPartsIsTakenAsItIs) {
  for (const int n : {30, 100, 180}) save("a", n);
  ASSERT_GT(parts(), 0u);
  const auto written = Env::posix().stat(root_ / "a.json");
  const AgentInfo listed = store_.list_cached_agents().at(0), direct = store_.agent_info("a");
  EXPECT_EQ(Env::posix().stat(root_ / "a.json"), written) << "written anew";
  EXPECT_EQ(listed.parts, direct.parts);
  EXPECT_EQ(listed.parts.size(), parts());
  EXPECT_EQ(listed.bytes, direct.bytes);
  EXPECT_EQ(listed.tail_bytes, direct.tail_bytes);
  EXPECT_EQ(listed.record, direct.record);
}

TEST_F(StoreParts, APartThatForksShareTakesItsBytesOnce) {
  for (const int n : {30, 100, 180}) save("a", n);
  const int64_t before = store_.get_cache_disk_usage().agent_bytes;
  store_.copy_agent_cache("a", "b");
  int64_t added = 0;  // nothing but these has bytes of its own
  for (const char* name : {"b.safetensors", "b.json"}) added += int64_t(fs::file_size(root_ / name));
  EXPECT_EQ(store_.get_cache_disk_usage().agent_bytes, before + added);
  // What no agent names any more is for gc, and only when no other agent has it.
  fs::remove(root_ / "b.safetensors");
  const DiskUsage shared = store_.get_cache_disk_usage();
  EXPECT_EQ(shared.agent_bytes, before);
  EXPECT_EQ(shared.orphan_bytes, 0);
  fs::remove(root_ / "a.safetensors");
  const DiskUsage none = store_.get_cache_disk_usage();
  EXPECT_EQ(none.agent_bytes, 0);
  EXPECT_GT(none.orphan_bytes, 0);
  EXPECT_EQ(store_.gc().bytes_freed > none.orphan_bytes, true);
  EXPECT_EQ(store_.get_cache_disk_usage().total_bytes, 0);
}

TEST_F(StoreParts, WhoeverSavesNextGoesOnFromWhatIsThere) {
  for (const int n : {100, 120, 140, 150, 250, 270, 290}) {
    const auto result = Store(root_).save_agent_cache("a", make_snapshot(n, kLayout), "m", {}, Durability::kFull, notes_for(n));
    ASSERT_TRUE(holds("a", n)) << n;
    if (n == 140) {
      EXPECT_LT(result.bytes_written, 5000 + 40 * int64_t(kLayout.bytes_per_token()));
    }
  }
  expect_tidy();
}

TEST_F(StoreParts, RandomCutsForksAndContinuations) {
  std::mt19937 random(5);
  std::map<std::string, int> agents;
  save("a", 30);
  agents["a"] = 30;
  for (int step = 0; step < 200; ++step) {
    auto it = std::next(agents.begin(), ptrdiff_t(random() % agents.size()));
    const std::string id = it->first;
    switch (random() % 5) {
      case 0: {  // on disk
        it->second = int(random() % unsigned(it->second + 1));
        store_.copy_agent_cache(id, id, {.n_tokens = it->second, .replace = true});
        break;
      }
      case 1: {  // in memory
        it->second = int(random() % unsigned(it->second + 1));
        save(id, it->second);
        break;
      }
      case 2: {
        const std::string other = "f" + std::to_string(step % 6);
        const int n = int(random() % unsigned(it->second + 1));
        if (other == id) break;
        store_.copy_agent_cache(id, other, {.n_tokens = n, .replace = true});
        agents[other] = n;
        break;
      }
      case 3: {
        if (agents.contains("renamed") || agents.size() < 2) break;
        store_.rename_agent_cache(id, "renamed");
        const int n = it->second;
        agents.erase(it);
        agents["renamed"] = n;
        break;
      }
      default: {
        it->second += 1 + int(random() % 60);
        save(id, it->second);
      }
    }
    for (const auto& [agent, n] : agents) ASSERT_TRUE(holds(agent, n)) << agent << " at " << n << " in step " << step;
  }
  expect_tidy();
}

TEST_F(StoreParts, OtherRowsIdsOrMessagesAreWrittenAnew) {
  for (const int n : {100, 150, 200}) save("a", n);
  save("a", 220, 2);  // computed anew
  EXPECT_TRUE(holds("a", 220, 2));
  KvSnapshot other = make_snapshot(230, kLayout, 2);
  for (size_t t = 120; t < other.tokens.size(); ++t) other.tokens[t] += 5;
  store_.save_agent_cache("a", other, "m", {}, Durability::kFull, notes_for(230));
  EXPECT_TRUE(same(Store(root_).load_agent_cache("a").snapshot, other));
  AgentNotes notes = notes_for(240);
  notes.messages[3].json = "{\"role\":\"system\"}";
  save("a", 240, 2);
  store_.save_agent_cache("a", make_snapshot(240, kLayout, 2), "m", {}, Durability::kFull, notes);
  EXPECT_EQ(Store(root_).load_agent_cache("a").messages, notes.messages);
  expect_tidy();
}

TEST_F(StoreParts, AnotherLayoutOfTheSameSizeIsWrittenAnew) {
  save("a", 100);
  save("a", 200);
  KvLayout windows = kLayout;
  for (KvTensorSpec& tensor : windows.tensors) tensor.window = 64;
  save("a", 220, 1, windows);
  EXPECT_TRUE(holds("a", 220, 1, windows));
}

TEST_F(StoreParts, RowsThatLieApartAreTheSame) {
  for (const int n : {70, 100, 130, 300}) {
    Scattered scattered(make_snapshot(n, kLayout));
    store_.save_agent_cache("a", scattered.snapshot, scattered.rows, "m", {}, Durability::kFull, notes_for(n));
    EXPECT_TRUE(holds("a", n)) << n;
  }
  EXPECT_GT(parts(), 0u);
}

TEST_F(StoreParts, ASinkAndACutGetTheTailOfManyFiles) {
  for (const int n : {300, 340, 380, 400}) save("a", n);
  EXPECT_GT(parts(), 1u);
  CollectingSink sink;
  store_.load_into("a", sink);
  EXPECT_TRUE(same(sink.snapshot, make_snapshot(400, kLayout)));
  for (const int n : {0, 1, 255, 256, 257, 299, 300, 301, 350, 399, 400}) {
    const auto loaded = Store(root_).load_agent_cache("a", {.n_tokens = n});
    EXPECT_TRUE(same(loaded.snapshot, make_snapshot(n, kLayout))) << n;
    for (const bool map : {false, true}) {
      const auto to_wake = Store(root_).load_agent_cache("a", {.map_rows = map, .n_tokens = n, .tail_in_run = true});
      EXPECT_TRUE(same(packed(to_wake.snapshot), make_snapshot(n, kLayout))) << n;
      EXPECT_EQ(to_wake.bytes_read, loaded.bytes_read) << n;
    }
    EXPECT_EQ(loaded.messages, notes_for(n).messages) << n;
  }
  EXPECT_EQ(store_.agent_tokens("a"), make_snapshot(400, kLayout).tokens);
  EXPECT_EQ(store_.agent_messages("a"), notes_for(400).messages);
}

/// Rows of a realistic size: those of SmolLM2-135M.
KvLayout realistic_layout() { return small_layout(KvDtype::kF16, 30, 3, 64); }

/// Bytes written by turns of `n` tokens up to `total`, over those of the agent at the end.
double ratio(int n, int total) {
  TemporaryDirectory directory(TemporaryDirectory::in_memory());
  const KvLayout layout = realistic_layout();
  const KvSnapshot all = make_snapshot(total, layout);
  Store store(directory.path() / "store");
  for (int end = n; end <= total; end += n) {
    KvSnapshot snapshot;
    snapshot.identity = all.identity;
    snapshot.lineage = all.lineage;
    snapshot.layout = layout;
    snapshot.tokens.assign(all.tokens.begin(), all.tokens.begin() + end);
    snapshot.sealed.assign(all.sealed.begin(), all.sealed.begin() + end / kSegmentTokens);
    const int rest = end % kSegmentTokens;
    const bool sealed = size_t(end / kSegmentTokens) < all.sealed.size();
    const auto from = sealed ? all.sealed[size_t(end / kSegmentTokens)]->bytes() : all.tail.bytes;
    const int from_tokens = sealed ? kSegmentTokens : all.tail.n_tokens;
    if (rest > 0) {
      const size_t size = layout.offset(layout.tensors.size(), rest);
      const auto rows = allocate_heap_buffer(size);
      copy_rows(layout, {from.data(), from_tokens, 0}, {rows.get(), rest, 0}, rest);
      snapshot.tail = {rest, {rows.get(), size}, rows};
    }
    AgentNotes notes;
    for (int said = 2 * n; said <= end; said += 2 * n) {
      notes.messages.push_back({"{\"role\":\"user\",\"content\":\"" + std::string(size_t(4 * n), 'x') + "\"}", said - 2 * n, said});
    }
    store.save_agent_cache("a", snapshot, "m", {}, Durability::kNone, notes);
  }
  const double final_bytes = double(total) * double(layout.bytes_per_token() + 4);
  return double(store.get_cache_disk_usage().bytes_written) / final_bytes;
}

TEST(StorePartsBytes, FourHundredTurnsOfTwenty) { EXPECT_LE(ratio(20, 8000), 2.7); }
TEST(StorePartsBytes, FiftyTurnsOf164) { EXPECT_LE(ratio(164, 8200), 1.7); }
TEST(StorePartsBytes, AThousandTurnsOfOneTokenAndOneGenerated) { EXPECT_LE(ratio(2, 2000), 10); }

TEST(StorePartsBytes, ForkAndRewindInsideTheTailWriteNoRow) {
  TemporaryDirectory directory(TemporaryDirectory::in_memory());
  const KvLayout layout = realistic_layout();
  Store store(directory.path() / "store");
  for (const int n : {300, 350, 420, 500}) store.save_agent_cache("a", make_snapshot(n, layout), "m");
  const int64_t row = int64_t(layout.bytes_per_token());
  for (const int n : {500, 470, 420, 400, 301, 300, 260}) {
    EXPECT_LT(store.copy_agent_cache("a", "f" + std::to_string(n), {.n_tokens = n}).bytes_written, row) << n;
    EXPECT_TRUE(same(Store(store.root()).load_agent_cache("f" + std::to_string(n)).snapshot, make_snapshot(n, layout))) << n;
  }
  for (const int n : {480, 410, 300}) {
    EXPECT_LT(store.copy_agent_cache("a", "a", {.n_tokens = n, .replace = true}).bytes_written, row) << n;
    EXPECT_TRUE(same(Store(store.root()).load_agent_cache("a").snapshot, make_snapshot(n, layout))) << n;
  }
  // The same of an agent that is cut in memory and then saved.
  EXPECT_LT(store.save_agent_cache("f500", make_snapshot(430, layout), "m").bytes_written, row);
  EXPECT_TRUE(same(Store(store.root()).load_agent_cache("f500").snapshot, make_snapshot(430, layout)));
}

// ---- damage

/// A store whose agent has segments, a history and parts with rows.
class StorePartsDamage : public StoreParts {
 protected:
  StorePartsDamage() {
    for (const int n : {200, 270, 310, 350, 400}) save("a", n, 1, small_layout());
    for (const auto& [name, bytes] : tree(root_)) {
      if (name.ends_with(".safetensors")) files_[name] = bytes;
    }
  }
  void expect_found(const std::string& name, const std::string& where) {
    const Store store(root_);
    std::string message;
    ASSERT_EQ(code_of([&] { store.load_agent_cache("a"); }, &message), ErrorCode::kCorruption) << where;
    ASSERT_NE(message.find(name), std::string::npos) << where << ": " << message;
    // A tail in one file is mapped, one in several is gathered from mappings: neither hides the damage.
    ASSERT_EQ(code_of([&] { store.load_agent_cache("a", {.map_rows = true}); }), ErrorCode::kCorruption) << where;
    for (const bool in_run : {false, true}) {
      const auto code = code_of([&] {
        const auto loaded = store.load_agent_cache("a", {.salvage = true, .map_rows = true, .tail_in_run = in_run});
        const int n = int(loaded.snapshot.tokens.size());
        ASSERT_TRUE(loaded.damage.has_value()) << where;
        ASSERT_TRUE(same(in_run ? packed(loaded.snapshot) : loaded.snapshot, make_snapshot(n, small_layout()))) << where;
        ASSERT_TRUE(!in_run || n == salvaged_) << where;
        salvaged_ = n;
      });
      ASSERT_TRUE(!code || (*code == ErrorCode::kCorruption && name == "a.safetensors")) << where;
    }
    const auto reports = store.verify("a");
    ASSERT_FALSE(reports[0].problems.empty()) << where;
  }
  std::map<std::string, std::string> files_;
  int salvaged_ = 0;
};

TEST_F(StorePartsDamage, EveryFlippedByteIsFound) {
  ASSERT_GE(files_.size(), 5u);
  for (const auto& [name, bytes] : files_) {
    for (size_t at = 0; at < bytes.size(); at += every() * (name.starts_with("segments") ? 7 : 1)) {
      std::string damaged = bytes;
      damaged[at] = char(damaged[at] ^ (1 << (at % 8)));
      write_all(root_ / name, damaged);
      expect_found(name, name + " byte " + std::to_string(at));
      ASSERT_FALSE(HasFatalFailure());
    }
    write_all(root_ / name, bytes);
  }
  EXPECT_TRUE(holds("a", 400, 1, small_layout()));
}

TEST_F(StorePartsDamage, EveryTruncationIsFound) {
  for (const auto& [name, bytes] : files_) {
    for (size_t left = 1; left <= bytes.size(); left += every()) {
      fs::resize_file(root_ / name, bytes.size() - left);
      expect_found(name, name + " cut to " + std::to_string(bytes.size() - left));
      ASSERT_FALSE(HasFatalFailure());
    }
    write_all(root_ / name, bytes);
  }
}

TEST_F(StorePartsDamage, APartThatIsMissingCostsWhatIsBehindIt) {
  for (const auto& [name, bytes] : files_) {
    if (!name.starts_with("parts/")) continue;
    fs::remove(root_ / name);
    expect_found(name, name);
    ASSERT_FALSE(HasFatalFailure());
    // A history's ids are those of its segments; rows of a tail are nowhere else.
    const auto loaded = store_.load_agent_cache("a", {.salvage = true});
    EXPECT_TRUE(salvaged_ == 400 || salvaged_ >= 256) << name;
    EXPECT_LT(loaded.messages.size(), notes_for(400).messages.size()) << name;
    write_all(root_ / name, bytes);
  }
  EXPECT_TRUE(holds("a", 400, 1, small_layout()));
}

TEST_F(StorePartsDamage, ASaveWritesAnewWhatIsDamaged) {
  for (const auto& [name, bytes] : files_) {
    if (!name.starts_with("parts/")) continue;
    std::string damaged = bytes;
    damaged.back() = char(damaged.back() ^ 1);
    write_all(root_ / name, damaged);
    break;
  }
  const KvSnapshot more = make_snapshot(410, small_layout());
  Store(root_).save_agent_cache("a", more, "m", {}, Durability::kFull, notes_for(410));
  EXPECT_TRUE(holds("a", 410, 1, small_layout()));
}

// ---- names

TEST_F(StoreParts, RowsOfOtherNumericsGetOtherNames) {
  save("a", 600);
  KvSnapshot snapshot = make_snapshot(600, kLayout);
  EXPECT_FALSE(snapshot.lineage.go_on_with("f32/test/l1", 600));
  EXPECT_TRUE(snapshot.lineage.go_on_with("f32/test/l2", 600));
  EXPECT_EQ(snapshot.lineage.numerics(), "f32/test/l2");
  EXPECT_EQ(snapshot.lineage.ranges[1].first, 512);
  KvSnapshot more = make_snapshot(1100, kLayout);
  more.lineage = snapshot.lineage;
  const auto saved = store_.save_agent_cache("a", more, "m");
  EXPECT_EQ(saved.segments_shared, 2);
  EXPECT_EQ(saved.segments_written, 2);
  const auto loaded = Store(root_).load_agent_cache("a");
  EXPECT_TRUE(same(loaded.snapshot, more));
  EXPECT_EQ(loaded.snapshot.lineage, more.lineage);
  // Nobody whose rows are all of one kind takes those for its own.
  EXPECT_EQ(store_.find_prefix(more.identity, make_snapshot(1, kLayout).lineage, kLayout, more.tokens), 512);
  EXPECT_EQ(store_.find_prefix(more.identity, more.lineage, kLayout, more.tokens), 1024);
  more.lineage.cut(300);
  EXPECT_EQ(more.lineage.ranges.back(), (Lineage::Range{256, "f32/test/l2"}));
}

TEST_F(StoreParts, RowsOfOneArithmeticOfRoundedActivationsAreNotTakenForThoseOfAnother) {
  const ConversationIdentity conversation{"t0", "m0"};
  const std::string kernels = "/kernels/l8-fma", last = "int16" + kernels;
  // Both arithmetics of old versions' 8 bits, and f32, beside the one that came after.
  for (const auto& [first, second] : {std::pair<std::string, std::string>{"int8", "int8.2"}, {"int8", "int16"}, {"int8.2", "int16"},
                                      {"f32", "int16"}, {"int8" + kernels, "int8.2" + kernels}, {"int8.2" + kernels, last},
                                      {"f32" + kernels, last}}) {
    for (const auto& old_names : {std::optional(conversation), std::optional<ConversationIdentity>()}) {
      SCOPED_TRACE(first + ", " + second + (old_names ? ", old names" : ""));
      KvSnapshot rows = make_snapshot(600, kLayout);
      rows.lineage = {.ranges = {{0, first}}, .old_names = old_names};
      store_.save_agent_cache("a", rows, "m");
      const Lineage others{.ranges = {{0, second}}, .old_names = old_names};
      EXPECT_EQ(store_.find_prefix(rows.identity, rows.lineage, kLayout, rows.tokens), 512);
      EXPECT_EQ(store_.find_prefix(rows.identity, others, kLayout, rows.tokens), 0);
      // The agent goes on, and its new rows are nobody else's.
      KvSnapshot more = make_snapshot(1100, kLayout);
      more.lineage = rows.lineage;
      EXPECT_TRUE(more.lineage.go_on_with(last, 600));
      EXPECT_EQ(store_.save_agent_cache("a", more, "m").segments_written, 2);
      EXPECT_TRUE(same(store_.load_agent_cache("a").snapshot, more));
      EXPECT_EQ(store_.find_prefix(more.identity, rows.lineage, kLayout, more.tokens), 512);
      EXPECT_EQ(store_.find_prefix(more.identity, more.lineage, kLayout, more.tokens), 1024);
      store_.delete_agent_cache("a");
      store_.gc();
    }
  }
}

TEST_F(StoreParts, AnIncompatibleIdentityIsNamedWithBothValues) {
  save("a", 10);
  std::string message;
  Identity other = test_identity("w1");
  EXPECT_EQ(code_of([&] { store_.load_agent_cache("a", {.expected = &other}); }, &message), ErrorCode::kIncompatible);
  EXPECT_NE(message.find("weights ('w0')"), std::string::npos) << message;
  EXPECT_NE(message.find("'w1'"), std::string::npos) << message;
  EXPECT_EQ(store_.load_agent_cache("a").info.conversation, (ConversationIdentity{"t0", "m0"}));
}

}  // namespace
}  // namespace torpor::testing
