/// Lines typed to `torpor chat`: any bytes are a message, a command with what it takes, or refused with a sentence.

#include <cstddef>
#include <cstdint>
#include <string>

#include "cli/chat_line.h"
#include "require.h"
#include "torpor/error.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string line(reinterpret_cast<const char*>(data), size);
  try {
    const torpor::cli::ChatLine parsed = torpor::cli::parse_chat_line(line);
    require(line.ends_with(parsed.text));
    if (parsed.command.empty()) {
      require(parsed.argument.empty() && !parsed.count);
      require(parsed.text.size() == line.size() - (line.starts_with("//") ? 1 : 0));
    } else {
      require(line.starts_with(parsed.command) && !line.starts_with("//"));
      require(parsed.text.starts_with(parsed.argument) && parsed.text.empty() == parsed.argument.empty());
      require(!parsed.count || *parsed.count >= 0);
    }
  } catch (const torpor::Error& error) {
    require(error.code() == torpor::ErrorCode::kInvalidArgument && line.starts_with('/') && !line.starts_with("//"));
  }
  return 0;
}
