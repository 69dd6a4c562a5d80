#pragma once
/// Text that users give.

#include <string>
#include <string_view>

namespace torpor::cli {

/// The whole file; `-` is standard input. kNotFound, kIo.
std::string read_prompt_file(const std::string& path);
/// kInvalidArgument, calling the text `what`, unless it is UTF-8.
void check_text(std::string_view text, const char* what);
/// Offset of the first byte that is not UTF-8, or npos.
size_t find_invalid_utf8(std::string_view text);

}  // namespace torpor::cli
