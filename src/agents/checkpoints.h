#pragma once
/// At which of a conversation's tokens a state of the recurrent layers is kept: numbers alone.

#include <cstdint>
#include <span>
#include <vector>

#include "torpor/kv_snapshot.h"

namespace torpor {

/// In a long prefill a state is kept every so many tokens: then states take no more than the rows do. A multiple of
/// kSegmentTokens, at least 1,024.
int64_t checkpoint_stride(const StateLayout& state, const KvLayout& rows);

/// Where a prefill of tokens [begin, end) has to stop to keep a state, ascending: at the `wanted` positions in between,
/// and at each multiple of `stride`.
std::vector<int64_t> checkpoint_stops(int64_t begin, int64_t end, int64_t stride, std::span<const int64_t> wanted);

/// Which of the states at `positions` (ascending, at most `length`) stay, of a conversation of `length` tokens. The first
/// one does, which the system prompt ends with, and the last four of `turn_ends` (ascending) or `length`. So does the
/// first in each stretch of tokens. Stretches have five strides up to twice that distance from the end, and twice as
/// many for each doubling of the distance.
std::vector<int64_t> thin_checkpoints(std::span<const int64_t> positions, std::span<const int64_t> turn_ends,
                                      int64_t length, int64_t stride);

}  // namespace torpor
