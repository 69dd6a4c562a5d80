#pragma once
/// From logits to a token.

#include <cstdint>
#include <span>

#include "torpor/generate.h"

namespace torpor {

/// kInvalidArgument for a temperature below 0 or a top_p outside (0, 1].
void check_sampling(const SamplingOptions& options);

/// The token that follows position `position - 1`. The random number depends on seed and position alone, so a turn that is
/// interrupted by sleep draws the same numbers as one that is not.
int32_t sample(std::span<const float> logits, const SamplingOptions& options, int position);

}  // namespace torpor
