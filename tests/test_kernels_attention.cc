// attention() against a plain f64 reference, and its promise that a row's bits depend on its prefix alone.

#include "attention_reference.h"
#include "torpor/error.h"

namespace torpor::kernels {
namespace {

TEST(KernelsAttention, HeadDims) {
  for (int dim : {64, 80, 96, 128, 256, 8, 20, 33, 72}) {
    for (KvDtype dtype : {KvDtype::kF16, KvDtype::kBF16, KvDtype::kF32}) {
      SCOPED_TRACE(testing::Message() << dim << " " << kv_dtype_name(dtype));
      Options options;
      options.dim = dim;
      options.dtype = dtype;
      options.rope_dims = dim / 2 * 2;
      check_case(options, 135);
    }
  }
}

TEST(KernelsAttention, HeadCounts) {
  for (auto [heads, kv_heads] : {std::pair{1, 1}, {4, 4}, {9, 3}, {6, 3}, {8, 1}, {16, 2}, {7, 1}}) {
    SCOPED_TRACE(testing::Message() << heads << " " << kv_heads);
    Options options;
    options.heads = heads;
    options.kv_heads = kv_heads;
    check_case(options, 201);
  }
}

TEST(KernelsAttention, Lengths) {
  for (int n : {1, 2, 5, 7, 63, 64, 65, 128, 255, 256, 257, 511, 513, 1100}) {
    SCOPED_TRACE(n);
    check_case(Options{}, n);
  }
}

TEST(KernelsAttention, Variants) {
  for (int window : {0, 1, 3, 64, 100, 512, 5000}) {
    for (int variant = 0; variant < 5; ++variant) {
      SCOPED_TRACE(testing::Message() << "window " << window << " variant " << variant);
      Options options;
      options.window = window;
      options.dtype = KvDtype::kBF16;
      if (variant == 1) options.softcap = 2.5f;
      if (variant == 2) options.sinks = true;
      if (variant == 3) options.norm = true;
      if (variant == 4) {
        options.traditional = true;
        options.rope_dims = 32;
        options.softcap = 50;
        options.sinks = true;
        options.norm = true;
      }
      check_case(options, 700);
    }
  }
}

TEST(KernelsAttention, NoRotation) {
  Options options;
  options.rope_dims = 0;
  check_case(options, 70);
}

// Values at the edges of the 16-bit formats go through a cache as IEEE 754 rounds them.
TEST(KernelsAttention, StoresRounded) {
  for (KvDtype dtype : {KvDtype::kF16, KvDtype::kBF16}) {
    Options options;
    options.heads = 1;
    options.dtype = dtype;
    const Model model(options);
    std::vector<float> qkv(model.width(), 0.0f);
    std::mt19937 random(3);
    std::vector<float> values = {0.0f,      1.0f,       65504.0f, 65519.0f, 65520.0f, 1e6f,    0x1p-14f, 0x1p-24f, 0x1p-25f,
                                 0x1.8p-25f, 0x1.8p-24f, 0x1p-15f, 1.00048828125f, 1.00146484375f, 0x1.ffcp-15f, 0x1.ffep-15f,
                                 0x1.fffp-15f};
    while (values.size() < 64) {
      values.push_back(std::ldexp(1 + float(random() % 4096) / 4096, -26 + int(random() % 14)));
    }
    for (size_t i = 0; i < 64; ++i) qkv[2 * 64 + i] = i % 2 == 0 ? values[i] : -values[i];
    const std::vector<float> source = qkv;
    Cache cache(model.spec, 1);
    std::vector<float> out(model.out_width());
    const AttentionSequence sequence{0, 1, 0, cache.runs};
    attention(qkv.data(), model.spec, std::span(&sequence, 1), out.data());
    for (size_t i = 0; i < 64; ++i) {
      const double expected = stored(source[2 * 64 + i], dtype);
      EXPECT_EQ(load_element(cache.runs[0].values, i, dtype), expected) << source[2 * 64 + i];
      EXPECT_EQ(double(out[i]), expected) << source[2 * 64 + i];  // one key: the output is its value as stored
    }
  }
}

TEST(KernelsAttention, BitsDependOnNeitherChunksNorThreads) {
  ThreadPool one(1), two(2), three(3);
  for (int variant = 0; variant < 14; ++variant) {
    SCOPED_TRACE(variant);
    Options options;
    options.heads = 9;
    options.kv_heads = 3;
    if (variant == 1) options.window = 100;
    if (variant == 2) {
      options.dtype = KvDtype::kF32;
      options.dim = 80;
      options.softcap = 30;
    }
    if (variant == 3) {
      options.sinks = options.norm = true;
      options.dtype = KvDtype::kBF16;
      options.window = 300;
    }
    if (variant == 4) {
      options.heads = 8;
      options.kv_heads = 1;
      options.dim = 256;
    }
    if (variant == 5) {
      options.heads = options.kv_heads = 2;
      options.dim = 96;
      options.window = 1;
    }
    if (variant >= 6) {  // 8 and 4 bits, head dims 64 and 128
      options.bits = variant % 2 == 0 ? 8 : 4;
      options.dim = variant < 8 ? 64 : 128;
      options.group = variant == 7 ? 32 : 64;
      options.dtype = variant == 9 ? KvDtype::kBF16 : KvDtype::kF16;
      options.window = variant == 8 ? 300 : 0;
    }
    if (variant >= 10) {
      options.bits = variant == 10 ? KvBits(8, 4) : KvBits(4);
      options.rotate = variant != 12;
      options.key_bias = variant >= 12;
    }
    const Model model(options);
    const int n = variant == 0 ? 1100 : 580;  // more than one superblock
    const std::vector<float> source = model.tokens(n, unsigned(20 + variant));
    Cache expected_cache(model.spec, n);
    const std::vector<float> expected = run_in_chunks(one, model, source, n, n, expected_cache);
    for (ThreadPool* pool : {&one, &two, &three}) {
      for (int chunk : {1, 7, 64, 512, n}) {
        if (pool == &three && chunk != 7) continue;
        Cache cache(model.spec, n);
        const std::vector<float> out = run_in_chunks(*pool, model, source, n, chunk, cache);
        EXPECT_TRUE(same_bits(out, expected)) << "threads " << pool->size() << " chunk " << chunk;
        EXPECT_TRUE(cache == expected_cache) << "threads " << pool->size() << " chunk " << chunk;
      }
    }
  }
}

void check_neighbours(const KvBits& bits, bool refined) {
  Options options;
  options.bits = bits;
  options.rotate = options.key_bias = refined;
  options.heads = 9;
  options.kv_heads = 3;
  options.window = 700;
  const Model model(options);
  const std::vector<int> before = {0, 1, 700, 63, 256, 1023, 300, 5}, now = {3, 1, 1, 70, 0, 2, 200, 1};
  ThreadPool one(1), two(2);
  for (ThreadPool* pool : {&one, &two}) {
    std::vector<Cache> alone, together;
    std::vector<std::vector<float>> sources, expected;
    std::vector<float> batch(5 * model.width(), 0.0f);  // the first rows belong to nobody
    std::vector<AttentionSequence> sequences;
    for (size_t i = 0; i < before.size(); ++i) {
      const int n = before[i] + now[i];
      sources.push_back(model.tokens(n, unsigned(40 + i)));
      for (std::vector<Cache>* caches : {&alone, &together}) {
        caches->emplace_back(model.spec, n);
        if (before[i] != 0) run_in_chunks(one, model, sources.back(), before[i], before[i], caches->back());
      }
      std::vector<float> rows(sources.back().begin() + std::ptrdiff_t(size_t(before[i]) * model.width()),
                              sources.back().end());
      sequences.push_back({int(batch.size() / model.width()), now[i], before[i], together[i].runs});
      batch.insert(batch.end(), rows.begin(), rows.end());
      expected.emplace_back(size_t(now[i]) * model.out_width());
      const AttentionSequence sequence{0, now[i], before[i], alone[i].runs};
      attention_on(one, rows.data(), model.spec, std::span(&sequence, 1), expected.back().data());
    }
    for (size_t i = 0; i < together.size(); ++i) sequences[i].runs = together[i].runs;
    std::vector<float> out(batch.size() / model.width() * model.out_width(), 123.0f);
    std::reverse(sequences.begin(), sequences.end());
    attention_on(*pool, batch.data(), model.spec, sequences, out.data());
    std::reverse(sequences.begin(), sequences.end());
    for (size_t i = 0; i < sequences.size(); ++i) {
      const auto from = out.begin() + std::ptrdiff_t(size_t(sequences[i].row) * model.out_width());
      const std::vector<float> part(from, from + std::ptrdiff_t(size_t(now[i]) * model.out_width()));
      EXPECT_TRUE(same_bits(part, expected[i])) << i;
      EXPECT_TRUE(together[i] == alone[i]) << i;
    }
    EXPECT_EQ(out[0], 123.0f);
  }
}

TEST(KernelsAttention, BitsDependOnNoNeighbour) {
  for (int bits : {0, 8, 4}) {
    SCOPED_TRACE(bits);
    check_neighbours(bits, false);
  }
  check_neighbours({8, 4}, true);
  check_neighbours(4, true);
}

// As agents of one prompt, forked anywhere, beside one that is still at its own: whole superblocks in common, or none.
TEST(KernelsAttention, SequencesThatShareRunsHaveTheBitsOfAlone) {
  ThreadPool one(1), two(2);
  for (unsigned seed = 0; seed < 12; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    const auto any = [&](int n) { return int(random() % unsigned(n)); };
    Options options;
    options.kv_heads = 1 + any(2);
    options.heads = options.kv_heads * (1 + any(4));
    const KvBits bits[] = {0, 0, 0, 8, 4, {8, 4}};
    options.bits = bits[seed % 6];
    options.dtype = seed % 6 == 0 ? KvDtype::kF32 : seed % 6 == 1 ? KvDtype::kBF16 : KvDtype::kF16;
    options.dim = options.bits == 0 ? 24 + 8 * any(6) : 64;
    options.group = any(2) == 0 ? 32 : 64;
    options.rotate = options.key_bias = options.bits != 0 && any(2) == 0;
    options.window = any(3) == 0 ? 300 + any(900) : 0;
    options.softcap = any(3) == 0 ? 20.0f : 0.0f;
    const Model model(options);
    const int prompt_runs = 2 + any(4), prompt_tokens = prompt_runs * kSegmentTokens;
    const Cache prompt = [&] {
      Cache cache(model.spec, prompt_tokens);
      run_in_chunks(two, model, model.tokens(prompt_tokens, 100 + seed), prompt_tokens, 512, cache);
      return cache;
    }();
    std::vector<Cache> caches;
    std::vector<AttentionSequence> sequences;
    std::vector<float> batch, expected;
    for (int i = 0, n_agents = 2 + any(6); i < n_agents; ++i) {
      const int shared_runs = any(4) == 0 ? any(prompt_runs + 1) : prompt_runs, shared = shared_runs * kSegmentTokens;
      const int before = shared + any(300), n = any(6) == 0 ? 70 : 1 + any(4);
      caches.emplace_back(model.spec, before + n);
      std::copy(prompt.runs.begin(), prompt.runs.begin() + shared_runs, caches.back().runs.begin());
      std::vector<float> rows = model.tokens(before - shared + n, 200 + unsigned(i));
      std::vector<float> out(size_t(before - shared) * model.out_width());
      const AttentionSequence prefill{0, before - shared, shared, caches.back().runs};
      attention_on(one, rows.data(), model.spec, std::span(&prefill, 1), out.data());
      rows.erase(rows.begin(), rows.begin() + ptrdiff_t(size_t(before - shared) * model.width()));
      sequences.push_back({int(batch.size() / model.width()), n, before, caches.back().runs});
      batch.insert(batch.end(), rows.begin(), rows.end());
      out.resize(size_t(n) * model.out_width());
      const AttentionSequence alone{0, n, before, caches.back().runs};
      attention_on(one, rows.data(), model.spec, std::span(&alone, 1), out.data());
      expected.insert(expected.end(), out.begin(), out.end());
    }
    for (size_t i = 0; i < caches.size(); ++i) sequences[i].runs = caches[i].runs;
    for (ThreadPool* pool : {&one, &two}) {
      std::vector<float> qkv = batch, out(expected.size());
      attention_on(*pool, qkv.data(), model.spec, sequences, out.data());
      EXPECT_TRUE(same_bits(out, expected)) << "threads " << pool->size();
    }
  }
}

// What a row may not see has no influence, whatever it is.
TEST(KernelsAttention, InfiniteValuesOfLaterTokensDontReachBack) {
  const Model model(Options{});
  std::vector<float> source = model.tokens(70, 5);
  Cache clean_cache(model.spec, 70), cache(model.spec, 70);
  const std::vector<float> clean = run_in_chunks(ThreadPool::shared(), model, source, 66, 66, clean_cache);
  for (int t = 66; t < 70; ++t) {
    for (size_t i = 3 * 64; i < 5 * 64; ++i) source[size_t(t) * model.width() + i] = 1e9f;  // inf in f16
  }
  std::vector<float> out = run_in_chunks(ThreadPool::shared(), model, source, 70, 70, cache);
  out.resize(clean.size());
  const std::vector<float> part(clean.begin(), clean.begin() + std::ptrdiff_t(66 * model.out_width()));
  out.resize(part.size());
  EXPECT_TRUE(same_bits(out, part));
}

// Poison stays visible: a key that is no number makes every output that sees it none, and no other one.
TEST(KernelsAttention, AKeyThatIsNoNumberReachesEachOutputThatSeesIt) {
  constexpr int kPoisoned = 30;
  for (const float softcap : {0.0f, 50.0f}) {
    for (const KvDtype dtype : {KvDtype::kF16, KvDtype::kBF16, KvDtype::kF32}) {
      SCOPED_TRACE(testing::Message() << softcap << " " << kv_dtype_name(dtype));
      Options options;
      options.softcap = softcap;
      options.dtype = dtype;
      const Model model(options);
      std::vector<float> source = model.tokens(140, 5);
      Cache clean_cache(model.spec, 140), cache(model.spec, 140);
      const std::vector<float> clean = run_in_chunks(ThreadPool::shared(), model, source, 140, 140, clean_cache);
      source[size_t(kPoisoned) * model.width() + 3 * 64 + 5] = std::numeric_limits<float>::quiet_NaN();
      const std::vector<float> out = run_in_chunks(ThreadPool::shared(), model, source, 140, 140, cache);
      const size_t before = kPoisoned * model.out_width();
      EXPECT_EQ(0, std::memcmp(out.data(), clean.data(), before * sizeof(float)));
      EXPECT_TRUE(std::all_of(out.begin() + std::ptrdiff_t(before), out.end(), [](float x) { return std::isnan(x); }));
    }
  }
}

TEST(KernelsAttention, RunsBehindTheWindowMayBeMissing) {
  for (int bits : {0, 8, 4}) {
    Options options;
    options.window = 100;
    options.bits = bits;
    const Model model(options);
    const std::vector<float> source = model.tokens(800, 5);
    Cache cache(model.spec, 800);
    const std::vector<float> expected = run_in_chunks(ThreadPool::shared(), model, source, 800, 800, cache);
    std::vector<float> qkv = source, out(expected.size());
    std::vector<KvRunView> runs = cache.runs;
    runs[0] = runs[1] = {nullptr, nullptr};
    const AttentionSequence sequence{700, 100, 700, runs};
    attention(qkv.data(), model.spec, std::span(&sequence, 1), out.data());
    EXPECT_EQ(0, std::memcmp(out.data() + 700 * model.out_width(), expected.data() + 700 * model.out_width(),
                             100 * model.out_width() * sizeof(float)));
  }
}

TEST(KernelsAttention, NothingToDo) {
  const Model model(Options{});
  attention(nullptr, model.spec, {}, nullptr);
  const AttentionSequence empty{0, 0, 10, {}};
  attention(nullptr, model.spec, std::span(&empty, 1), nullptr);
}

TEST(KernelsAttention, RejectsWhatCantBe) {
  Model model(Options{});
  std::vector<float> qkv(model.width()), out(model.out_width());
  const AttentionSequence uncovered{0, 1, 0, {}};
  EXPECT_THROW(attention(qkv.data(), model.spec, std::span(&uncovered, 1), out.data()), Error);
  model.spec.kv_dtype = KvDtype::kU32;
  EXPECT_THROW(attention(qkv.data(), model.spec, {}, out.data()), Error);
}

}  // namespace
}  // namespace torpor::kernels
