#pragma once
/// An answer in parts, and the ways a dialect sends it: whole, or as a stream of events.

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "server/chat.h"
#include "server/http.h"

namespace torpor::server {

/// A piece of an answer that has one kind from its first to its last byte.
struct AnswerPart {
  enum class Kind { kThinking, kText, kToolCall } kind = Kind::kText;
  std::string text;  ///< of thinking and text
  ToolCall call;     ///< of a tool call
  std::vector<TokenLogprobs> logprobs;  ///< of text, where they were asked for
};

/// Log-probabilities as OpenAI and Ollama write them, a list of objects.
Json logprobs_json(std::span<const TokenLogprobs> tokens);

struct Answer {
  std::string id;       ///< of the response
  int64_t created = 0;  ///< seconds since the epoch
  AnswerStart start;
  AnswerEnd end;
  std::vector<AnswerPart> parts;

  /// All text, or all thinking, in one.
  std::string joined(AnswerPart::Kind kind) const;
  std::vector<TokenLogprobs> logprobs() const;
  std::vector<const ToolCall*> calls() const;
};

/// A prefix and 24 random letters and digits.
std::string new_id(std::string_view prefix);

/// Collects an answer, and tells a derived class as parts open, grow and close. One part is open at a time.
class PartSink : public AnswerSink {
 public:
  /// The prefixes of the ids that the dialect gives to responses and to tool calls.
  PartSink(std::string_view id_prefix, std::string_view call_prefix);

  const Answer& answer() const { return answer_; }
  bool started() const { return started_; }

  void start(const AnswerStart& start) final;
  void thinking(std::string_view delta) final;
  void text(std::string_view delta) final;
  void logprobs(std::vector<TokenLogprobs> tokens) final { of_delta_ = std::move(tokens); }
  void tool_call(const std::string& name) final;
  void arguments(std::string_view delta) final;
  void finish(const AnswerEnd& end) override;

 protected:
  // `index` counts the parts of the answer from 0.
  virtual void on_start() {}
  virtual void on_open(const AnswerPart& part, int index) {}
  virtual void on_delta(const AnswerPart& part, int index, std::string_view delta) {}
  virtual void on_close(const AnswerPart& part, int index) {}
  virtual void on_finish() {}
  /// Inside on_delta of text: its tokens.
  std::span<const TokenLogprobs> delta_logprobs() const { return of_delta_; }

 private:
  void extend(AnswerPart::Kind kind, std::string_view delta);
  void close();

  Answer answer_;
  std::string call_prefix_;
  std::vector<TokenLogprobs> of_delta_;
  bool started_ = false, open_ = false;
};

/// A PartSink that sends events while the answer is computed.
class StreamSink : public PartSink {
 public:
  StreamSink(HttpResponse& response, std::string_view id_prefix, std::string_view call_prefix)
      : PartSink(id_prefix, call_prefix), to_(response) {}
  void finish(const AnswerEnd& end) final {
    to_.ending(true);
    PartSink::finish(end);
  }
  /// The answer ends here, after its start: says so in the dialect's form.
  virtual void fail(const Failure& failure) = 0;

 private:
  HttpResponse& to_;
};

/// The headers that each answer carries: X-Torpor-Agent, -Cached, and -Why on a miss.
HttpHeaders answer_headers(const AnswerStart& start, std::string content_type);

/// Asks for `bytes` to be sent during silences of a stream that has begun.
void keep_alive(HttpResponse& response, std::string bytes);

/// Server-sent events of one response.
class EventStream {
 public:
  /// `keep_alive`: what is sent when there was silence for some seconds.
  EventStream(HttpResponse& response, std::string keep_alive)
      : response_(response), keep_alive_(std::move(keep_alive)) {}

  void begin(const AnswerStart& start);
  void data(const Json& json) { send("data: " + to_text(json) + "\n\n"); }
  void event(const std::string& name, const Json& json) {
    send("event: " + name + "\ndata: " + to_text(json) + "\n\n");
  }
  void send(std::string_view bytes) { response_.write(bytes); }

 private:
  HttpResponse& response_;
  std::string keep_alive_;
};

/// Sends a complete answer as JSON, with the headers of answer_headers.
void answer_whole(HttpResponse& response, const Answer& answer, const Json& body);

/// Thrown when a stream has told its failure and has ended: nothing is left to answer.
struct StreamFailed {};

/// Runs a turn into a sink that streams. Failures before the start are thrown; later ones are told by the sink, and then
/// StreamFailed is thrown.
void run_stream(TurnRunner& runner, const ChatRequest& request, StreamSink& sink, HttpResponse& response);

}  // namespace torpor::server
