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

/// A file's bytes; nullopt when there is no such file, kIo when it can't be read.
std::optional<std::string> read_file(const std::filesystem::path& path);

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
