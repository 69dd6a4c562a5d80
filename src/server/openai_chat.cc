#include "server/answer.h"
#include "server/failure.h"
#include "server/openai.h"
#include "server/request.h"

namespace torpor::server {
namespace {

constexpr const char* kObject = "chat.completion";
constexpr const char* kChunk = "chat.completion.chunk";

Message read_message(Field item) {
  if (!item) throw item.wrong("a message");
  Message message;
  const std::string role = item["role"].required_string();
  if (role == "system" || role == "developer") {
    message.role = Role::kSystem;
  } else if (role == "assistant") {
    message.role = Role::kAssistant;
  } else if (role == "tool" || role == "function") {
    message.role = Role::kTool;
  } else if (role != "user") {
    throw item["role"].wrong("system, developer, user, assistant or tool");
  }
  // What the model said in one piece may come back in several.
  message.text = text_content(item["content"], message.role == Role::kAssistant ? "" : "\n");
  if (message.role == Role::kTool) {
    message.tool_call_id = item["tool_call_id"].string().value_or("");
    message.tool_name = item["name"].string().value_or("");
  }
  if (message.role == Role::kAssistant) {
    const auto thinking = item["reasoning_content"].string();
    message.thinking = thinking ? *thinking : item["reasoning"].string().value_or("");
    for (const Field& call : item["tool_calls"].items()) {
      const Field function = call["function"];
      if (!function) throw function.wrong("an object");
      message.tool_calls.push_back({call["id"].string().value_or(""), function["name"].required_string(),
                                    call_arguments(function["arguments"])});
    }
  }
  return message;
}

std::vector<Tool> read_tools(Field tools) {
  std::vector<Tool> read;
  for (const Field& tool : tools.items()) {
    // Tools of other types run in another server, or are none that a model here could call.
    if (tool["type"].string().value_or("function") != "function") continue;
    const Field function = tool["function"];
    if (!function) throw function.wrong("an object");
    read.push_back({function["name"].required_string(), function["description"].string().value_or(""),
                    function["parameters"].object().value_or(Json::object()),
                    function["strict"].boolean().value_or(false)});
  }
  return read;
}

void refuse_what_is_not_served(Field body) {
  if (body["n"].integer().value_or(1) != 1) throw body["n"].unserved("ask once for each answer");
  if (body["audio"]) throw body["audio"].unserved("the models here write text alone");
  for (const Field& modality : body["modalities"].items()) {
    if (modality.string() != "text") throw body["modalities"].unserved("the models here write text alone");
  }
  for (const char* member : {"functions", "function_call"}) {
    if (body[member]) throw body[member].unserved("use 'tools' and 'tool_choice'");
  }
  if (body["web_search_options"]) throw body["web_search_options"].unserved("give the model a tool that searches");
}

ChatRequest read_request(const HttpRequest& http, Field body) {
  refuse_what_is_not_served(body);
  ChatRequest request;
  read_identity(http, body, request);
  const Field messages = body["messages"];
  for (const Field& item : messages.items()) request.messages.push_back(read_message(item));
  if (request.messages.empty()) throw messages.wrong("an array of at least one message");
  name_tool_results(request.messages);
  request.tools = read_tools(body["tools"]);
  read_tool_choice(body["tool_choice"], request);
  request.parallel_tool_calls = body["parallel_tool_calls"].boolean().value_or(true);
  read_sampling(body, request.sampling);
  request.max_tokens = body["max_tokens"].integer(1);
  if (const auto most = body["max_completion_tokens"].integer(1)) request.max_tokens = most;
  request.stop = read_stop(body["stop"]);
  request.logprobs = read_logprobs(body);
  request.response_format = read_response_format(body["response_format"]);
  read_effort(body["reasoning_effort"], request);
  if (const auto thinks = body["enable_thinking"].boolean()) request.template_arguments["enable_thinking"] = *thinks;
  if (const auto arguments = body["chat_template_kwargs"].object()) request.template_arguments.update(*arguments);
  return request;
}

const char* finish_reason(StopReason reason) {
  switch (reason) {
    case StopReason::kLength: return "length";
    case StopReason::kToolCalls: return "tool_calls";
    case StopReason::kEnd:
    case StopReason::kStopString:
    case StopReason::kCancelled: break;
  }
  return "stop";
}

Json call_json(const ToolCall& call) {
  return {{"id", call.id}, {"type", "function"}, {"function", {{"name", call.name}, {"arguments", call.arguments}}}};
}

/// `logprobs` of a choice.
Json weighed(std::span<const TokenLogprobs> tokens) {
  Json logprobs{{"content", logprobs_json(tokens)}};
  logprobs["refusal"] = Json();
  return logprobs;
}

Json whole_answer(const Answer& answer, bool logprobs) {
  const std::string thinking = answer.joined(AnswerPart::Kind::kThinking);
  const auto calls = answer.calls();
  const std::string text = answer.joined(AnswerPart::Kind::kText);
  Json message{{"role", "assistant"}};
  message["content"] = text.empty() && !calls.empty() ? Json() : Json(text);
  message["refusal"] = Json();
  if (!thinking.empty()) message["reasoning_content"] = thinking;
  for (const ToolCall* call : calls) message["tool_calls"].push_back(call_json(*call));
  Json choice{{"index", 0}, {"message", message}};
  choice["logprobs"] = logprobs ? weighed(answer.logprobs()) : Json();
  choice["finish_reason"] = finish_reason(answer.end.reason);
  return {{"id", answer.id},           {"object", kObject},
          {"created", answer.created}, {"model", answer.start.model},
          {"choices", Json::array({choice})}, {"usage", usage_json(answer.end)}};
}

/// Chunks of one choice. The usage, when asked for, has a chunk without choices to itself, before [DONE].
class ChatStream : public StreamSink {
 public:
  ChatStream(HttpResponse& response, bool include_usage)
      : StreamSink(response, "chatcmpl-", "call_"), events_(response, kOpenAiKeepAlive), include_usage_(include_usage) {}

