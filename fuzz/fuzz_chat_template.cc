/// Chat templates: what begins as a JSON object is a tokenizer_config.json, all else a chat_template.jinja. Any bytes render a
/// conversation, or are refused with a sentence.

#include <string_view>

#include "model_directory.h"
#include "require.h"
#include "torpor/error.h"
#include "torpor/text.h"

namespace {

constexpr const char* kMessages = R"([{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
  {"role": "assistant", "content": "a",
   "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
  {"role": "tool", "content": "r"}])";
constexpr const char* kVariables =
    R"({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": [1.5, null]}}}]})";

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static ModelDirectory directory;
  const bool json = size > 1 && data[0] == '{' && std::string_view("{%#").find(char(data[1])) == std::string_view::npos;
  directory.put(json ? "tokenizer_config.json" : "chat_template.jinja", data, size);
  try {
    const auto chat_template = torpor::ChatTemplate::load(directory.path());
    if (chat_template == nullptr) return 0;
    require(!chat_template->digest().empty());
    static_cast<void>(chat_template->render(kMessages, true, kVariables));
  } catch (const torpor::Error& error) {
    require(error.code() == torpor::ErrorCode::kCorruption || error.code() == torpor::ErrorCode::kInvalidArgument ||
            error.code() == torpor::ErrorCode::kNotFound);  // a Git LFS pointer
  }
  return 0;
}
