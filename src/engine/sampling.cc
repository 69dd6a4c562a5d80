#include "engine/sampling.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>
#include <numeric>

#include "kernels/compute.h"
#include "kernels/weigh_logits.h"
#include "torpor/error.h"

namespace torpor {
namespace {

// SplitMix64 (Steele, Lea, Flood 2014), as a function of a counter.
double uniform(uint64_t seed, uint64_t counter) {
  uint64_t z = seed + 0x9E3779B97F4A7C15u * (counter + 1);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  z ^= z >> 31;
  return double(z >> 11) * 0x1.0p-53;
}

/// A NaN or +infinity among them. -infinity is a token that can't come. (As integers, which compilers vectorise.)
bool has_no_number(std::span<const float> logits) {
  uint32_t found = 0;
  for (const float logit : logits) {
    const uint32_t bits = std::bit_cast<uint32_t>(logit);
    found |= uint32_t((bits & 0x7fffffffu) >= 0x7f800000u && bits != 0xff800000u);
  }
  return found != 0;
}

Error no_number() {
  return Error(ErrorCode::kInternal,
               "The model computed no number for the next token; its weights, or rows kept in too small a KV format, "
               "don't hold what it computes.");
}

void require(bool right, const char* sentence) {
  if (!right) throw Error(ErrorCode::kInvalidArgument, sentence);
}

/// The token with the largest logit.
int32_t likeliest(std::span<const float> logits) {
  const int at = kernels::argmax(logits.data(), int(logits.size()));
  if (at < 0) throw no_number();
  return at;
}

/// Gives `take` tokens whose weight is above 0, the likeliest first, of equals the smaller id, until it returns false.
/// Likely ones are few: those above a bound are put in order, and the bound is lowered while more are asked for.
template <class Take>
void by_likelihood(std::span<const float> logits, const std::vector<float>& weights, const Take& take) {
  const auto likelier = [&](int32_t a, int32_t b) {
    const float first = logits[size_t(a)], second = logits[size_t(b)];
    return first > second || (first == second && a < b);
  };
  std::vector<int32_t> tokens;
  float above = INFINITY;
  for (const float bound : {0x1p-6f, 0x1p-10f, 0x1p-15f, 0x1p-24f, 0.0f}) {
    tokens.clear();
    for (size_t i = 0; i < weights.size(); ++i) {
      if (weights[i] > bound && weights[i] <= above) tokens.push_back(int32_t(i));
    }
    std::ranges::sort(tokens, likelier);
    for (const int32_t token : tokens) {
      if (!take(token)) return;
    }
    above = bound;
  }
}

}  // namespace

void check_sampling(const SamplingOptions& options, int vocab_size) {
  require(options.temperature >= 0 && !std::isinf(options.temperature),
          "The temperature must be a number of at least 0.");
  require(options.top_p > 0 && options.top_p <= 1, "top_p must be above 0 and at most 1.");
  require(options.top_k >= 0, "top_k must be at least 0.");
  require(options.min_p >= 0 && options.min_p <= 1, "min_p must be at least 0 and at most 1.");
  require(options.repetition_penalty > 0 && !std::isinf(options.repetition_penalty),
          "The repetition penalty must be a number above 0.");
  require(options.penalty_context >= 0, "The context of the repetition penalty must be at least 0 tokens.");
  require(std::isfinite(options.presence_penalty) && std::isfinite(options.frequency_penalty),
          "The presence and frequency penalties must be numbers.");
  for (const auto& [token, bias] : options.logit_bias) {
    require(token >= 0 && (vocab_size == 0 || token < vocab_size),
            "logit_bias names a token that the model does not have.");
    require(!std::isnan(bias) && bias < INFINITY, "logit_bias must be numbers, or -infinity.");
  }
}

void adjust_logits(std::span<float> logits, const SamplingOptions& options, std::span<const int32_t> before,
                   std::span<const int32_t> answer) {
  const auto known = [&](int32_t token) { return token >= 0 && size_t(token) < logits.size(); };
  for (const auto& [token, bias] : options.logit_bias) logits[size_t(token)] += bias;
  if (options.repetition_penalty != 1) {
    std::vector<bool> done(logits.size());
    const size_t most = options.penalty_context > 0 ? size_t(options.penalty_context) : before.size() + answer.size();
    const std::span<const int32_t> own = answer.last(std::min(most, answer.size()));
    for (const auto& tokens : {own, before.last(std::min(most - own.size(), before.size()))}) {
      for (const int32_t token : tokens) {
        if (!known(token) || done[size_t(token)]) continue;
        done[size_t(token)] = true;
        float& logit = logits[size_t(token)];
        logit = logit < 0 ? logit * options.repetition_penalty : logit / options.repetition_penalty;
      }
    }
  }
  if (options.presence_penalty != 0 || options.frequency_penalty != 0) {
    std::map<int32_t, int> counts;
    for (const int32_t token : answer) ++counts[token];
    for (const auto& [token, count] : counts) {
      if (known(token)) logits[size_t(token)] -= options.presence_penalty + options.frequency_penalty * float(count);
    }
  }
}

Candidates candidates(std::span<const float> logits, const SamplingOptions& options) {
  Candidates found;
  found.top = likeliest(logits);
  const float top = logits[size_t(found.top)];
  found.all = options.top_p == 1 && options.top_k == 0 && options.min_p == 0;
  found.weights.resize(logits.size());
  found.sums.resize((logits.size() + kernels::kWeightsPerSum - 1) / kernels::kWeightsPerSum);
  kernels::weigh_logits(logits.data(), logits.size(), top, found.all ? options.temperature : 1, found.weights.data(),
                        found.sums.data());
  found.total = std::accumulate(found.sums.begin(), found.sums.end(), 0.0);
  if (found.all) return found;

  // The most probable tokens, as many as each option allows: nucleus sampling (Holtzman et al. 2020), top-k, min-p
  // (Nguyen et al. 2024). Probabilities are the model's own here; the temperature counts among those that are kept.
  const double wanted = options.top_p < 1 ? options.top_p * found.total : INFINITY;
  const size_t most = options.top_k > 0 ? size_t(options.top_k) : logits.size();
  double taken = 0;
  by_likelihood(logits, found.weights, [&](int32_t token) {
    if (!found.tokens.empty() && found.weights[size_t(token)] < options.min_p) return false;
    found.tokens.push_back(token);
    taken += found.weights[size_t(token)];
    return found.tokens.size() < most && taken < wanted;
  });
  found.total = 0;
  for (const int32_t token : found.tokens) {
    float& weight = found.weights[size_t(token)];
    weight = float(std::exp((double(logits[size_t(token)]) - top) / options.temperature));
    found.total += weight;
  }
  return found;
}

int32_t sample(std::span<const float> logits, const SamplingOptions& options, int position) {
  if (options.temperature == 0) return likeliest(logits);
  const Candidates found = candidates(logits, options);
  double remaining = uniform(options.seed, uint64_t(position)) * found.total;
  int32_t last = found.top;  // where rounding leaves something, the last token that can come
  const auto drawn = [&](int32_t token) {
    const double weight = found.weights[size_t(token)];
    if (weight > 0) last = token;
    return (remaining -= weight) < 0;
  };
  for (const int32_t token : found.tokens) {
    if (drawn(token)) return token;
  }
  for (size_t sum = 0; found.all && sum < found.sums.size(); ++sum) {
    const size_t first = sum * kernels::kWeightsPerSum, end = std::min(logits.size(), first + kernels::kWeightsPerSum);
    if (remaining >= found.sums[sum] && sum + 1 < found.sums.size()) {
      remaining -= found.sums[sum];
      continue;
    }
    for (size_t token = first; token < end; ++token) {
      if (drawn(int32_t(token))) return int32_t(token);
    }
  }
  return last;
}

TokenLogprobs logprobs_of(std::span<const float> logits, int32_t token, int top) {
  if (has_no_number(logits)) throw no_number();
  const float most = *std::max_element(logits.begin(), logits.end());
  double total = 0;
  for (const float logit : logits) total += std::exp(double(logit) - most);
  const double log_total = std::log(total);
  const auto logprob = [&](int32_t id) { return float(double(logits[size_t(id)]) - most - log_total); };
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto end = order.begin() + std::min<ptrdiff_t>(top, ssize(order));
  std::partial_sort(order.begin(), end, order.end(), [&](int32_t a, int32_t b) {
    return logits[size_t(a)] > logits[size_t(b)] || (logits[size_t(a)] == logits[size_t(b)] && a < b);
  });
  TokenLogprobs found;
  found.token = token;
  found.logprob = logprob(token);
  for (auto id = order.begin(); id != end; ++id) {
    found.top.push_back({.token = *id, .logprob = logprob(*id), .text = {}});
  }
  return found;
}

}  // namespace torpor
