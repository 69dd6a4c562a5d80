#pragma once
/// Generation from a cache, and CacheExtractor, its face for embedders. Engine thread only.

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "torpor/cache.h"
#include "torpor/generate_options.h"
#include "torpor/model.h"
#include "torpor/text.h"

namespace torpor {

/// Appends `prompt` to `cache`, then generates. Every token prefilled or sampled has its rows in the cache afterwards.
/// kResourceExhausted, before anything is computed, when the prompt leaves no room in the model's context. An answer
/// that reaches the context's end stops there with kLength.
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
