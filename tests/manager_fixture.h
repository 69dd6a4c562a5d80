#pragma once
/// Agents without a model: "computing" a token writes rows that its position and id determine, so every row that comes back
/// can be checked.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <mlx/mlx.h>

#include "agents/manager.h"
#include "cache/dense.h"
#include "store_fixture.h"

namespace torpor {

inline constexpr int kHeads = 2, kDim = 32;

/// Of a negative window the rows are kept apart.
inline KvLayout layout_of(int window) {
  KvLayout layout;
  for (int i = 0; i < 2; ++i) {
    for (const char* part : {"_keys", "_values"}) {
      layout.tensors.push_back({.name = "layer_" + std::to_string(i) + part, .dtype = KvDtype::kF16,
                                .n_kv_heads = kHeads, .dim = kDim, .window = i == 1 ? std::abs(window) : 0,
                                .apart = i == 1 && window < 0});
    }
  }
  return layout;
}

inline uint8_t row_byte(size_t tensor, int head, int position, int32_t token) {
  return uint8_t((tensor * 7 + size_t(head) * 13 + size_t(position) * 31 + size_t(token) * 101) >> 1);
}

/// Each byte of the state after `length` tokens, of a model that has any.
inline std::byte state_byte(int64_t length) { return std::byte(uint8_t(length * 37 + 11)); }

/// Likewise for a cache of MLX's arrays.
inline void compute_dense(KvCache& cache, std::span<const int32_t> tokens) {
  const int n = int(tokens.size());
  const auto rows = [&](size_t tensor) {
    mx::array made(mx::allocator::malloc(size_t(kHeads) * tokens.size() * kDim * 2), {1, kHeads, n, kDim}, mx::float16);
    for (int head = 0; head < kHeads; ++head) {
      for (int i = 0; i < n; ++i) {
        std::memset(made.data<uint8_t>() + size_t(head * n + i) * kDim * 2,
                    row_byte(tensor, head, cache.length() + i, tokens[size_t(i)]), kDim * 2);
      }
    }
    return made;
  };
  for (int layer = 0; layer < 2; ++layer) {
    const auto [keys, values] = cache.update_and_fetch(layer, rows(size_t(2 * layer)), rows(size_t(2 * layer + 1)));
    mx::eval({keys, values});
  }
  cache.record_tokens(tokens);
  cache.advance(n);
}

inline void compute(KvCache& cache, std::span<const int32_t> tokens) {
  if (dynamic_cast<DenseKvCache*>(&cache) != nullptr) return compute_dense(cache, tokens);
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
  std::ranges::fill(cache.next_state(), state_byte(cache.length() + int(tokens.size())));
  cache.record_tokens(tokens);
  cache.advance(int(tokens.size()));
}

/// Every row that the next token attends is that of its token, and every state that of its position.
inline void expect_sound(const KvCache& cache) {
  ASSERT_TRUE(cache.validate()) << cache.validate().reason;
  for (const auto& state : cache.states()) {
    const auto is_its = [&](std::byte byte) { return byte == state_byte(state->position()); };
    ASSERT_TRUE(std::ranges::all_of(state->bytes(), is_its)) << "state after " << state->position() << " tokens";
  }
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

/// The parameter is the window of layer 1; 0 = none. Of a negative one the rows are kept apart.
class Manager : public ::testing::TestWithParam<int> {
 protected:
  KvLayout layout() const { return layout_of(GetParam()); }
  size_t run_bytes() const { return layout().bytes_per_token() * kSegmentTokens; }
  ManagerOptions options(size_t budget = 0, size_t queue = size_t(64) << 20, Backend backend = Backend::kKernels) const {
    return {.model_name = "m", .identity = testing::test_identity(), .layout = layout(), .backend = backend,
            .durability = Durability::kRename, .memory_budget = budget, .write_queue_bytes = queue};
  }
  std::unique_ptr<AgentManager> make(size_t budget = 0, size_t queue = size_t(64) << 20, Backend backend = Backend::kKernels) {
    return std::make_unique<AgentManager>(store_, options(budget, queue, backend));
  }
  /// A turn: what is held is continued with `tokens`.
  static AgentHold say(AgentManager& manager, const std::string& id, std::span<const int32_t> tokens) {
    AgentHold agent = manager.wake(id);
    const Growth growth{agent->cache.get(), int(tokens.size())};
    manager.reserve({&growth, 1});
    compute(*agent->cache, tokens);
    agent->messages.push_back({{"user", "said"}, agent->cache->length()});
    agent->history = agent->cache->tokens();
    agent->changed();
    return agent;
  }
  /// As Engine::save_all does.
  static void save_all(AgentManager& manager) {
    for (const AgentMemory& memory : manager.memory_usage().agents) manager.save_behind(*manager.wake(memory.agent));
    finish_saves(manager);
  }
  static void finish_saves(AgentManager& manager) {
    manager.wait_for_writes();
    manager.tell_errors();
  }

  testing::TemporaryDirectory directory_;
  Store store_{directory_.path() / "store"};
};

}  // namespace torpor
