#pragma once
/// attention() as its definition says it, in f64, and what its tests run it on.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/attention.h"
#include "kernels/compute.h"
#include "kernels/thread_pool.h"

namespace torpor::kernels {
namespace {

struct Options {
  int heads = 3, kv_heads = 1, dim = 64;
  int window = 0;
  float softcap = 0;
  bool sinks = false, norm = false, traditional = false;
  int rope_dims = -1;  // -1: all
  KvDtype dtype = KvDtype::kF16;
  KvBits bits = 0;
  int group = 64;
  bool key_bias = false, rotate = false;
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
  AffineElement(const AttentionSpec& spec, int bits, const std::byte* words, const std::byte* scales,
                const std::byte* biases, size_t at) {
    const size_t per_word = 32 / size_t(bits);
    uint32_t word;
    std::memcpy(&word, words + at / per_word * 4, 4);
    level = (word >> (at % per_word * size_t(bits))) & ((1u << bits) - 1);
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
    const auto bytes = [&](int bits) {
      return bits == 0 ? elements * kv_dtype_size(spec.kv_dtype) : elements * size_t(bits) / 8;
    };
    const size_t keys_size = bytes(spec.kv_bits.keys), values_size = bytes(spec.kv_bits.values);
    const size_t scales_size = spec.kv_bits == 0 ? 0 : elements / size_t(spec.kv_group) * kv_dtype_size(spec.kv_dtype);
    const int n = (tokens + kSegmentTokens - 1) / kSegmentTokens;
    for (int i = 0; i < n; ++i) {
      buffers_.emplace_back(keys_size + values_size + 4 * scales_size, std::byte{0xff});
      std::byte *keys = buffers_.back().data(), *values = keys + keys_size, *scales = values + values_size;
      if (spec.kv_bits == 0) {
        runs.push_back({keys, values});
      } else {
        runs.push_back({keys, values, scales, scales + scales_size, scales + 2 * scales_size,
                        scales + 3 * scales_size});
      }
    }
  }
  Cache(Cache&&) = default;
  bool operator==(const Cache& other) const { return buffers_ == other.buffers_; }
  std::vector<KvRunView> runs;

 private:
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
    // As large beside the signal as Qwen2.5's.
    for (int i = 0; i < o.kv_heads * o.dim; ++i) key_bias.push_back(20 * normal(random));
    if (o.key_bias) spec.key_bias = key_bias.data();
    spec.rotate_keys = o.rotate && o.bits.keys != 0;
    spec.rotate_values = o.rotate && o.bits.values != 0;
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
    if (spec.key_bias != nullptr) {
      for (size_t t = 0; t < size_t(n); ++t) {
        float* keys = qkv.data() + t * width() + out_width();
        for (size_t i = 0; i < key_bias.size(); ++i) keys[i] += key_bias[i];
      }
    }
    return qkv;
  }

  AttentionSpec spec;
  std::vector<float> sinks, q_norm, k_norm, key_bias;
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

/// A row times the matrix of the spec, by its definition: element (i, j) is -1 to the number of bits that i and j
/// share.
void rotate(std::vector<double>& row) {
  size_t size = 1;
  while (row.size() % (2 * size) == 0) size *= 2;
  const std::vector<double> x = row;
  for (size_t i = 0; i < row.size(); ++i) {
    double sum = 0;
    for (size_t j = 0; j < size; ++j) sum += (std::popcount(i % size & j) % 2 == 0 ? 1 : -1) * x[i / size * size + j];
    row[i] = sum / std::sqrt(double(size));
  }
}

/// What quantizing may change: half a level inside the range and one at the end that isn't met exactly (scale = edge /
/// rounded level, then a clamp), and the rounding of scale and bias to their dtype.
double affine_error(const AttentionSpec& spec, const AffineElement& e) {
  const double unit = spec.kv_dtype == KvDtype::kF16 ? 0x1p-11 : spec.kv_dtype == KvDtype::kBF16 ? 0x1p-8 : 0x1p-24;
  // Of rotated rows the range may leave out a quarter of what the elements reach, 2.5 levels on each side.
  const double levels = spec.rotate_keys || spec.rotate_values ? 3 : 1;
  return std::abs(e.scale) * (levels + 2 * unit) + unit * (std::abs(e.scale) * e.level + std::abs(e.bias));
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
      std::vector<float> own_key(k, k + dim);
      std::vector<double> bias(dim, 0.0), expected_value(v, v + dim), key_row(dim), value_row(dim);
      if (spec.key_bias != nullptr) {
        for (size_t i = 0; i < dim; ++i) own_key[i] -= spec.key_bias[h * dim + i];
        bias = prepared_head(spec, spec.key_bias + h * dim, nullptr, t);
      }
      std::vector<double> expected = prepared_head(spec, own_key.data(), spec.k_norm, t);
      if (spec.rotate_keys) rotate(expected);
      if (spec.rotate_values) rotate(expected_value);
      for (size_t i = 0; i < dim; ++i) {
        const size_t at = (h * kSegmentTokens + size_t(t % kSegmentTokens)) * dim + i;
        double key, value;
        if (spec.kv_bits != 0) {
          const AffineElement k_of(spec, spec.kv_bits.keys, run.keys, run.key_scales, run.key_biases, at);
          const AffineElement v_of(spec, spec.kv_bits.values, run.values, run.value_scales, run.value_biases, at);
          key = k_of.value();
          value = v_of.value();
          ASSERT_NEAR(key, expected[i], affine_error(spec, k_of) + 2e-6) << "key " << t << " " << i;
          ASSERT_NEAR(value, expected_value[i], affine_error(spec, v_of) + 2e-6) << "value " << t << " " << i;
        } else {
          key = load_element(run.keys, at, spec.kv_dtype);
          value = load_element(run.values, at, spec.kv_dtype);
          ASSERT_NEAR(key, expected[i], unit * std::abs(expected[i]) + 2e-6) << "key " << t << " " << i;
          ASSERT_EQ(value, stored(v[i], spec.kv_dtype)) << "value " << t << " " << i;
        }
        key_row[i] = key;
        value_row[i] = value;
      }
      if (spec.rotate_keys) rotate(key_row);
      if (spec.rotate_values) rotate(value_row);
      for (size_t i = 0; i < dim; ++i) {
        keys[(h * size_t(n) + size_t(t)) * dim + i] = key_row[i] + bias[i];
        values[(h * size_t(n) + size_t(t)) * dim + i] = value_row[i];
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
  // Values are of order 1, so are outputs; the errors are of f32 scores (a few units of 2^-24 times |score|) in exp. A
  // key bias makes the scores of a query 20 times larger.
  EXPECT_LT(worst, spec.key_bias == nullptr ? 1e-5 : 2e-4);
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

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
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

}  // namespace
}  // namespace torpor::kernels
