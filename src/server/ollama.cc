#include "server/ollama.h"

#include <algorithm>
#include <chrono>
#include <ctime>

#include "server/answer.h"
#include "server/failure.h"
#include "server/fields.h"
#include "server/models.h"
#include "server/request.h"

namespace torpor::server {
namespace {

using Clock = std::chrono::steady_clock;

// Clients ask whether the server knows what they need: the Ollama whose API this is.
constexpr const char* kVersion = "0.12.0";

void read_model(const HttpRequest& http, Field body, ChatRequest& request) {
  read_identity(http, body, request);
  if (request.model.empty()) request.model = body["name"].string().value_or("");
  // Ollama's name of a model without a tag.
  if (request.model.ends_with(":latest")) request.model.resize(request.model.size() - std::string(":latest").size());
}

void read_options(Field body, ChatRequest& request) {
  const Field options = body["options"];
  read_sampling(options, request.sampling);
  request.sampling.repetition_penalty = options["repeat_penalty"].number(kLeastPenalty, 100);
  const int counted = options["repeat_last_n"].integer(-1).value_or(64);  // Ollama's default; -1: all, 0: none
  if (counted == 0) request.sampling.repetition_penalty = 1;
  request.sampling.penalty_context = std::max(counted, 0);
  // Below 0 there is no bound.
  if (const auto most = options["num_predict"].integer(); most && *most >= 0) request.max_tokens = std::max(*most, 1);
  request.stop = read_stop(options["stop"]);
  request.logprobs = read_logprobs(body);
  const Field think = body["think"];
  if (think.is_string()) request.template_arguments["reasoning_effort"] = *think.string();
  else if (think) request.template_arguments["enable_thinking"] = *think.boolean();
  const Field format = body["format"];
  if (format.is_object()) {
    request.response_format = {ResponseFormat::Kind::kJsonSchema, *format.object(), {}, true};
  } else if (const auto word = format.string(); word && !word->empty()) {
    if (*word != "json") throw format.wrong("json, or a JSON Schema");
    request.response_format.kind = ResponseFormat::Kind::kJsonObject;
  }
}

void refuse_images(Field holder) {
  const Field images = holder["images"];
  if (images && !images.items().empty()) throw images.unserved("the models here read text alone");
}

Message read_message(Field item) {
  Message message;
  const std::string role = item["role"].required_string();
  if (role == "system") message.role = Role::kSystem;
  else if (role == "assistant") message.role = Role::kAssistant;
  else if (role == "tool") message.role = Role::kTool;
  else if (role != "user") throw item["role"].wrong("system, user, assistant or tool");
  message.text = item["content"].string().value_or("");
  message.thinking = item["thinking"].string().value_or("");
  refuse_images(item);
  for (const Field& call : item["tool_calls"].items()) {
    const Field function = call["function"];
    if (!function) throw function.wrong("an object");
    message.tool_calls.push_back({call["id"].string().value_or(""), function["name"].required_string(),
                                  call_arguments(function["arguments"])});
  }
  if (message.role == Role::kTool) {
    message.tool_name = item["tool_name"].string().value_or(item["name"].string().value_or(""));
    message.tool_call_id = item["tool_call_id"].string().value_or("");
  }
  return message;
}

ChatRequest read_chat(const HttpRequest& http, Field body) {
  ChatRequest request;
  read_model(http, body, request);
  for (const Field& item : body["messages"].items()) request.messages.push_back(read_message(item));
  name_tool_results(request.messages);
  for (const Field& tool : body["tools"].items()) {
    const Field function = tool["function"];
    if (!function) throw function.wrong("an object");
    request.tools.push_back({function["name"].required_string(), function["description"].string().value_or(""),
                             function["parameters"].object().value_or(Json::object()), false});
  }
  read_options(body, request);
  return request;
}

ChatRequest read_generate(const HttpRequest& http, Field body) {
  ChatRequest request;
  read_model(http, body, request);
  refuse_images(body);
  for (const char* member : {"suffix", "template"}) {
    const auto text = body[member].string();
    if (text && !text->empty()) throw body[member].unserved("write the whole prompt, with 'raw'");
  }
  if (const Field context = body["context"]; context && !context.items().empty()) {
    throw context.unserved("use /api/chat, with all messages");
  }
  const std::string prompt = body["prompt"].string().value_or("");
  if (body["raw"].boolean().value_or(false)) {
    request.prompt = prompt;
  } else if (!prompt.empty()) {
    const std::string system = body["system"].string().value_or("");
    if (!system.empty()) request.messages.push_back({Role::kSystem, system});
    request.messages.push_back({Role::kUser, prompt});
  }
  read_options(body, request);
  return request;
}

/// The members of one answer's lines. Chat and generate name the text differently.
class Lines {
 public:
  explicit Lines(bool chat) : chat_(chat) {}

