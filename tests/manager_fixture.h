#pragma once
/// Agents without a model: "computing" a token writes rows that its position and id determine, so every row that comes back
/// can be checked.

#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "agents/manager.h"
#include "store_fixture.h"

namespace torpor {

inline constexpr int kHeads = 2, kDim = 32;

inline KvLayout layout_of(int window) {
  KvLayout layout;
  for (int i = 0; i < 2; ++i) {
    for (const char* part : {"_keys", "_values"}) {
      layout.tensors.push_back({"layer_" + std::to_string(i) + part, KvDtype::kF16, kHeads, kDim, i == 1 ? window : 0});
    }
  }
  return layout;
}

inline uint8_t row_byte(size_t tensor, int head, int position, int32_t token) {
  return uint8_t((tensor * 7 + size_t(head) * 13 + size_t(position) * 31 + size_t(token) * 101) >> 1);
}

inline void compute(KvCache& cache, std::span<const int32_t> tokens) {
  const std::span<const KvBuffer> runs = cache.reserve(int(tokens.size()));
  const KvLayout& layout = cache.layout();
  for (size_t i = 0; i < tokens.size(); ++i) {
    const int position = cache.length() + int(i), row = position % kSegmentTokens;
    for (size_t t = 0; t < layout.tensors.size(); ++t) {
      for (int head = 0; head < kHeads; ++head) {
        std::byte* at = runs[size_t(position / kSegmentTokens)].data + layout.offset(t, kSegmentTokens) +
                        size_t(head * kSegmentTokens + row) * kDim * 2;
        std::memset(at, row_byte(t, head, position, tokens[i]), kDim * 2);
      }
    }
  }
  cache.record_tokens(tokens);
  cache.advance(int(tokens.size()));
}

/// Every row that the next token attends is that of its token.
inline void expect_sound(const KvCache& cache) {
  ASSERT_TRUE(cache.validate()) << cache.validate().reason;
  const KvSnapshot snapshot = cache.snapshot({});
  for (size_t r = 0; r < snapshot.n_runs(); ++r) {
    const int n = snapshot.run_tokens(r);
    for (size_t t = 0; t < snapshot.layout.tensors.size(); ++t) {
      const KvTensorSpec& spec = snapshot.layout.tensors[t];
      for (int head = 0; head < kHeads; ++head) {
        for (int row = 0; row < n; ++row) {
          const int position = int(r) * kSegmentTokens + row;
          if (!KvLayout::attended(spec, position, 1, cache.length())) continue;
          const std::byte* at =
              snapshot.run_bytes(r).data() + snapshot.layout.offset(t, n) + size_t(head * n + row) * kDim * 2;
          const auto expected = std::byte(row_byte(t, head, position, snapshot.tokens[size_t(position)]));
          ASSERT_TRUE(at[0] == expected && at[kDim * 2 - 1] == expected)
              << spec.name << " position " << position << " of " << cache.length();
        }
      }
    }
  }
}

inline std::vector<int32_t> ids(int n, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens;
  for (int i = 0; i < n; ++i) tokens.push_back(int32_t(random() % 50000));
  return tokens;
}

/// The parameter is the window of layer 1; 0 = none.
class Manager : public ::testing::TestWithParam<int> {
 protected:
  KvLayout layout() const { return layout_of(GetParam()); }
  size_t run_bytes() const { return layout().bytes_per_token() * kSegmentTokens; }
  std::unique_ptr<AgentManager> make(size_t budget = 0, size_t queue = size_t(64) << 20) {
    return std::make_unique<AgentManager>(
        store_, ManagerOptions{.model_name = "m", .identity = testing::test_identity(), .layout = layout(),
                               .backend = Backend::kKernels, .durability = Durability::kRename, .memory_budget = budget,
                               .write_queue_bytes = queue});
  }
  /// A turn: what is held is continued with `tokens`.
  static AgentHold say(AgentManager& manager, const std::string& id, std::span<const int32_t> tokens) {
    AgentHold agent = manager.wake(id);
    compute(*agent->cache, tokens);
    agent->messages.push_back({"user", "said", agent->cache->length()});
    agent->history = agent->cache->tokens();
    agent->changed();
    return agent;
  }

  testing::TemporaryDirectory directory_;
  Store store_{directory_.path() / "store"};
};

}  // namespace torpor
