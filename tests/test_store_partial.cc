/// Loads of a part: the first tokens, the rows that windows still see, and rows that this process holds already.

#include "counting_env.h"
#include "store/known.h"
#include "store_fixture.h"

namespace torpor::testing {
namespace {

/// Layer 1 has a window of 300 tokens, layer 0 none.
KvLayout windowed_layout() {
  KvLayout layout = small_layout(KvDtype::kF16, 2, 2, 8);
  layout.tensors[2].window = layout.tensors[3].window = 300;
  return layout;
}

/// `whole` as if it had been rewound: rows are functions of their place, so they are made again.
KvSnapshot first_tokens(int n, const KvLayout& layout) { return make_snapshot(n, layout); }

/// Equal in every byte that can still be attended.
::testing::AssertionResult same_attended(const KvSnapshot& a, const KvSnapshot& b) {
  if (a.tokens != b.tokens || a.n_runs() != b.n_runs()) return ::testing::AssertionFailure() << "other tokens";
  for (size_t i = 0; i < a.n_runs(); ++i) {
    const int n = a.run_tokens(i);
    if (b.run_tokens(i) != n) return ::testing::AssertionFailure() << "run " << i << " has another length";
    for (size_t t = 0; t < a.layout.tensors.size(); ++t) {
      if (!KvLayout::attended(a.layout.tensors[t], int64_t(i) * kSegmentTokens, n, int64_t(a.tokens.size()))) continue;
      const size_t begin = a.layout.offset(t, n), end = a.layout.offset(t + 1, n);
      if (std::memcmp(a.run_bytes(i).data() + begin, b.run_bytes(i).data() + begin, end - begin) != 0) {
        return ::testing::AssertionFailure() << "run " << i << " tensor " << t << " differs";
      }
    }
  }
  return ::testing::AssertionSuccess();
}

class StorePartial : public ::testing::Test {
 protected:
  StorePartial() { Store(root_).save_agent_cache("a", make_snapshot(1300, layout_), "m", {}, Durability::kRename); }
  fs::path segment_path(const std::string& name) const {
    return root_ / "segments" / name.substr(0, 2) / (name + ".safetensors");
  }
  /// Flips a byte of tensor `t` of segment `i`, in place, and of nothing that `stat` shows.
  void damage(int i, size_t t) {
    const auto path = segment_path(Store(root_).agent_info("a").segments[size_t(i)]);
    const auto time = fs::last_write_time(path);
    const size_t data = fs::file_size(path) - layout_.offset(layout_.tensors.size(), 256) - 256 * 4;
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    const auto at = std::streamoff(data + layout_.offset(t, 256) + 5);
    file.seekg(at);
    const char byte = char(file.get() ^ 1);
    file.seekp(at);
    file.put(byte);
    file.close();
    fs::last_write_time(path, time);
  }

