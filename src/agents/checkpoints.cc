#include "agents/checkpoints.h"

#include <algorithm>
#include <bit>
#include <set>

namespace torpor {

int64_t checkpoint_stride(const StateLayout& state, const KvLayout& rows) {
  constexpr int64_t kLeast = 1024;
  const auto row = int64_t(std::max<size_t>(1, rows.bytes_per_token())), bytes = int64_t(state.bytes());
  const int64_t tokens = (bytes + row - 1) / row;
  return std::max(kLeast, (tokens + kSegmentTokens - 1) / kSegmentTokens * kSegmentTokens);
}

std::vector<int64_t> checkpoint_stops(int64_t begin, int64_t end, int64_t stride, std::span<const int64_t> wanted) {
  std::set<int64_t> stops;
  for (const int64_t position : wanted) {
    if (position > begin && position < end) stops.insert(position);
  }
  for (int64_t position = (begin / stride + 1) * stride; position < end; position += stride) stops.insert(position);
  return {stops.begin(), stops.end()};
}

std::vector<int64_t> thin_checkpoints(std::span<const int64_t> positions, std::span<const int64_t> turn_ends,
                                      int64_t length, int64_t stride) {
  constexpr int kTurns = 4;
  std::set<int64_t> kept;
  if (!positions.empty()) kept.insert(positions.front());
  int turns = 0;
  for (size_t i = positions.size(); i-- > 0 && turns < kTurns;) {
    if (!std::ranges::binary_search(turn_ends, positions[i]) && positions[i] != length) continue;
    kept.insert(positions[i]);
    ++turns;
  }
  // Who is the first in a long stretch is the first in a short one, so what will be needed farther away is still there.
  for (size_t i = 0; i < positions.size(); ++i) {
    const auto distance = uint64_t(std::max<int64_t>(0, length - positions[i])), shortest = uint64_t(5 * stride);
    const int doublings = std::max(0, int(std::bit_width(distance / shortest)) - 1);
    const int64_t stretch = int64_t(shortest) << doublings;
    if (i == 0 || positions[i - 1] / stretch != positions[i] / stretch) kept.insert(positions[i]);
  }
  return {kept.begin(), kept.end()};
}

}  // namespace torpor
