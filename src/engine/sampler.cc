#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/compute.h"
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

}  // namespace

void check_sampling(const SamplingOptions& options) {
  if (!(options.temperature >= 0) || std::isinf(options.temperature)) {
    throw Error(ErrorCode::kInvalidArgument, "The temperature must be a number of at least 0.");
  }
  if (!(options.top_p > 0 && options.top_p <= 1)) {
    throw Error(ErrorCode::kInvalidArgument, "top_p must be above 0 and at most 1.");
  }
}

int32_t sample(std::span<const float> logits, const SamplingOptions& options, int position) {
  if (options.temperature == 0) return kernels::argmax(logits.data(), int(logits.size()));

  const float top = *std::max_element(logits.begin(), logits.end());
  std::vector<double> weights(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) {
    weights[i] = std::exp((double(logits[i]) - top) / options.temperature);
  }
  double total = std::accumulate(weights.begin(), weights.end(), 0.0);

  // Nucleus sampling (Holtzman et al. 2020): the most probable tokens, until their probability reaches top_p. A heap gives
  // them one by one, for they are few; of equals the smaller id comes first.
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  if (options.top_p < 1) {
    const auto below = [&](int32_t a, int32_t b) {
      return weights[a] < weights[b] || (weights[a] == weights[b] && a > b);
    };
    std::make_heap(order.begin(), order.end(), below);
    const double wanted = options.top_p * total;
    auto rest = order.end();
    for (total = 0; total < wanted && rest != order.begin();) {
      std::pop_heap(order.begin(), rest--, below);
      total += weights[*rest];
    }
    order.erase(order.begin(), rest);
    std::reverse(order.begin(), order.end());  // the most probable first
  }

  double remaining = uniform(options.seed, uint64_t(position)) * total;
  for (int32_t token : order) {
    remaining -= weights[token];
    if (remaining < 0) return token;
  }
  return order.back();
}

}  // namespace torpor
