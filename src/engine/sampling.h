#pragma once
/// From logits to a token. Pure functions.

#include <cstdint>
#include <span>
#include <vector>

#include "torpor/generate_options.h"

namespace torpor {

/// kInvalidArgument for numbers out of their range, and for ids of logit_bias beyond `vocab_size` (0: not known).
void check_sampling(const SamplingOptions& options, int vocab_size = 0);

/// Adds logit_bias and takes off penalties. `before` are the ids that the answer follows, `answer` its own so far.
void adjust_logits(std::span<float> logits, const SamplingOptions& options, std::span<const int32_t> before,
                   std::span<const int32_t> answer);

/// Tokens that may come, and how probable each is compared with the likeliest one, which has 1.
struct Candidates {
  int32_t top = 0;              ///< the likeliest, of equals the smallest id
  bool all = false;             ///< none is left out: then `tokens` is empty
  std::vector<int32_t> tokens;  ///< likeliest first, of equals the smaller id
  std::vector<float> weights;   ///< by id
  std::vector<double> sums;     ///< of each kernels::kWeightsPerSum weights, where none is left out
  double total = 0;             ///< of the tokens' weights
};
/// Of a temperature above 0. kInternal when a logit is no number, or none is finite.
Candidates candidates(std::span<const float> logits, const SamplingOptions& options);

/// The token that follows position `position - 1`. The random number depends on seed and position alone, so a turn that
/// is interrupted by sleep draws the same numbers as one that is not. kInternal when a logit is no number, or none is
/// finite.
int32_t sample(std::span<const float> logits, const SamplingOptions& options, int position);

/// Log-probabilities of a token and of the `top` likeliest, without their texts.
TokenLogprobs logprobs_of(std::span<const float> logits, int32_t token, int top);

}  // namespace torpor
