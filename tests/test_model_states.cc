/// What hybrids keep in place of rows: its bits depend on neither chunks nor what runs beside (kernels), and a pass
/// that fails leaves it.

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "kernels/recurrent.h"
#include "model/recurrent_mlx.h"
#include "model_fixture.h"
#include "torpor/cache.h"
#include "torpor/error.h"

namespace torpor {
namespace {

class Hybrids : public testing::TestWithParam<const char*> {
 protected:
  std::unique_ptr<Model> load(Backend backend) const {
    return Model::load((kGoldens / GetParam()).string(), {.backend = backend, .activations = Activations::kF32});
  }
  static std::vector<int32_t> random_tokens(const Model& model, int n, unsigned seed) {
    std::mt19937 random(seed);
    std::vector<int32_t> tokens;
    for (int i = 0; i < n; ++i) tokens.push_back(int32_t(random() % unsigned(model.info().vocab_size)));
    return tokens;
  }
  /// All that a sequence has after its tokens.
  struct Held {
    std::vector<float> logits;
    std::vector<std::byte> state, rows;
    bool operator==(const Held&) const = default;
  };
  static Held held(const TestCache& cache, std::vector<float> logits) {
    const auto state = cache.state();
    return {std::move(logits), {state.begin(), state.end()}, cache.rows()};
  }
  static Held in_chunks(Model& model, std::span<const int32_t> tokens, size_t step) {
    TestCache cache(model, KvDtype::kF16);
    std::vector<float> logits;
    for (size_t at = 0; at < tokens.size(); at += step) {
      logits = forward(model, cache, tokens.subspan(at, std::min(step, tokens.size() - at)));
    }
    return held(cache, std::move(logits));
  }
};

TEST_P(Hybrids, TheStateHasTheSizeOfItsLayoutWhateverTheLength) {
  const auto model = load(Backend::kKernels);
  const StateLayout layout = model->state_layout();
  ASSERT_FALSE(layout.empty());
  ASSERT_FALSE(model->kv_layout(KvDtype::kF16).tensors.empty());
  for (const StateTensorSpec& tensor : layout.tensors) EXPECT_EQ(tensor.dtype, KvDtype::kF32) << tensor.name;
  for (const int n : {1, 2, 300}) {
    EXPECT_EQ(in_chunks(*model, random_tokens(*model, n, 1), 512).state.size(), layout.bytes());
  }
}

TEST_P(Hybrids, BitsDependOnNeitherChunksNorNeighbours) {
  const auto model = load(Backend::kKernels);
  const std::vector<int32_t> tokens = random_tokens(*model, 600, 1);
  const Held expected = in_chunks(*model, tokens, tokens.size());
  for (const size_t step : {1, 7, 64, 512}) EXPECT_TRUE(in_chunks(*model, tokens, step) == expected) << step;

  // Beside seven others of other lengths, each step with all of them: the chunks of a pass then begin anywhere.
  for (const size_t step : {1, 7, 64, 512}) {
    std::vector<std::vector<int32_t>> prompts;
    std::vector<TestCache> caches;
    for (unsigned i = 0; i < 8; ++i) {
      prompts.push_back(i == 4 ? tokens : random_tokens(*model, int(tokens.size()) + int(i) * 5 - 20, 10 + i));
      caches.emplace_back(*model, KvDtype::kF16);
    }
    std::vector<float> logits;
    for (size_t at = 0; at < tokens.size(); at += step) {
      std::vector<ForwardSequence> batch;
      size_t row = 0;
      for (size_t i = 0; i < 8; ++i) {
        if (at >= prompts[i].size()) continue;
        if (i == 4) row = batch.size();
        const size_t n = std::min(step, prompts[i].size() - at);
        batch.push_back({.tokens = std::span(prompts[i]).subspan(at, n), .kv = &caches[i]});
      }
      const mx::array all = model->forward(batch);
      const size_t vocabulary = size_t(model->info().vocab_size);
      const float* const own = all.data<float>() + row * vocabulary;
      logits.assign(own, own + vocabulary);
    }
    EXPECT_TRUE(held(caches[4], logits) == expected) << "in steps of " << step;
  }
}

TEST_P(Hybrids, BackendsAgreeOnTheState) {
  const auto kernels = load(Backend::kKernels), mlx = load(Backend::kMlx);
  EXPECT_EQ(kernels->state_layout(), mlx->state_layout());
  EXPECT_EQ(kernels->identity(), mlx->identity());
  const std::vector<int32_t> tokens = random_tokens(*kernels, 60, 3);
  TestCache a(*kernels, KvDtype::kF32), b(*mlx, KvDtype::kF32);
  for (const size_t n : {1, 2, 57}) {
    const auto part = std::span(tokens).subspan(size_t(a.length()), n);
    forward(*kernels, a, part);
    forward(*mlx, b, part);
  }
  const auto floats = [](std::span<const std::byte> state) {
    return std::span(reinterpret_cast<const float*>(state.data()), state.size() / sizeof(float));
  };
  const auto x = floats(a.state()), y = floats(b.state());
  ASSERT_EQ(x.size(), y.size());
  for (size_t i = 0; i < x.size(); ++i) ASSERT_NEAR(x[i], y[i], 1e-3f * (1 + std::abs(x[i]))) << i;
}

TEST_P(Hybrids, APassThatFailsLeavesTheState) {
  const auto model = load(Backend::kKernels);
  const std::vector<int32_t> tokens = random_tokens(*model, 30, 5);
  /// Whose rows can't be written.
  class Full : public TestCache {
   public:
    using TestCache::TestCache;
    std::span<const KvBuffer> reserve(int) override { throw Error(ErrorCode::kResourceExhausted, "full"); }
  };
  TestCache cache(*model, KvDtype::kF16);
  Full full(*model, KvDtype::kF16);
  forward(*model, cache, tokens);
  const Held before = held(cache, {});
  const std::vector<ForwardSequence> batch{{.tokens = tokens, .kv = &cache}, {.tokens = tokens, .kv = &full}};
  EXPECT_THROW(model->forward(batch), Error);
  EXPECT_TRUE(held(cache, {}) == before);
}

/// With the caches that the engine has: cut to a state that was kept, slept, and gone on from.
TEST_P(Hybrids, GoingOnFromAHeldStateGivesTheBitsOfOneNeverCut) {
  const auto model = load(Backend::kKernels);
  const std::vector<int32_t> tokens = random_tokens(*model, 600, 1);
  std::vector<KvFormat> formats{KvDtype::kF16};
  if (model->info().head_dim % 32 == 0) {
    for (const int bits : {8, 4}) formats.push_back(model->refined(KvFormat(KvDtype::kF16, bits, 32)));
  }
  for (const KvFormat& format : formats) {
    Identity identity = model->identity();
    identity.kv = format.name();
    const auto run = [&](KvCache& cache, size_t end) {
      const auto part = std::span(tokens).subspan(size_t(cache.length()), end - size_t(cache.length()));
      const ForwardSequence sequence{.tokens = part, .kv = &cache};
      const mx::array logits = model->forward({&sequence, 1});
      cache.record_tokens(part);
      return std::vector<float>(logits.data<float>(), logits.data<float>() + logits.size());
    };
    const auto make = [&] {
      return KvCache::create(model->kv_layout(format), format, Backend::kKernels, model->state_layout());
    };
    const auto whole = make(), cut = make();
    const std::vector<float> expected = run(*whole, 600);
    run(*cut, 257);
    cut->keep_state();
    run(*cut, 500);
    ASSERT_EQ(cut->resumable(499), 257);
    cut->truncate(257);
    run(*cut, 300);
    const KvSnapshot slept = cut->snapshot(identity);
    const auto woken = KvCache::restore(slept, Backend::kKernels);
    ASSERT_EQ(woken->states().size(), 2u);
    EXPECT_EQ(run(*woken, 600), expected) << format.name();
    EXPECT_TRUE(std::ranges::equal(woken->state(), whole->state())) << format.name();
    const KvSnapshot a = woken->snapshot(identity), b = whole->snapshot(identity);
    for (size_t i = 0; i + 1 < a.n_runs(); ++i) EXPECT_TRUE(std::ranges::equal(a.run_bytes(i), b.run_bytes(i))) << i;
    EXPECT_TRUE(std::ranges::equal(a.tail.bytes, b.tail.bytes));
  }
}

TEST_P(Hybrids, ACacheWithoutItsStatesIsRefused) {
  const auto model = load(Backend::kKernels);
  /// As a model without recurrent layers has them.
  class Stateless : public TestCache {
   public:
    using TestCache::TestCache;
    const StateLayout& state_layout() const noexcept override { return KvAccess::state_layout(); }
  };
  Stateless cache(*model, KvDtype::kF16);
  const std::vector<int32_t> tokens{1};
  const ForwardSequence sequence{.tokens = tokens, .kv = &cache};
  EXPECT_THROW(model->forward({&sequence, 1}), Error);
}

/// One pass of more than a chunk, and passes cut elsewhere. MLX's sums are not the same bits, but near.
TEST_P(Hybrids, StatesOfMlxGoThroughChunksAndPasses) {
  const auto model = load(Backend::kMlx);
  const std::vector<int32_t> tokens = random_tokens(*model, 530, 1);
  const auto run = [&](std::initializer_list<size_t> ends) {
    const KvFormat format(KvDtype::kF32);
    auto cache = KvCache::create(model->kv_layout(format), format, Backend::kMlx, model->state_layout());
    for (size_t begin = 0; const size_t end : ends) {
      const auto part = std::span(tokens).subspan(begin, end - begin);
      const ForwardSequence sequence{.tokens = part, .kv = cache.get()};
      model->forward({&sequence, 1});
      cache->record_tokens(part);
      begin = end;
    }
    EXPECT_TRUE(cache->validate()) << cache->validate().reason;
    return cache;
  };
  const auto whole = run({530}), parts = run({1, 300, 530});
  const auto* a = reinterpret_cast<const float*>(whole->state().data());
  const auto* b = reinterpret_cast<const float*>(parts->state().data());
  for (size_t i = 0; i < whole->state().size() / sizeof(float); ++i) {
    ASSERT_NEAR(a[i], b[i], 1e-3f * (1 + std::abs(a[i]))) << i;
  }
}

/// The sizes of published models, where a head is more than one task's.
TEST(Recurrent, KernelsAgreeWithMlxsOperationsAtPublishedSizes) {
  using kernels::Recurrence;
  const kernels::RecurrentShape qwen{.kind = Recurrence::kGatedDelta, .taps = 4, .n_heads = 32, .n_groups = 16,
                                     .key_dim = 128, .value_dim = 128, .norm = {.size = 128, .eps = 1e-6f}};
  const kernels::RecurrentShape nemotron{.kind = Recurrence::kMamba2, .taps = 4, .n_heads = 64, .n_groups = 8,
                                         .key_dim = 128, .value_dim = 64, .max_step = 1e30f,
                                         .norm = {.size = 512, .eps = 1e-5f, .gate_before = true}};
  kernels::RecurrentShape odd = qwen;
  odd.n_heads = 2, odd.n_groups = 1, odd.key_dim = 7, odd.value_dim = odd.norm.size = 107;
  const kernels::RecurrentShape conv{.taps = 3, .value_dim = 2048};
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  const auto values = [&](size_t n, float scale) {
    std::vector<float> all(n);
    for (float& value : all) value = scale * normal(random);
    return all;
  };
  for (const kernels::RecurrentShape& shape : {qwen, nemotron, odd, conv}) {
    SCOPED_TRACE(shape.given());
    kernels::Recurrent cell{.shape = shape};
    const size_t heads = size_t(shape.n_heads), output = size_t(shape.output());
    cell.conv = values(size_t(shape.taps) * size_t(shape.channels()), 0.5f);
    cell.log_decay = values(heads, 1), cell.step_bias = values(heads, 1);
    if (shape.kind == Recurrence::kMamba2) cell.skip = values(heads, 1), cell.norm = values(output, 1);
    if (shape.kind == Recurrence::kGatedDelta) cell.norm = values(size_t(shape.value_dim), 1);
    constexpr int kTokens = 9;
    const std::vector<float> given = values(size_t(kTokens) * size_t(shape.given()), 1);
    const std::vector<float> before = values(shape.state(), 0.3f);
    std::vector<float> y(kTokens * output), state(shape.state()), expected_state(shape.state());
    const kernels::RecurrentSequence sequence{.row = 0, .n = kTokens, .state = before.data(), .next = state.data()};
    kernels::recurrent(given.data(), kTokens, cell, {&sequence, 1}, y.data());

    model::Batch batch;
    batch.sequences.push_back({.row = 0, .n = kTokens, .state = reinterpret_cast<const std::byte*>(before.data()),
                               .next_state = reinterpret_cast<std::byte*>(expected_state.data())});
    const mx::array rows(given.data(), {kTokens, shape.given()}, mx::float32);
    mx::array expected = mx::contiguous(model::recurrent_on_mlx(rows, cell, 0, batch));
    mx::eval({expected});
    for (auto& [at, part] : batch.states) {
      mx::eval({part});
      std::memcpy(at, part.data<float>(), part.nbytes());
    }
    for (size_t i = 0; i < y.size(); ++i) {
      ASSERT_NEAR(y[i], expected.data<float>()[i], 1e-4f * (1 + std::abs(y[i]))) << i;
    }
    for (size_t i = 0; i < state.size(); ++i) {
      ASSERT_NEAR(state[i], expected_state[i], 1e-4f * (1 + std::abs(state[i]))) << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Models, Hybrids,
                         testing::Values("tiny-lfm2", "tiny-qwen3-5", "tiny-qwen3-next", "tiny-nemotron-h",
                                         "tiny-nemotron-h-moe", "tiny-qwen3-5-moe", "tiny-lfm2-moe",
                                         "tiny-granite-hybrid", "tiny-granite-hybrid-moe"));

}  // namespace
}  // namespace torpor
