#pragma once
/// A turn as no dialect says it: the request, the runner that computes it, and the sink that hears the answer. A
/// dialect makes a ChatRequest of a body and is the AnswerSink that encodes what comes back. Nothing here is of MLX.

#include <atomic>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/json.h"
#include "torpor/generate_options.h"

namespace torpor::server {

/// Members keep the order in which the client wrote them: templates render them, so the order is part of the prompt.
using Json = nlohmann::ordered_json;

/// JSON text. Bytes that are no UTF-8 become U+FFFD.
inline std::string to_text(const Json& json) { return dump_json(json, -1, Json::error_handler_t::replace); }

enum class Role { kSystem, kUser, kAssistant, kTool };

/// One call of a tool by the model.
struct ToolCall {
  std::string id;         ///< the client's or ours; never rendered, never compared
  std::string name;
  std::string arguments;  ///< JSON text of an object
};

/// A canonical message: what differs between dialects, or from turn to turn of one client, is gone (cache marks, parts,
/// signatures).
struct Message {
  Role role = Role::kUser;
  std::string text;                  ///< UTF-8; of a tool, its result
  std::string thinking;              ///< of the assistant: what it thought before `text`
  std::vector<ToolCall> tool_calls;  ///< of the assistant, after `text`
  std::string tool_call_id;          ///< of a tool: the call that this answers
  std::string tool_name;             ///< of a tool: the name in that call; empty when no such call is in the history
};

struct Tool {
  std::string name, description;
  Json parameters = Json::object();  ///< JSON Schema of the arguments
  bool strict = false;               ///< the schema is a promise: refuse it when it can't be enforced
};

struct ToolChoice {
  enum class Kind { kAuto, kNone, kRequired, kNamed } kind = Kind::kAuto;
  std::string name;  ///< of kNamed; a declared tool
};

struct ResponseFormat {
  enum class Kind { kText, kJsonObject, kJsonSchema, kLark } kind = Kind::kText;
  Json schema;          ///< of kJsonSchema
  std::string grammar;  ///< of kLark
  bool strict = true;
};

/// What a request says of sampling; absent: the model's own default.
struct Sampling {
  std::optional<double> temperature, top_p, min_p;
  std::optional<int> top_k;
  std::optional<double> repetition_penalty, presence_penalty, frequency_penalty;
  std::optional<int> penalty_context;              ///< tokens that the repetition penalty counts; 0: all
  std::vector<std::pair<int, double>> logit_bias;  ///< token id, what is added to its logit
  std::optional<uint64_t> seed;
};

struct ChatRequest {
  std::string model;    ///< as the client named it, without `@agent`
  std::string tenant;   ///< whose key it was; agents and sessions belong to it
  std::string share;        ///< TurnRequest::share
  bool background = false;  ///< TurnRequest::background
  std::string agent;    ///< named explicitly; empty: none
  std::string id;       ///< TurnRequest::id
  std::string session;  ///< the client's id of the conversation; empty: none
  std::vector<Message> messages;      ///< the whole history, oldest first
  std::optional<std::string> prompt;  ///< in place of messages: text that is continued as it stands
  std::vector<Tool> tools;
  ToolChoice tool_choice;
  bool parallel_tool_calls = true;
  Sampling sampling;
  std::optional<int> max_tokens;  ///< above what the context leaves it is clamped
  std::vector<std::string> stop;
  std::optional<int> logprobs;    ///< how probable the text's tokens were is told, and so many of the likeliest
  ResponseFormat response_format;
  Json template_arguments = Json::object();  ///< enable_thinking, reasoning_effort and others that the template knows
};

/// Why a request is refused or fails, as no dialect says it. `what()` is one sentence for the user.
class Failure : public std::runtime_error {
 public:
  enum class Kind {
    kInvalid,           ///< malformed, or an option that is not served; `param` names it
    kContextTooLong,    ///< `tokens` > `maximum`
    kUnauthorized,      ///< no key or a wrong one
    kForbidden,         ///< a Host or Origin that is not ours
    kNotFound,          ///< no such model, agent, response or path
    kMethodNotAllowed,  ///< the path is served by another method
    kBusy,              ///< the agent is in a turn, or awake elsewhere
    kMoved,             ///< another server has the agent; `address`
    kTooLarge,          ///< the body's size
    kOverloaded,        ///< the queue is full; `retry_after`
    kUnavailable,       ///< loading or draining; `retry_after`
    kIncompatible,      ///< what is stored belongs to another model or format
    kNoRoom,            ///< more memory or disk than there is
    kInternal,          ///< damage, a disk that refuses, a defect
    kCancelled,         ///< the client has gone
  };
  Failure(Kind kind, const std::string& message, std::string param = {})
      : std::runtime_error(message), kind(kind), param(std::move(param)) {}

