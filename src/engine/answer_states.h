#pragma once
/// States of recurrent layers in an answer, so that the tokens of a stop string can be taken back at little cost.

#include "torpor/cache.h"
#include "torpor/model.h"

namespace torpor {

/// Two states of a cache's answer, at least kStride tokens apart. Engine thread only.
class AnswerStates {
 public:
  static constexpr int kStride = 16;
  /// After each step of an answer that may be cut (Generation::may_be_cut): keeps the live state when it is due, and
  /// lets go of the one before the last. Nothing without recurrent layers.
  void keep(KvCache& cache);
  /// The answer is over.
  void drop(KvCache& cache);

 private:
  int last_ = 0, before_ = 0;  // positions; 0: none
};

/// Computes the rows of those of `tokens` that are behind the cache's own. Recurrent layers go on from the live state.
void compute_again(Model& model, KvCache& cache, std::span<const int32_t> tokens);

}  // namespace torpor