  TemporaryDirectory directory_;
  fs::path root_ = directory_.path() / "store";
  KvLayout layout_ = windowed_layout();
};

TEST_F(StorePartial, AnyNumberOfFirstTokens) {
  for (const bool map : {false, true}) {
    for (const bool window : {false, true}) {
      for (int n : {0, 1, 255, 256, 257, 300, 511, 512, 513, 600, 1279, 1280, 1281, 1299, 1300}) {
        const auto loaded = Store(root_).load_agent_cache("a", {.map_rows = map, .n_tokens = n, .window_rows_only = window});
        EXPECT_NO_THROW(loaded.snapshot.validate()) << n;
        EXPECT_EQ(loaded.tokens, loaded.snapshot.tokens);
        const auto expected = first_tokens(n, layout_);
        if (window) {
          EXPECT_TRUE(same_attended(loaded.snapshot, expected)) << n << " mapped " << map;
        } else {
          EXPECT_TRUE(same(loaded.snapshot, expected)) << n << " mapped " << map;
        }
        for (const auto& run : loaded.snapshot.sealed) EXPECT_EQ(run->mapped(), map) << n;
        EXPECT_EQ(loaded.info.bytes, Store(root_).agent_info("a").bytes);
        const auto to_wake = Store(root_).load_agent_cache("a", {.map_rows = map, .n_tokens = n, .window_rows_only = window, .tail_in_run = true});
        EXPECT_TRUE(same_attended(packed(to_wake.snapshot), expected)) << n << " mapped " << map;
      }
    }
  }
  EXPECT_EQ(Store(root_).load_agent_cache("a", {.n_tokens = 5000}).tokens.size(), 1300u);
  EXPECT_EQ(code_of([&] { Store(root_).load_agent_cache("a", {.n_tokens = -1}); }), ErrorCode::kInvalidArgument);
}

TEST_F(StorePartial, OnlyWhatIsNeededIsRead) {
  const auto info = Store(root_).agent_info("a");
  CountingEnv env;
  const auto whole = Store(root_, &env).load_agent_cache("a", {});
  EXPECT_EQ(whole.bytes_read, info.bytes);
  EXPECT_GE(env.bytes_read, info.bytes);
  env.reset();
  // 1,300 tokens, a window of 300: of five segments the last two hold rows that layer 1 still sees.
  const auto window = Store(root_, &env).load_agent_cache("a", {.window_rows_only = true});
  const int64_t unseen = 3 * int64_t(layout_.offset(4, 256) - layout_.offset(2, 256));
  EXPECT_EQ(window.bytes_read, info.bytes - unseen);
  EXPECT_EQ(Store(root_).load_agent_cache("a", {.map_rows = true, .window_rows_only = true}).bytes_read, window.bytes_read);
  env.reset();
  Store(root_, &env).load_agent_cache("a", {.n_tokens = 300});
  EXPECT_EQ(env.opened_segments(), 2);
}

TEST_F(StorePartial, DamageOutsideTheWindowIsNotLookedFor) {
  damage(0, 2);
  EXPECT_TRUE(same_attended(Store(root_).load_agent_cache("a", {.window_rows_only = true}).snapshot, make_snapshot(1300, layout_)));
  for (const bool map : {false, true}) {
    EXPECT_EQ(code_of([&] { Store(root_).load_agent_cache("a", {.map_rows = map}); }), ErrorCode::kCorruption);
    EXPECT_EQ(code_of([&] { Store(root_).load_agent_cache("a", {.map_rows = map, .n_tokens = 300, .window_rows_only = true}); }),
              ErrorCode::kCorruption);
  }
}

TEST_F(StorePartial, ASalvagedPrefixHasTheRowsOfItsOwnWindow) {
  damage(4, 0);
  damage(0, 2);
  for (const bool map : {false, true}) {
    // Without segment 4 the window begins in segment 2, whose rows of layer 1 were not wanted at first.
    const auto loaded = Store(root_).load_agent_cache("a", {.salvage = true, .map_rows = map, .window_rows_only = true});
    EXPECT_EQ(loaded.snapshot.tokens.size(), 1024u);
    EXPECT_TRUE(same_attended(loaded.snapshot, first_tokens(1024, layout_)));
  }
}

TEST_F(StorePartial, RowsThatAreHeldAreSharedAndNotRead) {
  CountingEnv env;
  Store store(root_, &env);
  const auto saved = make_snapshot(1300, layout_);
  store.save_agent_cache("b", saved, "m", {}, Durability::kRename);
  for (const bool map : {false, true}) {
    env.reset();
    const auto loaded = store.load_agent_cache("a", {.map_rows = map});
    for (int i = 0; i < 5; ++i) EXPECT_EQ(loaded.snapshot.sealed[i], saved.sealed[i]);
    EXPECT_TRUE(same(loaded.snapshot, saved));
    EXPECT_EQ(env.opens, 1) << "the agent file";
    EXPECT_EQ(loaded.bytes_read, Store(root_).agent_info("a").tail_bytes);
  }
  // Mapped rows serve only those who asked for a mapping.
  Store other(root_, &env);
  const auto mapped = other.load_agent_cache("a", {.map_rows = true});
  env.reset();
  const auto again = other.load_agent_cache("a", {.map_rows = true});
  EXPECT_EQ(again.snapshot.sealed[0], mapped.snapshot.sealed[0]);
  EXPECT_EQ(env.maps, 1) << "the tail alone";
  EXPECT_FALSE(other.load_agent_cache("a", {}).snapshot.sealed[0]->mapped());
}

TEST_F(StorePartial, NobodyElsesRowsAreTakenForTheFiles) {
  Store store(root_);
  auto held = std::optional(store.load_agent_cache("a", {.map_rows = true}));
  const auto* before = held->snapshot.sealed[0]->bytes().data();
  // Replaced by another process: same rows, another file.
  const auto path = segment_path(held->info.segments[0]);
  fs::copy(path, directory_.path() / "copy");
  fs::rename(directory_.path() / "copy", path);
  EXPECT_NE(store.load_agent_cache("a", {.map_rows = true}).snapshot.sealed[0]->bytes().data(), before);
  // Rows that no one holds any more are read again.
  held.reset();
  damage(1, 0);
  EXPECT_EQ(code_of([&] { store.load_agent_cache("a", {.map_rows = true}); }), ErrorCode::kCorruption);
}

TEST_F(StorePartial, APartlyCheckedSegmentIsNotTakenForAWholeOne) {
  for (const bool map : {false, true}) {
    Store store(root_);
    const auto part = store.load_agent_cache("a", {.map_rows = map, .window_rows_only = true});
    EXPECT_TRUE(same(store.load_agent_cache("a", {.map_rows = map}).snapshot, make_snapshot(1300, layout_)));
    EXPECT_TRUE(same_attended(store.load_agent_cache("a", {.map_rows = map, .n_tokens = 400, .window_rows_only = true}).snapshot,
                              first_tokens(400, layout_)));
  }
  damage(0, 2);
  Store store(root_);
  const auto part = store.load_agent_cache("a", {.map_rows = true, .window_rows_only = true});
  EXPECT_EQ(code_of([&] { store.load_agent_cache("a", {.map_rows = true}); }), ErrorCode::kCorruption);
  // Someone with good rows in hand does not build on it either: it is written again.
  EXPECT_EQ(store.save_agent_cache("b", make_snapshot(300, layout_), "m").segments_written, 1);
}

TEST_F(StorePartial, NothingIsMappedFromANetwork) {
  CountingEnv env;
  env.remote = true;
  Store store(root_, &env);
  const auto loaded = store.load_agent_cache("a", {.map_rows = true});
  EXPECT_TRUE(same(loaded.snapshot, make_snapshot(1300, layout_)));
  for (const auto& run : loaded.snapshot.sealed) EXPECT_FALSE(run->mapped());
  EXPECT_EQ(store.map_segment(store.agent_info("a").segments[0]), nullptr);
  EXPECT_EQ(env.maps, 0);
}

TEST(KnownSegmentsTest, NamesOfRunsThatNobodyHoldsAreForgotten) {
  KnownSegments known;
  std::vector<std::shared_ptr<const SealedRun>> held;
  for (int i = 0; i < 20'000; ++i) {
    const auto run = std::make_shared<const SealedRun>(std::span<const std::byte>(), nullptr);
    run->set_segment({std::to_string(i), "", "content"});
    known.add_run(run);
    if (i % 1000 == 0) held.push_back(run);
  }
  EXPECT_LE(known.n_runs(), 1024u);
  for (const auto& run : held) EXPECT_EQ(known.run(run->segment()->name), run);
  EXPECT_EQ(known.run("1"), nullptr);
}

TEST_F(StorePartial, ASaveKnowsByTheRunItselfThatItsRowsAreOnDisk) {
  CountingEnv env;
  Store store(root_, &env);
  const auto snapshot = make_snapshot(1300, layout_, /*seed=*/3, /*first_token=*/500);
  const auto first = store.save_agent_cache("b", snapshot, "m", {}, Durability::kRename);
  for (size_t i = 0; i < 5; ++i) EXPECT_EQ(snapshot.sealed[i]->segment()->name, first.segments[i]);
  // Whoever shares the runs, longer or shorter.
  KvSnapshot shorter = snapshot;
  shorter.tokens.resize(512);
  shorter.sealed.resize(2);
  shorter.tail = {};
  // No row is read: not even those in memory, which may be pages on disk.
  for (const auto& run : snapshot.sealed) const_cast<std::byte&>(run->bytes()[0]) ^= std::byte{1};
  env.reset();
  EXPECT_EQ(store.save_agent_cache("c", shorter, "m", {}, Durability::kRename).segments_shared, 2);
  EXPECT_EQ(store.save_agent_cache("d", snapshot, "m", {}, Durability::kRename).segments, first.segments);
  EXPECT_EQ(env.opened_segments(), 0);
  EXPECT_TRUE(same(Store(root_).load_agent_cache("d").snapshot, make_snapshot(1300, layout_, 3, 500)));
}

TEST_F(StorePartial, SavingWhatWasLoadedInPartReadsNoRow) {
  CountingEnv env;
  Store store(root_, &env);
  auto part = store.load_agent_cache("a", {.map_rows = true, .window_rows_only = true});
  env.reset();
  const auto result = store.save_agent_cache("b", part.snapshot, "m", {}, Durability::kRename);
  EXPECT_EQ(result.segments_shared, 5);
  EXPECT_EQ(result.segments, part.info.segments);
  EXPECT_EQ(env.opened_segments(), 0);
  EXPECT_TRUE(same(Store(root_).load_agent_cache("b").snapshot, make_snapshot(1300, layout_)));
}

TEST_F(StorePartial, MappedRowsThatTheSystemLetGoOfAreCheckedAgain) {
  CountingEnv env;
  Store store(root_, &env);
  const auto loaded = store.load_agent_cache("a", {.map_rows = true});
  const auto& runs = loaded.snapshot.sealed;
  const TensorMask first_layer = {true, true, false, false};
  damage(1, 2);
  env.reset();
  for (const auto& run : runs) EXPECT_FALSE(store.recheck(layout_, *run));
  EXPECT_EQ(env.opens, 0) << "all of them are in memory";
  env.in_memory = false;
  EXPECT_TRUE(store.recheck(layout_, *runs[0]));
  EXPECT_TRUE(store.recheck(layout_, *runs[1], first_layer)) << "the damage is behind a window";
  std::string message;
  EXPECT_EQ(code_of([&] { store.recheck(layout_, *runs[1]); }, &message), ErrorCode::kCorruption);
  EXPECT_NE(message.find(loaded.info.segments[1]), std::string::npos);
  // A disk that fails is an error too. Rows in memory of the process's own have nothing to fear.
  env.can_read = false;
  EXPECT_EQ(code_of([&] { store.recheck(layout_, *runs[2]); }), ErrorCode::kIo);
  EXPECT_FALSE(store.recheck(layout_, *make_snapshot(256, layout_).sealed[0]));
  env.can_read = env.in_memory = true;
  // Nobody shares those rows any more, and who has good ones writes them.
  EXPECT_EQ(store.load_agent_cache("a", {.salvage = true, .map_rows = true}).snapshot.tokens.size(), 256u);
  EXPECT_EQ(store.save_agent_cache("b", make_snapshot(1300, layout_), "m").segments_written, 1);
  EXPECT_TRUE(same(Store(root_).load_agent_cache("a").snapshot, make_snapshot(1300, layout_)));
}

TEST_F(StorePartial, ALoadSharesNoRowsThatWereDamagedSince) {
  for (const bool removed : {false, true}) {
    CountingEnv env;
    Store store(root_, &env);
    store.save_agent_cache("a", make_snapshot(1300, layout_), "m");
    const auto held = store.load_agent_cache("a", {.map_rows = true});
    damage(1, 0);
    env.in_memory = false;
    if (removed) {
      // The mapping is all that is left of the file.
      fs::remove(segment_path(held.info.segments[1]));
      EXPECT_EQ(code_of([&] { store.recheck(layout_, *held.snapshot.sealed[1]); }), ErrorCode::kCorruption);
    }
    EXPECT_EQ(code_of([&] { store.load_agent_cache("a", {.map_rows = true}); }), ErrorCode::kCorruption);
    const auto salvaged = store.load_agent_cache("a", {.salvage = true, .map_rows = true});
    EXPECT_TRUE(same(salvaged.snapshot, make_snapshot(256, layout_)));
    EXPECT_EQ(salvaged.snapshot.sealed[0], held.snapshot.sealed[0]);
  }
}

TEST_F(StorePartial, UncheckedRowsAreNeverWrittenAsIfTheyWereGood) {
  // The rows that no one looked at are damaged, and the file is gone when the agent is saved.
  damage(0, 2);
  Store store(root_);
  auto part = store.load_agent_cache("a", {.map_rows = true, .window_rows_only = true});
  fs::remove(segment_path(part.info.segments[0]));
  EXPECT_EQ(code_of([&] { store.save_agent_cache("b", part.snapshot, "m"); }), ErrorCode::kCorruption);
  EXPECT_FALSE(store.contains("b"));
  // Undamaged ones are, whoever removed the file.
  part = store.load_agent_cache("a", {.salvage = true, .map_rows = true});
  EXPECT_TRUE(part.snapshot.tokens.empty());
}

}  // namespace
}  // namespace torpor::testing
