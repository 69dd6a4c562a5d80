#include "cli/text_input.h"

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <sstream>

#include "torpor/error.h"

namespace torpor::cli {

std::string read_prompt_file(const std::string& path) {
  std::ostringstream text;
  if (path == "-") {
    text << std::cin.rdbuf();
    return text.str();
  }
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    throw Error(ErrorCode::kIo, "can't read prompt file '" + path + "': it is a directory");
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    const int why = errno;
    throw Error(why == ENOENT ? ErrorCode::kNotFound : ErrorCode::kIo,
                "can't read prompt file '" + path + "': " + std::strerror(why));
  }
  text << file.rdbuf();
  if (file.bad()) throw Error(ErrorCode::kIo, "can't read prompt file '" + path + "'");
  return text.str();
}

size_t decode_utf8(std::string_view text, char32_t& code) {
  const auto lead = static_cast<unsigned char>(text[0]);
  code = lead;
  if (lead < 0x80) return 1;
  size_t length = 0;
  char32_t low = 0;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2, code = lead & 0x1F, low = 0x80;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3, code = lead & 0x0F, low = 0x800;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4, code = lead & 0x07, low = 0x10000;
  }
  if (length == 0 || text.size() < length) return 0;
  for (size_t k = 1; k < length; ++k) {
    const auto next = static_cast<unsigned char>(text[k]);
    if ((next & 0xC0) != 0x80) return 0;
    code = code << 6 | (next & 0x3F);
  }
  return code < low || code > 0x10FFFF || (code >= 0xD800 && code <= 0xDFFF) ? 0 : length;
}

size_t find_invalid_utf8(std::string_view text) {
  char32_t code = 0;
  for (size_t i = 0, length = 0; i < text.size(); i += length) {
    length = decode_utf8(text.substr(i), code);
    if (length == 0) return i;
  }
  return std::string_view::npos;
}

void check_text(std::string_view text, const char* what) {
  const size_t offset = find_invalid_utf8(text);
  if (offset != std::string_view::npos) {
    throw Error(ErrorCode::kInvalidArgument,
                std::string(what) + " is not valid UTF-8 (byte " + std::to_string(offset) + ")");
  }
}

std::string shell_word(const std::string& text) {
  const auto plain = [](unsigned char c) {
    return std::isalnum(c) || std::string_view("/._-:+@").find(char(c)) != std::string_view::npos;
  };
  if (!text.empty() && std::ranges::all_of(text, plain)) return text;
  std::string word = "'";
  for (const char c : text) word += c == '\'' ? "'\\''" : std::string(1, c);
  return word + "'";
}

}  // namespace torpor::cli
