#include "server/anthropic.h"

#include <algorithm>

#include "server/answer.h"
#include "server/failure.h"
#include "server/fields.h"
#include "server/opaque.h"
#include "server/request.h"

namespace torpor::server {
namespace {

// An event, not a comment: clients count the silence between events.
constexpr const char* kKeepAlive = "event: ping\ndata: {\"type\": \"ping\"}\n\n";

// Claude Code's first system block. It differs from one conversation to the next, so it would part their prompts at the
// first token.
constexpr std::string_view kBilling = "x-anthropic-billing-header:";

std::string without_billing(std::string text) {
  if (!text.starts_with(kBilling)) return text;
  const size_t line_end = text.find('\n');
  return line_end == std::string::npos ? std::string() : text.substr(line_end + 1);
}

/// `system`, or the content of a system message: blocks of text, of which that with the billing header counts for
/// nothing.
std::string system_text(Field system) {
  if (!system.is_array()) return without_billing(system.string().value_or(""));
  std::string text;
  for (const Field& block : system.items()) {
    if (block["type"].required_string() != "text") throw block["type"].unserved("write text");
    const std::string piece = block["text"].required_string();
    if (piece.starts_with(kBilling)) continue;
    if (!text.empty()) text += "\n";
    text += piece;
  }
  return text;
}

Failure not_text(Field block, const std::string& type) {
  const std::string& path = block.path();
  return Failure(Failure::Kind::kInvalid,
                 "'" + path + "' is of type " + type + "; the models here read text alone.", path);
}

std::string document_text(Field block) {
  const Field source = block["source"];
  if (source["type"].string() == "text") return source["data"].required_string();
  if (source["type"].string() == "content") return text_content(source["content"]);
  throw not_text(block, "document");
}

/// The content of a tool_result: a string, or blocks.
std::string result_text(Field content) {
  if (!content.is_array()) return content.string().value_or("");
  std::string text;
  bool first = true;
  for (const Field& block : content.items()) {
    if (!first) text += "\n";
    first = false;
    const std::string type = block["type"].required_string();
    if (type == "text") text += block["text"].required_string();
    else if (type == "document") text += document_text(block);
    else if (type == "tool_reference") text += block["tool_name"].required_string();
    else throw not_text(block, type);
  }
  return text;
}

/// A user's message: its tool results are messages of their own, in the order of the blocks.
void read_user(Field content, std::vector<Message>& messages) {
  if (!content.is_array()) {
    messages.push_back({Role::kUser, content.required_string()});
    return;
  }
  bool in_text = false;
  for (const Field& block : content.items()) {
    const std::string type = block["type"].required_string();
    if (type == "tool_result") {
      Message result{Role::kTool, result_text(block["content"])};
      result.tool_call_id = block["tool_use_id"].required_string();
      messages.push_back(std::move(result));
      in_text = false;
      continue;
    }
    std::string text;
    if (type == "text") text = block["text"].required_string();
    else if (type == "document") text = document_text(block);
    else throw not_text(block, type);
    if (in_text) messages.back().text += "\n" + text;
    else messages.push_back({Role::kUser, text});
    in_text = true;
  }
}

Message read_assistant(Field content) {
  Message message{Role::kAssistant};
  if (!content.is_array()) {
    message.text = content.required_string();
    return message;
  }
  for (const Field& block : content.items()) {
    const std::string type = block["type"].required_string();
    if (type == "text") {
      message.text += block["text"].required_string();
    } else if (type == "thinking") {
      std::string thinking = block["thinking"].string().value_or("");
      if (thinking.empty()) thinking = from_opaque(block["signature"].string().value_or("")).value_or("");
      message.thinking += thinking;
    } else if (type == "tool_use") {
      message.tool_calls.push_back(
          {block["id"].string().value_or(""), block["name"].required_string(), call_arguments(block["input"])});
    } else if (type != "redacted_thinking") {  // another server's, and unreadable
      throw not_text(block, type);
    }
  }
  return message;
}

std::vector<Message> read_messages(Field body) {
  std::vector<Message> messages;
  const std::string system = system_text(body["system"]);
  if (!system.empty()) messages.push_back({Role::kSystem, system});
  const Field list = body["messages"];
  const auto items = list.items();
  if (items.empty()) throw list.wrong("an array of at least one message");
  for (const Field& item : items) {
    const Field content = item["content"];
    const std::string role = item["role"].required_string();
    if (role == "user") {
      read_user(content, messages);
    } else if (role == "assistant") {
      messages.push_back(read_assistant(content));
    } else if (role == "system") {
      messages.push_back({Role::kSystem, system_text(content)});
    } else {
      throw item["role"].wrong("user, assistant or system");
    }
  }
  if (messages.back().role == Role::kAssistant) {
    throw list.unserved("end with a message of the user's, for an answer that has begun is not continued");
  }
  name_tool_results(messages);
  return messages;
}

void read_tools(Field body, ChatRequest& request) {
  for (const Field& tool : body["tools"].items()) {
    // Of other types are Anthropic's own, which their server runs or whose schema their models know by heart.
    if (tool["type"].string().value_or("custom") != "custom") continue;
    request.tools.push_back({tool["name"].required_string(), tool["description"].string().value_or(""),
                             tool["input_schema"].object().value_or(Json::object()),
                             tool["strict"].boolean().value_or(false)});
  }
  const Field choice = body["tool_choice"];
  if (!choice) return;
  const std::string type = choice["type"].required_string();
  if (type == "none") {
    request.tool_choice.kind = ToolChoice::Kind::kNone;
  } else if (type == "any") {
    if (request.tools.empty()) throw choice.wrong("auto or none when there are no tools");
    request.tool_choice.kind = ToolChoice::Kind::kRequired;
  } else if (type == "tool") {
    const std::string name = choice["name"].required_string();
    if (std::none_of(request.tools.begin(), request.tools.end(), [&](const Tool& tool) { return tool.name == name; })) {
      throw choice["name"].wrong("the name of one of the tools");
    }
    request.tool_choice = {ToolChoice::Kind::kNamed, name};
  } else if (type != "auto") {
    throw choice["type"].wrong("auto, any, tool or none");
  }
  request.parallel_tool_calls = !choice["disable_parallel_tool_use"].boolean().value_or(false);
}

ChatRequest read_request(const HttpRequest& http, Field body) {
  ChatRequest request;
  read_identity(http, body, request);
  request.messages = read_messages(body);
  read_tools(body, request);
  if (const Field servers = body["mcp_servers"]; servers && !servers.items().empty()) {
    throw servers.unserved("connect to them in the client");
  }
  request.sampling.temperature = body["temperature"].number(0, 100);
  request.sampling.top_p = body["top_p"].number(0, 1);
  request.sampling.top_k = body["top_k"].integer(0);
  request.max_tokens = body["max_tokens"].integer(1);
  request.stop = read_stop(body["stop_sequences"]);
  if (const Field thinking = body["thinking"]) {
    request.template_arguments["enable_thinking"] = thinking["type"].required_string() != "disabled";
  }
  const Field output = body["output_config"];
  read_effort(output["effort"], request);
  request.response_format = read_response_format(output["format"]);
  return request;
}

const char* stop_reason(StopReason reason) {
  switch (reason) {
    case StopReason::kLength: return "max_tokens";
    case StopReason::kToolCalls: return "tool_use";
    case StopReason::kStopString: return "stop_sequence";
    case StopReason::kEnd:
    case StopReason::kCancelled: break;
  }
  return "end_turn";
}

/// Anthropic's input_tokens are those that were neither read from the cache nor written to it.
Json usage_json(int prompt, int cached, int generated) {
  return {{"input_tokens", prompt - cached},
          {"cache_creation_input_tokens", 0},
          {"cache_read_input_tokens", cached},
          {"output_tokens", generated}};
}
Json usage_json(const AnswerEnd& end) { return usage_json(end.prompt_tokens, end.cached_tokens, end.generated_tokens); }

Json stop_json(const AnswerEnd& end) {
  Json stop{{"stop_reason", stop_reason(end.reason)}};
  stop["stop_sequence"] = end.reason == StopReason::kStopString ? Json(end.stop_string) : Json();
  return stop;
}

/// A content block as it stands in a whole answer; `omit` leaves the text of thinking out, but for its signature.
Json block_json(const AnswerPart& part, bool omit) {
  switch (part.kind) {
    case AnswerPart::Kind::kThinking:
      return {{"type", "thinking"}, {"thinking", omit ? "" : part.text}, {"signature", to_opaque(part.text)}};
    case AnswerPart::Kind::kText: return {{"type", "text"}, {"text", part.text}};
    case AnswerPart::Kind::kToolCall: break;
  }
  Json block{{"type", "tool_use"}, {"id", part.call.id}, {"name", part.call.name}};
  block["input"] = parse_json<Json>(part.call.arguments);
  return block;
}

Json message_json(const Answer& answer, Json content, Json stop, Json usage) {
  Json message{{"id", answer.id}, {"type", "message"}, {"role", "assistant"}, {"model", answer.start.model}};
  message["content"] = std::move(content);
  message.update(stop);
  message["usage"] = std::move(usage);
  return message;
}

class MessageStream : public StreamSink {
 public:
  MessageStream(HttpResponse& response, bool omit)
      : StreamSink(response, "msg_", "toolu_"), events_(response, kKeepAlive), omit_(omit) {}

