#include "server/request.h"

#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include "base/env.h"

namespace torpor::server {
namespace {

// The headers by which clients name a conversation, the most specific first.
constexpr std::string_view kSessionHeaders[] = {
    "x-claude-code-session-id", "session-id",        "session_id",          "x-session-id",
    "x-session-affinity",       "x-conversation-id", "x-openwebui-chat-id", "x-hermes-session-id",
    "x-grok-conv-id",           "thread-id"};

std::string session_of(const HttpRequest& http, Field body) {
  if (const Field key = body["prompt_cache_key"]; key.is_string()) return *key.string();
  if (const Field metadata = body["metadata"]; metadata.is_object()) {
    // Claude Code's user_id is JSON text, with the session among other ids.
    if (const Field user = metadata["user_id"]; user.is_string()) {
      const Json ids = parse_json<Json>(*user.string(), nullptr, false);
      if (ids.is_object() && ids.contains("session_id") && ids["session_id"].is_string()) return ids["session_id"];
    }
  }
  for (const std::string_view name : kSessionHeaders) {
    if (const auto value = http.header(name); value && !value->empty()) return std::string(*value);
  }
  return {};
}

}  // namespace

void read_identity(const HttpRequest& http, Field body, ChatRequest& request) {
  request.model = body["model"].string().value_or("");
  if (const size_t at = request.model.rfind('@'); at != std::string::npos) {
    request.agent = request.model.substr(at + 1);
    request.model.erase(at);
  }
  if (const auto agent = http.header("x-torpor-agent"); agent && !agent->empty()) request.agent = *agent;
  request.id = http.turn_id();
  request.session = session_of(http, body);
  request.tenant = http.tenant;
  request.share = http.share;
  const Field tier = body["service_tier"];
  request.background = http.background() || (tier.is_string() && *tier.string() == "flex");
}

std::string text_content(Field content, std::string_view between) {
  if (!content) return {};
  if (content.is_string()) return *content.string();
  if (!content.is_array()) throw content.wrong("a string or an array of parts");
  std::string text;
  bool first = true;
  for (const Field& part : content.items()) {
    const std::string type = part["type"].required_string();
    if (type == "refusal") {
      if (!first) text += between;
      text += part["refusal"].required_string();
    } else if (type == "text" || type == "input_text" || type == "output_text") {
      if (!first) text += between;
      text += part["text"].required_string();
    } else {
      throw Failure(Failure::Kind::kInvalid,
                    "'" + part.path() + "' is of type " + type + "; the models here read text alone.", part.path());
    }
    first = false;
  }
  return text;
}

std::string call_arguments(Field arguments) {
  if (!arguments) return "{}";
  if (arguments.is_object()) return to_text(arguments.json());
  const std::string text = *arguments.string();
  if (text.find_first_not_of(" \t\r\n") == std::string::npos) return "{}";
  const Json parsed = parse_json<Json>(text, nullptr, false);
  if (!parsed.is_object()) throw arguments.wrong("JSON text of an object");
  return text;
}

void name_tool_results(std::vector<Message>& messages) {
  std::vector<const ToolCall*> calls;
  for (const Message& message : messages) {
    for (const ToolCall& call : message.tool_calls) calls.push_back(&call);
  }
  for (Message& message : messages) {
    if (message.role != Role::kTool || !message.tool_name.empty()) continue;
    const auto call =
        std::find_if(calls.rbegin(), calls.rend(), [&](const ToolCall* c) { return c->id == message.tool_call_id; });
    if (call != calls.rend()) message.tool_name = (*call)->name;
  }
}

void read_tool_choice(Field choice, ChatRequest& request) {
  if (!choice) return;
  ToolChoice& chosen = request.tool_choice;
  if (choice.is_string()) {
    const std::string word = *choice.string();
    if (word == "none") chosen.kind = ToolChoice::Kind::kNone;
    else if (word == "required") chosen.kind = ToolChoice::Kind::kRequired;
    else if (word != "auto") throw choice.wrong("none, auto, required or a function");
  } else {
    const Field function = choice["function"];
    if (choice["type"].required_string() != "function") throw choice["type"].unserved("name a function");
    chosen.kind = ToolChoice::Kind::kNamed;
    chosen.name = (function ? function : choice)["name"].required_string();
    const bool declared = std::any_of(request.tools.begin(), request.tools.end(),
                                      [&](const Tool& tool) { return tool.name == chosen.name; });
    if (!declared) throw choice.wrong("one of the functions in 'tools'");
  }
  if (chosen.kind == ToolChoice::Kind::kRequired && request.tools.empty()) {
    throw choice.wrong("auto or none when there are no tools");
  }
}

void read_sampling(Field body, Sampling& sampling) {
  sampling.temperature = body["temperature"].number(0, 100);
  sampling.top_p = body["top_p"].number(0, 1);
  sampling.min_p = body["min_p"].number(0, 1);
  sampling.top_k = body["top_k"].integer(-1);
  sampling.repetition_penalty = body["repetition_penalty"].number(kLeastPenalty, 100);
  sampling.presence_penalty = body["presence_penalty"].number(-2, 2);
  sampling.frequency_penalty = body["frequency_penalty"].number(-2, 2);
  if (const Field member = body["seed"]; const auto seed = member.number(-9e18, 9e18)) {
    // A whole number has more bits than a double keeps.
    sampling.seed = uint64_t(member.json().is_number_integer() ? member.json().get<int64_t>() : int64_t(*seed));
  }
  if (const Field bias = body["logit_bias"]) {
    const Json biases = *bias.object();
    for (const auto& [token, value] : biases.items()) {
      char* end = nullptr;
      const long id = std::strtol(token.c_str(), &end, 10);
      if (token.empty() || *end || id < 0 || id > 1 << 30) throw bias.wrong("an object from token ids to numbers");
      if (const auto added = bias[token].number(-100, 100)) sampling.logit_bias.emplace_back(int(id), *added);
    }
  }
}

SamplingOptions sampling_options(const Sampling& asked, SamplingOptions options, int vocab_size) {
  const auto take = [](auto& option, const auto& value) {
    if (value) option = std::remove_reference_t<decltype(option)>(*value);
  };
  take(options.temperature, asked.temperature);
  take(options.top_p, asked.top_p);
  take(options.top_k, asked.top_k);
  take(options.min_p, asked.min_p);
  take(options.repetition_penalty, asked.repetition_penalty);
  take(options.presence_penalty, asked.presence_penalty);
  take(options.frequency_penalty, asked.frequency_penalty);
  take(options.penalty_context, asked.penalty_context);
  options.top_k = std::max(options.top_k, 0);      // -1 is another server's word for none
  options.top_p = std::max(options.top_p, 1e-6f);  // 0: the likeliest token alone
  for (const auto& [token, value] : asked.logit_bias) {
    if (token >= vocab_size) {
      throw Failure(Failure::Kind::kInvalid,
                    "'logit_bias' names token " + std::to_string(token) + "; the model has tokens 0 to " +
                        std::to_string(vocab_size - 1) + ".", "logit_bias");
    }
    options.logit_bias.emplace_back(token, float(value));
  }
  options.seed = asked.seed ? *asked.seed : random_bits();
  return options;
}

std::optional<int> read_logprobs(Field body) {
  const auto top = body["top_logprobs"].integer(0, kMostLogprobs);
  if (body["logprobs"].boolean().value_or(false)) return top.value_or(0);
  if (top.value_or(0) > 0) throw body["top_logprobs"].wrong("beside 'logprobs': true");
  return std::nullopt;
}

std::vector<std::string> read_stop(Field stop) {
  std::vector<std::string> strings;
  if (stop.is_array()) {
    for (const Field& item : stop.items()) strings.push_back(item.required_string());
  } else if (stop) {
    strings.push_back(*stop.string());
  }
  for (const std::string& string : strings) {
    if (string.empty()) throw stop.wrong("strings that are not empty");
  }
  return strings;
}

ResponseFormat read_response_format(Field format) {
  ResponseFormat read;
  if (!format) return read;
  const std::string type = format["type"].required_string();
  if (type == "json_object") {
    read.kind = ResponseFormat::Kind::kJsonObject;
  } else if (type == "json_schema") {
    const Field nested = format["json_schema"], holder = nested ? nested : format;
    read.kind = ResponseFormat::Kind::kJsonSchema;
    const Field schema = holder["schema"];
    if (!schema) throw schema.wrong("a JSON Schema");
    read.schema = *schema.object();
    read.strict = holder["strict"].boolean().value_or(false);
  } else if (type == "grammar") {
    read.kind = ResponseFormat::Kind::kLark;
    read.grammar = format["grammar"].required_string();
  } else if (type != "text") {
    throw format["type"].wrong("text, json_object, json_schema or grammar");
  }
  return read;
}

void read_effort(Field effort, ChatRequest& request) {
  const auto word = effort.string();
  if (!word) return;
  if (*word == "none") request.template_arguments["enable_thinking"] = false;
  else request.template_arguments["reasoning_effort"] = *word;
}

}  // namespace torpor::server
