#include "text/shim.h"

#include <cerrno>
#include <fstream>
#include <sstream>
#include <system_error>

#include "base/gguf.h"
#include "base/model_file.h"
#include "text/gguf_tokenizer.h"

namespace torpor::text {

void check(torpor_text_status status, const ShimText& error, std::string_view prefix) {
  if (status == TORPOR_TEXT_OK) return;
  const auto code = status == TORPOR_TEXT_INVALID ? ErrorCode::kInvalidArgument : ErrorCode::kInternal;
  throw Error(code, std::string(prefix) + error.str());
}

namespace {

std::optional<std::string> read_file(const std::filesystem::path& path) {
  std::error_code ignored;
  if (!std::filesystem::exists(path, ignored)) return std::nullopt;
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  std::ostringstream bytes;
  // An empty file sets failbit on `bytes`, which is no error.
  if (file && file.peek() != std::ifstream::traits_type::eof()) bytes << file.rdbuf();
  if (!file.is_open() || file.bad() || bytes.bad()) {
    throw Error(ErrorCode::kIo, "can't read " + path.string() + ": " + std::generic_category().message(errno));
  }
  std::string text = std::move(bytes).str();
  refuse_lfs_pointer(text, path);
  return text;
}

std::optional<std::string> read_json(const std::filesystem::path& path) {
  std::optional<std::string> text = read_file(path);
  if (text) text = plain_json(*text);
  return text;
}

torpor_text_file view_of(const std::optional<std::string>& text) {
  return text ? torpor_text_file{text->data(), text->size()} : torpor_text_file{nullptr, 0};
}

}  // namespace

ModelFiles::ModelFiles(const std::filesystem::path& dir, bool tokenizer) {
  if (is_gguf(dir)) {
    const GgufModel model = GgufModel::open(dir);
    tokenizer_config_ = gguf_tokenizer_config(model.metadata());
    if (tokenizer) tokenizer_ = gguf_tokenizer(model.metadata());
    return;
  }
  tokenizer_config_ = read_json(dir / "tokenizer_config.json");
  special_tokens_map_ = read_json(dir / "special_tokens_map.json");
  added_tokens_ = read_json(dir / "added_tokens.json");
  jinja_ = read_file(dir / "chat_template.jinja");
  tool_use_ = read_file(dir / "additional_chat_templates" / "tool_use.jinja");
  chat_template_ = read_json(dir / "chat_template.json");
  if (tokenizer) tokenizer_ = read_file(dir / "tokenizer.json");
}

torpor_text_files ModelFiles::view() const {
  return {.tokenizer = view_of(tokenizer_),
          .tokenizer_config = view_of(tokenizer_config_),
          .special_tokens_map = view_of(special_tokens_map_),
          .added_tokens = view_of(added_tokens_),
          .jinja = view_of(jinja_),
          .tool_use = view_of(tool_use_),
          .chat_template = view_of(chat_template_)};
}

}  // namespace torpor::text
