#pragma once
/// Answers held to a grammar, by the llguidance crate: JSON of a schema, or a grammar in its dialect of Lark.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/mutex.h"
#include "torpor/generate_options.h"
#include "torpor/text.h"

namespace torpor::server {

/// Makes the grammars of one model's answers. Any thread. The first one takes longer, up to half a second where the vocabulary is
/// large: all tokens are sorted.
class Grammars {
 public:
  /// `vocab_size`: of a row of logits. `ends`: ids of the tokens that end an answer, at least one.
  Grammars(std::shared_ptr<const Tokenizer> tokenizer, int vocab_size, std::vector<int32_t> ends);
  ~Grammars();
  Grammars(const Grammars&) = delete;

  /// For one answer. JSON of a schema is `%json {...}` in the grammar. kInvalidArgument says what can't be held to: an unknown keyword
  /// of a schema, by its name; a mistake in the grammar, with its line.
  std::shared_ptr<TokenFilter> lark(const std::string& grammar);

 private:
  class Vocabulary;

  const std::shared_ptr<const Tokenizer> tokenizer_;
  const int vocab_size_;
  const std::vector<int32_t> ends_;
  Mutex mutex_;
  std::unique_ptr<Vocabulary> vocabulary_ TORPOR_GUARDED_BY(mutex_);  // set once
};

}  // namespace torpor::server
