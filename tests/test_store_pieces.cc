/// Saves of rows that lie apart in memory the caller goes on writing to, and loads into memory that the caller lays out.

#include "counting_env.h"
#include "store_fixture.h"

namespace torpor::testing {
namespace {

class StorePieces : public ::testing::Test {
 protected:
  fs::path segment_path(const std::string& name) const {
    return root_ / "segments" / name.substr(0, 2) / (name + ".safetensors");
  }
  KvSnapshot load(const std::string& id) { return Store(root_).load_agent_cache(id).snapshot; }
  SaveResult save(const std::string& id, const KvSnapshot& snapshot) { return store_.save_agent_cache(id, snapshot, "m"); }
  SaveResult save(const std::string& id, const Scattered& apart) { return apart.save(store_, id); }
  /// `n` tokens in pieces, with the names that an earlier save gave.
  Scattered hinted(int n, const SaveResult& earlier) {
    Scattered apart(make_snapshot(n, layout_));
    for (size_t i = 0; i < earlier.segments.size(); ++i) apart.rows.runs[i].segment = earlier.segments[i];
    return apart;
  }
  static void flip(std::span<const std::byte> piece) { const_cast<std::byte&>(piece[0]) ^= std::byte{1}; }

  TemporaryDirectory directory_;
  fs::path root_ = directory_.path() / "store";
  KvLayout layout_ = small_layout(KvDtype::kF16, 2, 2, 8);
  CountingEnv env_;
  Store store_{root_, &env_};
};

TEST_F(StorePieces, TheSameFilesAsFromOneBuffer) {
  const auto whole = make_snapshot(700, layout_);
  Store(directory_.path() / "other").save_agent_cache("a", whole, "m");
  for (const size_t piece : {1, 2, 300, 4096, 16384, 1 << 20}) {
    Store store(root_);
    const auto result = Scattered(whole, piece).save(store, "a");
    EXPECT_EQ(result.segments_written, 2);
    EXPECT_TRUE(same(load("a"), whole)) << piece;
    for (const auto& name : result.segments) {
      EXPECT_EQ(read_all(segment_path(name)), read_all(directory_.path() / "other" / fs::relative(segment_path(name), root_)));
    }
    fs::remove_all(root_);
  }
}

TEST_F(StorePieces, NothingIsRememberedOfTheirMemory) {
  Scattered apart(make_snapshot(600, layout_));
  save("a", apart);
  apart.scribble();
  const auto scribbled = save("b", apart);
  EXPECT_EQ(scribbled.segments_written, 2) << "other rows of the same tokens";
  EXPECT_TRUE(same(load("a"), make_snapshot(600, layout_)));
  EXPECT_EQ(load("b").run_bytes(0)[7], std::byte{0x5a});
}

TEST_F(StorePieces, RowsOfANamedSegmentAreNotRead) {
  const auto first = save("a", Scattered(make_snapshot(600, layout_)));
  // Nothing but the last tensor's rows is looked at, so the others may even differ: the caller's word counts.
  Scattered apart = hinted(620, first);
  flip(apart.rows.runs[0].pieces[0]);
  env_.reset();
  const auto second = save("a", apart);
  EXPECT_EQ(second.segments, first.segments);
  EXPECT_EQ(second.segments_shared, 2);
  EXPECT_EQ(env_.opened_segments(), 0);
  EXPECT_TRUE(same(load("a"), make_snapshot(620, layout_)));
}

TEST_F(StorePieces, RowsThatWereComputedAnewAreFoundOutByTheLastTensor) {
  const auto first = save("a", Scattered(make_snapshot(600, layout_)));
  Scattered apart = hinted(600, first);
  flip(apart.rows.runs[1].pieces.back());
  const auto second = save("a", apart);
  EXPECT_EQ(second.segments[0], first.segments[0]);
  EXPECT_NE(second.segments[1], first.segments[1]) << "a variant";
  auto expected = make_snapshot(600, layout_);
  flip(expected.run_bytes(1).subspan(expected.run_bytes(1).size() - apart.rows.runs[1].pieces.back().size()));
  EXPECT_TRUE(same(load("a"), expected));
  // The variant's name is taken too.
  apart.rows.runs[1].segment = second.segments[1];
  env_.reset();
  EXPECT_EQ(save("a", apart).segments, second.segments);
  EXPECT_EQ(env_.opened_segments(), 0);
}

TEST_F(StorePieces, AWrongNameIsNotTaken) {
  const auto first = save("a", Scattered(make_snapshot(600, layout_)));
  const auto whole = make_snapshot(600, layout_);
  const auto names = first.segments;
  const auto expect_saves = [&](Store& store, const std::vector<std::string>& hints) {
    Scattered apart(whole);
    for (size_t i = 0; i < 2; ++i) apart.rows.runs[i].segment = hints[i];
    EXPECT_EQ(apart.save(store, "b").segments, names);
    EXPECT_TRUE(same(load("b"), whole));
  };
  expect_saves(store_, {names[1], names[0]});
  expect_saves(store_, {"none", "../../a"});
  // A process that has not seen the file reads it before it builds on it.
  Store other(root_);
  const auto path = segment_path(names[0]);
  auto bytes = read_all(path);
  bytes[bytes.size() - 2000] ^= 1;
  fs::remove(path);
  std::ofstream(path, std::ios::binary) << bytes;
  expect_saves(other, names);
  // One that has seen it notices that it is another.
  fs::remove(path);
  std::ofstream(path, std::ios::binary) << bytes;
  expect_saves(store_, names);
  fs::remove(path);
  expect_saves(store_, names);
}

TEST_F(StorePieces, UnknownTokensAreTheSameOnlyWhenTheirRowsAre) {
  auto one = make_snapshot(600, layout_), other = make_snapshot(600, layout_, /*seed=*/2);
  for (auto* snapshot : {&one, &other}) std::fill(snapshot->tokens.begin(), snapshot->tokens.end(), kUnknownToken);
  EXPECT_EQ(save("a", one).segments_written, 2);
  EXPECT_EQ(save("b", other).segments_written, 2);
  EXPECT_EQ(save("c", Scattered(one)).segments_shared, 2);
  for (const auto& [id, saved] : {std::pair("a", &one), std::pair("b", &other), std::pair("c", &one)}) {
    const auto loaded = load(id);
    for (size_t i = 0; i < 600; ++i) ASSERT_LT(loaded.tokens[i], 0);
    auto expected = *saved;
    expected.tokens = loaded.tokens;
    EXPECT_TRUE(same(loaded, expected));
    EXPECT_EQ(store_.agent_tokens(id), loaded.tokens);
  }
}

TEST_F(StorePieces, ASinkGetsEveryRowOnce) {
  // 20,000 tokens: more files than are kept open.
  for (const int n : {0, 3, 256, 600, 768, 20'000}) {
    const auto whole = make_snapshot(n, layout_);
    Store holder(root_);
    holder.save_agent_cache("a", whole, "m");
    CollectingSink sink;
    EXPECT_EQ(Store(root_).load_into("a", sink).snapshot.n_runs(), 0u);
    EXPECT_TRUE(same(sink.snapshot, whole)) << n;
    // Rows that this process holds are given all the same.
    CollectingSink again;
    const auto held = holder.load_agent_cache("a", {.map_rows = true});
    holder.load_into("a", again);
    EXPECT_TRUE(same(again.snapshot, whole));
  }
}

TEST_F(StorePieces, ASinkMayHaveRoomBetweenTheHeads) {
  const auto whole = make_snapshot(600, layout_);
  save("a", whole);
  /// Tensors of 700 rows.
  struct Roomy : CollectingSink {
    std::vector<std::vector<std::byte>> tensors;
    void begin(const AgentInfo&, const KvSnapshot& of) override {
      for (const auto& spec : of.layout.tensors) tensors.emplace_back(700 * spec.bytes_per_token(), std::byte{0x77});
    }
    Place place(size_t tensor, int64_t first, int) override {
      const size_t row = 16;
      return {tensors[tensor].data() + size_t(first) * row, 700 * row};
    }
  } sink;
  Store(root_).load_into("a", sink);
  for (size_t t = 0; t < 4; ++t) {
    for (size_t head = 0; head < 2; ++head) {
      for (size_t token = 0; token < 700; ++token) {
        const auto row = std::span(sink.tensors[t]).subspan((head * 700 + token) * 16, 16);
        if (token >= 600) {
          EXPECT_EQ(row[3], std::byte{0x77});
          continue;
        }
        const int n = whole.run_tokens(token / 256);
        const auto expected = whole.run_bytes(token / 256).subspan(layout_.offset(t, n) + (head * size_t(n) + token % 256) * 16, 16);
        EXPECT_TRUE(std::equal(row.begin(), row.end(), expected.begin())) << t << " " << head << " " << token;
      }
    }
  }
}

TEST_F(StorePieces, ALoadIntoASinkFindsDamage) {
  const auto result = save("a", make_snapshot(600, layout_));
  const size_t rows = layout_.offset(4, 256);
  for (const fs::path& path : {segment_path(result.segments[1]), root_ / "a.safetensors"}) {
    const auto good = read_all(path);
    for (size_t t = 0; t < 4; ++t) {
      const bool tail = path.filename() == "a.safetensors";
      auto bad = good;
      bad[good.size() - (tail ? 2400 + layout_.offset(4, 88) - layout_.offset(t, 88) : 1024 + rows - layout_.offset(t, 256)) + 5] ^= 1;
      std::ofstream(path, std::ios::binary) << bad;
      CollectingSink sink;
      EXPECT_EQ(code_of([&] { Store(root_).load_into("a", sink); }), ErrorCode::kCorruption);
    }
    std::ofstream(path, std::ios::binary) << good;
  }
  CollectingSink sink;
  EXPECT_NO_THROW(Store(root_).load_into("a", sink));
}

}  // namespace
}  // namespace torpor::testing
