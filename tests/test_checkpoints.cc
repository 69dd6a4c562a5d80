/// Where states of recurrent layers are kept, as numbers.

#include <algorithm>

#include <gtest/gtest.h>

#include "agents/checkpoints.h"

namespace torpor {
namespace {

/// Of Qwen3.5-9B: 24 layers with a state of 32 heads of 128 by 128 and a convolution's tail, 8 with rows in f16.
StateLayout qwen_state() {
  StateLayout layout;
  for (int i = 0; i < 24; ++i) {
    const std::string name = "layer_" + std::to_string(i);
    layout.tensors.push_back({name + "_conv", KvDtype::kF32, {3, 8192}});
    layout.tensors.push_back({name + "_recurrent", KvDtype::kF32, {32, 128, 128}});
  }
  return layout;
}
KvLayout qwen_rows() {
  KvLayout layout;
  for (int i = 24; i < 32; ++i) {
    for (const char* part : {"_keys", "_values"}) {
      layout.tensors.push_back({"layer_" + std::to_string(i) + part, KvDtype::kF16, 4, 256, 0});
    }
  }
  return layout;
}

TEST(Checkpoints, TakeNoMoreThanTheRowsOfTheTokensBetweenThem) {
  const StateLayout state = qwen_state();
  const KvLayout rows = qwen_rows();
  const int64_t stride = checkpoint_stride(state, rows);
  EXPECT_EQ(rows.bytes_per_token(), 32u << 10);
  EXPECT_EQ(stride, 1792);
  EXPECT_LE(state.bytes(), size_t(stride) * rows.bytes_per_token());
  const StateLayout small{{{"layer_0_conv", KvDtype::kF32, {2, 1024}}}};
  EXPECT_EQ(checkpoint_stride(small, rows), 1024) << "at least";
  EXPECT_EQ(checkpoint_stride(state, {}) % kSegmentTokens, 0) << "also without rows";
}

TEST(Checkpoints, APrefillStopsWhereAStateIsWantedAndAtEachStride) {
  const std::vector<int64_t> wanted{3000, 500, 100, 512, 3000};
  EXPECT_EQ(checkpoint_stops(100, 4000, 1024, wanted), (std::vector<int64_t>{500, 512, 1024, 2048, 3000, 3072}));
  EXPECT_EQ(checkpoint_stops(1024, 2048, 1024, {}), std::vector<int64_t>{});
  EXPECT_EQ(checkpoint_stops(1023, 2049, 1024, {}), (std::vector<int64_t>{1024, 2048}));
  EXPECT_EQ(checkpoint_stops(10, 10, 1024, wanted), std::vector<int64_t>{});
}

TEST(Checkpoints, AConversationOf64KTokensKeepsAtMostEight) {
  const int64_t stride = checkpoint_stride(qwen_state(), qwen_rows());
  for (const int64_t turn : {64, 700, 3000, 20000, 65536}) {
    std::vector<int64_t> kept, ends;
    for (int64_t begin = 0; begin < 65536; begin += turn) {
      const int64_t end = std::min<int64_t>(begin + turn, 65536), asked = end - turn / 4;
      const std::vector<int64_t> wanted{begin == 0 ? 48 : 0, asked - 5};
      for (const int64_t stop : checkpoint_stops(begin, asked, stride, wanted)) kept.push_back(stop);
      kept.push_back(end);
      ends.push_back(end);
      std::vector<int64_t> counted = ends;
      counted.insert(std::ranges::lower_bound(counted, asked - 5), asked - 5);
      kept = thin_checkpoints(kept, counted, end, stride);
      ASSERT_LE(kept.size(), 8u) << "turns of " << turn << " at " << end;
      ASSERT_EQ(kept.front(), turn == 64 ? 43 : 48);
      ASSERT_EQ(kept.back(), end);
      // What is computed again for a cut is in proportion to how far back it goes.
      for (int64_t cut = end - 1; cut > stride; cut -= 997) {
        const int64_t from = *(std::ranges::upper_bound(kept, cut) - 1);
        ASSERT_LE(cut - from, std::max(4 * (end - cut), 8 * stride) + turn)
            << cut << " of " << end << ", turns of " << turn;
      }
    }
  }
}

TEST(Checkpoints, TheLastFourTurnsAndTheSystemPromptStay) {
  const std::vector<int64_t> positions{40, 1024, 2048, 3000, 3100, 3200, 3300, 3400, 3500};
  const std::vector<int64_t> ends{3000, 3100, 3200, 3300, 3400};
  const auto kept = thin_checkpoints(positions, ends, 3500, 1024);
  for (const int64_t position : {40, 3200, 3300, 3400, 3500}) EXPECT_TRUE(std::ranges::binary_search(kept, position));
  EXPECT_FALSE(std::ranges::binary_search(kept, 3100));
  EXPECT_TRUE(thin_checkpoints({}, ends, 3500, 1024).empty());
}

}  // namespace
}  // namespace torpor
