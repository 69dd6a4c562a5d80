#include "server/answer.h"

#include <algorithm>
#include <chrono>
#include <ctime>
#include <random>

#include "server/failure.h"

namespace torpor::server {
namespace {

// Claude Code shows a banner after 20 s without bytes, and gateways before it cancel after 15 s.
constexpr std::chrono::seconds kSilence(5);

// OpenAI's word for a token that can't come: JSON has no infinity.
constexpr float kLeastLogprob = -9999;

}  // namespace

std::string Answer::joined(AnswerPart::Kind kind) const {
  std::string joined;
  for (const AnswerPart& part : parts) {
    if (part.kind == kind) joined += part.text;
  }
  return joined;
}

std::vector<const ToolCall*> Answer::calls() const {
  std::vector<const ToolCall*> calls;
  for (const AnswerPart& part : parts) {
    if (part.kind == AnswerPart::Kind::kToolCall) calls.push_back(&part.call);
  }
  return calls;
}

std::vector<TokenLogprobs> Answer::logprobs() const {
  std::vector<TokenLogprobs> all;
  for (const AnswerPart& part : parts) all.insert(all.end(), part.logprobs.begin(), part.logprobs.end());
  return all;
}

Json logprobs_json(std::span<const TokenLogprobs> tokens) {
  const auto told = [](const TokenLogprob& token) {
    Json json{{"token", token.text}, {"logprob", std::max(token.logprob, kLeastLogprob)}};
    json["bytes"] = Json();
    const bool whole = token.text.find("\uFFFD") == std::string::npos;  // no part of a character
    if (whole) json["bytes"] = std::vector<uint8_t>(token.text.begin(), token.text.end());
    return json;
  };
  Json list = Json::array();
  for (const TokenLogprobs& token : tokens) {
    Json json = told(token);
    json["top_logprobs"] = Json::array();
    for (const TokenLogprob& other : token.top) json["top_logprobs"].push_back(told(other));
    list.push_back(std::move(json));
  }
  return list;
}

std::string new_id(std::string_view prefix) {
  static constexpr std::string_view kLetters = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
  // From the system each time: ids of stored answers must not be guessed.
  std::random_device source;
  std::uniform_int_distribution<size_t> letter(0, kLetters.size() - 1);
  std::string id(prefix);
  for (int i = 0; i < 24; ++i) id += kLetters[letter(source)];
  return id;
}

PartSink::PartSink(std::string_view id_prefix, std::string_view call_prefix) : call_prefix_(call_prefix) {
  answer_.id = new_id(id_prefix);
  answer_.created = std::time(nullptr);
}

void PartSink::start(const AnswerStart& start) {
  answer_.start = start;
  started_ = true;
  on_start();
}

void PartSink::extend(AnswerPart::Kind kind, std::string_view delta) {
  if (delta.empty()) return;
  if (!open_ || answer_.parts.back().kind != kind) {
    close();
    answer_.parts.push_back({kind, {}, {}});
    open_ = true;
    on_open(answer_.parts.back(), int(answer_.parts.size()) - 1);
  }
  AnswerPart& part = answer_.parts.back();
  part.text += delta;
  part.logprobs.insert(part.logprobs.end(), of_delta_.begin(), of_delta_.end());
  on_delta(part, int(answer_.parts.size()) - 1, delta);
  of_delta_.clear();
}

void PartSink::close() {
  if (!open_) return;
  open_ = false;
  on_close(answer_.parts.back(), int(answer_.parts.size()) - 1);
}

void PartSink::thinking(std::string_view delta) { extend(AnswerPart::Kind::kThinking, delta); }
void PartSink::text(std::string_view delta) { extend(AnswerPart::Kind::kText, delta); }

void PartSink::tool_call(const std::string& name) {
  close();
  answer_.parts.push_back({AnswerPart::Kind::kToolCall, {}, {new_id(call_prefix_), name, {}}});
  open_ = true;
  on_open(answer_.parts.back(), int(answer_.parts.size()) - 1);
}

void PartSink::arguments(std::string_view delta) {
  if (delta.empty()) return;
  answer_.parts.back().call.arguments += delta;
  on_delta(answer_.parts.back(), int(answer_.parts.size()) - 1, delta);
}

void PartSink::finish(const AnswerEnd& end) {
  close();
  answer_.end = end;
  if (!end.agent.empty()) answer_.start.agent = end.agent;
  if (!end.why.empty()) answer_.start.why = end.why;
  on_finish();
}

HttpHeaders answer_headers(const AnswerStart& start, std::string content_type) {
  HttpHeaders headers{{"content-type", std::move(content_type)}};
  if (!start.agent.empty()) headers.emplace_back("x-torpor-agent", start.agent);
  headers.emplace_back("x-torpor-cached", std::to_string(start.cached_tokens));
  if (!start.why.empty()) {
    // A header is one line of ASCII; `why` quotes the conversation.
    std::string why = start.why;
    for (char& c : why) {
      if (c < ' ' || c > '~') c = '?';
    }
    headers.emplace_back("x-torpor-why", why);
  }
  return headers;
}

void EventStream::begin(const AnswerStart& start) {
  response_.begin(200, answer_headers(start, "text/event-stream; charset=utf-8"));
  server::keep_alive(response_, keep_alive_);
}

void keep_alive(HttpResponse& response, std::string bytes) { response.keep_alive(std::move(bytes), kSilence); }

void answer_whole(HttpResponse& response, const Answer& answer, const Json& body) {
  response.whole(200, answer_headers(answer.start, "application/json"), to_text(body));
}

void run_stream(TurnRunner& runner, const ChatRequest& request, StreamSink& sink, HttpResponse& response) {
  try {
    runner.run(request, sink, response.gone());
  } catch (...) {
    if (!sink.started()) throw;
    response.ending(false);
    sink.fail(current_failure());
    response.end();
    throw StreamFailed();
  }
  response.end();
}

}  // namespace torpor::server