  Json line(const std::string& model, std::string_view text, std::string_view thinking, Json calls = nullptr) const {
    Json line{{"model", model}, {"created_at", utc_time(std::time(nullptr))}};
    Json message{{"role", "assistant"}, {"content", text}};
    if (!chat_) line["response"] = text;
    Json& holder = chat_ ? message : line;
    if (!thinking.empty()) holder["thinking"] = thinking;
    if (!calls.is_null()) holder["tool_calls"] = std::move(calls);
    if (chat_) line["message"] = std::move(message);
    line["done"] = false;
    return line;
  }

  void spoke() {
    if (!spoke_) first_ = Clock::now(), spoke_ = true;
  }
  /// Makes a line the last one. Durations are nanoseconds.
  void finish(Json& line, const AnswerEnd& end) {
    spoke();
    const auto now = Clock::now();
    const auto ns = [](Clock::duration duration) {
      return std::chrono::duration_cast<std::chrono::nanoseconds>(duration).count();
    };
    line["done"] = true;
    line["done_reason"] = end.reason == StopReason::kLength ? "length" : "stop";
    line["total_duration"] = ns(now - asked_);
    line["load_duration"] = 0;
    line["prompt_eval_count"] = end.prompt_tokens;
    line["prompt_eval_duration"] = ns(first_ - asked_);
    line["eval_count"] = end.generated_tokens;
    line["eval_duration"] = ns(now - first_);
  }

  static Json call_json(const ToolCall& call, int index) {
    Json function{{"index", index}, {"name", call.name}, {"arguments", parse_json<Json>(call.arguments)}};
    return {{"id", call.id}, {"function", function}};
  }

 private:
  bool chat_, spoke_ = false;
  Clock::time_point asked_ = Clock::now(), first_;
};

class OllamaStream : public StreamSink {
 public:
  OllamaStream(HttpResponse& response, bool chat) : StreamSink(response, "", "call_"), response_(response), lines_(chat) {}

  void fail(const Failure& failure) override { send(failure_body(Dialect::kOllama, failure)); }

 protected:
  void on_start() override {
    response_.begin(200, answer_headers(answer().start, "application/x-ndjson"));
    // Each line must be JSON of the one form: a piece without text.
    keep_alive(response_, to_text(lines_.line(answer().start.model, "", "")) + "\n");
  }
  void on_delta(const AnswerPart& part, int, std::string_view delta) override {
    lines_.spoke();
    if (part.kind == AnswerPart::Kind::kToolCall) return;  // calls are told whole
    const bool thinks = part.kind == AnswerPart::Kind::kThinking;
    Json line = lines_.line(answer().start.model, thinks ? "" : delta, thinks ? delta : "");
    if (!delta_logprobs().empty()) line["logprobs"] = logprobs_json(delta_logprobs());
    send(line);
  }
  void on_close(const AnswerPart& part, int) override {
    if (part.kind != AnswerPart::Kind::kToolCall) return;
    send(lines_.line(answer().start.model, "", "", Json::array({Lines::call_json(part.call, calls_++)})));
  }
  void on_finish() override {
    Json line = lines_.line(answer().start.model, "", "");
    lines_.finish(line, answer().end);
    send(line);
  }

 private:
  void send(const Json& line) { response_.write(to_text(line) + "\n"); }

