// attention() against a plain f64 reference, and its promise that a row's bits depend on its prefix alone.

#include <memory>
#include <string>
#include <tuple>

#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "attention_reference.h"
#include "kernels/primitives.h"
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

TEST(KernelsAttention, Quantized) {
  for (int dim : {32, 64, 96, 128, 256}) {
    for (int group : {32, 64, 128}) {
      if (dim % group != 0) continue;
      for (int bits : {8, 4}) {
        for (KvDtype dtype : {KvDtype::kF16, KvDtype::kBF16, KvDtype::kF32}) {
          SCOPED_TRACE(testing::Message() << dim << " group " << group << " bits " << bits << " " << kv_dtype_name(dtype));
          Options options;
          options.dim = dim;
          options.dtype = dtype;
          options.bits = bits;
          options.group = group;
          check_case(options, 135);
        }
      }
    }
  }
}

TEST(KernelsAttention, KeysAndValuesOfOtherBits) {
  for (const KvBits bits : {KvBits(8, 4), KvBits(4, 8)}) {
    for (int dim : {64, 96}) {
      SCOPED_TRACE(testing::Message() << dim << " bits " << bits.keys << "," << bits.values);
      Options options;
      options.dim = dim;
      options.bits = bits;
      options.group = 32;
      check_case(options, 135);
    }
  }
}

// Dims whose greatest power of two is smaller than they are, too.
TEST(KernelsAttention, RotatedRowsAndKeysWithoutTheirBias) {
  for (int dim : {32, 64, 96, 128, 160, 256}) {
    for (int variant = 0; variant < 6; ++variant) {
      SCOPED_TRACE(testing::Message() << dim << " variant " << variant);
      Options options;
      options.dim = dim;
      options.heads = 4;
      options.kv_heads = 2;
      options.group = 32;
      options.bits = variant % 3 == 0 ? KvBits(8, 4) : variant % 3 == 1 ? KvBits(4) : KvBits(8);
      options.rotate = variant != 2;
      options.key_bias = variant >= 2;
      if (variant == 3) options.window = 100;
      if (variant == 4) {
        options.traditional = true;
        options.softcap = 50;
      }
      if (variant == 5) options.rope_dims = dim / 2;
      check_case(options, variant == 3 ? 400 : 135);
    }
  }
}

TEST(KernelsAttention, QuantizedVariants) {
  for (int window : {0, 1, 100, 512}) {
    for (int variant = 0; variant < 3; ++variant) {
      SCOPED_TRACE(testing::Message() << "window " << window << " variant " << variant);
      Options options;
      options.window = window;
      options.bits = variant == 1 ? 4 : 8;
      options.dim = variant == 2 ? 128 : 64;
      options.group = variant == 1 ? 32 : 64;
      options.norm = options.sinks = variant == 1;
      options.softcap = variant == 2 ? 30.0f : 0.0f;
      options.heads = 4;
      options.kv_heads = 2;
      check_case(options, 700);
    }
  }
}

