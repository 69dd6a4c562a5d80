#include "server/grammar.h"

#include <span>
#include <utility>

#include "text/tokenizer_impl.h"
#include "torpor_grammar_shim.h"

namespace torpor::server {

using text::ShimText;

class Grammars::Vocabulary {
 public:
  Vocabulary(const torpor_text_tokenizer* tokenizer, int size, std::span<const int32_t> ends) {
    const std::vector<uint32_t> ids(ends.begin(), ends.end());
    torpor_grammar_vocabulary* handle = nullptr;
    ShimText error;
    text::check(torpor_grammar_vocabulary_new(tokenizer, size_t(size), ids.data(), ids.size(), &handle, error.out()), error,
                "no grammar can be held to: ");
    handle_.reset(handle);
  }
  const torpor_grammar_vocabulary* handle() const { return handle_.get(); }

 private:
  std::unique_ptr<torpor_grammar_vocabulary, text::Deleter<torpor_grammar_vocabulary_free>> handle_;
};

namespace {

class Grammar final : public TokenFilter {
 public:
  explicit Grammar(torpor_grammar* handle) : handle_(handle) {}

  void allow(std::span<uint32_t> words) override {
    ShimText error;
    text::check(torpor_grammar_mask(handle_.get(), words.data(), words.size(), error.out()), error, "the grammar: ");
  }

  void accept(int32_t token) override {
    ShimText error;
    text::check(torpor_grammar_accept(handle_.get(), uint32_t(token), error.out()), error, "the grammar: ");
  }

 private:
  std::unique_ptr<torpor_grammar, text::Deleter<torpor_grammar_free>> handle_;
};

}  // namespace

Grammars::Grammars(std::shared_ptr<const Tokenizer> tokenizer, int vocab_size, std::vector<int32_t> ends)
    : tokenizer_(std::move(tokenizer)), vocab_size_(vocab_size), ends_(std::move(ends)) {}
Grammars::~Grammars() = default;

std::shared_ptr<TokenFilter> Grammars::lark(const std::string& grammar) {
  const Vocabulary* vocabulary = nullptr;
  {
    const MutexLock lock(mutex_);
    if (vocabulary_ == nullptr) {
      vocabulary_ = std::make_unique<Vocabulary>(tokenizer_->impl_->handle.get(), vocab_size_, ends_);
    }
    vocabulary = vocabulary_.get();
  }
  torpor_grammar* handle = nullptr;
  ShimText error;
  text::check(torpor_grammar_new(vocabulary->handle(), grammar.data(), grammar.size(), &handle, error.out()), error);
  return std::make_shared<Grammar>(handle);
}

}  // namespace torpor::server
