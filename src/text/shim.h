#pragma once
/// What the room's classes share of calling the Rust shim: ownership of what it returns, statuses as exceptions.

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "torpor/error.h"
#include "torpor_text_shim.h"

namespace torpor::text {

/// Text the shim gives out; released when it goes out of scope.
class ShimText {
 public:
  ShimText() = default;
  ~ShimText() { torpor_text_bytes_free(bytes_); }
  ShimText(const ShimText&) = delete;
  ShimText& operator=(const ShimText&) = delete;

  torpor_text_bytes* out() { return &bytes_; }
  std::string str() const { return bytes_.data ? std::string(bytes_.data, bytes_.size) : std::string(); }

 private:
  torpor_text_bytes bytes_{};
};

/// Throws what `status` says, unless it is TORPOR_TEXT_OK; `prefix` names the file or the input at fault.
void check(torpor_text_status status, const ShimText& error, std::string_view prefix = {});

/// The files of a model directory that the shim reads, as far as they are there; or what a GGUF file has of them. kIo when
/// one can't be read, kNotFound when one is a Git LFS pointer.
class ModelFiles {
 public:
  /// With `tokenizer` also tokenizer.json.
  ModelFiles(const std::filesystem::path& dir, bool tokenizer);
  /// Points into this object.
  torpor_text_files view() const;
  const std::optional<std::string>& tokenizer() const { return tokenizer_; }

 private:
  std::optional<std::string> tokenizer_, tokenizer_config_, special_tokens_map_, added_tokens_, jinja_, tool_use_, chat_template_;
};

template <auto Free>
struct Deleter {
  template <typename T>
  void operator()(T* handle) const {
    Free(handle);
  }
};

using TokenizerHandle = std::unique_ptr<torpor_text_tokenizer, Deleter<torpor_text_tokenizer_free>>;
using DetokenizerHandle = std::unique_ptr<torpor_text_detokenizer, Deleter<torpor_text_detokenizer_free>>;
using TemplateHandle = std::unique_ptr<torpor_text_template, Deleter<torpor_text_template_free>>;

}  // namespace torpor::text