// Nothing between the input and the cache: what is stored must be what MLX makes of the same rows.
TEST(KernelsAttention, QuantizesAsMlxDoes) {
  namespace mx = mlx::core;
  constexpr int kTokens = 300;
  for (int bits : {8, 4}) {
    for (auto [dim, group] : {std::pair{64, 64}, {64, 32}, {128, 128}, {128, 64}, {256, 32}}) {
      Options options;
      options.heads = options.kv_heads = 2;
      options.dim = dim;
      options.rope_dims = 0;
      options.bits = bits;
      options.group = group;
      std::vector<float> source = Model(options).tokens(kTokens, unsigned(bits * dim + group));
      const size_t row = Model(options).width();
      for (int t = 0; t < kTokens; ++t) {  // of many kinds
        for (size_t i = 0; i < row; ++i) {
          float& x = source[size_t(t) * row + i];
          switch (t % 12) {
            case 0: x = 0; break;
            case 1: x = float(t) * 0.37f; break;                 // constant
            case 2: x = -2.5f; break;
            case 3: x = std::abs(x); break;
            case 4: x = -std::abs(x) - 3; break;
            case 5: x *= 1e-8f; break;                           // below the smallest scale
            case 6: x *= 1000; break;
            case 7: x += i % 32 == 7 ? 40.0f : 0.0f; break;      // outliers
            case 8: x = std::round(x * 4) / 8; break;            // ties
            case 9: x = i % 2 == 0 ? 1.0f : -1.0f; break;        // edges of equal magnitude
            default: break;
          }
        }
      }
      for (KvDtype dtype : {KvDtype::kF32, KvDtype::kF16, KvDtype::kBF16}) {
        SCOPED_TRACE(testing::Message() << dim << " group " << group << " bits " << bits << " " << kv_dtype_name(dtype));
        options.dtype = dtype;
        const Model model(options);
        Cache cache(model.spec, kTokens);
        run_in_chunks(ThreadPool::shared(), model, source, kTokens, 100, cache);
        const size_t width = size_t(dim), words = width * size_t(bits) / 8;
        const size_t scales = size_t(dim / group) * kv_dtype_size(dtype);
        const mx::Dtype type = dtype == KvDtype::kF32 ? mx::float32 : dtype == KvDtype::kF16 ? mx::float16 : mx::bfloat16;
        // [tokens][heads and kv heads][dim], keys and values at heads 2 to 5.
        const mx::array rows(source.data(), {kTokens, 6, dim}, mx::float32);
        std::vector<mx::array> parts = mx::quantize(rows, group, bits, "affine", std::nullopt, mx::Device::cpu);
        for (size_t i = 1; i < 3; ++i) parts[i] = mx::astype(parts[i], type, mx::Device::cpu);
        for (mx::array& part : parts) part = mx::contiguous(part, false, mx::Device::cpu);
        mx::eval(parts);
        const auto expect_equal = [&](const std::byte* got, size_t part, int t, size_t head, size_t size) {
          const auto* all = reinterpret_cast<const std::byte*>(part == 0 ? static_cast<const void*>(parts[0].data<uint32_t>())
                                                                         : parts[part].data<void>());
          const size_t at = size_t(kSegmentTokens) * (head % 2) + size_t(t % kSegmentTokens);
          ASSERT_EQ(0, std::memcmp(got + at * size, all + (size_t(t) * 6 + head) * size, size))
              << "part " << part << " token " << t << " head " << head;
        };
        for (int t = 0; t < kTokens; ++t) {
          const KvRunView& run = cache.runs[size_t(t / kSegmentTokens)];
          for (size_t head = 2; head < 6; ++head) {
            expect_equal(head < 4 ? run.keys : run.values, 0, t, head, words);
            expect_equal(head < 4 ? run.key_scales : run.value_scales, 1, t, head, scales);
            expect_equal(head < 4 ? run.key_biases : run.value_biases, 2, t, head, scales);
          }
        }
      }
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

// The primitive finds a layer's six tensors in a run by their offsets, at once or as a node of the graph, and leaves an input
// alone that others hold.
TEST(KernelsAttention, NodeOverQuantizedRuns) {
  namespace mx = mlx::core;
  Options options;
  options.bits = 4;
  const Model model(options);
  constexpr int kTokens = 300;
  const std::vector<float> source = model.tokens(kTokens, 9);
  Cache cache(model.spec, kTokens);
  const std::vector<float> expected = run_in_chunks(ThreadPool::shared(), model, source, kTokens, kTokens, cache);

  const size_t rows = size_t(kSegmentTokens) * 64 / 2, scales = size_t(kSegmentTokens) * 2, before = 128;
  std::vector<std::vector<std::byte>> memory(2, std::vector<std::byte>(before + 2 * (rows + 2 * scales), std::byte{0xff}));
  SequenceRuns sequence;
  sequence.n = kTokens;
  for (auto& bytes : memory) sequence.runs.push_back({bytes.data(), bytes.size(), nullptr});
  sequence.key_offset = before;  // as in a file: keys, their scales and biases, then the values'
  sequence.key_scale_offset = before + rows;
  sequence.key_bias_offset = sequence.key_scale_offset + scales;
  sequence.value_offset = sequence.key_bias_offset + scales;
  sequence.value_scale_offset = sequence.value_offset + rows;
  sequence.value_bias_offset = sequence.value_scale_offset + scales;
  const mx::array qkv(source.data(), {kTokens, int(model.width())}, mx::float32);
  const auto spec = std::make_shared<const AttentionSpec>(model.spec);
  const mx::array out = attention(qkv, spec, {sequence});
  ASSERT_TRUE(out.is_available());
  EXPECT_EQ(0, std::memcmp(out.data<float>(), expected.data(), expected.size() * sizeof(float)));
  EXPECT_EQ(0, std::memcmp(qkv.data<float>(), source.data(), source.size() * sizeof(float)));
  mx::array later = attention(qkv + mx::array(0.0f), spec, {sequence});
  EXPECT_FALSE(later.is_available());
  mx::eval(later);
  EXPECT_EQ(0, std::memcmp(later.data<float>(), expected.data(), expected.size() * sizeof(float)));
  for (size_t i = 0; i < 2; ++i) {
    const std::byte* at = memory[i].data();
    const KvRunView& run = cache.runs[i];
    EXPECT_EQ(0, std::memcmp(at + sequence.key_offset, run.keys, rows));
    EXPECT_EQ(0, std::memcmp(at + sequence.value_offset, run.values, rows));
    EXPECT_EQ(0, std::memcmp(at + sequence.key_scale_offset, run.key_scales, scales));
    EXPECT_EQ(0, std::memcmp(at + sequence.key_bias_offset, run.key_biases, scales));
    EXPECT_EQ(0, std::memcmp(at + sequence.value_scale_offset, run.value_scales, scales));
    EXPECT_EQ(0, std::memcmp(at + sequence.value_bias_offset, run.value_biases, scales));
    EXPECT_EQ(at[before - 1], std::byte{0xff});
  }
  sequence.runs[1].size -= 1;
  EXPECT_THROW(attention(qkv, spec, {sequence}), Error);
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

TEST(KernelsAttention, RejectsHeadsThatGroupsDontDivide) {
  const auto message = [](int dim, int bits, int group) -> std::string {
    Model model(Options{});
    model.spec.head_dim = dim;
    model.spec.kv_bits = bits;
    model.spec.kv_group = group;
    try {
      attention(nullptr, model.spec, {}, nullptr);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(message(64, 8, 64), "");
  EXPECT_NE(message(80, 8, 64).find("a head of 80 dims can't be quantized in groups of 64"), std::string::npos);
  EXPECT_NE(message(64, 4, 128).find("a head of 64 dims can't be quantized in groups of 128"), std::string::npos);
  EXPECT_NE(message(80, 8, 16).find("groups of 32, 64 or 128"), std::string::npos);
  EXPECT_NE(message(64, 6, 64).find("8 or 4 bits"), std::string::npos);

  Options options;
  options.bits = 8;
  const Model model(options);
  Cache cache(model.spec, 1);
  cache.runs[0].value_biases = nullptr;
  std::vector<float> qkv(model.width()), out(model.out_width());
  const AttentionSequence sequence{0, 1, 0, cache.runs};
  EXPECT_THROW(attention(qkv.data(), model.spec, std::span(&sequence, 1), out.data()), Error);
}

}  // namespace
}  // namespace torpor::kernels
