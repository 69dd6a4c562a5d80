#include "base/gguf.h"
#include "base/hash.h"
#include "text/tokenizer_impl.h"

namespace torpor {

using text::ShimText;

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;

void Tokenizer::require(const std::filesystem::path& dir) {
  const auto path = dir / "tokenizer.json";
  std::error_code ignored;
  if (std::filesystem::exists(path, ignored) || is_gguf(dir)) return;
  std::string other;
  for (const char* name : {"tokenizer.model", "tekken.json", "vocab.json"}) {
    if (std::filesystem::exists(dir / name, ignored)) other = name;
  }
  throw Error(ErrorCode::kNotFound,
              "there is no tokenizer at " + path.string() +
                  (other.empty() ? std::string("; fetch the model again")
                                 : ", and " + other +
                                       " is not read; transformers makes one of it: "
                                       "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"));
}

std::shared_ptr<const Tokenizer> Tokenizer::load(const std::filesystem::path& dir) {
  require(dir);
  const text::ModelFiles files(dir, /*tokenizer=*/true);
  const torpor_text_files view = files.view();
  torpor_text_tokenizer* handle = nullptr;
  ShimText changes, error;
  const std::string from = is_gguf(dir) ? "the tokenizer of " + dir.string() : (dir / "tokenizer.json").string();
  text::check(torpor_text_tokenizer_new(&view, &handle, changes.out(), error.out()), error, "can't use " + from + ": ");
  auto impl = std::make_unique<Impl>();
  impl->handle.reset(handle);
  impl->digest = hash_hex(*files.tokenizer() + changes.str());
  return std::shared_ptr<const Tokenizer>(new Tokenizer(std::move(impl)));
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool add_special) const {
  return encode_at(text, add_special ? TORPOR_TEXT_BEGINNING : TORPOR_TEXT_ALONE, {});
}

std::vector<int32_t> Tokenizer::encode(const RenderedText& text, std::optional<int32_t> after) const {
  return encode_at(text.text,
                   !after        ? int64_t(TORPOR_TEXT_ALONE)
                   : *after >= 0 ? int64_t(*after)
                                 : int64_t(UINT32_MAX),
                   text.joint);
}

std::vector<int32_t> Tokenizer::encode_at(std::string_view text, int64_t place, std::string_view joint) const {
  torpor_text_ids ids{};
  ShimText error;
  text::check(torpor_text_tokenizer_encode(impl_->handle.get(), text.data(), text.size(), place, joint.data(),
                                           joint.size(), &ids, error.out()),
              error);
  const std::unique_ptr<torpor_text_ids, void (*)(torpor_text_ids*)> owned(
      &ids, [](torpor_text_ids* given) { torpor_text_ids_free(*given); });
  return {ids.data, ids.data + ids.size};
}

std::string Tokenizer::decode(const std::vector<int32_t>& ids, bool skip_special) const {
  ShimText decoded, error;
  text::check(torpor_text_tokenizer_decode(impl_->handle.get(), ids.data(), ids.size(), skip_special, decoded.out(),
                                           error.out()),
              error);
  return decoded.str();
}

std::optional<int32_t> Tokenizer::token_to_id(std::string_view token) const {
  int32_t id = -1;
  ShimText error;
  text::check(torpor_text_tokenizer_token_to_id(impl_->handle.get(), token.data(), token.size(), &id, error.out()),
              error);
  if (id < 0) return std::nullopt;
  return id;
}

int Tokenizer::vocab_size() const {
  size_t size = 0;
  ShimText error;
  text::check(torpor_text_tokenizer_vocab_size(impl_->handle.get(), &size, error.out()), error);
  return static_cast<int>(size);
}

const std::string& Tokenizer::digest() const { return impl_->digest; }

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
