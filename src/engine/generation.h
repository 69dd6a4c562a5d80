#pragma once
/// One answer as it comes about, step by step: what is to be computed next, and what its logits say. No model and no cache
/// inside, so whoever owns those may compute the rows of several generations in one forward pass. One thread at a time.

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "torpor/generate_options.h"
#include "torpor/model_info.h"
#include "torpor/text.h"

namespace torpor {

/// kInvalidArgument for a temperature below 0 or a top_p outside (0, 1].
void check_sampling(const SamplingOptions& options);

/// The token that follows position `position - 1`. The random number depends on seed and position alone, so a turn that is
/// interrupted by sleep draws the same numbers as one that is not. kInternal when a logit is no number, or none is finite.
int32_t sample(std::span<const float> logits, const SamplingOptions& options, int position);

/// Lets text through once it can no longer become part of a stop string.
class StopFilter {
 public:
  explicit StopFilter(std::vector<std::string> stops);
  /// Text that is certain after `piece`. After stopped() it is always empty.
  std::string push(std::string_view piece);
  /// What was held back, at the end of generation.
  std::string finish();
  bool stopped() const noexcept { return stopped_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool stopped_ = false;
};

/// How many rows a step with tokens of a prompt computes: as many as take `seconds` at the speed measured last, so that a
/// cancellation, or the next token of another's answer, waits no longer. Chunks change no bit where kernels are batch invariant;
/// other backends get chunks of one size.
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

  /// What a step computes of each turn, given in the order they came with the tokens `left` of their prompts. One that decodes
  /// (0 left) gets a row, one that waits for another's rows (-1) none. The prompts that came first and that has least left share what is left of rows(), kLeast at least. The
  /// shorter one gets up to half of it, so it may pass; the first one never waits.
  std::vector<int> share(std::span<const int> left) const;

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
  Generation(const ModelInfo& model, std::shared_ptr<const Tokenizer> tokenizer, int held, std::vector<int32_t> prompt,
             GenerateOptions options);

  /// Tokens whose rows the next forward pass computes: at most `most` of the prompt, then the token sampled last. Empty when
  /// the generation is over. Valid until take().
  std::span<const int32_t> next_rows(int most);
  /// Whether take() needs logits: not before the prompt's last token is among the rows.
  bool wants_logits() const noexcept { return asked_ >= prompt_left(); }
  /// The rows of next_rows() are in the cache. `logits` `[vocab]` are those after the last one, or empty where none are wanted.
  /// Calls the options' callbacks. kInternal when the logits hold no number.
  void take(std::span<const float> logits);
  bool over() const noexcept { return over_; }
  /// Tokens of the prompt whose rows are not in the cache yet.
  int prompt_left() const noexcept { return int(prompt_.size()) - given_ - result_.prefilled; }
  /// The next `rows` of them have come into the cache without being computed. At least one is left.
  void skip(int rows);
  /// Rows in the cache: all that `held`, the prompt and `sampled()` have, but for what next_rows will ask for.
  int position() const noexcept { return position_; }
  const std::vector<int32_t>& sampled() const noexcept { return result_.tokens; }
  /// Once it is over.
  GenerateResult finish();

 private:
  using Clock = std::chrono::steady_clock;

  bool cancelled() const { return options_.cancel != nullptr && options_.cancel->load(); }
  void tell_progress() const;
  void sample_next(std::span<const float> logits);
  void emit(const std::string& text);
  void end(FinishReason reason);

  const ModelInfo& model_;
  const GenerateOptions options_;
  const std::vector<int32_t> prompt_;
  Detokenizer detokenizer_;
  StopFilter filter_;
  int position_;                      // rows in the cache
  int asked_ = 0;                     // rows that next_rows gave
  int given_ = 0;                     // rows of the prompt that were skipped
  bool last_ = false, over_ = false;  // the token sampled last ends the answer; all is said
  Clock::time_point start_ = Clock::now(), first_token_;
  GenerateResult result_;
};

}  // namespace torpor
