#include "engine/generation.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "torpor/error.h"

namespace torpor {
namespace {

double ms_between(std::chrono::steady_clock::time_point start, std::chrono::steady_clock::time_point end) {
  return std::chrono::duration<double, std::milli>(end - start).count();
}

}  // namespace

// ---- stop strings

StopFilter::StopFilter(std::vector<std::string> stops) : stops_(std::move(stops)) {
  std::erase_if(stops_, [](const std::string& stop) { return stop.empty(); });
}

std::string StopFilter::push(std::string_view piece, bool shown) {
  if (stopped()) return {};
  held_ += piece;
  shown_.append(piece.size(), shown ? '1' : '0');
  size_t first = std::string::npos;
  for (const std::string& stop : stops_) {
    const size_t at = held_.find(stop);
    if (at >= first) continue;
    first = at;
    stop_ = stop;
  }
  if (stopped()) {
    std::string text = release(first);
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
  return release(held_.size() - keep);
}

std::string StopFilter::release(size_t size) {
  std::string text;
  for (size_t i = 0; i < size; ++i) {
    if (shown_[i] == '1') text += held_[i];
  }
  held_.erase(0, size);
  shown_.erase(0, size);
  released_ += size;
  return text;
}

// ---- chunks of a prompt

void PrefillPace::took(int rows, double seconds) {
  if (!adapts_ || rows <= 0) return;
  const double fit = seconds > 0 ? rows * seconds_ / seconds : kMost;
  const int most = int(std::min(fit, double(kMost))), unit = most >= kBlock ? kBlock : kLeast;
  rows_ = std::max(most / unit * unit, kLeast);
}

std::vector<int> PrefillPace::share(std::span<const int> left, std::span<const int> guesses, size_t background) const {
  std::vector<int> rows(left.size());
  size_t first = left.size(), second = left.size();
  int decoding = 0;
  for (size_t i = 0; i < left.size(); ++i) {
    if (left[i] <= 0) {
      decoding += rows[i] = left[i] < 0 ? 0 : guesses.empty() ? 1 : 1 + guesses[i];
    } else if (first == left.size()) {
      first = i;
    } else if (i >= background && first < background) {
      continue;
    } else if (second == left.size() || left[i] < left[second]) {
      second = i;
    }
  }
  if (first == left.size()) return rows;
  const int chunk = adapts_ ? std::max(rows_ - decoding, kLeast) : rows_;
  if (second == left.size() || !adapts_) {
    rows[first] = std::min(left[first], chunk);
    return rows;
  }
  const int passing = left[second] < left[first] ? std::min(left[second], chunk / 2) : 0;
  rows[first] = std::min(left[first], chunk - passing);
  rows[second] = std::min(left[second], chunk - rows[first]);
  int spare = chunk - rows[first] - rows[second];
  for (size_t i = 0; i < left.size(); ++i) {
    if (left[i] <= 0 || i == first || i == second || (i >= background && first < background)) continue;
    rows[i] = std::min(left[i], spare);
    spare -= rows[i];
  }
  return rows;
}

// ---- an answer

Generation::Generation(const ModelInfo& model, std::shared_ptr<const Tokenizer> tokenizer, int held,
                       std::vector<int32_t> prompt, GenerateOptions options, std::vector<int32_t> before)
    : model_(model), options_(std::move(options)), tokenizer_(std::move(tokenizer)), prompt_(std::move(prompt)),
      before_(std::move(before)), detokenizer_(tokenizer_),
      filter_(options_.find_stop ? std::vector<std::string>() : options_.stop), position_(held),
      begin_(held + int(prompt_.size())) {
  check_sampling(options_.sampling, model_.vocab_size);
  if (options_.logprobs && (*options_.logprobs < 0 || *options_.logprobs > 64)) {
    throw Error(ErrorCode::kInvalidArgument, "Log-probabilities can be had of 0 to 64 of the likeliest tokens.");
  }
  before_.insert(before_.end(), prompt_.begin(), prompt_.end());
  if (prompt_.empty()) throw Error(ErrorCode::kInvalidArgument, "The prompt has no tokens; give it some text.");
  if (options_.max_tokens < 1) throw Error(ErrorCode::kInvalidArgument, "max_tokens must be at least 1.");
  if (const int limit = model_.max_context; limit > 0 && held + int64_t(prompt_.size()) >= limit) {
    throw Error(ErrorCode::kResourceExhausted,
                "The prompt of " + std::to_string(prompt_.size()) + " tokens after " + std::to_string(held) +
                    " held does not fit the model's context of " + std::to_string(limit) +
                    " tokens; shorten it or start a new agent.")
        .with_field(kContextFull, std::to_string(limit), std::to_string(held + int64_t(prompt_.size())));
  }
  begin_filter();
}

int Generation::guess(int most, double cost) {
  guesses_.clear();
  if (!speculation_ || over_ || last_) return 0;
  most = std::min(most, options_.max_tokens - int(result_.tokens.size()));
  if (model_.max_context > 0) most = std::min(most, model_.max_context - position_ - 1);
  guesses_ = speculation_->guess(most, cost, model_.vocab_size);
  if (!guesses_.empty()) guesses_.insert(guesses_.begin(), result_.tokens.back());
  return guessed();
}

std::span<const int32_t> Generation::next_rows(int most) {
  const int left = prompt_left();
  if (left > 0 && cancelled()) end(FinishReason::kCancelled);
  const int wanted = left > 0 ? left : begin_ + int(result_.tokens.size()) - position_;
  asked_ = over_ ? 0 : std::min(std::max(most, 1), wanted);
  if (left > 0) return std::span(prompt_).subspan(prompt_.size() - size_t(left), size_t(asked_));
  if (over_) return {};
  if (!guesses_.empty()) {
    guesses_.resize(std::min(guesses_.size(), size_t(std::max(most, 1))));
    asked_ = int(guesses_.size());
    return guesses_;
  }
  return std::span(result_.tokens).subspan(size_t(position_ - begin_), size_t(asked_));
}

void Generation::take(std::span<const float> logits) {
  const int rows = std::exchange(asked_, 0);
  const std::vector<int32_t> guesses = std::exchange(guesses_, {});
  if (guesses.empty()) {
    position_ += rows;
    if (prompt_left() > 0) {
      result_.prefilled += rows;
      tell_progress();
      if (prompt_left() > 0) return;
    }
    return go_on(logits);
  }
  // A row counts when its token is the one that was sampled after the row before it, so all is as if it had been computed alone.
  const size_t vocab = logits.size() / guesses.size();
  result_.proposed += int(guesses.size()) - 1;
  for (size_t i = 0; i < guesses.size(); ++i) {
    if (i > 0 && (over_ || !result_.stop.empty() || result_.tokens.back() != guesses[i])) break;
    result_.accepted += i > 0 ? 1 : 0;
    ++position_;
    go_on(logits.subspan(i * vocab, vocab));
  }
}

void Generation::go_on(std::span<const float> logits) {
  if (position_ < begin_ + int(result_.tokens.size())) return;  // of an answer that a stop string has ended
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
  const int32_t token = choose(logits);
  if (result_.tokens.empty()) {
    first_token_ = Clock::now();
    result_.prefill_ms = ms_between(start_, first_token_);
  }
  if (options_.logprobs) weigh(logits, token);
  result_.tokens.push_back(token);
  ++result_.generated;
  if (options_.speculate) {
    if (!speculation_) speculation_.emplace(before_);
    speculation_->push(token);
  }
  const std::vector<int32_t>& eos = model_.eos_token_ids;
  const bool is_eos = std::find(eos.begin(), eos.end(), token) != eos.end();
  if (!is_eos) {
    const std::string piece = detokenizer_.push(token);
    std::string hidden;
    const bool shows = !filter_.watches() || !piece.empty() || !tokenizer_->decode({token}, true).empty();
    if (!shows) hidden = tokenizer_->decode({token});
    ends_.push_back({(ends_.empty() ? 0 : ends_.back().pushed) + piece.size() + hidden.size(),
                     (ends_.empty() ? 0 : ends_.back().shown) + piece.size()});
    emit(hidden.empty() ? filter_.push(piece) : filter_.push(hidden, false));
    if (filter_.stopped()) cut_at({filter_.cut(), filter_.stop()});
    if (const auto found = options_.find_stop ? options_.find_stop(piece) : std::nullopt) cut_at(*found);
  }
  // The last token's rows are computed too: the next turn then prefills nothing but what is new.
  last_ = is_eos || !result_.stop.empty();
  if (options_.filter && !last_) {
    options_.filter->accept(token);
    begin_filter();
  }
}

void Generation::weigh(std::span<const float> logits, int32_t token) {
  TokenLogprobs& found = result_.logprobs.emplace_back(logprobs_of(logits, token, *options_.logprobs));
  // Decoders drop a space at the beginning of a text, so each text is told after the token before it.
  const int32_t last = result_.tokens.empty() ? before_.back() : result_.tokens.back();
  const std::string before = tokenizer_->decode({last});
  const auto text_of = [&](int32_t id) {
    const std::string both = tokenizer_->decode({last, id});
    const bool whole = both.size() > before.size() && both.starts_with(before);
    return whole ? both.substr(before.size()) : tokenizer_->decode({id});
  };
  found.text = text_of(token);
  for (TokenLogprob& other : found.top) other.text = text_of(other.token);
  found.begin = ends_.empty() ? 0 : ends_.back().shown;
  if (options_.on_token) options_.on_token(found);
}

int32_t Generation::choose(std::span<const float> logits) {
  const SamplingOptions& options = options_.sampling;
  const bool adjusts = !options.logit_bias.empty() || options.repetition_penalty != 1 ||
                       options.presence_penalty != 0 || options.frequency_penalty != 0;
  if (!adjusts && !options_.filter) return sample(logits, options, position_);
  const auto some = [](std::span<const float> row) {
    return std::ranges::any_of(row, [](float logit) { return logit != -INFINITY; });
  };
  std::vector<float> adjusted(logits.begin(), logits.end());
  if (adjusts) {
    adjust_logits(adjusted, options, before_, result_.tokens);
    if (some(logits) && !some(adjusted)) {
      throw Error(ErrorCode::kInvalidArgument, "logit_bias forbids every token that can come; leave one.");
    }
  }
  if (options_.filter) {
    const std::vector<uint32_t> allowed = allowed_.get();
    for (size_t id = 0; id < adjusted.size(); ++id) {
      if ((allowed[id / 32] >> (id % 32) & 1) == 0) adjusted[id] = -INFINITY;
    }
    if (!some(adjusted)) {
      throw Error(ErrorCode::kInvalidArgument, "No token that can come goes on with the grammar; change the grammar, or logit_bias.");
    }
  }
  return sample(adjusted, options, position_);
}

void Generation::begin_filter() {
  if (!options_.filter) return;
  allowed_ = std::async(std::launch::async, [filter = options_.filter, size = size_t(model_.vocab_size)] {
    std::vector<uint32_t> words((size + 31) / 32);
    filter->allow(words);
    return words;
  });
}

// Tokens of the stop string go, and with them those that hold only a part of the character before it.
void Generation::cut_at(const StopFound& found) {
  result_.stop = found.stop;
  size_t kept = size_t(std::ranges::upper_bound(ends_, found.at, {}, &End::pushed) - ends_.begin());
  // With find_stop all text was told, and all of it is shown.
  if (options_.find_stop) result_.text.resize(std::min(found.at, result_.text.size()));
  const auto said_by = [&](size_t n) { return n > 0 ? std::min(ends_[n - 1].shown, result_.text.size()) : 0; };
  const auto whole = [&](size_t n) {
    const std::vector<int32_t> first(result_.tokens.begin(), result_.tokens.begin() + ptrdiff_t(n));
    return tokenizer_->decode(first, true) == result_.text.substr(0, said_by(n));
  };
  while (kept > 0 && !whole(kept)) --kept;
  const std::string rest = result_.text.substr(said_by(kept));
  result_.tokens.resize(kept);
  if (!rest.empty()) {
    const int32_t last = kept > 0 ? result_.tokens.back() : before_.back();
    const std::vector<int32_t> again = tokenizer_->encode(RenderedText{rest}, last);
    result_.tokens.insert(result_.tokens.end(), again.begin(), again.end());
  }
  position_ = begin_ + int(kept);
  if (rest.empty()) end(FinishReason::kStop);
}

void Generation::emit(const std::string& text) {
  if (text.empty()) return;
  result_.text += text;
  if (options_.on_text) options_.on_text(text);
}

void Generation::end(FinishReason reason) {
  over_ = true;
  result_.finish_reason = reason;
  if (result_.stop.empty()) {
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
