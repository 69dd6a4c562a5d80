// attention() against a plain f64 reference, and its promise that a row's bits depend on its prefix alone.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "kernels/attention.h"
#include "kernels/compute.h"
#include "kernels/primitives.h"
#include "kernels/thread_pool.h"
#include "torpor/error.h"

namespace torpor::kernels {
namespace {

struct Options {
  int heads = 3, kv_heads = 1, dim = 64;
  int window = 0;
  float softcap = 0;
  bool sinks = false, norm = false, traditional = false;
  int rope_dims = -1;  // -1: all
  KvDtype dtype = KvDtype::kF16;
  int bits = 0, group = 64;
};

/// Any value, as a 16-bit cache would round it. Written from the formats' definitions, not like the kernel.
double round_to(double x, int mantissa_bits, int min_exponent, double max) {
  if (x == 0) return x;
  const int exponent = std::max(std::ilogb(x), min_exponent);
  const double unit = std::ldexp(1.0, exponent - mantissa_bits);
  const double rounded = std::nearbyint(x / unit) * unit;
  return std::abs(rounded) > max ? std::copysign(std::numeric_limits<double>::infinity(), x) : rounded;
}
double stored(float x, KvDtype dtype) {
  if (dtype == KvDtype::kF16) return round_to(x, 10, -14, 65504);
  if (dtype == KvDtype::kBF16) return round_to(x, 7, -126, 3.4e38);
  return x;
}
double load_element(const std::byte* p, size_t i, KvDtype dtype) {
  if (dtype == KvDtype::kF32) {
    float f;
    std::memcpy(&f, p + i * 4, 4);
    return f;
  }
  uint16_t h;
  std::memcpy(&h, p + i * 2, 2);
  if (dtype == KvDtype::kBF16) {
    const uint32_t u = uint32_t(h) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  }
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  double value = exponent == 31  ? (mantissa != 0 ? std::nan("") : std::numeric_limits<double>::infinity())
                 : exponent == 0 ? std::ldexp(mantissa, -24)
                                 : std::ldexp(1024 + mantissa, exponent - 25);
  return (h & 0x8000) != 0 ? -value : value;
}

/// Element `at` of dequantized rows, in f64 from the packed words.
struct AffineElement {
  AffineElement(const AttentionSpec& spec, const std::byte* words, const std::byte* scales, const std::byte* biases, size_t at) {
    const size_t per_word = 32 / size_t(spec.kv_bits);
    uint32_t word;
    std::memcpy(&word, words + at / per_word * 4, 4);
    level = (word >> (at % per_word * size_t(spec.kv_bits))) & ((1u << spec.kv_bits) - 1);
    scale = load_element(scales, at / size_t(spec.kv_group), spec.kv_dtype);
    bias = load_element(biases, at / size_t(spec.kv_group), spec.kv_dtype);
  }
  double value() const { return scale * level + bias; }
  unsigned level;
  double scale, bias;
};

/// One layer's cache, filled with NaN so that a row read before it is written shows.
class Cache {
 public:
  Cache(const AttentionSpec& spec, int tokens) {
    const size_t elements = size_t(spec.n_kv_heads) * kSegmentTokens * size_t(spec.head_dim);
    rows_ = spec.kv_bits == 0 ? elements * kv_dtype_size(spec.kv_dtype) : elements * size_t(spec.kv_bits) / 8;
    scales_ = spec.kv_bits == 0 ? 0 : elements / size_t(spec.kv_group) * kv_dtype_size(spec.kv_dtype);
    const int n = (tokens + kSegmentTokens - 1) / kSegmentTokens;
    for (int i = 0; i < n; ++i) {
      buffers_.emplace_back(2 * rows_ + 4 * scales_, std::byte{0xff});
      std::byte *keys = buffers_.back().data(), *values = keys + rows_, *scales = values + rows_;
      if (spec.kv_bits == 0) {
        runs.push_back({keys, values});
      } else {
        runs.push_back({keys, values, scales, scales + scales_, scales + 2 * scales_, scales + 3 * scales_});
      }
    }
  }
  Cache(Cache&&) = default;
  bool operator==(const Cache& other) const { return buffers_ == other.buffers_; }
  std::vector<KvRunView> runs;