  HttpResponse& response_;
  Lines lines_;
  int calls_ = 0;
};

void answer_turn(const ChatRequest& request, Field body, bool chat, TurnRunner& runner, HttpResponse& response) {
  Lines lines(chat);
  if (request.messages.empty() && !request.prompt) {
    // Nothing to answer: a client that wants the model loaded.
    const ModelEntry model = find_model(runner, request.model);
    Json line = lines.line(model.name, "", "");
    line["done"] = true;
    line["done_reason"] = "load";
    response.whole(200, {{"content-type", "application/json"}}, to_text(line));
    return;
  }
  if (body["stream"].boolean().value_or(true)) {
    OllamaStream stream(response, chat);
    run_stream(runner, request, stream, response);
    return;
  }
  PartSink sink("", "call_");
  runner.run(request, sink, response.gone());
  const Answer& answer = sink.answer();
  Json calls;
  for (const ToolCall* call : answer.calls()) calls.push_back(Lines::call_json(*call, int(calls.size())));
  Json line = lines.line(answer.start.model, answer.joined(AnswerPart::Kind::kText),
                         answer.joined(AnswerPart::Kind::kThinking), calls);
  if (request.logprobs) line["logprobs"] = logprobs_json(answer.logprobs());
  lines.finish(line, answer.end);
  answer_whole(response, answer, line);
}

Json details(const ModelEntry& model) {
  return {{"parent_model", ""}, {"format", model.format}, {"family", model.family},
          {"families", Json::array({model.family})}, {"parameter_size", model.parameter_size},
          {"quantization_level", model.quantization}};
}

Json listed(const ModelEntry& model) {
  return {{"name", model.name}, {"model", model.name}, {"modified_at", utc_time(model.created)},
          {"size", model.bytes}, {"digest", model.digest}, {"details", details(model)}};
}

void answer_json(HttpResponse& response, const Json& json) {
  response.whole(200, {{"content-type", "application/json"}}, to_text(json));
}

}  // namespace

void answer_ollama_chat(const HttpRequest& http, TurnRunner& runner, HttpResponse& response) {
  const Json json = parse_body(http);
  answer_turn(read_chat(http, Field(json)), Field(json), true, runner, response);
}

void answer_ollama_generate(const HttpRequest& http, TurnRunner& runner, HttpResponse& response) {
  const Json json = parse_body(http);
  answer_turn(read_generate(http, Field(json)), Field(json), false, runner, response);
}

void answer_ollama_tags(const HttpRequest&, TurnRunner& runner, HttpResponse& response) {
  Json models = Json::array();
  for (const ModelEntry& model : runner.models()) models.push_back(listed(model));
  answer_json(response, {{"models", models}});
}

void answer_ollama_ps(const HttpRequest&, TurnRunner& runner, HttpResponse& response) {
  Json models = Json::array();
  for (const ModelEntry& model : runner.models()) {
    if (!model.loaded) continue;
    Json entry = listed(model);
    entry["size_vram"] = 0;
    entry["context_length"] = model.context;
    models.push_back(entry);
  }
  answer_json(response, {{"models", models}});
}

void answer_ollama_version(const HttpRequest&, TurnRunner&, HttpResponse& response) {
  answer_json(response, {{"version", kVersion}});
}

void answer_ollama_show(const HttpRequest& http, TurnRunner& runner, HttpResponse& response) {
  const Json json = parse_body(http);
  const Field body(json);
  ChatRequest request;
  read_model(http, body, request);
  const ModelEntry model = find_model(runner, request.model);
  Json capabilities = Json::array({"completion"});
  if (model.tools) capabilities.push_back("tools");
  if (model.thinking) capabilities.push_back("thinking");
  const std::string family = model.family.empty() ? "model" : model.family;
  const Json info{{"general.architecture", family}, {family + ".context_length", model.context}};
  answer_json(response, {{"modelfile", ""}, {"parameters", ""}, {"template", ""}, {"details", details(model)},
                         {"model_info", info}, {"capabilities", capabilities},
                         {"modified_at", utc_time(model.created)}});
}

}  // namespace torpor::server