  void fail(const Failure& failure) override { events_.data(failure_body(Dialect::kOpenAi, failure)); }

 protected:
  void on_start() override {
    events_.begin(answer().start);
    send({{"role", "assistant"}, {"content", ""}});
  }
  void on_open(const AnswerPart& part, int) override {
    if (part.kind != AnswerPart::Kind::kToolCall) return;
    ++calls_;
    Json call{{"index", calls_ - 1}};
    call.update(call_json(part.call));
    send({{"tool_calls", Json::array({call})}});
  }
  void on_delta(const AnswerPart& part, int, std::string_view delta) override {
    switch (part.kind) {
      case AnswerPart::Kind::kThinking: return send({{"reasoning_content", delta}});
      case AnswerPart::Kind::kText:
        return send({{"content", delta}}, nullptr, delta_logprobs().empty() ? Json() : weighed(delta_logprobs()));
      case AnswerPart::Kind::kToolCall: break;
    }
    const Json call{{"index", calls_ - 1}, {"function", {{"arguments", delta}}}};
    send({{"tool_calls", Json::array({call})}});
  }
  void on_finish() override {
    send(Json::object(), finish_reason(answer().end.reason));
    if (include_usage_) {
      Json chunk = envelope();
      chunk["choices"] = Json::array();
      chunk["usage"] = usage_json(answer().end);
      events_.data(chunk);
    }
    events_.send("data: [DONE]\n\n");
  }

 private:
  Json envelope() const {
    return {{"id", answer().id}, {"object", kChunk}, {"created", answer().created}, {"model", answer().start.model}};
  }
  void send(Json delta, const char* reason = nullptr, Json logprobs = nullptr) {
    Json choice{{"index", 0}, {"delta", std::move(delta)}};
    choice["logprobs"] = std::move(logprobs);
    choice["finish_reason"] = reason ? Json(reason) : Json();
    Json chunk = envelope();
    chunk["choices"] = Json::array({choice});
    if (include_usage_) chunk["usage"] = Json();
    events_.data(chunk);
  }

  EventStream events_;
  bool include_usage_;
  int calls_ = 0;
};

}  // namespace

Json usage_json(const AnswerEnd& end) {
  return {{"prompt_tokens", end.prompt_tokens},
          {"completion_tokens", end.generated_tokens},
          {"total_tokens", end.prompt_tokens + end.generated_tokens},
          {"prompt_tokens_details", {{"cached_tokens", end.cached_tokens}}},
          {"completion_tokens_details", {{"reasoning_tokens", end.thinking_tokens}}}};
}

void answer_chat_completions(const HttpRequest& http, TurnRunner& runner, HttpResponse& response) {
  const Json json = parse_body(http);
  const Field body(json);
  const ChatRequest request = read_request(http, body);
  const bool include_usage = body["stream_options"]["include_usage"].boolean().value_or(false);
  if (body["stream"].boolean().value_or(false)) {
    ChatStream stream(response, include_usage);
    run_stream(runner, request, stream, response);
  } else {
    PartSink sink("chatcmpl-", "call_");
    runner.run(request, sink, response.gone());
    answer_whole(response, sink.answer(), whole_answer(sink.answer(), request.logprobs.has_value()));
  }
}

}  // namespace torpor::server
