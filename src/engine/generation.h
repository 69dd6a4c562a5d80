#pragma once
/// One answer as it comes about, step by step: what is to be computed next, and what its logits say. No model and no cache
/// inside, so whoever owns those may compute the rows of several generations in one forward pass. One thread at a time.

#include <chrono>
#include <cstdint>
#include <future>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/sampling.h"
#include "engine/speculation.h"
#include "torpor/generate_options.h"
#include "torpor/model_info.h"
#include "torpor/text.h"

namespace torpor {

/// Lets text through once it can no longer become part of a stop string.
class StopFilter {
 public:
  explicit StopFilter(std::vector<std::string> stops);
  /// Text that is certain after `piece`. After stopped() it is always empty. What is not `shown`, a special token's text,
  /// can be part of a stop string, but never comes out.
  std::string push(std::string_view piece, bool shown = true);
  /// What was held back, at the end of generation.
  std::string finish() { return release(held_.size()); }
  bool watches() const noexcept { return !stops_.empty(); }
  bool stopped() const noexcept { return !stop_.empty(); }
  /// Whether text that was pushed may be the beginning of a stop string.
  bool holds_back() const noexcept { return !held_.empty(); }
  /// Once it has stopped: at which string, and bytes of all that was pushed before that.
  const std::string& stop() const noexcept { return stop_; }
  size_t cut() const noexcept { return released_; }

 private:
  /// Lets the first `size` bytes go: those of them that are shown.
  std::string release(size_t size);

  std::vector<std::string> stops_;
  std::string held_, shown_;  // `shown_`: '1' for each byte of held_ that is
  std::string stop_;
  size_t released_ = 0;
};

/// How many rows a step with tokens of a prompt computes: as many as take `seconds` at the speed measured last, so that a
/// cancellation, or the next token of another's answer, waits no longer. Chunks change no bit where kernels are batch invariant;
/// other backends get chunks of one size, of one prompt at a time.
class PrefillPace {
 public:
  static constexpr int kMost = 512, kLeast = 16;
  static constexpr int kBlock = 144;  // rows that the kernels multiply at once: whole blocks cost nothing more than one chunk
  static constexpr double kSeconds = 0.25;

  explicit PrefillPace(Backend backend, double seconds = kSeconds)
      : adapts_(backend == Backend::kKernels), seconds_(seconds), rows_(adapts_ ? kFirst : kMost) {}
  /// Rows of the next such step.
  int rows() const noexcept { return rows_; }
  /// A step of `rows` rows took `seconds`.
  void took(int rows, double seconds);

  /// What a step computes of each turn, given by rank (Scheduler::Step) with the tokens `left` of their prompts. One that decodes
  /// (0 left) gets a row, and one for each of its `guesses` (empty: none has any), one that waits for another's rows (-1) none. The
  /// first prompt and the one that has least left share what is left of rows(), kLeast at least. The shorter one gets up to half of
  /// it, so it may pass; the first one never waits. What these two leave goes to the others by rank.
  /// From index `background` on no prompt is read beside one that comes before it.
  std::vector<int> share(std::span<const int> left, std::span<const int> guesses = {}, size_t background = SIZE_MAX) const;

 private:
  static constexpr int kFirst = 32;  // the speed is not known yet
  bool adapts_;
  double seconds_;
  int rows_;
};

class Generation {
 public:
  /// An answer to `prompt`, which follows `held` tokens in the cache. kInvalidArgument for options that can't be;
  /// kResourceExhausted when the prompt leaves no room in the model's context. `model` must outlive the generation.
  /// `before`: the ids that are held, for the repetition penalty.
  Generation(const ModelInfo& model, std::shared_ptr<const Tokenizer> tokenizer, int held, std::vector<int32_t> prompt,
             GenerateOptions options, std::vector<int32_t> before = {});

