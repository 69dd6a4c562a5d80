#include "engine/answer_states.h"

#include <utility>

namespace torpor {

void AnswerStates::keep(KvCache& cache) {
  const int length = cache.length();
  if (cache.state_layout().empty() || cache.keeps_state() || (last_ > 0 && length < last_ + kStride)) return;
  cache.keep_state();
  cache.drop_state(std::exchange(before_, std::exchange(last_, length)));
}

void AnswerStates::drop(KvCache& cache) {
  cache.drop_state(std::exchange(before_, 0));
  cache.drop_state(std::exchange(last_, 0));
}

void compute_again(Model& model, KvCache& cache, std::span<const int32_t> tokens) {
  const ForwardSequence rest{.tokens = tokens.subspan(size_t(cache.length())), .kv = &cache, .no_logits = true};
  if (rest.tokens.empty()) return;
  model.forward({&rest, 1});
  cache.record_tokens(rest.tokens);
}

}  // namespace torpor
