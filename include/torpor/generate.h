#pragma once
/// Generation from a cache, and CacheExtractor, its face for embedders. Engine thread only.

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "torpor/cache.h"
#include "torpor/model.h"
#include "torpor/text.h"

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

/// Appends `prompt` to `cache`, then generates. Every token prefilled or sampled has its rows in the cache afterwards.
/// kResourceExhausted, before anything is computed, when the prompt leaves no room in the model's context; an answer that
/// reaches the context's end stops there with kLength.
GenerateResult generate(Model& model, std::shared_ptr<const Tokenizer> tokenizer,
                        KvCache& cache, std::span<const int32_t> prompt, const GenerateOptions& options);

/// Takes the KV cache out of generation: multi-turn without the agent manager or the store.
///
///     CacheExtractor extractor(model, tokenizer);
///     auto [text, cache] = extractor.generate("Once upon a time");
///     auto [more, cache2] = extractor.generate(" and then", std::move(cache));
class CacheExtractor {
 public:
  CacheExtractor(std::shared_ptr<Model> model, std::shared_ptr<const Tokenizer> tokenizer,
                 std::optional<KvFormat> kv_format = std::nullopt);

  struct Output {
    std::string text;
    std::unique_ptr<KvCache> cache;
    GenerateResult details;
  };
  /// Continues from `cache` (nullptr: from nothing). `prompt` is plain text, appended as it stands; special tokens of
  /// the tokenizer (BOS) are added to an empty cache only.
  Output generate(const std::string& prompt, std::unique_ptr<KvCache> cache = nullptr,
                  const GenerateOptions& options = {});

 private:
  std::shared_ptr<Model> model_;
  std::shared_ptr<const Tokenizer> tokenizer_;
  KvFormat kv_format_;
};

}  // namespace torpor
