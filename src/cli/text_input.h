#pragma once
/// Text that users give, or a shell.

#include <string>
#include <string_view>

namespace torpor::cli {

/// The whole file; `-` is standard input. kNotFound, kIo.
std::string read_prompt_file(const std::string& path);
/// kInvalidArgument, calling the text `what`, unless it is UTF-8.
void check_text(std::string_view text, const char* what);
/// Bytes of the character that `text`, which is not empty, begins with, and its code point; 0 when it is no UTF-8.
size_t decode_utf8(std::string_view text, char32_t& code);
/// Offset of the first byte that is not UTF-8, or npos.
size_t find_invalid_utf8(std::string_view text);
/// An argument that a shell takes as one word.
std::string shell_word(const std::string& text);

}  // namespace torpor::cli
