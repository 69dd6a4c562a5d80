// RMSNorm, argmax, gates, the weights of logits and the embedding lookup against plain loops.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "guarded_memory.h"
#include "kernels/compute.h"
#include "kernels/recurrent.h"
#include "kernels/thread_pool.h"
#include "kernels/weigh_logits.h"
#include "torpor/error.h"

namespace torpor::kernels {
namespace {

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
  EXPECT_EQ(-1, argmax(std::vector<float>(20, -infinity).data(), 20));
  for (const int n : {5, 100, 49152}) {
    for (const float odd : {nan, -nan, infinity}) {
      for (const int at : {0, n / 2, n - 1}) {
        std::vector<float> values(size_t(n), -1.0f);
        values[size_t(n) / 3] = -infinity;
        EXPECT_EQ(0, argmax(values.data(), n));
        values[size_t(at)] = odd;
        EXPECT_EQ(-1, argmax(values.data(), n)) << odd << " at " << at << " of " << n;
      }
    }
  }
}

// Of lengths that no vector divides, in memory that ends with them.
TEST(KernelsElementwise, LogitsAreWeighedAsTheSoftmaxSaysWithEveryTarget) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal(0, 3);
  const int threads = ThreadPool::shared().size();
  for (const size_t n : {1, 2, 3, 7, 15, 16, 17, 33, 257, 4095, 4096, 4097, 50'001}) {
    SCOPED_TRACE(n);
    std::vector<float> source(n);
    for (float& logit : source) logit = random() % 7 == 0 ? -INFINITY : normal(random);
    source[n / 2] = 20;
    testing::Guarded<float> logits(source), weights(n);
    const size_t pieces = (n + kWeightsPerSum - 1) / kWeightsPerSum;
    testing::Guarded<double> sums(pieces);
    for (const double temperature : {1e-40, 0.3, 1.0, 50.0}) {
      ThreadPool::resize_shared(1);
      weigh_logits(logits.data(), n, 20, temperature, weights.data(), sums.data());
      std::vector<double> want(pieces);
      for (size_t i = 0; i < n; ++i) {
        const double weight = weights.data()[i], exact = std::exp((double(source[i]) - 20) / temperature);
        want[i / kWeightsPerSum] += weight;
        ASSERT_NEAR(weight, exact, 1e-5 * exact + 1e-37) << i;
        if (source[i] == -INFINITY) {
          ASSERT_EQ(weight, 0) << i;
        }
      }
      EXPECT_EQ(weights.data()[n / 2], 1);
      for (size_t i = 0; i < pieces; ++i) ASSERT_NEAR(sums.data()[i], want[i], 1e-6 * want[i]) << i;
      std::vector<float> again(n);
      std::vector<double> sums_again(pieces);
      ThreadPool::resize_shared(3);
      weigh_logits(source.data(), n, 20, temperature, again.data(), sums_again.data());
      ASSERT_EQ(std::memcmp(again.data(), weights.data(), n * sizeof(float)), 0);
      ASSERT_EQ(std::memcmp(sums_again.data(), sums.data(), pieces * sizeof(double)), 0);
    }
  }
  ThreadPool::resize_shared(threads);
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

TEST(KernelsGate, ValuesAreMultipliedAndANaNShowsWhereverItStands) {
  std::mt19937 rng(3);
  std::normal_distribution<float> normal(0, 3);
  constexpr size_t n = 37;  // no multiple of a vector's lanes
  std::vector<float> x(n), gates(n), y(n);
  for (size_t i = 0; i < n; ++i) x[i] = normal(rng), gates[i] = normal(rng);
  gates[1] = 200, gates[2] = -200;
  gate(x.data(), gates.data(), n, y.data());
  for (size_t i = 0; i < n; ++i) EXPECT_NEAR(y[i], x[i] / (1 + std::exp(-gates[i])), 1e-5) << i;
  for (size_t at = 0; at < n; ++at) {
    std::vector<float> poisoned = gates;
    poisoned[at] = at % 2 == 0 ? std::nanf("") : -std::nanf("");
    gate(x.data(), poisoned.data(), n, y.data());
    for (size_t i = 0; i < n; ++i) EXPECT_EQ(std::isnan(y[i]), i == at) << at;
  }
}

}  // namespace
}  // namespace torpor::kernels
