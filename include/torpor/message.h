#pragma once
/// A message of a conversation, in its canonical form (docs/format.md, "Messages"). Plain data.

#include <string>
#include <vector>

namespace torpor {

/// A call of a tool by the assistant.
struct ToolCall {
  std::string name;
  std::string arguments;  ///< a JSON object; empty = {}
  std::string id;         ///< the client's; some templates write it

  bool operator==(const ToolCall&) const = default;
};

struct Message {
  std::string role;      ///< "system", "user", "assistant", "tool", or another that the chat template knows
  std::string content;   ///< UTF-8
  std::string name{};    ///< of the tool whose result this is, or of who speaks
  std::string thinking{};
  std::vector<ToolCall> tool_calls{};
  std::string tool_call_id{};  ///< the client's; the call whose result this is

  bool operator==(const Message&) const = default;
};

/// Where the messages of a turn and those that an agent holds part.
struct MessageDivergence {
  int message = 0;         ///< index of the first that differs
  std::string held;        ///< the agent's there, as JSON; empty: it has no more
  std::string given;       ///< the turn's there; empty: it has no more
  bool beginning = false;  ///< tools or template arguments render the beginning otherwise; `held` and `given` are those
};

/// Whether two messages say the same: role, name and content are equal, and so are the calls' names and their arguments
/// as JSON. Ids don't count. Around an assistant's content white space doesn't count either. Nor does thinking that one
/// of the two lacks: many clients and templates drop it.
bool says_the_same(const Message& a, const Message& b);

/// One JSON object: `role`, `content`, `name`, `thinking`, `tool_calls`, `tool_call_id`. All but the first two are left
/// out where they are empty. kInvalidArgument for invalid UTF-8, and for arguments that are no JSON object.
std::string message_to_json(const Message& message);
/// The inverse; other keys are ignored. As OpenAI has it, a call may stand in `function`, its arguments be a text that
/// holds the object, and thinking be called `reasoning_content`. kInvalidArgument when it is no such object.
Message message_from_json(const std::string& json);
/// Of a JSON array of them.
std::vector<Message> messages_from_json(const std::string& json);

}  // namespace torpor
