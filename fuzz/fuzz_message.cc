/// Messages in their canonical form, as a JSON array of a client's: they are refused with a sentence, or are the same after
/// they were written and read again. Whether two say the same does not depend on which comes first.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "agents/conversation.h"
#include "require.h"
#include "torpor/error.h"
#include "torpor/message.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::vector<torpor::Message> messages;
  std::vector<torpor::HeldMessage> held;
  try {
    messages = torpor::messages_from_json(std::string(reinterpret_cast<const char*>(data), size));
    for (const torpor::Message& message : messages) {
      const std::string json = torpor::message_to_json(message);
      const torpor::Message again = torpor::message_from_json(json);
      require(torpor::says_the_same(message, again) && torpor::says_the_same(again, message));
      require(again.tool_call_id == message.tool_call_id && torpor::message_to_json(again) == json);
      held.push_back({again, int(held.size())});
    }
  } catch (const torpor::Error& error) {
    require(error.code() == torpor::ErrorCode::kInvalidArgument);
    return 0;
  }
  require(torpor::count_equal(held, messages) == messages.size());
  const size_t answered = torpor::last_answer(held, held.size());
  require(answered == 0 || messages[answered - 1].role == "assistant");
  for (size_t i = 1; i < messages.size(); ++i) {
    const torpor::Message &a = messages[i - 1], &b = messages[i];
    require(torpor::says_the_same(a, b) == torpor::says_the_same(b, a));
  }
  return 0;
}
