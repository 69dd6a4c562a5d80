#pragma once
/// How an answer is generated, and what comes of it: no header of MLX's is needed. Plain data.

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace torpor {

struct SamplingOptions {
  float temperature = 0;  ///< 0 = greedy
  float top_p = 1;        ///< in (0, 1]: the smallest set of tokens with this much probability
  uint64_t seed = 0;      ///< equal seeds, prompts and caches give equal tokens
};

struct GenerateOptions {
  int max_tokens = 256;
  SamplingOptions sampling;
  std::vector<std::string> stop;  ///< generation ends when its text contains one; the text is cut before it
  /// Called with each piece of text that is complete and can no longer become part of a stop string.
  std::function<void(std::string_view)> on_text;
  /// Called between prefill chunks with tokens done and tokens to do.
  std::function<void(int done, int total)> on_prefill;
  /// Set from any thread (or a signal handler) to end the turn; what was computed stays in the cache.
  const std::atomic<bool>* cancel = nullptr;
};

enum class FinishReason { kStop, kLength, kCancelled };
/// "stop", "length", "cancelled".
const char* finish_reason_name(FinishReason reason);

struct GenerateResult {
  std::string text;
  std::vector<int32_t> tokens;  ///< sampled, a final end-of-turn token included; their rows are all in the cache
  FinishReason finish_reason = FinishReason::kLength;
  int prefilled = 0;            ///< prompt tokens computed
  double prefill_ms = 0;        ///< start to first token
  double decode_ms = 0;
};

}  // namespace torpor
