// The KV cache as a value: snapshot, restore, clone, truncate and validate, for both kinds of cache, without a model.

#include <cstring>
#include <random>

#include <gtest/gtest.h>
#include <mlx/mlx.h>

#include "cache/ledger.h"
#include "torpor/cache.h"
#include "torpor/error.h"

namespace torpor {
namespace {

constexpr int kHeads = 2, kDim = 8, kLayers = 3;

KvLayout make_layout(KvDtype dtype) {
  KvLayout layout;
  for (int i = 0; i < kLayers; ++i) {
    for (const char* part : {"_keys", "_values"}) {
      layout.tensors.push_back({"layer_" + std::to_string(i) + part, dtype, kHeads, kDim, 0});
    }
  }
  return layout;
}

// A snapshot of `n` tokens whose rows are random bytes, in buffers that `allocate` gives.
KvSnapshot random_snapshot(int n, KvDtype dtype, const BufferAllocator& allocate, unsigned seed) {
  std::mt19937 random(seed);
  KvSnapshot snapshot;
  snapshot.layout = make_layout(dtype);
  snapshot.identity.kv = kv_dtype_name(dtype);
  for (int i = 0; i < n; ++i) snapshot.tokens.push_back(int32_t(random() % 1000));
  for (int first = 0; first < n; first += kSegmentTokens) {
    const int rows = std::min(kSegmentTokens, n - first);
    const size_t size = snapshot.layout.offset(snapshot.layout.tensors.size(), rows);
    auto buffer = allocate(size);
    for (size_t i = 0; i < size; ++i) buffer.get()[i] = std::byte(random());
    snapshot.add_run(rows, {buffer.get(), size}, buffer);
  }
  return snapshot;
}

void expect_equal(const KvSnapshot& a, const KvSnapshot& b) {
  EXPECT_EQ(a.identity, b.identity);
  EXPECT_EQ(a.layout, b.layout);
  EXPECT_EQ(a.tokens, b.tokens);
  ASSERT_EQ(a.n_runs(), b.n_runs());
  for (size_t i = 0; i < a.n_runs(); ++i) {
    ASSERT_EQ(a.run_bytes(i).size(), b.run_bytes(i).size());
    EXPECT_EQ(0, std::memcmp(a.run_bytes(i).data(), b.run_bytes(i).data(), a.run_bytes(i).size())) << "run " << i;
  }
}

// The first `n` tokens of a snapshot, cut by hand.
KvSnapshot prefix_of(const KvSnapshot& whole, int n) {
  KvSnapshot prefix{.identity = whole.identity, .layout = whole.layout, .tokens = {whole.tokens.begin(), whole.tokens.begin() + n}};
  for (int first = 0; first < n; first += kSegmentTokens) {
    const int from_tokens = whole.run_tokens(size_t(first / kSegmentTokens));
    const std::byte* from = whole.run_bytes(size_t(first / kSegmentTokens)).data();
    const int rows = std::min(kSegmentTokens, n - first);
    const size_t size = whole.layout.offset(whole.layout.tensors.size(), rows);
    auto buffer = allocate_heap_buffer(size);
    size_t out = 0;
    for (size_t t = 0; t < whole.layout.tensors.size(); ++t) {
      const KvTensorSpec& spec = whole.layout.tensors[t];
      const size_t row = size_t(spec.dim) * kv_dtype_size(spec.dtype);
      for (int head = 0; head < spec.n_kv_heads; ++head) {
        std::memcpy(buffer.get() + out,
                    from + whole.layout.offset(t, from_tokens) + size_t(head) * from_tokens * row,
                    rows * row);
        out += rows * row;
      }
    }
    prefix.add_run(rows, {buffer.get(), size}, buffer);
  }
  return prefix;
}

class CacheKinds : public testing::TestWithParam<std::tuple<Backend, KvDtype>> {
 protected:
  Backend backend() const { return std::get<0>(GetParam()); }
  KvDtype dtype() const { return std::get<1>(GetParam()); }
};

TEST_P(CacheKinds, RestoreThenSnapshotGivesTheSameBytes) {
  for (int n : {0, 1, 255, 256, 257, 512, 700}) {
    for (const BufferAllocator& allocate : {BufferAllocator(mlx_buffer), BufferAllocator(allocate_heap_buffer)}) {
      const KvSnapshot before = random_snapshot(n, dtype(), allocate, unsigned(n));
      const auto cache = KvCache::restore(before, backend());
      EXPECT_EQ(get_cache_size(*cache), n);
      EXPECT_TRUE(validate_cache_structure(*cache, &before.layout)) << validate_cache_structure(*cache).reason;
      expect_equal(cache->snapshot(before.identity), before);
    }
  }
}

TEST_P(CacheKinds, TruncateKeepsThePrefixAndLeavesClonesAlone) {
  const KvSnapshot whole = random_snapshot(700, dtype(), mlx_buffer, 7);
  for (int n : {700, 699, 513, 512, 511, 256, 255, 1, 0}) {
    const auto cache = KvCache::restore(whole, backend());
    const auto clone = cache->clone();
    cache->truncate(n);
    expect_equal(cache->snapshot(whole.identity), prefix_of(whole, n));
    expect_equal(clone->snapshot(whole.identity), whole);
  }
  KvSnapshot with_ring = whole;
  const std::byte byte{};
  with_ring.state = {{"ring", "U8", {1}, {&byte, 1}, nullptr}};
  EXPECT_THROW(KvCache::restore(with_ring, backend()), Error);
  EXPECT_THROW(KvCache::restore(whole, backend())->truncate(701), Error);
  EXPECT_THROW(KvCache::restore(whole, backend())->truncate(-1), Error);
}

TEST_P(CacheKinds, MemoryIsThatOfTheRealBuffers) {
  const KvSnapshot snapshot = random_snapshot(300, dtype(), mlx_buffer, 3);
  const size_t row = snapshot.layout.bytes_per_token();
  const auto cache = KvCache::restore(snapshot, backend());
  EXPECT_GE(get_cache_memory(*cache), 512 * row);
  EXPECT_LT(get_cache_memory(*cache), 512 * row + 4096);
  EXPECT_EQ(get_cache_memory(*KvCache::create(snapshot.layout, dtype(), backend())), 0u);
}

TEST_P(CacheKinds, ValidationNamesWhatDisagrees) {
  const KvSnapshot snapshot = random_snapshot(10, dtype(), mlx_buffer, 3);
  const auto cache = KvCache::restore(snapshot, backend());

  KvLayout fewer = snapshot.layout;
  fewer.tensors.pop_back();
  EXPECT_NE(validate_cache_structure(*cache, &fewer).reason.find("6 tensors"), std::string::npos);

  KvLayout other_dtype = make_layout(dtype() == KvDtype::kF32 ? KvDtype::kF16 : KvDtype::kF32);
  EXPECT_NE(validate_cache_structure(*cache, &other_dtype).reason.find("layer_0_keys is"), std::string::npos);

  KvLayout other_shape = snapshot.layout;
  other_shape.tensors[3].dim = 16;
  EXPECT_NE(validate_cache_structure(*cache, &other_shape).reason.find("layer_1_values"), std::string::npos);

  const int32_t extra[] = {1};
  cache->record_tokens(extra);
  EXPECT_FALSE(validate_cache_structure(*cache));
  EXPECT_NE(validate_cache_structure(*cache).reason.find("11 token ids"), std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(AllKinds, CacheKinds,
                         testing::Combine(testing::Values(Backend::kKernels, Backend::kMlx),
                                          testing::Values(KvDtype::kF32, KvDtype::kF16, KvDtype::kBF16)));

TEST(SegmentedCache, FullRunsAreAdoptedNotCopied) {
  const KvSnapshot snapshot = random_snapshot(600, KvDtype::kF16, mlx_buffer, 1);
  const auto cache = KvCache::restore(snapshot, Backend::kKernels);
  const KvSnapshot again = cache->snapshot(snapshot.identity);
  EXPECT_EQ(again.sealed, snapshot.sealed);
  EXPECT_NE(again.tail.bytes.data(), snapshot.tail.bytes.data());
}

/// `snapshot` with its tail in a buffer of a run's size.
KvSnapshot with_tail_in_run(KvSnapshot snapshot) {
  const size_t size = snapshot.layout.offset(snapshot.layout.tensors.size(), kSegmentTokens);
  const auto run = mlx_buffer(size);
  std::memset(run.get(), 0x7f, size);
  const std::byte* from = snapshot.tail.bytes.data();
  std::byte* to = run.get();
  const size_t n = size_t(snapshot.tail.n_tokens);
  for (const KvTensorSpec& tensor : snapshot.layout.tensors) {
    const size_t row = size_t(tensor.dim) * kv_dtype_size(tensor.dtype);
    for (int head = 0; head < tensor.n_kv_heads; ++head, from += n * row, to += kSegmentTokens * row) std::memcpy(to, from, n * row);
  }
  snapshot.tail = {int(n), {run.get(), size}, run, run};
  return snapshot;
}

TEST(SegmentedCache, ATailInARunIsTakenOverAndCopiedOnlyWhileOthersHoldIt) {
  const KvSnapshot plain = random_snapshot(600, KvDtype::kF16, mlx_buffer, 1);
  auto in_run = std::make_optional(with_tail_in_run(plain));
  const std::byte* const taken = in_run->tail.run.get();
  const auto cache = KvCache::restore(*in_run, Backend::kKernels);
  expect_equal(cache->snapshot(plain.identity), plain);
  const size_t run_bytes = in_run->tail.bytes.size();
  EXPECT_EQ(cache->growth(1), run_bytes) << "the snapshot is held";
  const std::vector<std::byte> before(in_run->tail.bytes.begin(), in_run->tail.bytes.end());
  const auto other = KvCache::restore(*in_run, Backend::kKernels);
  EXPECT_NE(other->reserve(1)[2].data, taken);
  EXPECT_TRUE(std::ranges::equal(before, in_run->tail.bytes));
  in_run.reset();
  EXPECT_EQ(cache->growth(1), 0u);
  EXPECT_EQ(cache->reserve(1)[2].data, taken) << "no copy";
}

TEST(SegmentedCache, ASnapshotThatSharesTheTailKeepsItsRowsWhateverTheCacheDoes) {
  const KvSnapshot plain = random_snapshot(600, KvDtype::kF16, mlx_buffer, 1);
  for (const int cut : {600, 550, 520}) {
    const auto cache = KvCache::restore(plain, Backend::kKernels);
    std::optional<KvSnapshot> shared = cache->snapshot(plain.identity, /*copy_tail=*/false);
    EXPECT_EQ(shared->tail.n_tokens, 600 - 512);
    EXPECT_NO_THROW(shared->validate());
    cache->truncate(cut);
    const auto runs = cache->reserve(10);
    EXPECT_NE(runs[2].data, shared->tail.run.get());
    std::memset(runs[2].data, 0x11, runs[2].size);
    expect_equal(KvCache::restore(*shared, Backend::kKernels)->snapshot(plain.identity), plain);
    const std::byte* const now = runs[2].data;
    shared = cache->snapshot(plain.identity, /*copy_tail=*/false);
    EXPECT_EQ(shared->tail.run.get(), now) << "nothing is copied";
    shared.reset();
    EXPECT_EQ(cache->growth(1), 0u);
  }
}

TEST_P(CacheKinds, ATailInARunHoldsTheSameRows) {
  const KvSnapshot plain = random_snapshot(600, dtype(), mlx_buffer, 1);
  const KvSnapshot in_run = with_tail_in_run(plain);
  EXPECT_NO_THROW(in_run.validate());
  expect_equal(KvCache::restore(in_run, backend())->snapshot(plain.identity), plain);
}

// Restored from a mapping of segment files, which either kind goes on holding.
TEST_P(CacheKinds, MappedRunsStayTheObjectsTheyWere) {
  KvSnapshot mapped = random_snapshot(600, dtype(), allocate_heap_buffer, 1);
  for (auto& run : mapped.sealed) {
    run = std::make_shared<const SealedRun>(run->bytes(), run, /*mapped=*/true);
    run->set_segment({"name", "", "content"});
  }
  const auto cache = KvCache::restore(mapped, backend());
  EXPECT_EQ(cache->snapshot(mapped.identity).sealed, mapped.sealed);
  EXPECT_EQ(cache->clone()->snapshot(mapped.identity).sealed, mapped.sealed);
  cache->truncate(300);
  EXPECT_EQ(cache->snapshot(mapped.identity).sealed, std::vector(1, mapped.sealed[0]));
  expect_equal(cache->snapshot(mapped.identity), prefix_of(mapped, 300));
}

// A snapshot without the rows that a window left behind (LoadOptions::window_rows_only), read into memory.
TEST_P(CacheKinds, RowsThatWereNotReadAreNotGoneOnFrom) {
  KvSnapshot read = random_snapshot(1000, dtype(), allocate_heap_buffer, 1);
  read.layout.tensors[2].window = read.layout.tensors[3].window = 300;
  for (size_t i = 0; i < read.sealed.size(); ++i) {
    read.sealed[i] = std::make_shared<const SealedRun>(read.sealed[i]->bytes(), read.sealed[i], /*mapped=*/false,
                                                       read.layout.attended(int64_t(i) * 256, 256, 1000));
  }
  const auto cache = KvCache::restore(read, backend());
  EXPECT_TRUE(cache->can_truncate(1000));
  EXPECT_TRUE(cache->can_truncate(820));
  EXPECT_FALSE(cache->can_truncate(811));
  EXPECT_FALSE(cache->can_truncate(300));
  const KvSnapshot again = cache->snapshot(read.identity);
  EXPECT_EQ(again.sealed[0], read.sealed[0]);
  expect_equal(again, read);
}

TEST(SegmentedCache, ARunThatFillsIsOneObjectForEveryone) {
  const auto cache = KvCache::create(make_layout(KvDtype::kF16), KvDtype::kF16, Backend::kKernels);
  const std::vector<int32_t> tokens(700, 5);
  for (int done = 0; done < 700; done += 50) {
    cache->reserve(50);
    cache->record_tokens(std::span(tokens).first(50));
    cache->advance(50);
  }
  const KvSnapshot snapshot = cache->snapshot({});
  ASSERT_EQ(snapshot.sealed.size(), 2u);
  EXPECT_EQ(snapshot.tail.n_tokens, 700 - 512);
  EXPECT_EQ(cache->snapshot({}).sealed, snapshot.sealed);
  const auto clone = cache->clone();
  EXPECT_EQ(clone->snapshot({}).sealed, snapshot.sealed);
  // Cut inside the second run: what fills it again is another.
  clone->truncate(300);
  clone->reserve(250);
  clone->record_tokens(std::span(tokens).first(250));
  clone->advance(250);
  const KvSnapshot other = clone->snapshot({});
  ASSERT_EQ(other.sealed.size(), 2u);
  EXPECT_EQ(other.sealed[0], snapshot.sealed[0]);
  EXPECT_NE(other.sealed[1], snapshot.sealed[1]);
  EXPECT_EQ(cache->snapshot({}).sealed, snapshot.sealed);
}

TEST(SegmentedCache, RowsWrittenAfterACutInsideASealedRunReachNobodyElse) {
  const KvSnapshot whole = random_snapshot(600, KvDtype::kF16, mlx_buffer, 1);
  const auto cache = KvCache::restore(whole, Backend::kKernels);
  const auto clone = cache->clone();
  cache->truncate(300);
  const KvBuffer run = cache->reserve(10)[1];
  std::memset(run.data, 0, run.size);  // as the kernels write the new rows in place
  // Against other memory than `whole`'s, which the clone adopted.
  expect_equal(clone->snapshot(whole.identity), random_snapshot(600, KvDtype::kF16, mlx_buffer, 1));
}

TEST(SegmentedCache, SnapshotOutlivesTheCache) {
  const KvSnapshot before = random_snapshot(600, KvDtype::kF16, mlx_buffer, 1);
  auto cache = KvCache::restore(before, Backend::kKernels);
  const KvSnapshot after = cache->snapshot(before.identity);
  cache.reset();
  expect_equal(after, before);
}

TEST(DenseCache, AppendedRowsAreWhatASnapshotHolds) {
  const KvLayout layout = make_layout(KvDtype::kF16);
  const auto cache = KvCache::create(layout, KvDtype::kF16, Backend::kMlx);
  std::vector<mx::array> keys;
  for (int n : {3, 1, 300}) {
    mx::array k = mx::astype(mx::random::normal({1, kHeads, n, kDim}), mx::float16);
    for (int layer = 0; layer < kLayers; ++layer) cache->update_and_fetch(layer, k, k);
    keys.push_back(k);
    cache->advance(n);
    cache->record_tokens(std::vector<int32_t>(size_t(n), 5));
  }
  const KvSnapshot snapshot = cache->snapshot({});
  ASSERT_EQ(snapshot.n_runs(), 2u);
  mx::array all = mx::contiguous(mx::concatenate(keys, 2));
  all.eval();
  const auto* rows = reinterpret_cast<const std::byte*>(all.data<uint8_t>());
  const size_t row = kDim * 2;
  for (int head = 0; head < kHeads; ++head) {
    EXPECT_EQ(0, std::memcmp(snapshot.run_bytes(0).data() + head * 256 * row, rows + head * 304 * row, 256 * row));
    EXPECT_EQ(0, std::memcmp(snapshot.run_bytes(1).data() + head * 48 * row, rows + (head * 304 + 256) * row, 48 * row));
  }
}

// ---- recurrent states

StateLayout make_state_layout() {
  return {{{"layer_0_conv", KvDtype::kF32, {3, 4}}, {"layer_0_recurrent", KvDtype::kF32, {2, 8, 8}}}};
}

class CacheStates : public testing::TestWithParam<Backend> {
 protected:
  std::unique_ptr<KvCache> make() const {
    return KvCache::create(make_layout(KvDtype::kF16), KvDtype::kF16, GetParam(), states_);
  }
  /// A pass over `n` tokens, whose state is all `mark`. One that throws does so before it advances.
  void compute(KvCache& cache, int n, char mark, bool throws = false) const {
    if (GetParam() == Backend::kKernels) {
      cache.reserve(n);
    } else {
      const mx::array rows = mx::zeros({1, kHeads, n, kDim}, mx::float16);
      for (int layer = 0; layer < kLayers; ++layer) cache.update_and_fetch(layer, rows, rows);
    }
    const std::span<std::byte> next = cache.next_state();
    ASSERT_EQ(next.size(), states_.bytes());
    std::memset(next.data(), mark, next.size());
    if (throws) return;
    cache.record_tokens(std::vector<int32_t>(size_t(n), mark));
    cache.advance(n);
  }
  static char mark(std::span<const std::byte> state) { return state.empty() ? '0' : char(state.back()); }
  static std::vector<int64_t> positions(const KvCache& cache) {
    std::vector<int64_t> all;
    for (const auto& state : cache.states()) all.push_back(state->position());
    return all;
  }
  using Positions = std::vector<int64_t>;

  const StateLayout states_ = make_state_layout();
};

TEST_P(CacheStates, APassMakesANewStateAndTheOldOneStaysIfItIsKept) {
  const auto cache = make();
  EXPECT_TRUE(cache->state().empty());
  EXPECT_EQ(cache->spare_rows(), 0);
  compute(*cache, 300, 'a');
  EXPECT_EQ(mark(cache->state()), 'a');
  cache->keep_state();
  const auto kept = cache->states().back();
  compute(*cache, 10, 'b');
  compute(*cache, 1, 'c');
  EXPECT_EQ(positions(*cache), (Positions{300, 311}));
  EXPECT_EQ(cache->states().front(), kept) << "by pointer";
  EXPECT_EQ(mark(kept->bytes()), 'a');
  EXPECT_EQ(mark(cache->state()), 'c');
  EXPECT_TRUE(cache->validate()) << cache->validate().reason;
  cache->drop_state(300);
  cache->drop_state(311);  // live: it goes with the next pass
  EXPECT_EQ(positions(*cache), (Positions{311}));
  compute(*cache, 1, 'd');
  EXPECT_EQ(positions(*cache), (Positions{312}));
}

TEST_P(CacheStates, APassThatThrowsLeavesTheState) {
  const auto cache = make();
  compute(*cache, 5, 'x', /*throws=*/true);
  EXPECT_TRUE(cache->state().empty());
  compute(*cache, 5, 'a');
  compute(*cache, 5, 'x', /*throws=*/true);
  EXPECT_EQ(mark(cache->state()), 'a');
  EXPECT_EQ(positions(*cache), (Positions{5}));
  compute(*cache, 5, 'b');
  EXPECT_EQ(mark(cache->state()), 'b');
}

TEST_P(CacheStates, TwoBuffersTakeTurnsUnlessSomebodyHoldsOne) {
  const auto cache = make();
  compute(*cache, 1, 'a');
  const void* const first = cache->state().data();
  compute(*cache, 1, 'b');
  const void* const second = cache->state().data();
  compute(*cache, 1, 'c');
  EXPECT_EQ(cache->state().data(), first);
  const auto held = cache->states().back();
  compute(*cache, 1, 'd');
  EXPECT_EQ(cache->state().data(), second);
  compute(*cache, 1, 'e');
  EXPECT_EQ(mark(held->bytes()), 'c') << "the buffer is not written while it is held";
  EXPECT_NE(cache->state().data(), first);
}

TEST_P(CacheStates, ACacheIsCutOnlyToAStateThatIsHeld) {
  const auto cache = make();
  compute(*cache, 256, 'a');
  cache->keep_state();
  compute(*cache, 100, 'b');
  cache->keep_state();
  compute(*cache, 44, 'c');
  EXPECT_EQ(cache->resumable(400), 400);
  EXPECT_EQ(cache->resumable(399), 356);
  EXPECT_EQ(cache->resumable(300), 256);
  EXPECT_EQ(cache->resumable(255), 0);
  EXPECT_FALSE(cache->can_truncate(399));
  EXPECT_THROW(cache->truncate(399), Error);
  EXPECT_EQ(cache->length(), 400);
  ASSERT_TRUE(cache->can_truncate(256));
  const auto clone = cache->clone();
  cache->truncate(256);
  EXPECT_EQ(mark(cache->state()), 'a');
  EXPECT_EQ(positions(*cache), (Positions{256}));
  compute(*cache, 2, 'd');
  EXPECT_EQ(positions(*cache), (Positions{256, 258})) << "a state that was cut to was kept, and still is";
  EXPECT_EQ(positions(*clone), (Positions{256, 356, 400}));
  EXPECT_EQ(clone->states()[0], cache->states()[0]);
  EXPECT_EQ(mark(clone->state()), 'c');
  compute(*clone, 1, 'e');
  clone->truncate(0);
  EXPECT_TRUE(clone->states().empty());
  EXPECT_TRUE(clone->state().empty());
  EXPECT_EQ(mark(cache->state()), 'd');
}

TEST_P(CacheStates, AClonesPassDoesNotTouchTheStateOfTheOther) {
  const auto cache = make();
  compute(*cache, 3, 'a');
  const auto clone = cache->clone();
  EXPECT_EQ(clone->state().data(), cache->state().data()) << "shared";
  compute(*clone, 1, 'b');
  compute(*clone, 1, 'c');
  compute(*cache, 1, 'd');
  EXPECT_EQ(mark(clone->state()), 'c');
  EXPECT_EQ(mark(cache->state()), 'd');
}

TEST_P(CacheStates, AStateThatCameFromElsewhereIsHeld) {
  const auto cache = make();
  compute(*cache, 300, 'a');
  const auto other = [&](int64_t position, size_t bytes) {
    const auto buffer = allocate_heap_buffer(bytes);
    std::memset(buffer.get(), 'o', bytes);
    return std::make_shared<const StateCheckpoint>(position, std::span<const std::byte>(buffer.get(), bytes), buffer);
  };
  const auto state = other(256, states_.bytes());
  cache->add_state(state);
  cache->add_state(other(256, states_.bytes()));
  EXPECT_EQ(positions(*cache), (Positions{256, 300}));
  EXPECT_EQ(cache->states()[0], state);
  cache->add_state(other(300, states_.bytes()));
  EXPECT_EQ(mark(cache->state()), 'a') << "there is one";
  EXPECT_THROW(cache->add_state(other(301, states_.bytes())), Error);
  EXPECT_THROW(cache->add_state(other(0, states_.bytes())), Error);
  EXPECT_THROW(cache->add_state(other(200, states_.bytes() - 1)), Error);
  cache->truncate(256);
  EXPECT_EQ(cache->state().data(), state->bytes().data());
  compute(*cache, 1, 'b');
  compute(*cache, 1, 'c');
  EXPECT_EQ(mark(state->bytes()), 'o');
}

TEST_P(CacheStates, ASnapshotHasTheStatesAndACacheIsMadeOfThem) {
  auto cache = make();
  EXPECT_TRUE(cache->snapshot({}).states.empty());
  EXPECT_EQ(KvCache::restore(cache->snapshot({}), GetParam())->state_layout(), states_);
  compute(*cache, 256, 'a');
  cache->keep_state();
  compute(*cache, 1, 'b');
  const KvSnapshot snapshot = cache->snapshot({});
  EXPECT_EQ(snapshot.state_layout, states_);
  ASSERT_EQ(snapshot.states.size(), 2u);
  const auto restored = KvCache::restore(snapshot, GetParam());
  EXPECT_EQ(positions(*restored), (Positions{256, 257}));
  EXPECT_EQ(restored->state().data(), cache->state().data()) << "nothing is copied";
  compute(*restored, 1, 'c');
  compute(*cache, 1, 'd');
  compute(*cache, 1, 'e');
  EXPECT_EQ(mark(snapshot.states[1]->bytes()), 'b');
  EXPECT_TRUE(restored->validate());
  KvSnapshot without = snapshot;
  without.states.pop_back();
  EXPECT_THROW(KvCache::restore(without, GetParam()), Error);
}

TEST_P(CacheStates, EveryStateCountsOnceAndGrowthSaysWhatAPassTakes) {
  const auto ledger = std::make_shared<KvLedger>();
  const auto cache = make();
  cache->count_in(ledger);
  const size_t state = states_.bytes();
  EXPECT_EQ(cache->growth(0), 0u);
  for (int step = 0; step < 4; ++step) {
    const size_t before = ledger->bytes(), growth = cache->growth(1);
    cache->grow(1);
    EXPECT_EQ(ledger->bytes() - before, growth) << step;
    compute(*cache, 1, 'a');
    EXPECT_EQ(ledger->bytes(), before + growth) << step;
    if (step == 1) cache->keep_state();
  }
  const size_t rows = 256 * cache->layout().bytes_per_token();
  EXPECT_EQ(ledger->bytes(), rows + 3 * state) << "live, kept and spare";
  EXPECT_EQ(cache->nbytes(), rows + 3 * state);
  auto clone = cache->clone();
  EXPECT_EQ(ledger->bytes(), rows + 3 * state);
  cache->drop_state(2);
  EXPECT_EQ(ledger->bytes(), rows + 3 * state) << "the clone holds it";
  clone->drop_state(2);
  EXPECT_EQ(ledger->bytes(), rows + 2 * state);
  clone.reset();
  cache->truncate(0);
  EXPECT_EQ(ledger->bytes() % 1024, state % 1024) << "the spare buffer stays";
}

INSTANTIATE_TEST_SUITE_P(AllBackends, CacheStates, testing::Values(Backend::kKernels, Backend::kMlx));

}  // namespace
}  // namespace torpor
