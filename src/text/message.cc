#include "torpor/message.h"

#include <algorithm>
#include <array>
#include <string_view>

#include "base/json.h"
#include "torpor/error.h"

namespace torpor {
namespace {

using Json = nlohmann::ordered_json;

[[noreturn]] void refuse(const std::string& what) { throw Error(ErrorCode::kInvalidArgument, what); }

constexpr std::array<std::string_view, 7> kMembers = {
    "role", "content", "name", "thinking", "reasoning_content", "tool_calls", "tool_call_id"};

/// Discarded when it is no JSON. What is nested deeper than anyone means to would overflow the stack when it is written. The
/// messages are the objects at depth `messages`; what they have beside kMembers is left out, whatever it is. 0: there are none.
Json parse(const std::string& text, int messages = 0) {
  constexpr int kDeepest = 200;
  bool left_out = false;
  return parse_json<Json>(text, [&](int depth, Json::parse_event_t event, Json& value) {
    if (event == Json::parse_event_t::key && depth == messages) {
      left_out = std::find(kMembers.begin(), kMembers.end(), value.get_ref<const std::string&>()) == kMembers.end();
    } else if (event == Json::parse_event_t::object_end && depth == messages - 1) {
      left_out = false;
    }
    if (!left_out && depth > kDeepest) refuse("A message's JSON is nested too deeply.");
    return !left_out;
  }, false);
}

/// A call's arguments. Discarded when they are no JSON object.
Json arguments_of(const std::string& text) {
  if (text.empty()) return Json::object();
  Json arguments = parse(text);
  return arguments.is_object() ? arguments : Json(Json::value_t::discarded);
}

bool equal_arguments(const std::string& a, const std::string& b) {
  if (a == b) return true;
  const Json first = arguments_of(a), second = arguments_of(b);
  // The order of an object's members says nothing.
  return !first.is_discarded() && !second.is_discarded() && nlohmann::json(first) == nlohmann::json(second);
}

std::string_view trimmed(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r\n";
  const size_t first = text.find_first_not_of(kSpace);
  return first == text.npos ? std::string_view() : text.substr(first, text.find_last_not_of(kSpace) - first + 1);
}

/// The text of a member that may be missing or null.
std::string text_of(const Json& object, const char* key) {
  const auto found = object.find(key);
  if (found == object.end() || found->is_null()) return {};
  if (!found->is_string()) refuse(std::string("A message's \"") + key + "\" is not a text.");
  return found->get<std::string>();
}

/// Content as a text, or as a list of parts of which each is one.
std::string content_of(const Json& message) {
  const auto found = message.find("content");
  if (found == message.end() || !found->is_array()) return text_of(message, "content");
  std::string text;
  for (const Json& part : *found) {
    if (!part.is_object() || part.value("type", "text") != "text")
      refuse("A part of a message's content is not a text.");
    text += text_of(part, "text");
  }
  return text;
}

ToolCall call_of(const Json& given) {
  if (!given.is_object()) refuse("A tool call is not a JSON object.");
  const auto function = given.find("function");
  const Json& called = function != given.end() ? *function : given;
  if (!called.is_object()) refuse("A tool call's \"function\" is not a JSON object.");
  ToolCall call{.name = text_of(called, "name"), .arguments = {}, .id = text_of(given, "id")};
  if (call.name.empty()) refuse("A tool call has no name.");
  if (const auto arguments = called.find("arguments"); arguments != called.end() && !arguments->is_null()) {
    call.arguments = arguments->is_string() ? arguments->get<std::string>() : arguments->dump();
  }
  if (arguments_of(call.arguments).is_discarded())
    refuse("The arguments of tool call '" + call.name + "' are not a JSON object.");
  return call;
}

Message message_of(const Json& json) {
  if (!json.is_object()) refuse("A message is not a JSON object.");
  Message message;
  message.role = text_of(json, "role");
  if (message.role.empty()) refuse("A message has no role.");
  message.content = content_of(json);
  message.name = text_of(json, "name");
  for (const char* key : {"thinking", "reasoning_content"}) {
    if (message.thinking.empty()) message.thinking = text_of(json, key);
  }
  if (const auto calls = json.find("tool_calls"); calls != json.end() && !calls->is_null()) {
    if (!calls->is_array()) refuse("A message's \"tool_calls\" is not a list.");
    for (const Json& call : *calls) message.tool_calls.push_back(call_of(call));
  }
  if (message.tool_calls.empty() && !json.contains("content")) refuse("A message has no content.");
  message.tool_call_id = text_of(json, "tool_call_id");
  return message;
}

}  // namespace

bool says_the_same(const Message& a, const Message& b) {
  const bool answers = a.role == "assistant";
  if (a.role != b.role || a.name != b.name) return false;
  if (answers ? trimmed(a.content) != trimmed(b.content) : a.content != b.content) return false;
  if (!(answers && (a.thinking.empty() || b.thinking.empty())) && trimmed(a.thinking) != trimmed(b.thinking))
    return false;
  return std::ranges::equal(a.tool_calls, b.tool_calls, [](const ToolCall& one, const ToolCall& other) {
    return one.name == other.name && equal_arguments(one.arguments, other.arguments);
  });
}

std::string message_to_json(const Message& message) {
  Json json{{"role", message.role}, {"content", message.content}};
  if (!message.name.empty()) json["name"] = message.name;
  if (!message.thinking.empty()) json["thinking"] = message.thinking;
  for (const ToolCall& call : message.tool_calls) {
    Json arguments = arguments_of(call.arguments);
    if (arguments.is_discarded()) refuse("The arguments of tool call '" + call.name + "' are not a JSON object.");
    Json& last = json["tool_calls"].emplace_back(Json{{"name", call.name}, {"arguments", std::move(arguments)}});
    if (!call.id.empty()) last["id"] = call.id;
  }
  if (!message.tool_call_id.empty()) json["tool_call_id"] = message.tool_call_id;
  try {
    return dump_json(json);
  } catch (const nlohmann::json::exception&) {
    refuse("A message is not valid UTF-8; convert it and try again.");
  }
}

Message message_from_json(const std::string& json) { return message_of(parse(json, 1)); }

std::vector<Message> messages_from_json(const std::string& json) {
  const Json array = parse(json, 2);
  if (!array.is_array()) refuse("The messages are not a JSON array.");
  std::vector<Message> messages;
  for (const Json& message : array) messages.push_back(message_of(message));
  return messages;
}

}  // namespace torpor
