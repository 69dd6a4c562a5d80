#pragma once
/// How an answer is generated, and what comes of it: no header of MLX's is needed. Plain data.

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace torpor {

/// From logits to a token, as mlx-lm does it: logit_bias, penalties, the tokens that top_k, top_p and min_p all keep,
/// temperature.
struct SamplingOptions {
  float temperature = 0;  ///< 0 = greedy
  float top_p = 1;        ///< in (0, 1]: the smallest set of tokens with this much probability
  uint64_t seed = 0;      ///< random numbers depend on it and on the position alone
  int top_k = 0;          ///< only so many of the likeliest; 0 = all
  float min_p = 0;        ///< in [0, 1]: only tokens with this part of the likeliest one's probability
  /// Above 0; 1 = none. Logits of the last `penalty_context` tokens, prompt and answer, are divided by it where they
  /// are positive, else multiplied.
  float repetition_penalty = 1;
  int penalty_context = 64;      ///< tokens; 0 = all that the agent holds
  float presence_penalty = 0;    ///< taken from the logits of tokens that the answer has
  float frequency_penalty = 0;   ///< taken once for each time that the answer has the token
  std::vector<std::pair<int32_t, float>> logit_bias;  ///< added to the logits of these ids; -infinity forbids
};

struct TokenLogprob {
  int32_t token = 0;
  float logprob = 0;
  std::string text;  ///< in its place, special tokens' too; a part of a character is U+FFFD
};
struct TokenLogprobs : TokenLogprob {
  std::vector<TokenLogprob> top;  ///< the likeliest, in order
  size_t begin = 0;               ///< bytes of the answer's text before it
};

/// A stop string, and how many bytes of the answer's text are before it.
struct StopFound {
  size_t at = 0;
  std::string stop;
};

/// Says which tokens may come next in one answer. The engine calls it from its own threads, one call at a time.
class TokenFilter {
 public:
  virtual ~TokenFilter() = default;
  /// Sets bit `id % 32` of word `id / 32` for each token that may come next, and clears the others. There are words for
  /// all `vocab_size` bits. Runs beside the forward pass. When no bit is set, or it throws, the turn fails.
  virtual void allow(std::span<uint32_t> words) = 0;
  /// That token has come, which was allowed. Once no text may follow, allow() gives the tokens that end the answer.
  virtual void accept(int32_t token) = 0;
};

struct GenerateOptions {
  int max_tokens = 256;
  SamplingOptions sampling;
  /// Generation ends when its text contains one, or a special token's text does. Text and cache are cut before it.
  std::vector<std::string> stop;
  /// Log-probabilities of each token generated and of so many of the likeliest, at most 64. They are the model's own,
  /// before bias, penalties and temperature.
  std::optional<int> logprobs;
  /// Instead of `stop`, where not all text counts. Hears the answer's text piece by piece on the engine's thread, and
  /// says where a stop string begins. on_text may have heard what follows. It must not block or call the Engine.
  std::function<std::optional<StopFound>(std::string_view piece)> find_stop;
  /// With logprobs: called for each token on the engine's thread, before on_text can hear its text. It must not block
  /// or call the Engine.
  std::function<void(const TokenLogprobs& token)> on_token;
  /// Tokens that may come, of this one answer; it is used up by it. nullptr: all.
  std::shared_ptr<TokenFilter> filter;
  /// Guesses what follows from what the agent holds, and verifies several tokens in one forward pass. No bit of the
  /// answer depends on it. Where kernels are not batch invariant (Backend::kMlx) nothing is guessed.
  bool speculate = true;
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
  /// Sampled, a final end-of-turn token included; their rows are all in the cache. Those of a stop string are left out.
  /// Where its first token has text before it too, that text is encoded anew.
  std::vector<int32_t> tokens;
  std::vector<TokenLogprobs> logprobs;  ///< of the tokens as they were sampled
  FinishReason finish_reason = FinishReason::kLength;
  int generated = 0;            ///< tokens that were sampled, those of a stop string too
  std::string stop;             ///< the stop string that ended it, or empty
  int prefilled = 0;            ///< prompt tokens computed
  int proposed = 0;             ///< tokens that were guessed (GenerateOptions::speculate)
  int accepted = 0;             ///< of those, the ones that came
  double prefill_ms = 0;        ///< start to first token
  double decode_ms = 0;
};

}  // namespace torpor
