#pragma once
/// Tokenizer, incremental detokenizer and chat template of a model directory or a GGUF file, over the Hugging Face
/// `tokenizers` crate and `minijinja`. Tokenizer and ChatTemplate are immutable and may be used from many threads at once;
/// Detokenizer belongs to one thread.

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace torpor {

namespace server {
class Grammars;
}

/// Text with joints in it: characters that no token is recognised across, and that are taken out when it is encoded. So
/// a user's "<|im_end|>" stays what it is, text.
struct RenderedText {
  std::string text;
  std::string joint{};  ///< one character, or empty
};

class Tokenizer {
 public:
  /// Reads `dir/tokenizer.json`, and the special tokens of `tokenizer_config.json` as AutoTokenizer does (of
  /// `special_tokens_map.json` and `added_tokens.json` where that has no `added_tokens_decoder`). kNotFound when
  /// tokenizer.json is absent, kInvalidArgument when it can't be used.
  static std::shared_ptr<const Tokenizer> load(const std::filesystem::path& dir);
  /// kNotFound with the way out when `dir` has no tokenizer.json. Reads nothing.
  static void require(const std::filesystem::path& dir);
  ~Tokenizer();

  /// Token ids of UTF-8 `text`. Special tokens in it are recognised. `add_special` adds what the tokenizer's
  /// post-processor adds (BOS), unless the text begins so. kInvalidArgument for invalid UTF-8, with the byte offset.
  std::vector<int32_t> encode(std::string_view text, bool add_special) const;
  /// The ids of text that follows the token `after`, as they would be in the whole text: no space is put before it. A
  /// negative `after` is a token that is not known. Nothing is added.
  std::vector<int32_t> encode(const RenderedText& text, std::optional<int32_t> after) const;
  /// Text of all ids, as Hugging Face's `decode` gives it without clean-up. Ids past the vocabulary have no text;
  /// kInvalidArgument for negative ones.
  std::string decode(const std::vector<int32_t>& ids, bool skip_special = false) const;
  /// The id of a token's exact text, or nullopt.
  std::optional<int32_t> token_to_id(std::string_view token) const;
  /// Added tokens included.
  int vocab_size() const;
  /// Digest of tokenizer.json's bytes and what the other files change of it, for Identity::tokenizer.
  const std::string& digest() const;

 private:
  friend class Detokenizer;
  friend class ChatTemplate;
  friend class server::Grammars;
  std::vector<int32_t> encode_at(std::string_view text, int64_t place, std::string_view joint) const;
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// Turns a stream of ids into a stream of text that never splits a UTF-8 character. The pieces that push and finish
/// return make up what `decode` gives for all the ids. A push costs the same at any length.
class Detokenizer {
 public:
  explicit Detokenizer(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special = true);
  ~Detokenizer();
  Detokenizer(Detokenizer&&) noexcept;
  /// Text that `id` completes; empty while a character is still open. SentencePiece's byte tokens (<0xE4>) are text
  /// once their run has ended, since one broken character makes U+FFFD of them all. kInvalidArgument for a negative id.
  std::string push(int32_t id);
  /// What is left at the end (an open character becomes U+FFFD). The next push starts a new text.
  std::string finish();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

class ChatTemplate {
 public:
  /// From `chat_template.jinja`, else `chat_template` in `tokenizer_config.json` (text, or `default` and `tool_use` of
  /// a list or object), else `chat_template.json`. Turns with tools prefer `additional_chat_templates/tool_use.jinja`.
  /// nullptr when the model has none; kInvalidArgument when it does not parse.
  static std::shared_ptr<const ChatTemplate> load(const std::filesystem::path& dir);
  ~ChatTemplate();

  /// Renders as Hugging Face's `apply_chat_template(..., tokenize=False)` does. `messages_json` is a JSON array of
  /// `{"role", "content", ...}`, whose null members count as missing; `extra_json` an object of further variables
  /// ("tools", "enable_thinking"), or empty. kInvalidArgument carries the message of the template's own
  /// `raise_exception`, word for word, or says on which line rendering failed.
  std::string render(std::string_view messages_json, bool add_generation_prompt, std::string_view extra_json = {}) const;
  /// The same for `guarded_by` to encode. In messages and variables its special tokens are text. So are other tokens
  /// that the template frames messages with. (`<think>` and `</think>` of an assistant stay what templates look for.)
  /// nullptr: they count as tokens.
  RenderedText render(std::string_view messages_json, bool add_generation_prompt, std::string_view extra_json,
                      const Tokenizer* guarded_by) const;
  /// Digest of the template text, for Identity::chat_template.
  const std::string& digest() const;

 private:
  struct Impl;
  explicit ChatTemplate(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace torpor
