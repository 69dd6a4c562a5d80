#include "text/shim.h"

#include <cerrno>
#include <fstream>
#include <sstream>
#include <system_error>

namespace torpor::text {

void check(torpor_text_status status, const ShimText& error, std::string_view prefix) {
  if (status == TORPOR_TEXT_OK) return;
  const auto code = status == TORPOR_TEXT_INVALID ? ErrorCode::kInvalidArgument : ErrorCode::kInternal;
  throw Error(code, std::string(prefix) + error.str());
}

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
  return std::move(bytes).str();
}

}  // namespace torpor::text