  void fail(const Failure& failure) override { send("error", failure_body(Dialect::kAnthropic, failure)); }

 protected:
  void on_start() override {
    const AnswerStart& start = answer().start;
    events_.begin(start);
    Json stop{{"stop_reason", Json()}};
    stop["stop_sequence"] = Json();
    const Json usage = usage_json(start.prompt_tokens, start.cached_tokens, 0);
    send("message_start",
         {{"type", "message_start"}, {"message", message_json(answer(), Json::array(), stop, usage)}});
    events_.send(kKeepAlive);
  }
  void on_open(const AnswerPart& part, int index) override {
    Json block{{"type", "tool_use"}, {"id", part.call.id}, {"name", part.call.name}, {"input", Json::object()}};
    if (part.kind == AnswerPart::Kind::kText) block = {{"type", "text"}, {"text", ""}};
    if (part.kind == AnswerPart::Kind::kThinking) block = {{"type", "thinking"}, {"thinking", ""}, {"signature", ""}};
    send("content_block_start", {{"type", "content_block_start"}, {"index", index}, {"content_block", block}});
  }
  void on_delta(const AnswerPart& part, int index, std::string_view delta) override {
    switch (part.kind) {
      case AnswerPart::Kind::kThinking:
        if (!omit_) send_delta(index, {{"type", "thinking_delta"}, {"thinking", delta}});
        return;
      case AnswerPart::Kind::kText: return send_delta(index, {{"type", "text_delta"}, {"text", delta}});
      case AnswerPart::Kind::kToolCall: break;
    }
    send_delta(index, {{"type", "input_json_delta"}, {"partial_json", delta}});
  }
  void on_close(const AnswerPart& part, int index) override {
    if (part.kind == AnswerPart::Kind::kThinking) {
      send_delta(index, {{"type", "signature_delta"}, {"signature", to_opaque(part.text)}});
    }
    send("content_block_stop", {{"type", "content_block_stop"}, {"index", index}});
  }
  void on_finish() override {
    const AnswerEnd& end = answer().end;
    send("message_delta", {{"type", "message_delta"}, {"delta", stop_json(end)}, {"usage", usage_json(end)}});
    send("message_stop", {{"type", "message_stop"}});
  }

