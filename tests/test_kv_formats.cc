// How rows are kept, on both backends: quantized as MLX quantizes, and let go where a window has left them behind.

#include <array>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <random>

#include <gtest/gtest.h>
#include <mlx/mlx.h>

#include "store_fixture.h"
#include "tiny_model.h"
#include "torpor/cache.h"
#include "torpor/error.h"
#include "torpor/model.h"
#include "torpor/store.h"

namespace torpor {
namespace {

namespace fs = std::filesystem;

// Two layers with heads of 32; in one of them each token sees 6.
const std::string kWindowed = TORPOR_SOURCE_DIR "/tests/goldens/model/tiny-window";
// Heads of 32, and a bias on keys.
const std::string kBiased = TORPOR_SOURCE_DIR "/tests/goldens/model/tiny-mixed-g128";

const std::string kGoldens = TORPOR_SOURCE_DIR "/tests/goldens/model/";

std::vector<int32_t> test_tokens(int n) {
  std::mt19937 random(5);
  std::vector<int32_t> tokens;
  for (int i = 0; i < n; ++i) tokens.push_back(int32_t(3 + random() % 120));
  return tokens;
}

std::vector<float> feed(Model& model, KvCache& cache, std::span<const int32_t> tokens) {
  const ForwardSequence sequence{tokens, &cache, false};
  const mx::array logits = model.forward({&sequence, 1});
  cache.record_tokens(tokens);
  return {logits.data<float>(), logits.data<float>() + logits.size()};
}

// Tensor `t` of a snapshot of one run, as an array.
mx::array tensor(const KvSnapshot& snapshot, size_t t) {
  const KvTensorSpec& spec = snapshot.layout.tensors[t];
  const std::byte* bytes = snapshot.run_bytes(0).data() + snapshot.layout.offset(t, snapshot.run_tokens(0));
  const mx::Shape shape{1, spec.n_kv_heads, snapshot.run_tokens(0), spec.dim};
  switch (spec.dtype) {
    case KvDtype::kF32: return mx::array(reinterpret_cast<const float*>(bytes), shape, mx::float32);
    case KvDtype::kF16: return mx::array(reinterpret_cast<const mx::float16_t*>(bytes), shape, mx::float16);
    case KvDtype::kBF16: return mx::array(reinterpret_cast<const mx::bfloat16_t*>(bytes), shape, mx::bfloat16);
    default: return mx::array(reinterpret_cast<const uint32_t*>(bytes), shape, mx::uint32);
  }
}

class Backends : public ::testing::TestWithParam<Backend> {
 protected:
  void SetUp() override {
    char pattern[] = "/tmp/torpor-test-XXXXXX";
    root_ = mkdtemp(pattern);
  }
  void TearDown() override { fs::remove_all(root_); }
  std::string root_;
};

TEST_P(Backends, RowsAreThoseOfMlxQuantize) {
  const auto model = Model::load(kWindowed, {.backend = GetParam()});
  const std::vector<int32_t> tokens = test_tokens(50);
  // The first layer's keys and values don't depend on how a cache keeps them.
  const auto exact = KvCache::create(model->kv_layout(KvDtype::kF32), KvDtype::kF32, GetParam());
  feed(*model, *exact, tokens);
  const KvSnapshot rows = exact->snapshot({});
  for (const KvFormat& format : {KvFormat(KvDtype::kF32, 8, 32), KvFormat(KvDtype::kF16, 4, 32), KvFormat(KvDtype::kBF16, 4, 32)}) {
    const auto cache = KvCache::create(model->kv_layout(format), format, GetParam());
    feed(*model, *cache, std::span(tokens).first(33));
    feed(*model, *cache, std::span(tokens).subspan(33));
    const KvSnapshot quantized = cache->snapshot({});
    for (size_t which : {0, 1}) {
      const std::vector<mx::array> expected =
          mx::quantize(tensor(rows, which), format.group, format.bits.keys, "affine", std::nullopt, mx::Device::cpu);
      for (size_t part : {0, 1, 2}) {
        const mx::array actual = tensor(quantized, 3 * which + part);
        EXPECT_TRUE(mx::array_equal(actual, mx::astype(expected[part], actual.dtype())).item<bool>())
            << format.name() << " " << quantized.layout.tensors[3 * which + part].name;
      }
    }
  }
}

// The same bytes hold 3.56 times the tokens: 4 bits, and 2 x 16 for every 64 elements, against 16.
TEST_P(Backends, FourBitsHoldThreeTimesTheAgentsOfF16) {
  const auto model = Model::load(kWindowed, {.backend = GetParam()});
  EXPECT_THROW(model->kv_layout({KvDtype::kF16, 4, 64}), Error);  // heads of 32
  EXPECT_THROW(model->kv_layout({KvDtype::kF16, 3, 32}), Error);
  EXPECT_THROW(model->kv_layout(KvDtype::kU32), Error);

  const auto wide = Model::load(TORPOR_SOURCE_DIR "/.models/smollm2-135m", {.backend = GetParam()});
  Store store(root_);
  std::vector<double> held, on_disk;
  for (const KvFormat& format : {KvFormat(KvDtype::kF16), KvFormat(KvDtype::kF16, 4)}) {
    KvSnapshot snapshot{.layout = wide->kv_layout(format), .tokens = test_tokens(512)};
    snapshot.identity.kv = format.name();
    const size_t size = snapshot.layout.offset(snapshot.layout.tensors.size(), kSegmentTokens);
    for (int i = 0; i < 2; ++i) {
      const auto buffer = allocate_heap_buffer(size);
      std::memset(buffer.get(), i, size);
      snapshot.add_run(kSegmentTokens, {buffer.get(), size}, buffer);
    }
    held.push_back(double(KvCache::restore(snapshot, GetParam())->nbytes()));
    store.save_agent_cache("a", snapshot, "m");
    on_disk.push_back(double(store.agent_info("a").bytes));
  }
  EXPECT_GT(held[0] / held[1], 3.5);
  EXPECT_GT(on_disk[0] / on_disk[1], 3.3);
}

TEST_P(Backends, AWindowBoundsWhatIsHeldAndNothingElseChanges) {
  for (const KvFormat& format : {KvFormat(KvDtype::kF16), KvFormat(KvDtype::kF16, 4, 32)}) {
    const auto model = Model::load(kWindowed, {.backend = GetParam()});
    const KvLayout layout = model->kv_layout(format);
    const std::vector<int32_t> tokens = test_tokens(1100);
    Identity identity = model->identity();
    identity.kv = format.name();
    Store store(root_ + "/" + std::to_string(format.bits.keys));
    const auto cache = KvCache::create(layout, format, GetParam());
    feed(*model, *cache, std::span(tokens).first(700));
    const auto whole = cache->clone();
    const KvSnapshot saved = cache->snapshot(identity);
    const SaveResult result = store.save_agent_cache("a", saved, "m");

    // What is on disk is let go of.
    const size_t before = cache->nbytes();
    for (size_t i = 0; i < result.segments.size(); ++i) cache->replace_run(int(i), store.map_segment(result.segments[i]));
    size_t bounded = 0;  // the last run of a layer with a window, all three of one without
    for (const KvTensorSpec& spec : layout.tensors) bounded += spec.bytes_per_token() * kSegmentTokens * (spec.window > 0 ? 1 : 3);
    EXPECT_EQ(before, 3 * kSegmentTokens * layout.bytes_per_token());
    EXPECT_LT(bounded, before);
    EXPECT_EQ(cache->nbytes(), bounded);
    EXPECT_TRUE(cache->can_truncate(600));
    // Kernels attend a mapping where it is, and every row of these was checked.
    EXPECT_EQ(cache->can_truncate(500), GetParam() == Backend::kKernels);

    // And so does a wake that reads no more than the window.
    LoadOptions options;
    options.map_rows = options.window_rows_only = true;
    Store other_process(store.root());  // it knows of no rows that were checked already
    const auto woken = KvCache::restore(other_process.load_agent_cache("a", options).snapshot, GetParam());
    EXPECT_EQ(woken->nbytes(), bounded);
    EXPECT_TRUE(woken->can_truncate(600));
    EXPECT_FALSE(woken->can_truncate(500));

    const auto rewound = whole->clone();
    rewound->truncate(600);
    const std::vector<float> expected = feed(*model, *whole, std::span(tokens).subspan(700));
    const KvSnapshot expected_rows = whole->snapshot(identity);
    for (KvCache* other : {cache.get(), woken.get()}) {
      const auto fork = other->clone();
      EXPECT_EQ(feed(*model, *other, std::span(tokens).subspan(700)), expected);
      const KvSnapshot rows = other->snapshot(identity);
      ASSERT_EQ(rows.n_runs(), expected_rows.n_runs());
      for (size_t i = 0; i < rows.n_runs(); ++i) {
        EXPECT_TRUE(std::ranges::equal(rows.run_bytes(i), expected_rows.run_bytes(i))) << "run " << i;
      }
      EXPECT_TRUE(validate_cache_structure(*other, &layout));
      fork->truncate(600);
      const auto again = rewound->clone();
      EXPECT_EQ(feed(*model, *fork, std::span(tokens).subspan(600, 20)),
                feed(*model, *again, std::span(tokens).subspan(600, 20)));
    }
  }
}

TEST_P(Backends, NamesOfFormatsAreReadAsTheyAreWritten) {
  const auto biased = Model::load(kBiased, {.backend = GetParam()});
  const auto plain = Model::load(kWindowed, {.backend = GetParam()});
  EXPECT_EQ(biased->refined(KvDtype::kF16).name(), "f16");
  EXPECT_EQ(biased->refined({KvDtype::kF16, 8}).name(), "q8 group 64 f16 bias-free");
  EXPECT_EQ(biased->refined({KvDtype::kF32, {8, 4}, 32}).name(), "q8,4 group 32 f32 bias-free rotated");
  EXPECT_EQ(plain->refined({KvDtype::kF16, 8}).name(), "q8 group 64 f16");
  EXPECT_EQ(plain->refined({KvDtype::kBF16, 4, 128}).name(), "q4 group 128 bf16 rotated");
  EXPECT_THROW(plain->kv_layout(biased->refined({KvDtype::kF16, 8, 32})), Error);  // no bias that keys could lack
  for (const Model* model : {biased.get(), plain.get()}) {
    for (const KvBits bits : {KvBits(0), KvBits(8), KvBits(4), KvBits(8, 4), KvBits(4, 8)}) {
      const KvFormat plain_rows(KvDtype::kBF16, bits, bits == 0 ? 64 : 32);
      for (const KvFormat& format : {plain_rows, model->refined({KvDtype::kF16, bits})}) {
        EXPECT_EQ(KvFormat::parse(format.name()), format) << format.name();
      }
    }
  }
  for (const char* name : {"", "q8", "q8,8 group 64 f16", "q8 group 64 f16 rotated", "f16 bias-free",
                           "q4 group 64 f16 rotated bias-free", "q4 group 64 f16 rotated ", "q0,4 group 64 f16",
                           "q8,4,4 group 64 f16"}) {
    EXPECT_FALSE(KvFormat::parse(name)) << name;
  }
}

// As agents of earlier versions are, and as new ones are.
TEST_P(Backends, AWokenCacheOfEveryFormatGoesOnAsIfItHadNeverStopped) {
  const auto model = Model::load(kBiased, {.backend = GetParam()});
  const std::vector<int32_t> tokens = test_tokens(320);
  for (const KvBits bits : {KvBits(8), KvBits(4), KvBits(8, 4), KvBits(4, 8)}) {
    const KvFormat plain(KvDtype::kF16, bits, 32);
    std::vector<float> of_plain;
    for (const KvFormat& format : {plain, model->refined(plain)}) {
      SCOPED_TRACE(format.name());
      Identity identity = model->identity();
      identity.kv = format.name();
      const auto cache = KvCache::create(model->kv_layout(format), format, GetParam());
      feed(*model, *cache, std::span(tokens).first(300));
      Store(root_).save_agent_cache("a", cache->snapshot(identity), "m");
      const auto copy = cache->clone();
      EXPECT_EQ(copy->format(), format);
      const std::vector<float> expected = feed(*model, *cache, std::span(tokens).subspan(300));
      EXPECT_EQ(feed(*model, *copy, std::span(tokens).subspan(300)), expected);
      const auto woken = KvCache::restore(Store(root_).load_agent_cache("a").snapshot, GetParam());
      EXPECT_EQ(feed(*model, *woken, std::span(tokens).subspan(300)), expected);
      EXPECT_NE(expected, of_plain);  // another method is another arithmetic
      of_plain = expected;

      // In small chunks, and beside an agent that begins otherwise.
      if (GetParam() != Backend::kKernels) continue;
      const auto chunks = KvCache::create(model->kv_layout(format), format, GetParam()), other = chunks->clone();
      for (size_t i = 0; i < 314; i += 7) {
        feed(*model, *chunks, std::span(tokens).subspan(i, std::min<size_t>(7, 314 - i)));
      }
      feed(*model, *other, std::span(tokens).subspan(100, 90));
      const std::vector<ForwardSequence> batch = {{std::span(tokens).first(5), other.get()},
                                                  {std::span(tokens).subspan(314), chunks.get()}};
      const mx::array logits = model->forward(batch);
      const auto* last = logits.data<float>() + expected.size();
      EXPECT_EQ(std::vector<float>(last, last + expected.size()), expected);
    }
  }
}

// Keys are divided by what queries are multiplied by. Where only one of them is, scores are others'.
TEST_P(Backends, KeysOf4BitsAreMoreExactThanPlainOnesWhereNormsLieFarApart) {
  testing::write_tiny_model(root_ + "/model", testing::TinyAttention::kNormed);
  const auto model = Model::load(root_ + "/model", {.backend = GetParam()});
  const std::vector<int32_t> tokens = test_tokens(90);
  const auto logits_of = [&](const KvFormat& format) {
    const auto cache = KvCache::create(model->kv_layout(format), format, GetParam());
    return feed(*model, *cache, tokens);
  };
  const std::vector<float> exact = logits_of(KvDtype::kF32);
  const auto error_of = [&](const KvFormat& format) {
    const std::vector<float> found = logits_of(format);
    double error = 0, size = 0;
    for (size_t i = 0; i < exact.size(); ++i) {
      error += std::pow(double(found[i]) - double(exact[i]), 2);
      size += std::pow(double(exact[i]), 2);
    }
    return std::sqrt(error / size);
  };
  const KvFormat plain(KvDtype::kF32, {4, 8}, 32);
  EXPECT_LT(error_of(model->refined(plain)), 0.6 * error_of(plain));
}

// mlx-lm refuses quantized rows of these; MLX's attention to the same rows, dequantized, doesn't.
TEST(Formats, SinksAndLatentsAreAttendedAsInMlxsAttentionWhateverTheFormat) {
  const std::vector<int32_t> tokens = test_tokens(90);
  for (const char* name : {"tiny-gpt-oss", "tiny-glm4-moe-lite"}) {
    for (const KvBits bits : {KvBits(), KvBits(8), KvBits(8, 4), KvBits(4)}) {
      std::vector<float> logits[2];
      for (const Backend backend : {Backend::kKernels, Backend::kMlx}) {
        const auto model = Model::load(kGoldens + name, {.backend = backend, .activations = Activations::kF32});
        const KvFormat format = model->refined(KvFormat(KvDtype::kF16, bits, 32));
        const auto cache = KvCache::create(model->kv_layout(format), format, backend);
        feed(*model, *cache, std::span(tokens).first(80));
        logits[backend == Backend::kMlx] = feed(*model, *cache, std::span(tokens).subspan(80));
      }
      double error = 0, size = 0;
      for (size_t i = 0; i < logits[0].size(); ++i) {
        error += std::pow(double(logits[0][i]) - double(logits[1][i]), 2);
        size += std::pow(double(logits[1][i]), 2);
      }
      EXPECT_LT(std::sqrt(error / size), 0.01) << name << " " << bits.keys << ", " << bits.values;
    }
  }
}

// The latents, and the dims that rotate, of one head, as mlx-lm has them.
TEST(Latents, AreKeptOnceAndWakeToTheSameBitsInChunksAndBesideOthers) {
  const auto model = Model::load(kGoldens + "tiny-glm4-moe-lite", {.backend = Backend::kKernels});
  const KvLayout plain = model->kv_layout(KvDtype::kF16);
  ASSERT_EQ(plain.tensors.size(), 6u);
  EXPECT_EQ(plain.tensors[2].name, "layer_1_keys");
  EXPECT_EQ(std::pair(plain.tensors[2].n_kv_heads, plain.tensors[2].dim), std::pair(1, 64));
  EXPECT_EQ(std::pair(plain.tensors[3].n_kv_heads, plain.tensors[3].dim), std::pair(1, 32));
  EXPECT_THROW(model->kv_layout(KvFormat(KvDtype::kF16, 8, 64)), Error);  // groups that the dims that rotate don't fill

  const std::vector<int32_t> tokens = test_tokens(1310);
  for (const KvBits bits : {KvBits(), KvBits(8), KvBits(4, 8), KvBits(4)}) {
    const KvFormat format = model->refined(KvFormat(KvDtype::kF16, bits, 32));
    SCOPED_TRACE(format.name());
    const auto create = [&] { return KvCache::create(model->kv_layout(format), format, Backend::kKernels); };
    Identity identity = model->identity();
    identity.kv = format.name();
    constexpr std::array<size_t, 4> kLengths{257, 1, 256, 1300};
    for (size_t at = 0; at < kLengths.size(); at += testing::every()) {
      const size_t n = kLengths[at];
      const auto cache = create(), chunks = create();
      feed(*model, *cache, std::span(tokens).first(n));
      const auto woken = KvCache::restore(cache->snapshot(identity), Backend::kKernels);
      const auto copy = cache->clone();
      const std::vector<float> expected = feed(*model, *cache, std::span(tokens).subspan(n, 5));
      EXPECT_EQ(feed(*model, *woken, std::span(tokens).subspan(n, 5)), expected) << n;
      for (size_t i = 0; i < n; i += 7) {
        feed(*model, *chunks, std::span(tokens).subspan(i, std::min<size_t>(7, n - i)));
      }
      // Beside one that holds the same rows, and computed again in chunks.
      const std::vector<ForwardSequence> batch = {{std::span(tokens).subspan(n, 2), copy.get()},
                                                  {std::span(tokens).subspan(n, 5), chunks.get()}};
      const mx::array logits = model->forward(batch);
      const auto* last = logits.data<float>() + expected.size();
      EXPECT_EQ(std::vector<float>(last, last + expected.size()), expected) << n;
    }
  }
}

TEST_P(Backends, CachesOfOtherMethodsAreNotComputedTogether) {
  const auto model = Model::load(kBiased, {.backend = GetParam()});
  const KvFormat plain(KvDtype::kF16, 4, 32), refined = model->refined(plain);
  const auto one = KvCache::create(model->kv_layout(plain), plain, GetParam());
  const auto other = KvCache::create(model->kv_layout(refined), refined, GetParam());
  const std::vector<int32_t> tokens = test_tokens(3);
  const std::vector<ForwardSequence> batch = {{tokens, one.get()}, {tokens, other.get()}};
  EXPECT_THROW(model->forward(batch), Error);
}

INSTANTIATE_TEST_SUITE_P(All, Backends, ::testing::Values(Backend::kKernels, Backend::kMlx),
                         [](const auto& backend) { return backend.param == Backend::kKernels ? "kernels" : "mlx"; });

}  // namespace
}  // namespace torpor
