#include "text/tokenizer_impl.h"

namespace torpor {

using text::ShimText;

struct Detokenizer::Impl {
  text::DetokenizerHandle handle;
};

Detokenizer::Detokenizer(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special)
    : impl_(std::make_unique<Impl>()) {
  if (!tokenizer) throw Error(ErrorCode::kInvalidArgument, "a detokenizer needs a tokenizer");
  torpor_text_detokenizer* handle = nullptr;
  ShimText error;
  text::check(torpor_text_detokenizer_new(tokenizer->impl_->handle.get(), skip_special, &handle, error.out()), error);
  impl_->handle.reset(handle);
}

Detokenizer::~Detokenizer() = default;
Detokenizer::Detokenizer(Detokenizer&&) noexcept = default;

std::string Detokenizer::push(int32_t id) {
  ShimText completed, error;
  text::check(torpor_text_detokenizer_push(impl_->handle.get(), id, completed.out(), error.out()), error);
  return completed.str();
}

std::string Detokenizer::finish() {
  ShimText rest, error;
  text::check(torpor_text_detokenizer_finish(impl_->handle.get(), rest.out(), error.out()), error);
  return rest.str();
}

}  // namespace torpor
