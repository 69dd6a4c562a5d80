/// Rows of long windows: in files beside the segments, which an agent names as far as its checkpoints' windows see.

#include "fault_env.h"
#include "store/agent_file.h"
#include "store/state_file.h"
#include "store/whole_files.h"
#include "store_fixture.h"

namespace torpor::testing {
namespace {

constexpr int kWindow = 1024;

/// Layer 0 has no window. The rows of layer 1 are kept apart.
KvLayout apart_layout(int dim = 4) {
  KvLayout layout = small_layout(KvDtype::kF16, 2, 2, dim);
  for (KvTensorSpec& tensor : layout.tensors) {
    if (tensor.window == 0) continue;
    tensor.window = kWindow;
    tensor.apart = true;
  }
  return layout;
}

const KvLayout kApart = apart_layout();

/// Equal where the next token attends, or the last one.
::testing::AssertionResult same_seen(const KvSnapshot& a, const KvSnapshot& b) {
  if (a.tokens != b.tokens || a.n_runs() != b.n_runs() || a.layout != b.layout) {
    return ::testing::AssertionFailure() << "other tokens: " << a.tokens.size() << ", " << b.tokens.size();
  }
  for (size_t i = 0; i < a.n_runs(); ++i) {
    const int n = a.run_tokens(i);
    for (size_t t = 0; t < a.layout.tensors.size(); ++t) {
      const auto length = int64_t(a.tokens.size());
      if (!KvLayout::attended(a.layout.tensors[t], int64_t(i) * kSegmentTokens, n, length)) continue;
      const size_t begin = a.layout.offset(t, n), size = a.layout.offset(t + 1, n) - begin;
      if (a.run_bytes(i).size() < begin + size || b.run_bytes(i).size() < begin + size ||
          !std::ranges::equal(a.run_bytes(i).subspan(begin, size), b.run_bytes(i).subspan(begin, size))) {
        return ::testing::AssertionFailure() << "run " << i << " tensor " << t << " differs";
      }
    }
  }
  return ::testing::AssertionSuccess();
}

/// The greatest m <= n from which every window sees only runs that have files, or the tail of `length` tokens.
int64_t resumable(const std::vector<StateRef>& files, int64_t length, int64_t n) {
  for (int64_t m = n;; --m) {
    bool all = true;
    for (int64_t run = 0; run * kSegmentTokens < m && all; ++run) {
      const int64_t end = (run + 1) * kSegmentTokens;
      if (end > length || end <= m - kWindow) continue;
      all = std::ranges::find(files, end, &StateRef::position) != files.end();
    }
    if (all) return m;
  }
}

class StoreWindows : public ::testing::Test {
 protected:
  /// The first `n` tokens of the agents below. They are to be kept for going on from these numbers of tokens, too.
  static KvSnapshot make(int n, const std::vector<int64_t>& checkpoints = {}) {
    KvSnapshot snapshot = make_snapshot(n, kApart);
    if (!checkpoints.empty()) snapshot.state_layout = window_rows(kApart);
    for (size_t i = 0; i < snapshot.sealed.size(); ++i) {
      const auto sees = [&](int64_t position) { return sees_window_rows(kApart, int64_t(i), position); };
      if (std::ranges::any_of(checkpoints, sees)) snapshot.states.push_back(snapshot.window_rows_of(i));
    }
    return snapshot;
  }
  fs::path path_of(const std::string& file) const {
    return root_ / "states" / file.substr(0, 2) / (file + ".safetensors");
  }
  static std::vector<int64_t> positions_of(const std::vector<StateRef>& files) {
    std::vector<int64_t> positions;
    for (const StateRef& file : files) positions.push_back(file.position);
    return positions;
  }
  static std::set<std::string> window_files(const fs::path& root) {
    std::set<std::string> files;
    for (const auto& [name, bytes] : tree(root)) {
      if (name.starts_with("states/")) files.insert(name);
    }
    return files;
  }