 private:
  size_t rows_, scales_;
  std::vector<std::vector<std::byte>> buffers_;
};

struct Model {
  explicit Model(const Options& o) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    spec.n_heads = o.heads;
    spec.n_kv_heads = o.kv_heads;
    spec.head_dim = o.dim;
    spec.scale = 1.0f / std::sqrt(float(o.dim));
    spec.window = o.window;
    spec.softcap = o.softcap;
    spec.kv_dtype = o.dtype;
    spec.kv_bits = o.bits;
    spec.kv_group = o.group;
    spec.norm_eps = 1e-6f;
    spec.rope.dims = o.rope_dims < 0 ? o.dim : o.rope_dims;
    spec.rope.traditional = o.traditional;
    for (int i = 0; i < spec.rope.dims / 2; ++i) {
      spec.rope.inv_freq.push_back(float(std::pow(10000.0, -2.0 * i / spec.rope.dims)));
    }
    for (int i = 0; i < o.heads; ++i) sinks.push_back(normal(random));
    for (int i = 0; i < o.dim; ++i) {
      q_norm.push_back(1 + 0.1f * normal(random));
      k_norm.push_back(1 + 0.1f * normal(random));
    }
    if (o.sinks) spec.sinks = sinks.data();
    if (o.norm) {
      spec.q_norm = q_norm.data();
      spec.k_norm = k_norm.data();
    }
  }
  size_t width() const { return size_t(spec.n_heads + 2 * spec.n_kv_heads) * size_t(spec.head_dim); }
  size_t out_width() const { return size_t(spec.n_heads) * size_t(spec.head_dim); }
  std::vector<float> tokens(int n, unsigned seed) const {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<float> qkv(size_t(n) * width());
    for (float& x : qkv) x = normal(random);
    return qkv;
  }