  Kind kind;
  std::string param;          ///< the member of the body that is at fault, "messages[2].content"
  int tokens = 0, maximum = 0;
  int retry_after = 0;        ///< seconds
  std::string address;        ///< of kMoved: "http://10.0.0.7:8080"
  std::string agent;          ///< of kMoved: its id
};

/// The turn is admitted and its prompt known; nothing was computed yet.
struct AnswerStart {
  std::string model;          ///< that answers
  std::string agent;          ///< that goes on; empty: none with a name
  int prompt_tokens = 0;      ///< the whole prompt
  int cached_tokens = 0;      ///< of those, not computed now
  std::string why;            ///< of a miss: the first message that differs; empty otherwise
};

enum class StopReason { kEnd, kStopString, kLength, kToolCalls, kCancelled };

/// The answer is complete, and saved.
struct AnswerEnd {
  StopReason reason = StopReason::kEnd;
  std::string stop_string;    ///< of kStopString
  int prompt_tokens = 0, cached_tokens = 0;
  int generated_tokens = 0;   ///< thinking included
  int thinking_tokens = 0;
  // As in AnswerStart, where the turn itself has found out.
  std::string agent, why;
};

/// Hears one answer, on the thread that called TurnRunner::run: start, then pieces as they are generated, then finish.
/// Pieces are UTF-8 that splits no character, and never empty.
class AnswerSink {
 public:
  virtual ~AnswerSink() = default;
  virtual void start(const AnswerStart& start) = 0;
  /// Tokens of the prompt done, and to do.
  virtual void progress(int done, int total) {}
  virtual void thinking(std::string_view delta) = 0;
  virtual void text(std::string_view delta) = 0;
  /// The tokens that begin in the text that comes next (ChatRequest::logprobs). Their `begin` counts the text told
  /// before.
  virtual void logprobs(std::vector<TokenLogprobs> tokens) {}
  /// A call begins. Its arguments follow in `arguments`: together they are JSON text of an object.
  virtual void tool_call(const std::string& name) = 0;
  virtual void arguments(std::string_view delta) = 0;
  virtual void finish(const AnswerEnd& end) = 0;
};

/// What the server can answer with.
struct ModelEntry {
  std::string name;             ///< that requests name
  int64_t created = 0;          ///< seconds since the epoch: of its files
  int context = 0;              ///< tokens
  bool loaded = false;
  int64_t bytes = 0;            ///< of its files
  std::string digest;           ///< hexadecimal
  std::string family;           ///< "qwen2"
  std::string parameter_size;   ///< "494M"; empty: unknown
  std::string quantization;     ///< "Q4_1", "F16"; empty: unknown
  bool tools = false, thinking = false;  ///< its template knows them
  std::string format = "safetensors";    ///< of its files; or "gguf"
};

/// Computes turns. Any thread may call it, several at once.
class TurnRunner {
 public:
  virtual ~TurnRunner() = default;
  /// One turn. Returns after `finish`. Any thread may set `gone`: the turn is then taken back, and kCancelled thrown.
  /// Throws Failure or torpor::Error, before or after `start`; the agent is then as before. What the sink throws comes
  /// out of it.
  virtual void run(const ChatRequest& request, AnswerSink& sink, const std::atomic<bool>& gone) = 0;
  /// Tokens of the prompt that `run` would compute or find.
  virtual int count_tokens(const ChatRequest& request) = 0;
  virtual std::vector<ModelEntry> models() = 0;
};

}  // namespace torpor::server
