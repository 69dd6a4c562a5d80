#include "torpor/generate.h"

#include <algorithm>
#include <chrono>

#include "engine/sampler.h"
#include "engine/stop_filter.h"
#include "torpor/error.h"

namespace torpor {
namespace {

// Prompt tokens between two looks at the cancel flag and the progress callback.
constexpr int kPrefillChunk = 512;

using Clock = std::chrono::steady_clock;

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

bool cancelled(const GenerateOptions& options) { return options.cancel != nullptr && options.cancel->load(); }

std::span<const float> last_row(const mx::array& logits) {
  const int vocab = logits.shape(-1);
  return {logits.data<float>() + (logits.size() - size_t(vocab)), size_t(vocab)};
}

}  // namespace

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
  check_sampling(options.sampling);
  if (prompt.empty()) throw Error(ErrorCode::kInvalidArgument, "The prompt has no tokens; give it some text.");
  if (options.max_tokens < 1) throw Error(ErrorCode::kInvalidArgument, "max_tokens must be at least 1.");
  const int limit = model.info().max_context;
  if (limit > 0 && cache.length() + int64_t(prompt.size()) >= limit) {
    throw Error(ErrorCode::kResourceExhausted,
                "The prompt of " + std::to_string(prompt.size()) + " tokens after " + std::to_string(cache.length()) +
                    " held does not fit the model's context of " + std::to_string(limit) +
                    " tokens; shorten it or start a new agent.");
  }

  GenerateResult result;
  const auto start = Clock::now();
  const auto forward = [&](std::span<const int32_t> tokens) {
    const ForwardSequence sequence{tokens, &cache, false};
    mx::array logits = model.forward({&sequence, 1});
    cache.record_tokens(tokens);
    return logits;
  };

  mx::array logits(0.0f);
  const int total = int(prompt.size());
  while (result.prefilled < total) {
    if (cancelled(options)) {
      result.finish_reason = FinishReason::kCancelled;
      result.prefill_ms = ms_since(start);
      return result;
    }
    const int n = std::min(kPrefillChunk, total - result.prefilled);
    logits = forward(prompt.subspan(size_t(result.prefilled), size_t(n)));
    result.prefilled += n;
    if (options.on_prefill) options.on_prefill(result.prefilled, total);
  }

  Detokenizer detokenizer(tokenizer);
  StopFilter filter(options.stop);
  const auto emit = [&](const std::string& text) {
    if (text.empty()) return;
    result.text += text;
    if (options.on_text) options.on_text(text);
  };
  const std::vector<int32_t>& eos = model.info().eos_token_ids;
  auto decode_start = start;
  for (int i = 0; i < options.max_tokens; ++i) {
    if (limit > 0 && cache.length() >= limit) break;
    if (cancelled(options)) {
      result.finish_reason = FinishReason::kCancelled;
      break;
    }
    const int32_t token = sample(last_row(logits), options.sampling, cache.length());
    if (i == 0) {
      result.prefill_ms = ms_since(start);
      decode_start = Clock::now();
    }
    result.tokens.push_back(token);
    const bool end = std::find(eos.begin(), eos.end(), token) != eos.end();
    if (!end) emit(filter.push(detokenizer.push(token)));
    // The last token's rows are computed too: the next turn then prefills nothing but what is new.
    logits = forward({&token, 1});
    if (end || filter.stopped()) {
      result.finish_reason = FinishReason::kStop;
      break;
    }
  }
  if (!filter.stopped()) {
    emit(filter.push(detokenizer.finish()));
    emit(filter.finish());
  }
  result.decode_ms = ms_since(decode_start);
  return result;
}

CacheExtractor::CacheExtractor(std::shared_ptr<Model> model, std::shared_ptr<const Tokenizer> tokenizer,
                               std::optional<KvFormat> kv_format)
    : model_(std::move(model)),
      tokenizer_(std::move(tokenizer)),
      kv_format_(kv_format.value_or(model_->default_kv_format())) {}

CacheExtractor::Output CacheExtractor::generate(const std::string& prompt, std::unique_ptr<KvCache> cache,
                                                const GenerateOptions& options) {
  const KvLayout layout = model_->kv_layout(kv_format_);
  if (cache == nullptr) cache = KvCache::create(layout, model_->backend());
  if (const CacheValidation sound = validate_cache_structure(*cache, &layout); !sound) {
    throw Error(ErrorCode::kIncompatible, "The cache given does not fit the model: " + sound.reason + ".");
  }
  const std::vector<int32_t> tokens = tokenizer_->encode(prompt, cache->length() == 0);
  Output output;
  output.details = torpor::generate(*model_, tokenizer_, *cache, tokens, options);
  output.text = output.details.text;
  output.cache = std::move(cache);
  return output;
}

}  // namespace torpor
