// Mixtures of experts against a plain f64 reference: the choice, the weights, and the order of the sums.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include <gtest/gtest.h>
#include <mlx/mlx.h>

#include "kernels/compute.h"
#include "kernels/moe.h"
#include "kernels/packed_linear.h"
#include "kernels/primitives.h"
#include "kernels/thread_pool.h"
#include "linear_reference.h"
#include "torpor/error.h"

namespace torpor::kernels {
namespace {

/// Experts of random weights: gate, up and down; the MLP in f64.
struct TestExpert {
  TestWeight gate, up, down;
  ExpertActivation activation;

  TestExpert(ExpertActivation activation, int k, int width, std::mt19937& rng)
      : gate(Type::kMxfp4, width, k, rng, 0, 0, Type::kF16, activation == ExpertActivation::kClampedSwiGlu),
        up(Type::kMxfp4, width, k, rng, 0, 0, Type::kF16, activation == ExpertActivation::kClampedSwiGlu),
        down(Type::kAffine, k, width, rng, 4, 32, Type::kF16, activation == ExpertActivation::kClampedSwiGlu),
        activation(activation) {}

  Expert packed() const {
    const auto both = activation == ExpertActivation::kRelu2           ? PackedLinear::pack({up.source})
                      : activation == ExpertActivation::kClampedSwiGlu ? PackedLinear::pack({gate.source, up.source})
                                                                       : PackedLinear::pack_gated(gate.source, up.source);
    return {both, PackedLinear::pack({down.source})};
  }
  std::vector<double> reference(const float* x) const {
    std::vector<float> hidden;
    for (int i = 0; i < up.source.n; ++i) {
      const double g = gate.reference(x, i).first, u = up.reference(x, i).first;
      if (activation == ExpertActivation::kRelu2) {
        hidden.push_back(float(std::max(u, 0.0) * std::max(u, 0.0)));
      } else if (activation == ExpertActivation::kClampedSwiGlu) {
        const double low = std::min(g, 7.0), clamped = std::clamp(u, -7.0, 7.0);
        hidden.push_back(float(low / (1 + std::exp(-1.702 * low)) * (clamped + 1)));
      } else {
        hidden.push_back(float(activate(activation == ExpertActivation::kSilu ? Activation::kSilu : Activation::kGeluTanh, g) * u));
      }
    }
    std::vector<double> out;
    for (int i = 0; i < down.source.n; ++i) out.push_back(down.reference(hidden.data(), i).first);
    return out;
  }
};

TEST(KernelsMoe, RowsGetTheWeightedSumOfTheirExpertsWhateverIsBesideThem) {
  const RestoreThreads restore;
  std::mt19937 rng(17);
  using Scores = Routing::Scores;
  using Weights = Routing::Weights;
  constexpr int kExperts = 6, kWide = 64, kInner = 32, kMost = 70;
  const std::vector<float> per_expert = random_rows(1, kExperts, rng);
  struct Kind {
    ExpertActivation activation;
    Routing routing;
    bool shared, gated;
  };
  for (const Kind& kind : {Kind{ExpertActivation::kSilu, {Scores::kSoftmax, Weights::kNormalised, 2}, false, false},
                           Kind{ExpertActivation::kSilu, {Scores::kSigmoid, Weights::kNormalised, 3, 1e-6f, 2.5f, per_expert}, true, false},
                           Kind{ExpertActivation::kGeluTanh, {Scores::kSoftmax, Weights::kScores, 2, 0, 1, {}, per_expert}, true, true},
                           Kind{ExpertActivation::kClampedSwiGlu, {Scores::kLinear, Weights::kSoftmax, 4}, false, false},
                           Kind{ExpertActivation::kRelu2, {Scores::kSigmoid, Weights::kScores, 1}, false, false}}) {
    SCOPED_TRACE(int(kind.activation) * 10 + int(kind.routing.scores));
    std::vector<TestExpert> experts;
    for (int e = 0; e <= kExperts; ++e) experts.emplace_back(kind.activation, kWide, kInner, rng);
    const TestWeight gate(Type::kF32, 1, kWide, rng);
    Moe w{.routing = kind.routing, .activation = kind.activation};
    for (int e = 0; e < kExperts; ++e) w.experts.push_back(experts[size_t(e)].packed());
    if (kind.shared) w.shared = experts.back().packed();
    if (kind.gated) w.shared_gate = PackedLinear::pack({gate.source});
    const std::vector<float> x = random_rows(kMost, kWide, rng), logits = random_rows(kMost, kExperts, rng);

    std::vector<float> whole(kMost * kWide, NAN), y(whole.size());
    moe(x.data(), logits.data(), kMost, w, whole.data());
    for (int row = 0; row < kMost; row += 7) {
      const float *in = x.data() + row * kWide, *scored = logits.data() + row * kExperts;
      // The choice and the weights, in f64.
      std::vector<double> scores(scored, scored + kExperts);
      double sum = 0;
      for (const double score : scores) sum += std::exp(score);
      for (double& score : scores) {
        if (kind.routing.scores == Scores::kSoftmax) score = std::exp(score) / sum;
        if (kind.routing.scores == Scores::kSigmoid) score = 1 / (1 + std::exp(-score));
      }
      std::vector<int> order(kExperts);
      std::iota(order.begin(), order.end(), 0);
      const auto ranked = [&](int e) { return scores[size_t(e)] + (kind.routing.selection_bias.empty() ? 0 : per_expert[size_t(e)]); };
      std::ranges::sort(order, [&](int a, int b) { return ranked(a) > ranked(b); });
      order.resize(size_t(kind.routing.chosen));
      double total = kind.routing.weights == Weights::kNormalised ? double(kind.routing.epsilon) : 0;
      for (const int e : order) {
        if (kind.routing.weights == Weights::kNormalised) total += scores[size_t(e)];
        if (kind.routing.weights == Weights::kSoftmax) total += std::exp(scores[size_t(e)]);
      }
      std::vector<double> want(kWide, 0.0);
      const auto add = [&](const TestExpert& expert, double weight) {
        const std::vector<double> out = expert.reference(in);
        for (int i = 0; i < kWide; ++i) want[size_t(i)] += weight * out[size_t(i)];
      };
      for (const int e : order) {
        double weight = kind.routing.weights == Weights::kSoftmax ? std::exp(scores[size_t(e)]) : scores[size_t(e)];
        if (total > 0) weight /= total;
        weight *= double(kind.routing.scale) * (kind.routing.expert_scale.empty() ? 1 : per_expert[size_t(e)]);
        add(experts[size_t(e)], weight);
      }
      if (kind.shared) add(experts.back(), kind.gated ? 1 / (1 + std::exp(-gate.reference(in, 0).first)) : 1);
      for (int i = 0; i < kWide; ++i) {
        ASSERT_NEAR(whole[size_t(row * kWide + i)], want[size_t(i)], 1e-5 * (1 + std::abs(want[size_t(i)])))
            << "row " << row << " column " << i;
      }
    }
    for (const int threads : {1, 3}) {
      ThreadPool::resize_shared(threads);
      for (const int m : {1, 2, 9, 33}) {
        const int first = kMost - m;  // not where the whole begins
        moe(x.data() + first * kWide, logits.data() + first * kExperts, m, w, y.data());
        ASSERT_EQ(std::memcmp(y.data(), whole.data() + first * kWide, size_t(m) * kWide * sizeof(float)), 0) << "M " << m;
      }
    }
  }
}

TEST(KernelsMoe, OfEqualScoresTheLowerIndexIsChosenAndANaNShows) {
  const float logits[3][4] = {{1, 2, 2, 2}, {5, 5, 5, 5}, {0, 1, NAN, 3}};
  for (const auto scores : {Routing::Scores::kLinear, Routing::Scores::kSoftmax, Routing::Scores::kSigmoid}) {
    int32_t experts[6];
    float weights[6];
    route(logits[0], 3, 4, {.scores = scores, .weights = Routing::Weights::kNormalised, .chosen = 2}, experts, weights);
    EXPECT_EQ(std::vector(experts, experts + 4), (std::vector<int32_t>{1, 2, 0, 1}));
    EXPECT_EQ(std::vector(weights, weights + 4), (std::vector<float>{0.5f, 0.5f, 0.5f, 0.5f}));
    EXPECT_TRUE(std::isnan(weights[4]) || std::isnan(weights[5]));
  }
}

TEST(KernelsMoe, ExpertsComeFromTheBestGroups) {
  // The largest of all is in the group that is worst as a pair.
  const float logits[2][6] = {{9, 0, 5, 5, 6, 4}, {1, 1, 1, 1, 1, 1}};
  const auto chosen = [&](Routing::GroupScore score, int groups) {
    int32_t experts[4];
    float weights[4];
    route(logits[0], 2, 6, {.scores = Routing::Scores::kLinear, .chosen = 2, .groups = 3, .chosen_groups = groups,
                            .group_score = score}, experts, weights);
    return std::vector(experts, experts + 4);
  };
  using Score = Routing::GroupScore;
  EXPECT_EQ(chosen(Score::kTwoLargest, 1), (std::vector<int32_t>{2, 3, 0, 1}));
  EXPECT_EQ(chosen(Score::kTwoLargest, 2), (std::vector<int32_t>{2, 4, 0, 1}));
  EXPECT_EQ(chosen(Score::kLargest, 1), (std::vector<int32_t>{0, 1, 0, 1}));
  EXPECT_EQ(chosen(Score::kLargest, 2), (std::vector<int32_t>{0, 4, 0, 1}));
}

TEST(KernelsMoe, ExpertsAreSummedInTheOrderOfTheirIndices) {
  std::mt19937 rng(18);
  constexpr int kExperts = 5, kWide = 64;
  Moe w{.routing = {.scores = Routing::Scores::kLinear, .chosen = kExperts}};
  std::vector<TestExpert> experts;
  for (int e = 0; e < kExperts; ++e) experts.emplace_back(ExpertActivation::kSilu, kWide, 32, rng);
  for (const TestExpert& expert : experts) w.experts.push_back(expert.packed());
  const std::vector<float> x = random_rows(1, kWide, rng), logits{0.3f, 9.0f, -0.7f, 5.0f, 1.1f};
  std::vector<float> want(kWide, 0.0f), hidden(32), out(kWide), y(kWide);
  for (int e = 0; e < kExperts; ++e) {
    gated_linear(x.data(), 1, *w.experts[size_t(e)].up, Activation::kSilu, hidden.data());
    linear(hidden.data(), 1, *w.experts[size_t(e)].down, nullptr, out.data());
    for (int i = 0; i < kWide; ++i) {
      volatile const float part = logits[size_t(e)] * out[size_t(i)];  // no contraction
      want[size_t(i)] = want[size_t(i)] + part;
    }
  }
  moe(x.data(), logits.data(), 1, w, y.data());
  EXPECT_EQ(y, want);
  // The primitive is the plain kernel.
  mx::array got = moe(mx::array(x.data(), {1, kWide}, mx::float32), mx::array(logits.data(), {1, kExperts}, mx::float32),
                      std::make_shared<const Moe>(w));
  got.eval();
  EXPECT_EQ(std::memcmp(got.data<float>(), want.data(), want.size() * sizeof(float)), 0);
}

TEST(KernelsMoe, ExpertsThatDontFitAreNamed) {
  std::mt19937 rng(19);
  const Expert expert = TestExpert(ExpertActivation::kSilu, 64, 32, rng).packed(), other = TestExpert(ExpertActivation::kSilu, 64, 64, rng).packed();
  std::vector<float> x(64), logits(2), y(64);
  EXPECT_NO_THROW(moe(x.data(), logits.data(), 1, {.experts = {expert, other}}, y.data()));
  EXPECT_THROW(moe(x.data(), logits.data(), 1, {.routing = {.chosen = 3}, .experts = {expert, other}}, y.data()), Error);
  EXPECT_THROW(moe(x.data(), logits.data(), 1, {.experts = {{expert.up, other.down}}}, y.data()), Error);
  EXPECT_THROW(moe(x.data(), logits.data(), 1, {.routing = {.selection_bias = {1}}, .experts = {expert, other}}, y.data()), Error);
}

}  // namespace
}  // namespace torpor::kernels