  TemporaryDirectory directory_{TemporaryDirectory::in_memory()};
  fs::path root_ = directory_.path() / "store";
  Store store_{root_};
};

TEST_F(StoreWindows, AnAgentComesBackWithAllRowsThatItsWindowsSee) {
  for (const int n : {1, 255, 256, 257, 1024, 1279, 1280, 1300, 2560}) {
    const KvSnapshot whole = make(n);
    const SaveResult saved = store_.save_agent_cache("a", whole, "m");
    std::vector<int64_t> seen;
    for (int64_t end = kSegmentTokens; end <= n; end += kSegmentTokens) {
      if (end > n - kWindow) seen.push_back(end);
    }
    EXPECT_EQ(positions_of(saved.states), seen) << n;
    CollectingSink sink;
    EXPECT_EQ(Store(root_).load_into("a", sink).snapshot.n_runs(), 0u);
    EXPECT_TRUE(same_seen(sink.snapshot, whole)) << n;
    for (const bool map : {false, true}) {
      for (const bool in_run : {false, true}) {
        const LoadOptions options{.map_rows = map, .window_rows_only = map, .tail_in_run = in_run};
        LoadedAgent loaded = Store(root_).load_agent_cache("a", options);
        EXPECT_TRUE(same_seen(in_run ? packed(loaded.snapshot) : loaded.snapshot, whole)) << n;
        EXPECT_NO_THROW(loaded.snapshot.validate()) << n;
        EXPECT_FALSE(loaded.damage);
        // Saved again, by who has read it, it is what it was.
        Store again(root_);
        loaded = again.load_agent_cache("a", options);
        const SaveResult second = again.save_agent_cache("a", loaded.snapshot, "m", {}, Durability::kFull,
                                                         {{}, {}, loaded.info.states.value()});
        EXPECT_EQ(second.states, saved.states);
        EXPECT_EQ(second.segments, saved.segments);
        EXPECT_EQ(second.states_written + second.segments_written, 0);
      }
    }
    EXPECT_TRUE(store_.verify("a")[0].problems.empty()) << n;
    EXPECT_EQ(store_.verify("a")[0].intact_tokens, n);
    // Each file is what its path says, for who keeps copies elsewhere.
    const WholeFiles files(store_);
    for (const std::string& path : check_agent_file(as_bytes_of(files.agent_file("a")), "a").files) {
      EXPECT_NO_THROW(files.read(path)) << path;
    }
  }
}

TEST_F(StoreWindows, ASegmentHoldsTheOtherTensorsAndALongPrefillWritesWhatItsEndSees) {
  const KvLayout apart = apart_layout(64);
  KvLayout together = apart;
  for (KvTensorSpec& tensor : together.tensors) tensor.apart = false;
  std::optional<Store> store(root_);
  const SaveResult less = store->save_agent_cache("a", make_snapshot(8192, apart), "m");
  const SaveResult all = store->save_agent_cache("b", make_snapshot(8192, together), "m");
  const int64_t row = int64_t(apart.bytes_per_token()) / 2;
  EXPECT_EQ(less.states_written, kWindow / kSegmentTokens);
  EXPECT_NEAR(double(less.bytes_written), double(row * (8192 + kWindow) + 8192 * 4), 200'000);
  EXPECT_NEAR(double(all.bytes_written), double(row * 8192 * 2 + 8192 * 4), 200'000);
  // A turn that seals a run writes no more than before, but for a header.
  std::vector<StateRef> kept = less.states;
  std::erase_if(kept, [](const StateRef& file) { return file.position <= 8500 - kWindow; });
  const KvSnapshot turn = make_snapshot(8500, apart);
  const SaveResult later = store->save_agent_cache("a", turn, "m", {}, Durability::kFull, {{}, {}, kept});
  EXPECT_EQ(later.states_written, 1);
  EXPECT_EQ(later.segments_written, 1);
  EXPECT_EQ(positions_of(later.states), (std::vector<int64_t>{7680, 7936, 8192, 8448}));
  store.reset();
  EXPECT_EQ(window_files(root_).size(), 4u) << "what is named no longer goes with the store at the latest";
  const AgentInfo info = store_.agent_info("a");
  EXPECT_EQ(info.window, kWindow);
  EXPECT_EQ(info.state_bytes, store_.get_cache_disk_usage().state_bytes);
}

TEST_F(StoreWindows, CutsGoOnFromTheLastTokenWhoseWindowsFindAllTheirRows) {
  const SaveResult saved = store_.save_agent_cache("a", make(4000, {700, 1300}), "m");
  EXPECT_EQ(positions_of(saved.states),
            (std::vector<int64_t>{256, 512, 768, 1024, 1280, 1536, 3072, 3328, 3584, 3840}));
  const AgentInfo info = store_.agent_info("a");
  for (const int n : {0, 1, 255, 256, 257, 700, 1279, 1280, 1300, 1535, 1536, 2303, 2304, 2305, 2700, 3000, 3071, 3839,
                      3840, 3841, 3999, 4000}) {
    const int64_t at = resumable(saved.states, 3840, n);
    EXPECT_EQ(resumable_tokens(info, n), at) << n;
    const LoadOptions to_wake{.map_rows = true, .n_tokens = n, .window_rows_only = true};
    const LoadedAgent loaded = Store(root_).load_agent_cache("a", to_wake);
    EXPECT_TRUE(same_seen(loaded.snapshot, make(int(at)))) << n;
    EXPECT_EQ(loaded.tokens.size(), size_t(n)) << "all ids, to compute the rest again";
    EXPECT_FALSE(loaded.damage);
    const std::string id = "cut-" + std::to_string(n);
    const SaveResult copied = store_.copy_agent_cache("a", id, {.n_tokens = n});
    EXPECT_EQ(copied.states_written + copied.segments_written, 0);
    for (const AgentInfo& copy : {store_.agent_info(id), Store(root_).agent_info(id)}) {
      EXPECT_EQ(copy.cache_size, n);
      EXPECT_EQ(resumable_tokens(copy, n), at) << n;
    }
    fs::remove(root_ / (id + ".json"));
    EXPECT_EQ(resumable_tokens(Store(root_).agent_info(id), n), at) << n << ", without its sidecar";
    const LoadedAgent cut = Store(root_).load_agent_cache(id);
    EXPECT_TRUE(same_seen(cut.snapshot, make(int(at)))) << n;
    EXPECT_EQ(cut.tokens.size(), size_t(n));
    EXPECT_TRUE(store_.verify(id)[0].problems.empty()) << n;
  }
  // A cut whose tail lacks rows says so, however often it is cut or renamed.
  store_.copy_agent_cache("cut-2305", "x", {.n_tokens = 2304});
  EXPECT_FALSE(store_.agent_info("x").bare_tail);
  store_.copy_agent_cache("cut-2700", "y", {.n_tokens = 2690});
  EXPECT_TRUE(store_.agent_info("y").bare_tail);
  EXPECT_EQ(resumable_tokens(store_.agent_info("y"), 2690), resumable(saved.states, 3840, 2690));
  // Once its rows are computed again it is an agent like any other.
  store_.save_agent_cache("y", make(2690), "m");
  EXPECT_FALSE(store_.agent_info("y").bare_tail);
  EXPECT_TRUE(same_seen(store_.load_agent_cache("y").snapshot, make(2690)));
}

TEST_F(StoreWindows, ATailWithoutItsRowsIsNotGoneOnFromInTheFirstSegmentEither) {
  const SaveResult saved = store_.save_agent_cache("a", make(4000), "m");
  store_.copy_agent_cache("a", "b", {.n_tokens = 100});
  EXPECT_EQ(resumable_tokens(store_.agent_info("b"), 100), 0);
  const LoadedAgent loaded = store_.load_agent_cache("b");
  EXPECT_TRUE(loaded.snapshot.tokens.empty());
  EXPECT_EQ(loaded.tokens.size(), 100u);
}

TEST_F(StoreWindows, EveryDamageIsFoundAndCostsTheTokensBehindTheLastPlaceToGoOnFrom) {
  const SaveResult saved = store_.save_agent_cache("a", make(2600, {700}), "m");
  const size_t step = 197 * every();
  for (const StateRef& ref : saved.states) {
    const bool needed = ref.position > 2600 - kWindow;
    const std::string good = read_all(path_of(ref.file));
    std::vector<StateRef> others = saved.states;
    std::erase(others, ref);
    for (size_t at = 0; at < good.size() + 1; at += step) {
      std::string bad = good;
      at < good.size() ? void(bad[at] = char(bad[at] ^ 4)) : bad.resize(good.size() / 2);
      write_all(path_of(ref.file), bad);
      const auto load = [&](bool salvage) {
        return Store(root_).load_agent_cache("a", {.salvage = salvage, .map_rows = true, .window_rows_only = true});
      };
      if (!needed) {
        EXPECT_FALSE(load(false).damage);
        continue;
      }
      const auto code = code_of([&] { load(false); });
      EXPECT_TRUE(code == ErrorCode::kCorruption || code == ErrorCode::kIncompatible) << ref.position << " at " << at;
      const LoadedAgent loaded = load(true);
      EXPECT_TRUE(loaded.damage);
      EXPECT_TRUE(same_seen(loaded.snapshot, make(int(resumable(others, 2560, 2600))))) << ref.position;
      EXPECT_EQ(loaded.tokens.size(), 2600u);
    }
    EXPECT_EQ(store_.verify("a")[0].problems.size(), 1u) << ref.position;
    if (needed) {
      EXPECT_EQ(store_.verify("a")[0].intact_tokens, resumable(others, 2560, 2600));
      // Who has the rows writes the file again.
      Store(root_).save_agent_cache("a", make(2600, {700}), "m");
      EXPECT_TRUE(Store(root_).verify("a")[0].problems.empty());
    }
    write_all(path_of(ref.file), good);
    fs::remove(path_of(ref.file));
    EXPECT_EQ(store_.verify("a")[0].problems.size(), 1u);
    write_all(path_of(ref.file), good);
  }
}

TEST_F(StoreWindows, APrefixEndsWhereItsWindowsFindAllTheirRows) {
  const KvSnapshot whole = make(4000, {1300});
  store_.save_agent_cache("a", whole, "m");
  const StatesSought any;
  const auto find = [&](int n, const StatesSought* sought) {
    return store_.find_prefix(whole.identity, whole.lineage, kApart, std::span(whole.tokens).first(size_t(n)), sought);
  };
  EXPECT_EQ(find(4000, nullptr), 3840) << "rows that are known";
  for (const auto& [n, at] :
       {std::pair(4000, 3840), {3839, 1536}, {2100, 1536}, {1535, 1280}, {1300, 1280}, {256, 0}}) {
    EXPECT_EQ(find(n, &any), at) << n;
    LoadOptions options{.map_rows = true, .window_rows_only = true, .states = &any};
    const LoadedPrefix loaded = Store(root_).load_prefix(whole.identity, whole.lineage, kApart,
                                                         std::span(whole.tokens).first(size_t(n)), options);
    EXPECT_TRUE(same_seen(loaded.snapshot, make(at))) << n;
    // Who goes on there names the files that it has read.
    KvSnapshot next = loaded.snapshot;
    const SaveResult saved = store_.save_agent_cache("b", next, "m", {}, Durability::kFull, {{}, {}, loaded.windows});
    EXPECT_EQ(saved.states_written, 0);
    EXPECT_EQ(saved.states, loaded.windows);
  }
  // A prefix of nobody's.
  Store other(directory_.path() / "other");
  other.save_prefix(make(2600, {700}));
  EXPECT_EQ(other.find_prefix(whole.identity, whole.lineage, kApart, whole.tokens, &any), 2560);
  EXPECT_EQ(window_files(directory_.path() / "other").size(), 7u);
}

TEST_F(StoreWindows, AnExportHoldsWhatItsEndSeesAndComesBack) {
  store_.save_agent_cache("a", make(2600, {700}), "m");
  const fs::path file = directory_.path() / "exported.safetensors";
  store_.export_agent("a", file);
  Store other(directory_.path() / "other");
  const SaveResult imported = other.import_agent(file, "b");
  EXPECT_EQ(positions_of(imported.states), (std::vector<int64_t>{1792, 2048, 2304, 2560}));
  EXPECT_TRUE(same_seen(other.load_agent_cache("b").snapshot, make(2600)));
}

TEST_F(StoreWindows, LayoutsThatCannotBeAreRefused) {
  KvSnapshot unordered = make(10);
  std::swap(unordered.layout.tensors[0], unordered.layout.tensors[2]);
  KvSnapshot endless = make(10);
  endless.layout.tensors[3].window = 0;
  KvSnapshot all = make(10);
  for (KvTensorSpec& tensor : all.layout.tensors) tensor.apart = true, tensor.window = kWindow;
  const KvSnapshot wide = make_snapshot(10, [] {
    KvLayout layout = kApart;
    layout.tensors[3].dim = 4 * 140;
    return layout;
  }());
  for (const KvSnapshot& bad : {unordered, endless, all, wide}) {
    EXPECT_EQ(code_of([&] { store_.save_agent_cache("a", bad, "m"); }), ErrorCode::kInvalidArgument);
  }
  EXPECT_EQ(code_of([&] { Scattered(make(300)).save(store_, "a"); }), ErrorCode::kInvalidArgument);
}

TEST_F(StoreWindows, AfterAFaultOrAPowerCutTheAgentIsAsBeforeOrAfterTheSave) {
  const fs::path source = directory_.path() / "source";
  const SaveResult saved = Store(source).save_agent_cache("a", make(1100), "m");
  const KvSnapshot before = make(1100), after = make(1300);
  const AgentNotes notes{{}, {}, saved.states};
  int counter = 0;
  for (const int lost : {-1, int(Lost::kNothing), int(Lost::kAll)}) {
    int k = 1;
    for (bool triggered = true; triggered; k += int(every())) {
      ASSERT_LT(k, 1000);
      const fs::path root = directory_.path() / ("s" + std::to_string(counter++)), attic = root.string() + "-attic";
      fs::copy(source, root, fs::copy_options::recursive);
      const std::string where = "call " + std::to_string(k) + ", lost " + std::to_string(lost);
      FaultEnv env(root, attic);
      std::optional<ErrorCode> code;
      {
        Store store(root, &env);
        lost < 0 ? env.fail_at(k, EIO, false, Calls::kAll) : env.fail_at(k, EIO, true);
        code = code_of([&] { store.save_agent_cache("a", after, "m", {}, Durability::kFull, notes); });
      }
      triggered = env.triggered();  // by what the store does at its end, too
      if (lost >= 0) env.lose(Lost(lost));
      std::optional<LoadedAgent> loaded;
      ASSERT_NO_THROW(loaded = Store(root).load_agent_cache("a")) << where;
      EXPECT_TRUE(same_seen(loaded->snapshot, after) || (code && same_seen(loaded->snapshot, before))) << where;
      fs::remove_all(root), fs::remove_all(attic);
    }
    EXPECT_GT(k, 4);
  }
}

}  // namespace
}  // namespace torpor::testing
