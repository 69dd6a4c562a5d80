#include <algorithm>

#include "server/answer.h"
#include "server/failure.h"
#include "server/openai.h"
#include "server/request.h"

namespace torpor::server {
namespace {

ChatRequest read_request(const HttpRequest& http, Field body) {
  for (const char* member : {"n", "best_of"}) {
    if (body[member].integer().value_or(1) != 1) throw body[member].unserved("ask once for each answer");
  }
  if (body["echo"].boolean().value_or(false)) throw body["echo"].unserved("the prompt is yours already");
  if (body["suffix"]) throw body["suffix"].unserved("write the infill tokens of the model into the prompt");
  ChatRequest request;
  read_identity(http, body, request);
  const Field prompt = body["prompt"];
  if (prompt.is_array()) {
    const auto prompts = prompt.items();
    if (prompts.size() != 1 || !prompts[0].is_string()) throw prompt.unserved("send one string");
    request.prompt = prompts[0].string();
  } else {
    request.prompt = prompt.required_string();
  }
  read_sampling(body, request.sampling);
  request.max_tokens = body["max_tokens"].integer(1).value_or(16);  // OpenAI's default
  request.stop = read_stop(body["stop"]);
  request.logprobs = body["logprobs"].integer(0, kMostLogprobs);
  request.response_format = read_response_format(body["response_format"]);
  return request;
}

Json envelope(const Answer& answer) {
  return {{"id", answer.id}, {"object", "text_completion"}, {"created", answer.created}, {"model", answer.start.model}};
}

Json choice(std::string_view text, const char* reason, Json logprobs = nullptr) {
  Json choice{{"index", 0}, {"text", text}};
  choice["logprobs"] = std::move(logprobs);
  choice["finish_reason"] = reason ? Json(reason) : Json();
  return choice;
}

/// `logprobs` of a choice: lists with an element for each token. Offsets are characters of the answer's text.
class Weighing {
 public:
  Json json(const std::string& text, std::span<const TokenLogprobs> tokens) {
    Json logprobs{{"tokens", Json::array()}, {"token_logprobs", Json::array()}, {"top_logprobs", Json::array()},
                  {"text_offset", Json::array()}};
    const Json list = logprobs_json(tokens);
    for (size_t i = 0; i < tokens.size(); ++i) {
      for (const size_t end = std::min(tokens[i].begin, text.size()); bytes_ < end; ++bytes_) {
        characters_ += (text[bytes_] & 0xC0) != 0x80 ? 1 : 0;
      }
      logprobs["tokens"].push_back(list[i]["token"]);
      logprobs["token_logprobs"].push_back(list[i]["logprob"]);
      Json top = Json::object();
      for (const Json& other : list[i]["top_logprobs"]) top[other["token"].get<std::string>()] = other["logprob"];
      logprobs["top_logprobs"].push_back(std::move(top));
      logprobs["text_offset"].push_back(characters_);
    }
    return logprobs;
  }

 private:
  size_t bytes_ = 0, characters_ = 0;  // counted so far
};

const char* finish_reason(const Answer& answer) { return answer.end.reason == StopReason::kLength ? "length" : "stop"; }

class CompletionStream : public StreamSink {
 public:
  CompletionStream(HttpResponse& response, bool include_usage)
      : StreamSink(response, "cmpl-", "call_"), events_(response, kOpenAiKeepAlive), include_usage_(include_usage) {}

  void fail(const Failure& failure) override { events_.data(failure_body(Dialect::kOpenAi, failure)); }

 protected:
  void on_start() override { events_.begin(answer().start); }
  void on_delta(const AnswerPart& part, int, std::string_view delta) override {
    const auto tokens = delta_logprobs();
    send(Json::array({choice(delta, nullptr, tokens.empty() ? Json() : weighing_.json(part.text, tokens))}));
  }
  void on_finish() override {
    send(Json::array({choice("", finish_reason(answer()))}));
    if (include_usage_) send(Json::array(), usage_json(answer().end));
    events_.send("data: [DONE]\n\n");
  }

 private:
  void send(Json choices, Json usage = nullptr) {
    Json chunk = envelope(answer());
    chunk["choices"] = std::move(choices);
    if (include_usage_) chunk["usage"] = std::move(usage);
    events_.data(chunk);
  }

  EventStream events_;
  bool include_usage_;
  Weighing weighing_;
};

}  // namespace

void answer_completions(const HttpRequest& http, TurnRunner& runner, HttpResponse& response) {
  const Json json = parse_body(http);
  const Field body(json);
  const ChatRequest request = read_request(http, body);
  if (body["stream"].boolean().value_or(false)) {
    CompletionStream stream(response, body["stream_options"]["include_usage"].boolean().value_or(false));
    run_stream(runner, request, stream, response);
  } else {
    PartSink sink("cmpl-", "call_");
    runner.run(request, sink, response.gone());
    Json whole = envelope(sink.answer());
    const std::string text = sink.answer().joined(AnswerPart::Kind::kText);
    Json logprobs = request.logprobs ? Weighing().json(text, sink.answer().logprobs()) : Json();
    whole["choices"] = Json::array({choice(text, finish_reason(sink.answer()), std::move(logprobs))});
    whole["usage"] = usage_json(sink.answer().end);
    answer_whole(response, sink.answer(), whole);
  }
}

}  // namespace torpor::server