  AttentionSpec spec;
  std::vector<float> sinks, q_norm, k_norm;
};

std::vector<double> prepared_head(const AttentionSpec& spec, const float* x, const float* norm, int position) {
  const size_t dim = size_t(spec.head_dim), half = size_t(spec.rope.dims / 2);
  std::vector<double> y(x, x + dim);
  if (norm != nullptr) {
    double sum = 0;
    for (double v : y) sum += v * v;
    const double factor = 1 / std::sqrt(sum / double(dim) + double(spec.norm_eps));
    for (size_t i = 0; i < dim; ++i) y[i] *= factor * double(norm[i]);
  }
  for (size_t i = 0; i < half; ++i) {
    const double angle = double(position) * double(spec.rope.inv_freq[i]);
    double& a = y[spec.rope.traditional ? 2 * i : i];
    double& b = y[spec.rope.traditional ? 2 * i + 1 : i + half];
    const double a0 = a, b0 = b;
    a = a0 * std::cos(angle) - b0 * std::sin(angle);
    b = b0 * std::cos(angle) + a0 * std::sin(angle);
  }
  return y;
}

/// What quantizing may change: half a level inside the range and one at the end that isn't met exactly (scale = edge /
/// rounded level, then a clamp), and the rounding of scale and bias to their dtype.
double affine_error(const AttentionSpec& spec, const AffineElement& e) {
  const double unit = spec.kv_dtype == KvDtype::kF16 ? 0x1p-11 : spec.kv_dtype == KvDtype::kBF16 ? 0x1p-8 : 0x1p-24;
  return std::abs(e.scale) * (1 + 2 * unit) + unit * (std::abs(e.scale) * e.level + std::abs(e.bias));
}

/// Checks the cache's rows against the reference, then the outputs, computed in f64 from the rows as they are stored.
void expect_matches_reference(const Model& model, const std::vector<float>& qkv, int n, const Cache& cache,
                              const std::vector<float>& out, const std::vector<int>& queries) {
  const AttentionSpec& spec = model.spec;
  const size_t dim = size_t(spec.head_dim), heads = size_t(spec.n_heads), kv_heads = size_t(spec.n_kv_heads);
  // A rounding unit of the cache's dtype, plus what f32 arithmetic before the rounding may change.
  const double unit = spec.kv_dtype == KvDtype::kF16 ? 0x1p-10 : spec.kv_dtype == KvDtype::kBF16 ? 0x1p-7 : 0;
  std::vector<double> keys(kv_heads * size_t(n) * dim), values(keys.size());
  for (int t = 0; t < n; ++t) {
    const KvRunView& run = cache.runs[size_t(t / kSegmentTokens)];
    for (size_t h = 0; h < kv_heads; ++h) {
      const float* k = qkv.data() + size_t(t) * model.width() + (heads + h) * dim;
      const float* v = k + kv_heads * dim;
      const std::vector<double> expected = prepared_head(spec, k, spec.k_norm, t);
      for (size_t i = 0; i < dim; ++i) {
        const size_t at = (h * kSegmentTokens + size_t(t % kSegmentTokens)) * dim + i;
        double key, value;
        if (spec.kv_bits != 0) {
          const AffineElement k_of(spec, run.keys, run.key_scales, run.key_biases, at);
          const AffineElement v_of(spec, run.values, run.value_scales, run.value_biases, at);
          key = k_of.value();
          value = v_of.value();
          ASSERT_NEAR(key, expected[i], affine_error(spec, k_of) + 2e-6) << "key " << t << " " << i;
          ASSERT_NEAR(value, double(v[i]), affine_error(spec, v_of) + 2e-6) << "value " << t << " " << i;
        } else {
          key = load_element(run.keys, at, spec.kv_dtype);
          value = load_element(run.values, at, spec.kv_dtype);
          ASSERT_NEAR(key, expected[i], unit * std::abs(expected[i]) + 2e-6) << "key " << t << " " << i;
          ASSERT_EQ(value, stored(v[i], spec.kv_dtype)) << "value " << t << " " << i;
        }
        keys[(h * size_t(n) + size_t(t)) * dim + i] = key;
        values[(h * size_t(n) + size_t(t)) * dim + i] = value;
      }
    }
  }
  double worst = 0;
  for (int t : queries) {
    const int first = spec.window > 0 ? std::max(0, t - spec.window + 1) : 0;
    for (size_t h = 0; h < heads; ++h) {
      const std::vector<double> q = prepared_head(spec, qkv.data() + size_t(t) * model.width() + h * dim, spec.q_norm, t);
      const size_t kv = h / (heads / kv_heads);
      std::vector<double> scores;
      double top = spec.sinks != nullptr ? double(spec.sinks[h]) : -std::numeric_limits<double>::infinity();
      for (int j = first; j <= t; ++j) {
        double score = 0;
        for (size_t i = 0; i < dim; ++i) score += q[i] * keys[(kv * size_t(n) + size_t(j)) * dim + i];
        score *= double(spec.scale);
        if (spec.softcap > 0) score = double(spec.softcap) * std::tanh(score / double(spec.softcap));
        scores.push_back(score);
        top = std::max(top, score);
      }
      double sum = spec.sinks != nullptr ? std::exp(double(spec.sinks[h]) - top) : 0;
      std::vector<double> expected(dim, 0.0);
      for (int j = first; j <= t; ++j) {
        const double p = std::exp(scores[size_t(j - first)] - top);
        sum += p;
        for (size_t i = 0; i < dim; ++i) expected[i] += p * values[(kv * size_t(n) + size_t(j)) * dim + i];
      }
      for (size_t i = 0; i < dim; ++i) {
        const double got = double(out[size_t(t) * model.out_width() + h * dim + i]);
        ASSERT_FALSE(std::isnan(got)) << t << " " << h << " " << i;
        worst = std::max(worst, std::abs(got - expected[i] / sum));
      }
    }
  }
  // Values are of order 1, so are outputs; the errors are of f32 scores (a few units of 2^-24 times |score|) in exp.
  EXPECT_LT(worst, 1e-5);
}

std::vector<float> run_in_chunks(ThreadPool& pool, const Model& model, const std::vector<float>& source, int n, int chunk,
                                 Cache& cache) {
  std::vector<float> qkv = source, out(size_t(n) * model.out_width(), std::nanf(""));
  for (int first = 0; first < n; first += chunk) {
    const AttentionSequence sequence{first, std::min(chunk, n - first), first, cache.runs};
    attention_on(pool, qkv.data(), model.spec, std::span(&sequence, 1), out.data());
  }
  return out;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

std::vector<int> some_queries(int n) {
  std::vector<int> queries;
  for (int t : {0, 1, 2, 5, 15, 63, 64, 65, 127, 200, 255, 256, 300, 511, 512, 513, 600, 1023, 1024}) {
    if (t < n - 1) queries.push_back(t);
  }
  queries.push_back(n - 1);
  return queries;
}

void check_case(const Options& options, int n) {
  const Model model(options);
  const std::vector<float> source = model.tokens(n, 11);
  Cache cache(model.spec, n);
  const std::vector<float> out = run_in_chunks(ThreadPool::shared(), model, source, n, n, cache);
  expect_matches_reference(model, source, n, cache, out, some_queries(n));
}

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
  for (int variant = 0; variant < 10; ++variant) {
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

void check_neighbours(int bits) {
  Options options;
  options.bits = bits;
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
    check_neighbours(bits);
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

// The graph node finds a layer's six tensors in a run by their offsets.
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
  mx::array out = attention(qkv, spec, {sequence});
  mx::eval(out);
  EXPECT_EQ(0, std::memcmp(out.data<float>(), expected.data(), expected.size() * sizeof(float)));
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

TEST(KernelsElementwise, RmsNorm) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (int k : {1, 3, 8, 31, 576, 577, 2048}) {
    for (int m : {0, 1, 2, 75}) {
      const size_t width = size_t(k);
      std::vector<float> x(size_t(m) * width), weight(width), y(x.size()), alone(width);
      for (float& v : x) v = normal(random);
      for (float& v : weight) v = normal(random);
      rms_norm(x.data(), m, k, weight.data(), 1e-5f, y.data());
      for (int r = 0; r < m; ++r) {
        double sum = 0;
        for (int i = 0; i < k; ++i) sum += double(x[size_t(r * k + i)]) * double(x[size_t(r * k + i)]);
        const double factor = 1 / std::sqrt(sum / k + 1e-5);
        for (int i = 0; i < k; ++i) {
          const double expected = double(x[size_t(r * k + i)]) * factor * double(weight[size_t(i)]);
          ASSERT_NEAR(double(y[size_t(r * k + i)]), expected, 2e-6 * std::abs(expected) + 1e-12);
        }
        rms_norm(x.data() + r * k, 1, k, weight.data(), 1e-5f, alone.data());
        ASSERT_EQ(0, std::memcmp(alone.data(), y.data() + r * k, size_t(k) * sizeof(float)));
      }
    }
  }
}

TEST(KernelsElementwise, Argmax) {
  EXPECT_EQ(-1, argmax(nullptr, 0));
  std::mt19937 random(1);
  for (int n : {1, 2, 7, 8, 9, 100, 49152, 49157}) {
    std::vector<float> values(static_cast<size_t>(n));
    for (int repeat = 0; repeat < 20; ++repeat) {
      for (float& v : values) v = float(int(random() % 50)) - 60;  // many ties
      EXPECT_EQ(std::max_element(values.begin(), values.end()) - values.begin(), argmax(values.data(), n)) << n;
    }
  }
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  EXPECT_EQ(0, argmax(std::vector<float>(20, -infinity).data(), 20));
  EXPECT_EQ(0, argmax(std::vector<float>(20, nan).data(), 20));
  std::vector<float> mixed(20, nan);
  mixed[13] = -5;
  EXPECT_EQ(13, argmax(mixed.data(), 20));
}

TEST(KernelsElementwise, Embedding) {
  const int n = 50, k = 64;
  std::vector<float> weight(size_t(n * k));
  for (size_t i = 0; i < weight.size(); ++i) weight[i] = float(i % 251) - 100;
  WeightSource source;
  source.n = n;
  source.k = k;
  source.weight = weight.data();
  const auto packed = PackedLinear::pack({source});
  const std::vector<int32_t> tokens = {49, 0, 7, 7};
  std::vector<float> y(tokens.size() * size_t(k));
  embedding(tokens.data(), int(tokens.size()), *packed, y.data());
  for (size_t t = 0; t < tokens.size(); ++t) {
    for (size_t i = 0; i < size_t(k); ++i) EXPECT_EQ(weight[size_t(tokens[t] * k) + i], y[t * size_t(k) + i]);
  }
  const int32_t outside = 50;
  EXPECT_THROW(embedding(&outside, 1, *packed, y.data()), Error);
}

}  // namespace
}  // namespace torpor::kernels
