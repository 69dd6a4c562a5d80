#include "engine/generation.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <utility>

#include "kernels/compute.h"
#include "torpor/error.h"

namespace torpor {
namespace {

double ms_between(std::chrono::steady_clock::time_point start, std::chrono::steady_clock::time_point end) {
  return std::chrono::duration<double, std::milli>(end - start).count();
}

// SplitMix64 (Steele, Lea, Flood 2014), as a function of a counter.
double uniform(uint64_t seed, uint64_t counter) {
  uint64_t z = seed + 0x9E3779B97F4A7C15u * (counter + 1);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  z ^= z >> 31;
  return double(z >> 11) * 0x1.0p-53;
}

/// A NaN or +infinity among them. -infinity is a token that can't come. (As integers, which compilers vectorise.)
bool has_no_number(std::span<const float> logits) {
  uint32_t found = 0;
  for (const float logit : logits) {
    const uint32_t bits = std::bit_cast<uint32_t>(logit);
    found |= uint32_t((bits & 0x7fffffffu) >= 0x7f800000u && bits != 0xff800000u);
  }
  return found != 0;
}

Error no_number() {
  return Error(ErrorCode::kInternal, "The model computed no number for the next token; its weights, or rows kept in too small a KV "
                                     "format, don't hold what it computes.");
}

}  // namespace

// ---- from logits to a token

void check_sampling(const SamplingOptions& options) {
  if (!(options.temperature >= 0) || std::isinf(options.temperature)) {
    throw Error(ErrorCode::kInvalidArgument, "The temperature must be a number of at least 0.");
  }
  if (!(options.top_p > 0 && options.top_p <= 1)) {
    throw Error(ErrorCode::kInvalidArgument, "top_p must be above 0 and at most 1.");
  }
}

int32_t sample(std::span<const float> logits, const SamplingOptions& options, int position) {
  if (has_no_number(logits)) throw no_number();
  if (options.temperature == 0) {
    const int32_t token = kernels::argmax(logits.data(), int(logits.size()));
    if (!std::isfinite(logits[size_t(token)])) throw no_number();
    return token;
  }

  const float top = *std::max_element(logits.begin(), logits.end());
  if (!std::isfinite(top)) throw no_number();
  std::vector<double> weights(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) {
    weights[i] = std::exp((double(logits[i]) - top) / options.temperature);
  }
  double total = std::accumulate(weights.begin(), weights.end(), 0.0);

  // Nucleus sampling (Holtzman et al. 2020): the most probable tokens, until their probability reaches top_p. A heap gives
  // them one by one, for they are few; of equals the smaller id comes first.
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  if (options.top_p < 1) {
    const auto below = [&](int32_t a, int32_t b) {
      return weights[a] < weights[b] || (weights[a] == weights[b] && a > b);
    };
    std::make_heap(order.begin(), order.end(), below);
    const double wanted = options.top_p * total;
    auto rest = order.end();
    for (total = 0; total < wanted && rest != order.begin();) {
      std::pop_heap(order.begin(), rest--, below);
      total += weights[*rest];
    }
    order.erase(order.begin(), rest);
    std::reverse(order.begin(), order.end());  // the most probable first
  }

  double remaining = uniform(options.seed, uint64_t(position)) * total;
  for (int32_t token : order) {
    remaining -= weights[token];
    if (remaining < 0) return token;
  }
  return order.back();
}

// ---- stop strings

StopFilter::StopFilter(std::vector<std::string> stops) : stops_(std::move(stops)) {
  std::erase_if(stops_, [](const std::string& stop) { return stop.empty(); });
}

std::string StopFilter::push(std::string_view piece) {
  if (stopped_) return {};
  held_ += piece;
  size_t first = std::string::npos;
  for (const std::string& stop : stops_) first = std::min(first, held_.find(stop));
  if (first != std::string::npos) {
    stopped_ = true;
    std::string text = held_.substr(0, first);
    held_.clear();
    return text;
  }
  // Hold back the longest end of the text that is the beginning of a stop string.
  size_t keep = 0;
  for (const std::string& stop : stops_) {
    for (size_t n = std::min(stop.size() - 1, held_.size()); n > keep; --n) {
      if (held_.ends_with(std::string_view(stop).substr(0, n))) keep = n;
    }
  }
  std::string text = held_.substr(0, held_.size() - keep);
  held_.erase(0, held_.size() - keep);
  return text;
}

std::string StopFilter::finish() { return std::exchange(held_, {}); }

// ---- chunks of a prompt

void PrefillPace::took(int rows, double seconds) {
  if (!adapts_ || rows <= 0) return;
  const double fit = seconds > 0 ? rows * seconds_ / seconds : kMost;
  const int most = int(std::min(fit, double(kMost))), unit = most >= kBlock ? kBlock : kLeast;
  rows_ = std::max(most / unit * unit, kLeast);
}

std::vector<int> PrefillPace::share(std::span<const int> left) const {
  std::vector<int> rows(left.size());
  size_t first = left.size(), second = left.size();
  int decoding = 0;
  for (size_t i = 0; i < left.size(); ++i) {
    if (left[i] <= 0) {
      decoding += rows[i] = left[i] + 1;
    } else if (first == left.size()) {
      first = i;
    } else if (second == left.size() || left[i] < left[second]) {
      second = i;
    }
  }
  if (first == left.size()) return rows;
  const int chunk = std::max(rows_ - decoding, kLeast);
  if (second == left.size()) {
    rows[first] = std::min(left[first], chunk);
    return rows;
  }
  const int passing = left[second] < left[first] ? std::min(left[second], chunk / 2) : 0;
  rows[first] = std::min(left[first], chunk - passing);
  rows[second] = std::min(left[second], chunk - rows[first]);
  return rows;
}

// ---- an answer

Generation::Generation(const ModelInfo& model, std::shared_ptr<const Tokenizer> tokenizer, int held,
                       std::vector<int32_t> prompt, GenerateOptions options)
    : model_(model), options_(std::move(options)), prompt_(std::move(prompt)), detokenizer_(std::move(tokenizer)),
      filter_(options_.stop), position_(held) {
  check_sampling(options_.sampling);
  if (prompt_.empty()) throw Error(ErrorCode::kInvalidArgument, "The prompt has no tokens; give it some text.");
  if (options_.max_tokens < 1) throw Error(ErrorCode::kInvalidArgument, "max_tokens must be at least 1.");
  if (const int limit = model_.max_context; limit > 0 && held + int64_t(prompt_.size()) >= limit) {
    throw Error(ErrorCode::kResourceExhausted,
                "The prompt of " + std::to_string(prompt_.size()) + " tokens after " + std::to_string(held) +
                    " held does not fit the model's context of " + std::to_string(limit) +
                    " tokens; shorten it or start a new agent.");
  }
}

std::span<const int32_t> Generation::next_rows(int most) {
  const int left = prompt_left();
  if (left > 0 && cancelled()) end(FinishReason::kCancelled);
  asked_ = over_ ? 0 : left > 0 ? std::min(std::max(most, 1), left) : 1;
  if (left > 0) return std::span(prompt_).subspan(prompt_.size() - size_t(left), size_t(asked_));
  return std::span(result_.tokens).last(size_t(asked_));
}

void Generation::take(std::span<const float> logits) {
  const int rows = std::exchange(asked_, 0);
  position_ += rows;
  if (prompt_left() > 0) {
    result_.prefilled += rows;
    tell_progress();
    if (prompt_left() > 0) return;
  }
  if (last_) {
    end(FinishReason::kStop);
  } else if (int(result_.tokens.size()) >= options_.max_tokens || (model_.max_context > 0 && position_ >= model_.max_context)) {
    end(FinishReason::kLength);
  } else if (cancelled()) {
    end(FinishReason::kCancelled);
  } else {
    sample_next(logits);
  }
}

void Generation::skip(int rows) {
  given_ += rows;
  position_ += rows;
  tell_progress();
}

void Generation::tell_progress() const {
  const int total = int(prompt_.size());
  if (options_.on_prefill) options_.on_prefill(total - prompt_left(), total);
}

void Generation::sample_next(std::span<const float> logits) {
  const int32_t token = sample(logits, options_.sampling, position_);
  if (result_.tokens.empty()) {
    first_token_ = Clock::now();
    result_.prefill_ms = ms_between(start_, first_token_);
  }
  result_.tokens.push_back(token);
  const std::vector<int32_t>& eos = model_.eos_token_ids;
  const bool is_eos = std::find(eos.begin(), eos.end(), token) != eos.end();
  if (!is_eos) emit(filter_.push(detokenizer_.push(token)));
  // The last token's rows are computed too: the next turn then prefills nothing but what is new.
  last_ = is_eos || filter_.stopped();
}

void Generation::emit(const std::string& text) {
  if (text.empty()) return;
  result_.text += text;
  if (options_.on_text) options_.on_text(text);
}

void Generation::end(FinishReason reason) {
  over_ = true;
  result_.finish_reason = reason;
  if (!filter_.stopped()) {
    emit(filter_.push(detokenizer_.finish()));
    emit(filter_.finish());
  }
  const Clock::time_point now = Clock::now();
  if (result_.tokens.empty()) {
    result_.prefill_ms = ms_between(start_, now);
  } else {
    result_.decode_ms = ms_between(first_token_, now);
  }
}

GenerateResult Generation::finish() { return std::move(result_); }

}  // namespace torpor
