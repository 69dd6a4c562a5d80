/// The store as its callers see it: round trips, sharing, the catalogue, locks, exchange.

#include "base/env.h"
#include "store/sidecar.h"
#include "store_fixture.h"

#include <sys/stat.h>

#include <thread>

namespace torpor::testing {
namespace {

class StoreTest : public ::testing::Test {
 protected:
  TemporaryDirectory directory_;
  fs::path root_ = directory_.path() / "store";
  Store store_{root_};

  int count_segments() const {
    int n = 0;
    for (const auto& [name, bytes] : tree(root_)) n += name.starts_with("segments/");
    return n;
  }
};

TEST_F(StoreTest, RoundTripsEveryLengthAndDtype) {
  for (KvDtype dtype : {KvDtype::kF32, KvDtype::kF16, KvDtype::kBF16}) {
    for (int n : {0, 1, 255, 256, 257, 600}) {
      const auto snapshot = make_snapshot(n, small_layout(dtype, 3, 2, 5));
      const std::string id = std::string(kv_dtype_name(dtype)) + "-" + std::to_string(n);
      const auto saved = store_.save_agent_cache(id, snapshot, "some/model", {{"note", "grüße \"x\""}, {"a", ""}});
      EXPECT_EQ(saved.segments_written + saved.segments_shared, n / 256) << id;
      // A new Store: nothing may come from memory.
      const auto loaded = Store(root_).load_agent_cache(id);
      EXPECT_TRUE(same(loaded.snapshot, snapshot)) << id;
      const auto mapped = Store(root_).load_agent_cache(id, {.map_rows = true});
      EXPECT_TRUE(same(mapped.snapshot, snapshot)) << id;
      EXPECT_EQ(mapped.bytes_read, loaded.bytes_read);
      EXPECT_FALSE(loaded.damage.has_value());
      EXPECT_EQ(loaded.info.cache_size, n);
      EXPECT_EQ(loaded.info.model, "some/model");
      EXPECT_EQ(loaded.info.user, (std::vector<std::pair<std::string, std::string>>{{"note", "grüße \"x\""}, {"a", ""}}));
      EXPECT_EQ(loaded.info.segments.size(), size_t(n / 256));
      EXPECT_EQ(loaded.bytes_read, loaded.info.bytes);
      EXPECT_EQ(fs::file_size(root_ / (id + ".safetensors")) , size_t(loaded.info.tail_bytes));
    }
  }
}

TEST_F(StoreTest, MixedDtypesOfQuantizedKvRoundTrip) {
  KvLayout layout;
  layout.tensors = {{"layer_0_keys", KvDtype::kU32, 2, 8, 0},
                    {"layer_0_keys_scales", KvDtype::kF16, 2, 1, 0},
                    {"layer_0_keys_biases", KvDtype::kBF16, 2, 1, 0},
                    {"layer_0_values", KvDtype::kU32, 2, 8, 1024}};
  const auto snapshot = make_snapshot(300, layout);
  store_.save_agent_cache("q", snapshot, "m");
  EXPECT_TRUE(same(store_.load_agent_cache("q").snapshot, snapshot));
}

TEST_F(StoreTest, AnEmptyAgentWithoutLayoutIsAnOrdinaryAgent) {
  store_.save_agent_cache("empty", KvSnapshot{}, "");
  EXPECT_TRUE(store_.load_agent_cache("empty").snapshot.tokens.empty());
  EXPECT_EQ(store_.list_cached_agents().size(), 1u);
}


TEST_F(StoreTest, FilesArePrivate) {
  store_.save_agent_cache("a", make_snapshot(300), "m");
  for (const auto& entry : fs::recursive_directory_iterator(root_)) {
    struct stat stat;
    ASSERT_EQ(::stat(entry.path().c_str(), &stat), 0);
    EXPECT_EQ(stat.st_mode & 0777, entry.is_directory() ? 0700u : 0600u) << entry.path();
  }
}

TEST_F(StoreTest, SealedSegmentsAreSharedAndLeftAlone) {
  const auto snapshot = make_snapshot(600);
  EXPECT_EQ(store_.save_agent_cache("a", snapshot, "m").segments_written, 2);
  std::map<std::string, std::pair<ino_t, timespec>> before;
  for (const auto& entry : fs::recursive_directory_iterator(root_ / "segments")) {
    struct stat stat;
    ::stat(entry.path().c_str(), &stat);
    if (entry.is_regular_file()) before[entry.path()] = {stat.st_ino, stat.st_mtim};
  }
  ASSERT_EQ(before.size(), 2u);
  // By the same agent, by another in this process, by another in a new one, and by equal rows in other memory.
  for (const char* id : {"a", "b"}) {
    EXPECT_EQ(store_.save_agent_cache(id, snapshot, "m").segments_shared, 2);
  }
  EXPECT_EQ(Store(root_).save_agent_cache("c", snapshot, "m").segments_shared, 2);
  EXPECT_EQ(store_.save_agent_cache("d", make_snapshot(600), "m").segments_shared, 2);
  EXPECT_EQ(count_segments(), 2);
  for (const auto& [path, was] : before) {
    struct stat stat;
    ::stat(path.c_str(), &stat);
    EXPECT_EQ(stat.st_ino, was.first);
    EXPECT_EQ(stat.st_mtim.tv_nsec, was.second.tv_nsec);
  }
  for (const char* id : {"a", "b", "c", "d"}) EXPECT_TRUE(same(store_.load_agent_cache(id).snapshot, snapshot));
  const auto usage = store_.get_cache_disk_usage();
  EXPECT_EQ(usage.agents, 4);
  EXPECT_EQ(usage.segments, 2);
  EXPECT_EQ(usage.orphan_segments, 0);
  EXPECT_EQ(usage.total_bytes, usage.agent_bytes + usage.segment_bytes);
}

TEST_F(StoreTest, EqualTokensWithOtherRowsKeepTheirOwnRows) {
  // Metal and CUDA need not give one prefix the same bits twice. Each agent gets back what it saved.
  const auto one = make_snapshot(600, small_layout(), 1), other = make_snapshot(600, small_layout(), 2);
  ASSERT_EQ(one.tokens, other.tokens);
  store_.save_agent_cache("one", one, "m");
  store_.save_agent_cache("other", other, "m");
  EXPECT_EQ(count_segments(), 4);
  EXPECT_EQ(Store(root_).save_agent_cache("other2", other, "m").segments_shared, 2);
  EXPECT_EQ(Store(root_).save_agent_cache("other", other, "m").segments_shared, 2);
  const Store fresh(root_);
  EXPECT_TRUE(same(fresh.load_agent_cache("one").snapshot, one));
  EXPECT_TRUE(same(fresh.load_agent_cache("other").snapshot, other));
  EXPECT_TRUE(same(fresh.load_agent_cache("other2").snapshot, other));
}

TEST_F(StoreTest, SavesAtOnceOfEqualTokensWithOtherRowsKeepTheirOwnRows) {
  for (int round = 0; round < 20; ++round) {
    std::vector<KvSnapshot> snapshots;
    for (uint32_t seed = 1; seed <= 6; ++seed) {
      snapshots.push_back(make_snapshot(600, small_layout(), seed));
      snapshots.back().tokens[0] = round;  // names that no round before has taken
    }
    {
      std::vector<std::jthread> threads;
      for (size_t i = 0; i < snapshots.size(); ++i) {
        threads.emplace_back([&, i] {  // each with a store of its own, as another process has
          Store(root_).save_agent_cache(std::to_string(i), snapshots[i], "m", {}, Durability::kRename);
        });
      }
    }
    for (size_t i = 0; i < snapshots.size(); ++i) {
      ASSERT_TRUE(same(Store(root_).load_agent_cache(std::to_string(i)).snapshot, snapshots[i])) << "round " << round;
    }
  }
}

TEST_F(StoreTest, OtherIdentityOrParentIsAnotherSegment) {
  auto a = make_snapshot(256), b = make_snapshot(256);
  b.identity.weights = "w1";
  store_.save_agent_cache("a", a, "m");
  store_.save_agent_cache("b", b, "m");
  EXPECT_EQ(count_segments(), 2);
  // The same 256 tokens twice in a row.
  auto twice = make_snapshot(256);
  twice.tokens.insert(twice.tokens.end(), a.tokens.begin(), a.tokens.end());
  const KvTail again = make_run(twice.layout, 256, 256, 1);
  twice.add_run(256, again.bytes, again.owner);
  store_.save_agent_cache("twice", twice, "m");
  EXPECT_EQ(count_segments(), 3);
  EXPECT_TRUE(same(store_.load_agent_cache("twice").snapshot, twice));
}

TEST_F(StoreTest, CostFollowsTheChange) {
  const auto layout = small_layout(KvDtype::kF16, 4, 2, 64);
  auto snapshot = make_snapshot(2000, layout);
  const auto first = store_.save_agent_cache("a", snapshot, "m");
  // What a turn does: the sealed runs stay, the last one grows.
  const auto longer = make_snapshot(2020, layout);
  snapshot.tokens = longer.tokens;
  snapshot.tail = longer.tail;
  const auto second = store_.save_agent_cache("a", snapshot, "m");
  EXPECT_EQ(second.segments_written, 0);
  EXPECT_LT(second.bytes_written * 4, first.bytes_written);
  EXPECT_TRUE(same(store_.load_agent_cache("a").snapshot, longer));
}

TEST_F(StoreTest, BytesWrittenIsWhatAppearsOnDisk) {
  const auto result = store_.save_agent_cache("a", make_snapshot(600), "m");
  int64_t on_disk = 0;
  for (const auto& [name, bytes] : tree(root_)) on_disk += int64_t(bytes.size());
  EXPECT_EQ(result.bytes_written, on_disk);
}

TEST_F(StoreTest, OverwritingKeepsTheDateOfBirth) {
  store_.save_agent_cache("a", make_snapshot(3), "m");
  const auto first = store_.agent_info("a");
  store_.save_agent_cache("a", make_snapshot(4), "m");
  const auto second = store_.agent_info("a");
  EXPECT_EQ(first.created_at, second.created_at);
  EXPECT_LT(first.updated_at, second.updated_at);
  EXPECT_NE(first.hash, second.hash);
  // Replaced by another process since: that one's counts.
  Store other(root_);
  other.delete_agent_cache("a");
  other.save_agent_cache("a", make_snapshot(5), "m");
  const std::string born = other.agent_info("a").created_at;
  EXPECT_LT(second.updated_at, born);
  store_.save_agent_cache("a", make_snapshot(6), "m");
  EXPECT_EQ(store_.agent_info("a").created_at, born);
  store_.delete_agent_cache("a");
  store_.save_agent_cache("a", make_snapshot(7), "m");
  EXPECT_LT(born, store_.agent_info("a").created_at);
}

TEST_F(StoreTest, AnotherIdentityIsRefusedByTheFieldsName) {
  store_.save_agent_cache("a", make_snapshot(300), "m");
  const Identity right = test_identity();
  LoadOptions options{.expected = &right};
  EXPECT_NO_THROW(store_.load_agent_cache("a", options));
  for (const auto& [name, value] : right.fields()) {
    auto fields = right.fields();
    for (auto& field : fields) {
      if (field.first == name) field.second = "another";
    }
    const Identity wrong = Identity::from_fields(fields);
    LoadOptions wrong_options{.expected = &wrong};
    wrong_options.allocate = [](size_t) -> std::shared_ptr<std::byte> { ADD_FAILURE() << "read too far"; return nullptr; };
    std::string message;
    EXPECT_EQ(code_of([&] { store_.load_agent_cache("a", wrong_options); }, &message), ErrorCode::kIncompatible);
    EXPECT_NE(message.find(name), std::string::npos) << message;
  }
}

TEST_F(StoreTest, RefusesWhatCanNotBeStored) {
  for (const char* id : {"", ".", "..", ".a", "-a", "a/b", "a b", "ä", "../a"}) {
    EXPECT_EQ(code_of([&] { store_.save_agent_cache(id, make_snapshot(1), "m"); }), ErrorCode::kInvalidArgument) << id;
    EXPECT_EQ(code_of([&] { store_.load_agent_cache(id); }), ErrorCode::kInvalidArgument) << id;
    EXPECT_EQ(code_of([&] { (void)store_.lock_agent(id); }), ErrorCode::kInvalidArgument) << id;
    EXPECT_FALSE(store_.contains(id));
  }
  EXPECT_EQ(code_of([&] { check_agent_id(std::string(129, 'a')); }), ErrorCode::kInvalidArgument);
  EXPECT_NO_THROW(check_agent_id(std::string(128, 'a')));
  EXPECT_EQ(code_of([&] { store_.save_agent_cache("a", make_snapshot(1), "\xff"); }), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of([&] { store_.save_agent_cache("a", make_snapshot(1), "m", {{"k", "1"}, {"k", "2"}}); }),
            ErrorCode::kInvalidArgument);
  auto lacking = make_snapshot(5);
  lacking.tokens.pop_back();
  EXPECT_EQ(code_of([&] { store_.save_agent_cache("a", lacking, "m"); }), ErrorCode::kInvalidArgument);
  auto twice = make_snapshot(5);
  twice.layout.tensors[1].name = twice.layout.tensors[0].name;
  EXPECT_EQ(code_of([&] { store_.save_agent_cache("a", twice, "m"); }), ErrorCode::kInvalidArgument);
  EXPECT_TRUE(tree(root_).empty());
}

TEST_F(StoreTest, MissingAgentsAreNotFound) {
  EXPECT_EQ(code_of([&] { store_.load_agent_cache("a"); }), ErrorCode::kNotFound);
  EXPECT_EQ(code_of([&] { store_.agent_info("a"); }), ErrorCode::kNotFound);
  EXPECT_EQ(code_of([&] { store_.delete_agent_cache("a"); }), ErrorCode::kNotFound);
  EXPECT_EQ(code_of([&] { store_.verify("a"); }), ErrorCode::kNotFound);
  EXPECT_TRUE(store_.list_cached_agents().empty());
  EXPECT_TRUE(store_.verify().empty());
  EXPECT_EQ(store_.gc().files_removed, 0);
}

TEST_F(StoreTest, ASidecarWhoseNumbersCanNotBeIsRebuilt) {
  store_.save_agent_cache("a", make_snapshot(300), "m");
  const AgentInfo honest = store_.agent_info("a");
  const FileStat stat = Env::posix().stat(root_ / "a.safetensors").value();
  const auto listed = [&](auto change) {
    AgentInfo claimed = honest;
    change(claimed);
    write_all(root_ / "a.json", encode_sidecar(claimed, stat));
    return store_.list_cached_agents().at(0);
  };
  for (const AgentInfo& found : {listed([](AgentInfo& i) { i.cache_size = -1; }), listed([](AgentInfo& i) { i.bytes = INT64_MIN; }),
                                 listed([](AgentInfo& i) { i.bytes = i.tail_bytes - 1; }),
                                 listed([](AgentInfo& i) { i.tail_bytes = INT64_MAX; }),
                                 listed([](AgentInfo& i) { i.bytes = INT64_MAX, i.tail_bytes = -1; })}) {
    EXPECT_EQ(found.cache_size, honest.cache_size);
    EXPECT_EQ(found.bytes, honest.bytes);
    EXPECT_EQ(found.tail_bytes, honest.tail_bytes);
  }
}

TEST_F(StoreTest, SidecarsAreRebuiltWhenMissingEditedOrStale) {
  store_.save_agent_cache("a", make_snapshot(300), "m", {{"k", "v"}});
  const auto path = root_ / "a.json";
  const std::string good = read_all(path);
  auto expect_rebuilt = [&](const std::string& where) {
    const auto agents = store_.list_cached_agents();
    ASSERT_EQ(agents.size(), 1u) << where;
    const auto direct = store_.agent_info("a");
    EXPECT_EQ(agents[0].hash, direct.hash) << where;
    EXPECT_EQ(agents[0].cache_size, direct.cache_size) << where;
    EXPECT_EQ(agents[0].bytes, direct.bytes) << where;
    EXPECT_EQ(agents[0].tail_bytes, direct.tail_bytes) << where;
    EXPECT_EQ(agents[0].segments, direct.segments) << where;
    EXPECT_EQ(agents[0].identity, direct.identity) << where;
    EXPECT_EQ(agents[0].user, direct.user) << where;
    EXPECT_EQ(agents[0].updated_at, direct.updated_at) << where;
  };
  expect_rebuilt("fresh");
  EXPECT_EQ(read_all(path), good);
  fs::remove(path);
  expect_rebuilt("missing");
  EXPECT_EQ(read_all(path), good);
  for (size_t at = 0; at < good.size(); ++at) {
    std::string edited = good;
    edited[at] ^= 1;
    write_all(path, edited);
    expect_rebuilt("byte " + std::to_string(at));
    ASSERT_EQ(read_all(path), good) << at;
  }
  write_all(path, good.substr(0, 40));
  expect_rebuilt("cut");
  store_.save_agent_cache("a", make_snapshot(301), "m", {}, Durability::kNone);
  EXPECT_EQ(read_all(path), good) << "kNone leaves the sidecar behind";
  expect_rebuilt("stale");
  EXPECT_NE(read_all(path), good);
}

TEST_F(StoreTest, ListReadsNoAgentFileWhenSidecarsAreFresh) {
  store_.save_agent_cache("a", make_snapshot(3), "m");
  const auto before = store_.list_cached_agents();
  // Garbage that stat can't see: whoever opened the file would notice.
  const auto path = root_ / "a.safetensors";
  const auto time = fs::last_write_time(path);
  const std::string garbage(fs::file_size(path), 'x');
  { std::fstream(path, std::ios::in | std::ios::out | std::ios::binary) << garbage; }
  fs::last_write_time(path, time);
  const auto after = store_.list_cached_agents();
  ASSERT_EQ(after.size(), 1u);
  EXPECT_EQ(after[0].hash, before[0].hash);
}

TEST_F(StoreTest, DeleteRemovesWhatNoOtherAgentNeeds) {
  store_.save_agent_cache("a", make_snapshot(600), "m");
  store_.save_agent_cache("b", make_snapshot(300), "m");
  store_.delete_agent_cache("a");
  EXPECT_FALSE(store_.contains("a"));
  EXPECT_EQ(count_segments(), 1);
  EXPECT_TRUE(same(store_.load_agent_cache("b").snapshot, make_snapshot(300)));
  store_.delete_agent_cache("b");
  EXPECT_TRUE(tree(root_).empty());
  EXPECT_FALSE(fs::exists(root_ / ".locks/a.lock"));
}

TEST_F(StoreTest, GcKeepsTheLivingAndRemovesTheRest) {
  store_.save_agent_cache("a", make_snapshot(600), "m");
  const auto living = tree(root_);
  store_.save_agent_cache("b", make_snapshot(600, small_layout(), 1, 7000), "m");
  fs::remove(root_ / "b.safetensors");
  write_all(root_ / ".torpor-tmp-1-2", "left over");
  const auto segment = store_.agent_info("a").segments[0];
  write_all(root_ / "segments" / segment.substr(0, 2) / ".torpor-tmp-3-4", "left over");
  write_all(root_ / "notes.json", "{}");
  const auto usage = store_.get_cache_disk_usage();
  EXPECT_EQ(usage.orphan_segments, 2);
  const auto result = store_.gc();
  EXPECT_EQ(result.files_removed, 2 + 1 + 2);  // segments, sidecar, temporary files
  EXPECT_GT(result.bytes_freed, usage.orphan_bytes);
  EXPECT_EQ(read_all(root_ / "notes.json"), "{}") << "not ours to remove";
  fs::remove(root_ / "notes.json");
  EXPECT_EQ(tree(root_), living);
}

TEST_F(StoreTest, RecordsAreKeptUntilTheyExpireAndCountedAndCollected) {
  store_.save_agent_cache("a", make_snapshot(3), "m");
  const int64_t before = store_.get_cache_disk_usage().total_bytes;
  const std::string hash(32, 'a'), bytes("answer\0\n", 8);
  const int64_t now = std::time(nullptr);
  const Record later{"response-" + hash, now + 3600}, expired{"replay-" + hash, now - 1}, lasting{"team-" + hash, 0};
  for (const auto& [record, text] : {std::pair(later, "old"), {expired, "old"}, {lasting, "t"}}) store_.keep_record(record, text);
  store_.keep_record(later, bytes);
  EXPECT_EQ(Store(root_).read_record(later), bytes);
  const std::vector<Record> all = store_.records();
  ASSERT_EQ(all.size(), 3u);
  EXPECT_EQ(all.front().name, expired.name);
  EXPECT_EQ(all.back().expires, later.expires);
  EXPECT_EQ(all.back().bytes, 33 + 8);
  const DiskUsage usage = store_.get_cache_disk_usage();
  EXPECT_EQ(usage.records, 3);
  EXPECT_EQ(usage.record_bytes, 33 + 8 + 33 + 3 + 33 + 1);
  EXPECT_EQ(usage.orphan_bytes, 33 + 3);
  EXPECT_EQ(usage.total_bytes, before + usage.record_bytes);
  // Not the store's.
  for (const std::string& name : {std::string("notes.txt"), "response-" + hash + ".12x", "response-" + hash + ".+12"}) {
    write_all(root_ / "records" / name, "x");
  }
  write_all(root_ / "records" / ".torpor-tmp-1-2", "left over");
  EXPECT_EQ(store_.get_cache_disk_usage().total_bytes, usage.total_bytes + 9);
  EXPECT_EQ(store_.gc(true).files_removed, 2);
  EXPECT_EQ(store_.gc().files_removed, 2);
  EXPECT_EQ(store_.records().size(), 2u);
  EXPECT_TRUE(fs::exists(root_ / "records" / "notes.txt"));
  EXPECT_EQ(code_of([&] { store_.read_record(expired); }), ErrorCode::kNotFound);
  for (const char* name : {"", "-", "../etc", "response", "Response-00000000000000000000000000000000"}) {
    EXPECT_EQ(code_of([&] { store_.keep_record({name, now}, "x"); }), ErrorCode::kInvalidArgument) << name;
  }
}

TEST_F(StoreTest, DamageOfARecordIsFound) {
  const Record record{"team-" + std::string(32, 'a'), 0};
  store_.keep_record(record, "what was kept");
  const fs::path path = root_ / "records" / (record.name + ".0");
  const std::string good = read_all(path);
  for (size_t at = 0; at < good.size(); ++at) {
    std::string bad = good;
    bad[at] = char(bad[at] ^ 1);
    write_all(path, bad);
    EXPECT_EQ(code_of([&] { store_.read_record(record); }), ErrorCode::kCorruption) << at;
    write_all(path, good.substr(0, at));
    EXPECT_EQ(code_of([&] { store_.read_record(record); }), ErrorCode::kCorruption) << at;
  }
  EXPECT_TRUE(store_.drop_record(record));
  EXPECT_FALSE(store_.drop_record(record));
}

TEST_F(StoreTest, RecordsCountAgainstTheDiskLimitsAndExpiredOnesMakeRoom) {
  const int64_t now = std::time(nullptr);
  const auto record = [](char digit, int64_t expires) { return Record{"replay-" + std::string(32, digit), expires}; };
  const std::string bytes(1000, 'x');
  store_.keep_record(record('1', now - 1), bytes);
  store_.set_disk_limits({.budget = store_.get_cache_disk_usage().total_bytes + 500});
  store_.keep_record(record('2', now + 3600), bytes);
  EXPECT_EQ(code_of([&] { store_.read_record(record('1', now - 1)); }), ErrorCode::kNotFound);
  EXPECT_EQ(code_of([&] { store_.keep_record(record('3', now + 3600), bytes); }), ErrorCode::kResourceExhausted);
  EXPECT_EQ(store_.read_record(record('2', now + 3600)), bytes);
}

TEST_F(StoreTest, RecordsGoThroughNoSymbolicLink) {
  const Record record{"team-" + std::string(32, 'a'), 0};
  store_.save_agent_cache("a", make_snapshot(3), "m");
  const fs::path elsewhere = root_.parent_path() / "elsewhere";
  fs::create_directory(elsewhere);
  write_all(elsewhere / (record.name + ".0"), "x");
  fs::create_directory_symlink(elsewhere, root_ / "records");
  EXPECT_TRUE(store_.records().empty());
  EXPECT_FALSE(store_.drop_record(record));
  EXPECT_EQ(code_of([&] { store_.keep_record(record, "y"); }), ErrorCode::kIo);
  EXPECT_EQ(read_all(elsewhere / (record.name + ".0")), "x");
}

TEST_F(StoreTest, AnAwakeAgentHasOneOwner) {
  store_.save_agent_cache("a", make_snapshot(3), "m");
  auto lock = store_.lock_agent("a");
  EXPECT_EQ(code_of([&] { (void)store_.lock_agent("a"); }), ErrorCode::kBusy);
  EXPECT_EQ(code_of([&] { (void)Store(root_).lock_agent("a"); }), ErrorCode::kBusy);
  EXPECT_EQ(code_of([&] { store_.delete_agent_cache("a"); }), ErrorCode::kBusy);
  EXPECT_NO_THROW((void)store_.lock_agent("b"));
  // Readers and the owner's own saves go on.
  EXPECT_NO_THROW(store_.load_agent_cache("a"));
  EXPECT_NO_THROW(store_.save_agent_cache("a", make_snapshot(4), "m"));
  EXPECT_NO_THROW(store_.gc());
  lock.reset();
  EXPECT_NO_THROW((void)store_.lock_agent("a"));
}

TEST_F(StoreTest, ExportAndImportAreInverses) {
  for (int n : {0, 1, 256, 300, 600}) {
    const auto snapshot = make_snapshot(n, small_layout(KvDtype::kBF16, 2, 3, 4));
    const std::string id = "n" + std::to_string(n);
    store_.save_agent_cache(id, snapshot, "m", {{"k", "v"}});
    const auto path = directory_.path() / (id + ".safetensors");
    store_.export_agent(id, path);
    EXPECT_TRUE(fs::exists(directory_.path() / (id + ".json")));
    Store other(directory_.path() / "other");
    other.import_agent(path, id + "-copy");
    const auto loaded = other.load_agent_cache(id + "-copy");
    EXPECT_TRUE(same(loaded.snapshot, snapshot)) << n;
    EXPECT_EQ(loaded.info.model, "m");
    EXPECT_EQ(loaded.info.user.size(), 1u);
    EXPECT_EQ(code_of([&] { other.import_agent(path, id + "-copy"); }), ErrorCode::kInvalidArgument);
    // Back into the store it came from: the segments are there.
    EXPECT_EQ(store_.import_agent(path, id + "-again").segments_written, 0);
  }
}

TEST_F(StoreTest, AnExportHoldsEachLayerInOnePiece) {
  const auto layout = small_layout(KvDtype::kF16, 1, 2, 3);
  const auto snapshot = make_snapshot(300, layout);
  store_.save_agent_cache("a", snapshot, "m");
  const auto path = directory_.path() / "e.safetensors";
  store_.export_agent("a", path);
  // The rows of a tensor do not depend on how they are cut into runs, so one run of 300 gives the expected bytes.
  const auto whole = make_run(layout, 0, 300, 1);
  const std::string file = read_all(path);
  const std::string expected(reinterpret_cast<const char*>(whole.bytes.data()), whole.bytes.size());
  EXPECT_EQ(file.substr(file.size() - 300 * 4 - expected.size(), expected.size()), expected);
}

TEST_F(StoreTest, OnlyIntactExportsAreImported) {
  store_.save_agent_cache("a", make_snapshot(300), "m");
  const auto path = directory_.path() / "e.safetensors";
  store_.export_agent("a", path);
  const std::string good = read_all(path);
  EXPECT_EQ(code_of([&] { store_.import_agent(root_ / "a.safetensors", "b"); }), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of([&] { store_.import_agent(directory_.path() / "none", "b"); }), ErrorCode::kNotFound);
  write_all(directory_.path() / "plain", std::string("\x02\0\0\0\0\0\0\0{}", 10));
  EXPECT_EQ(code_of([&] { store_.import_agent(directory_.path() / "plain", "b"); }), ErrorCode::kInvalidArgument);
  for (size_t at = 0; at < good.size(); at += 7) {
    std::string damaged = good;
    damaged[at] ^= 4;
    write_all(path, damaged);
    const auto code = code_of([&] { store_.import_agent(path, "b"); });
    EXPECT_TRUE(code == ErrorCode::kCorruption || code == ErrorCode::kInvalidArgument) << at;
    EXPECT_FALSE(store_.contains("b"));
  }
  EXPECT_EQ(code_of([&] { store_.export_agent("a", root_ / "b.safetensors"); }), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of([&] { store_.export_agent("a", directory_.path() / "no/such/e.safetensors"); }), ErrorCode::kIo);
}

TEST_F(StoreTest, ManySegmentsNeedFewDescriptors) {
  const auto snapshot = make_snapshot(256 * 70 + 3);
  store_.save_agent_cache("a", snapshot, "m", {}, Durability::kRename);
  EXPECT_TRUE(same(Store(root_).load_agent_cache("a").snapshot, snapshot));
}

TEST_F(StoreTest, DefaultRoot) {
  ::setenv("TORPOR_STORE", "/some/where", 1);
  EXPECT_EQ(default_store_root(), "/some/where");
  ::unsetenv("TORPOR_STORE");
  ::setenv("HOME", "/home/x", 1);
  EXPECT_EQ(default_store_root(), "/home/x/.agent_caches");
}

}  // namespace
}  // namespace torpor::testing