  /// Guesses what follows the token sampled last: at most `most` tokens, and how many they are. None before there is one, nor
  /// without GenerateOptions::speculate. `cost`: RowCost::of. The next rows then are theirs, too.
  int guess(int most, double cost);
  /// Tokens whose rows the next forward pass computes: at most `most` of the prompt, then the token sampled last and what is
  /// guessed. Empty when the generation is over. Valid until take().
  std::span<const int32_t> next_rows(int most);
  /// How many of these are guessed; take() needs the logits of all of them then.
  int guessed() const noexcept { return int(guesses_.empty() ? 0 : guesses_.size() - 1); }
  /// Whether take() needs logits: not before the prompt's last token is among the rows.
  bool wants_logits() const noexcept { return asked_ >= prompt_left(); }
  /// The rows of next_rows() are in the cache. `logits` `[vocab]` are those after the last one, `[rows, vocab]` with guesses, or
  /// empty where none are wanted. Calls the options' callbacks. kInternal when the logits hold no number.
  void take(std::span<const float> logits);
  bool over() const noexcept { return over_; }
  /// Whether a stop string may yet take tokens of the answer back, and as far as is known not from before these rows.
  bool may_be_cut() const noexcept {
    return (filter_.watches() || options_.find_stop) && !filter_.holds_back() && prompt_left() == 0 && !over_ && !last_;
  }
  /// Tokens of the prompt whose rows are not in the cache yet.
  int prompt_left() const noexcept { return int(prompt_.size()) - given_ - result_.prefilled; }
  /// The next `rows` of them have come into the cache without being computed. At least one is left.
  void skip(int rows);
  /// Rows in the cache: all that `held`, the prompt and `sampled()` have, but for what next_rows will ask for. Fewer than
  /// there are where a guess was wrong or a stop string has come: the owner of the cache takes those from here on back.
  int position() const noexcept { return position_; }
  const std::vector<int32_t>& sampled() const noexcept { return result_.tokens; }
  /// Tokens guessed so far, and of those the ones that came.
  int proposed() const noexcept { return result_.proposed; }
  int accepted() const noexcept { return result_.accepted; }
  /// Once it is over.
  GenerateResult finish();

 private:
  using Clock = std::chrono::steady_clock;

  bool cancelled() const { return options_.cancel != nullptr && options_.cancel->load(); }
  void tell_progress() const;
  /// Goes on from the first row that has no token after it yet.
  void go_on(std::span<const float> logits);
  void sample_next(std::span<const float> logits);
  int32_t choose(std::span<const float> logits);
  /// Begins to find out which tokens may come next, beside the forward pass (GenerateOptions::filter).
  void begin_filter();
  void weigh(std::span<const float> logits, int32_t token);
  void cut_at(const StopFound& found);
  void emit(const std::string& text);
  void end(FinishReason reason);

  const ModelInfo& model_;
  const GenerateOptions options_;
  const std::shared_ptr<const Tokenizer> tokenizer_;
  const std::vector<int32_t> prompt_;
  std::vector<int32_t> before_;       // all that the answer follows, as far as it is known
  Detokenizer detokenizer_;
  StopFilter filter_;
  /// After a token: bytes of text pushed into the filter, and of those the ones that are shown.
  struct End {
    size_t pushed, shown;
  };
  std::vector<End> ends_;             // of the tokens sampled, but for one that ends the turn
  int position_;                      // rows in the cache
  const int begin_;                   // of those, before the answer
  int asked_ = 0;                     // rows that next_rows gave
  std::optional<Speculation> speculation_;  // none before the first token
  std::vector<int32_t> guesses_;      // the token sampled last, and what is guessed to follow; empty where nothing is
  int given_ = 0;                     // rows of the prompt that were skipped
  bool last_ = false, over_ = false;  // the token sampled last ends the answer; all is said
  Clock::time_point start_ = Clock::now(), first_token_;
  GenerateResult result_;
  std::future<std::vector<uint32_t>> allowed_;  // last: it is waited for before the others go
};

}  // namespace torpor