 private:
  void send(const char* name, const Json& json) { events_.event(name, json); }
  void send_delta(int index, Json delta) {
    send("content_block_delta", {{"type", "content_block_delta"}, {"index", index}, {"delta", std::move(delta)}});
  }

  EventStream events_;
  bool omit_;
};

}  // namespace

void answer_messages(const HttpRequest& http, TurnRunner& runner, HttpResponse& response) {
  const Json json = parse_body(http);
  const Field body(json);
  const ChatRequest request = read_request(http, body);
  const bool omit = body["thinking"]["display"].string() == "omitted";
  if (body["stream"].boolean().value_or(false)) {
    MessageStream stream(response, omit);
    run_stream(runner, request, stream, response);
    return;
  }
  PartSink sink("msg_", "toolu_");
  runner.run(request, sink, response.gone());
  Json content = Json::array();
  for (const AnswerPart& part : sink.answer().parts) content.push_back(block_json(part, omit));
  const AnswerEnd& end = sink.answer().end;
  answer_whole(response, sink.answer(), message_json(sink.answer(), content, stop_json(end), usage_json(end)));
}

void answer_count_tokens(const HttpRequest& http, TurnRunner& runner, HttpResponse& response) {
  const Json json = parse_body(http);
  const ChatRequest request = read_request(http, Field(json));
  const Json count{{"input_tokens", runner.count_tokens(request)}};
  response.whole(200, {{"content-type", "application/json"}}, to_text(count));
}

}  // namespace torpor::server
