/// Several sequences in one pass of MLX's backend: each has the logits, rows and states that it has alone, but for the
/// last bits, and pays for no other's length. (On the kernels bits are equal: test_model.cc, test_model_states.cc.)

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <random>
#include <stdexcept>

#include <unistd.h>

#include <mlx/primitives.h>

#include "model_fixture.h"
#include "tiny_model.h"
#include "torpor/cache.h"
#include "torpor/error.h"

namespace torpor {
namespace {

/// Sums of another shape may be made in another order. Logits of the tiny models reach 25.
constexpr float kLogitBound = 1e-3f, kMargin = 1e-4f;

std::unique_ptr<KvCache> make_cache(const Model& model, const KvFormat& format) {
  return KvCache::create(model.kv_layout(format), format, model.backend(), model.state_layout());
}

/// The logits after the tokens, one row for each sequence.
std::vector<float> compute(Model& model, const std::vector<KvCache*>& caches,
                           const std::vector<std::vector<int32_t>>& tokens) {
  std::vector<ForwardSequence> batch;
  for (size_t i = 0; i < caches.size(); ++i) batch.push_back({.tokens = tokens[i], .kv = caches[i]});
  const mx::array logits = model.forward(batch);
  for (size_t i = 0; i < caches.size(); ++i) caches[i]->record_tokens(tokens[i]);
  return {logits.data<float>(), logits.data<float>() + logits.size()};
}

std::vector<int32_t> some_tokens(const Model& model, size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(n);
  for (int32_t& token : tokens) token = int32_t(random() % unsigned(model.info().vocab_size));
  return tokens;
}

void expect_near(std::span<const float> found, std::span<const float> alone, float bound) {
  ASSERT_EQ(found.size(), alone.size());
  for (size_t i = 0; i < found.size(); ++i) ASSERT_NEAR(found[i], alone[i], bound * (1 + std::abs(alone[i]) / 25)) << i;
}

void expect_same_choice(std::span<const float> found, std::span<const float> alone) {
  std::vector<float> sorted(alone.begin(), alone.end());
  std::ranges::nth_element(sorted, sorted.begin() + 1, std::greater());
  if (*std::ranges::max_element(alone) - sorted[1] >= kMargin) EXPECT_EQ(argmax(found), argmax(alone));
}

std::span<const float> floats_of(std::span<const std::byte> state) {
  return {reinterpret_cast<const float*>(state.data()), state.size() / sizeof(float)};
}

/// Windows, sinks, soft caps, rows of other layers, latents, recurrent layers, experts, scaled queries, biases.
class OfModel : public ::testing::TestWithParam<const char*> {};

TEST_P(OfModel, SequencesOfAnyLengthsHaveTheLogitsAndStatesInOnePassThatTheyHaveAlone) {
  const auto model = Model::load((kGoldens / GetParam()).string(), {.backend = Backend::kMlx});
  const size_t vocab = size_t(model->info().vocab_size);
  std::vector<KvFormat> formats{KvDtype::kF32};
  for (const KvBits bits : {KvBits{8, 8}, KvBits{4, 4}}) {
    KvFormat format(KvDtype::kF16, 8, 32);
    format.bits = bits;
    format = model->refined(format);
    try {
      model->kv_layout(format);
      formats.push_back(format);
    } catch (const Error&) {  // its heads are no multiple of 32 wide
    }
  }
  for (const KvFormat& format : formats) {
    SCOPED_TRACE(format.name());
    std::vector<std::unique_ptr<KvCache>> together, alone;
    std::vector<KvCache*> all;
    for (const size_t n : {5, 1, 40, 17, 90}) {
      KvCache& cache = *alone.emplace_back(make_cache(*model, format));
      compute(*model, {&cache}, {some_tokens(*model, n, unsigned(n))});
      all.push_back(together.emplace_back(cache.clone()).get());
    }
    // One row of each, then beside two rows of one and, at last, of the first three alone.
    for (unsigned step = 0; step < 4; ++step) {
      std::vector<KvCache*> caches = all;
      if (step == 3) caches.resize(3);
      std::vector<std::vector<int32_t>> tokens;
      for (size_t i = 0; i < caches.size(); ++i) {
        tokens.push_back(some_tokens(*model, step == 2 && i == 2 ? 2 : 1, 10 * step + unsigned(i)));
      }
      const std::vector<float> logits = compute(*model, caches, tokens);
      for (size_t i = 0; i < caches.size(); ++i) {
        const std::vector<float> expected = compute(*model, {alone[i].get()}, {tokens[i]});
        const std::span<const float> found = std::span(logits).subspan(i * vocab, vocab);
        expect_near(found, expected, kLogitBound);
        expect_same_choice(found, expected);
      }
    }
    for (size_t i = 0; i < all.size(); ++i) {
      EXPECT_EQ(all[i]->length(), alone[i]->length());
      expect_near(floats_of(all[i]->state()), floats_of(alone[i]->state()), kLogitBound);
      EXPECT_TRUE(all[i]->validate()) << all[i]->validate().reason;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Models, OfModel,
                         ::testing::Values("tiny-q4-g64", "tiny-qwen2", "tiny-qwen3", "tiny-gemma2", "tiny-gemma4",
                                           "tiny-gpt-oss", "tiny-deepseek-v2-q4", "tiny-mistral4", "tiny-lfm2",
                                           "tiny-qwen3-next", "tiny-nemotron-h-moe", "tiny-cohere2"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::ranges::replace(name, '-', '_');
                           return name;
                         });

class MlxBatch : public ::testing::Test {
 protected:
  MlxBatch() { testing::write_tiny_model(directory_); }
  ~MlxBatch() override { fs::remove_all(directory_); }

  const fs::path directory_ = fs::temp_directory_path() / ("torpor-test-batch-" + std::to_string(::getpid()));
};

TEST_F(MlxBatch, NoSequenceTakesMemoryForAnothersLength) {
  const auto model = Model::load(directory_.string(), {.backend = Backend::kMlx});
  std::vector<std::unique_ptr<KvCache>> caches;
  std::vector<KvCache*> all;
  for (int i = 0; i < 16; ++i) {
    all.push_back(caches.emplace_back(make_cache(*model, KvDtype::kF16)).get());
    compute(*model, {all.back()}, {some_tokens(*model, i == 0 ? 2000 : 3, unsigned(i))});
  }
  // What a pass takes beside what is there. Rows of f16 are attended in f32.
  const auto taken = [&](const std::vector<KvCache*>& some) {
    mx::reset_peak_memory();
    const size_t before = mx::get_active_memory();
    compute(*model, some, std::vector(some.size(), std::vector<int32_t>{1}));
    return mx::get_peak_memory() - before;
  };
  const size_t alone = taken({all[0]}), shorter = taken({all[1]}), together = taken(all);
  EXPECT_GT(alone, 2000u * 32 * sizeof(float));
  EXPECT_LT(together, alone + 16 * shorter);
  EXPECT_LT(16 * shorter, 4 * alone);  // so padding would be seen
}

/// Fails when it is evaluated.
class Failing final : public mx::UnaryPrimitive {
 public:
  explicit Failing(mx::Stream stream) : UnaryPrimitive(stream) {}
  void eval_cpu(const std::vector<mx::array>&, mx::array&) override { throw std::runtime_error("full"); }
  void eval_gpu(const std::vector<mx::array>&, mx::array&) override { throw std::runtime_error("full"); }
  const char* name() const override { return "Failing"; }
};

/// Another cache, whose rows can't be computed.
class FailingCache final : public KvAccess {
 public:
  explicit FailingCache(KvCache& cache) : cache_(cache) {}
  const KvFormat& format() const noexcept override { return cache_.format(); }
  const KvLayout& layout() const noexcept override { return cache_.layout(); }
  int length() const override { return cache_.length(); }
  std::span<const KvBuffer> reserve(int n) override { return cache_.reserve(n); }
  std::pair<mx::array, mx::array> update_and_fetch(int layer, const mx::array& k, const mx::array& v) override {
    const auto [keys, values] = cache_.update_and_fetch(layer, k, v);
    const mx::Stream stream = mx::default_stream(mx::default_device());
    return {keys, mx::array(values.shape(), values.dtype(), std::make_shared<Failing>(stream), {values})};
  }
  void advance(int n) override { cache_.advance(n); }

 private:
  KvCache& cache_;
};

TEST_F(MlxBatch, AfterAPassThatFailedForOneTheOthersAreComputedAsIfThereHadBeenNone) {
  const auto model = Model::load(directory_.string(), {.backend = Backend::kMlx});
  for (const char* name : {"f32", "q8 group 32 f16"}) {
    const KvFormat format = KvFormat::parse(name).value();
    for (const size_t held : {0, 1, 255, 256}) {  // rows that begin a tensor, go into it, end it and make it grow
      SCOPED_TRACE(held);
      const auto first = make_cache(*model, format), second = make_cache(*model, format);
      const auto other = make_cache(*model, format);
      if (held > 0) compute(*model, {first.get()}, {some_tokens(*model, held, 1)});
      if (held > 0) compute(*model, {other.get()}, {some_tokens(*model, held, 1)});
      FailingCache failing(*second);
      for (const size_t n : {1, 256}) {
        const std::vector<int32_t> tokens = some_tokens(*model, n, 2);
        const std::vector<ForwardSequence> batch{{.tokens = tokens, .kv = first.get()},
                                                 {.tokens = tokens, .kv = &failing}};
        EXPECT_THROW(model->forward(batch), Error);
        EXPECT_EQ(first->length(), int(held));
        EXPECT_TRUE(first->validate()) << first->validate().reason;
      }
      const std::vector<int32_t> next{7};
      EXPECT_EQ(compute(*model, {first.get()}, {next}), compute(*model, {other.get()}, {next}));
    }
  }
}

}  // namespace
}  // namespace torpor
