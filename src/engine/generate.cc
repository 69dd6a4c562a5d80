#include "torpor/generate.h"

#include <algorithm>
#include <chrono>

#include "engine/answer_states.h"
#include "engine/generation.h"
#include "torpor/error.h"

namespace torpor {

const char* finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop: return "stop";
    case FinishReason::kLength: return "length";
    case FinishReason::kCancelled: return "cancelled";
  }
  return "?";
}

GenerateResult generate(Model& model, std::shared_ptr<const Tokenizer> tokenizer, KvCache& cache,
                        std::span<const int32_t> prompt, const GenerateOptions& options) {
  using Clock = std::chrono::steady_clock;
  Generation generation(model.info(), std::move(tokenizer), cache.length(), {prompt.begin(), prompt.end()}, options,
                        cache.tokens());
  // For a stop string's tokens, which are taken back.
  const int begun = cache.length();
  const bool was_kept = cache.keeps_state();
  cache.keep_state();
  AnswerStates states;
  PrefillPace pace(model.backend());
  RowCost cost;
  while (true) {
    const bool reads = generation.prompt_left() > 0;
    const int guesses = reads ? 0 : generation.guess(cache.spare_rows() - 1, cost.of(1));
    const std::span<const int32_t> rows = generation.next_rows(std::max(pace.rows(), 1 + guesses));
    if (rows.empty()) {
      states.drop(cache);
      if (!was_kept) cache.drop_state(begun);
      return generation.finish();
    }
    const auto start = Clock::now();
    const ForwardSequence sequence{.tokens = rows, .kv = &cache, .all_logits = guesses > 0, .no_logits = !generation.wants_logits()};
    const mx::array logits = model.forward({&sequence, 1});
    cache.record_tokens(rows);
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    reads ? pace.took(int(rows.size()), seconds) : cost.took(1, guesses, seconds);
    generation.take({logits.data<float>(), logits.size()});
    if (const int kept = generation.position(); cache.length() > kept) {
      const std::vector<int32_t> tokens(cache.tokens().begin(), cache.tokens().begin() + kept);
      cache.truncate(cache.resumable(kept));
      compute_again(model, cache, tokens);
    } else if (generation.may_be_cut()) {
      states.keep(cache);
    }
  }
}

CacheExtractor::CacheExtractor(std::shared_ptr<Model> model, std::shared_ptr<const Tokenizer> tokenizer,
                               std::optional<KvFormat> kv_format)
    : model_(std::move(model)),
      tokenizer_(std::move(tokenizer)),
      kv_format_(model_->refined(kv_format.value_or(model_->default_kv_format()))) {}

CacheExtractor::Output CacheExtractor::generate(const std::string& prompt, std::unique_ptr<KvCache> cache,
                                                const GenerateOptions& options) {
  const KvLayout layout = model_->kv_layout(kv_format_);
  if (cache == nullptr) {
    cache = KvCache::create(layout, kv_format_, model_->backend(), model_->state_layout());
  }
  if (const CacheValidation sound = validate_cache_structure(*cache, &layout); !sound) {
    throw Error(ErrorCode::kIncompatible, "The cache given does not fit the model: " + sound.reason + ".").with_field("layout");
  }
  const std::vector<int32_t> tokens = cache->length() == 0 ? tokenizer_->encode(prompt, true)
                                                           : tokenizer_->encode(RenderedText{prompt}, cache->tokens().back());
  Output output;
  output.details = torpor::generate(*model_, tokenizer_, *cache, tokens, options);
  output.text = output.details.text;
  output.cache = std::move(cache);
  return output;
}

}  // namespace torpor
