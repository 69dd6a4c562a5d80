#include "server/failure.h"

#include <algorithm>
#include <new>

#include "server/keys.h"
#include "torpor/error.h"
#include "torpor/model_info.h"
#include "torpor/remote_tier.h"

namespace torpor::server {
namespace {

using Kind = Failure::Kind;

struct Form {
  Kind kind;
  int status;
  int anthropic_status;
  const char* openai_type;
  const char* openai_code;  // nullptr: null
  const char* anthropic_type;
  bool again;               // a repetition may succeed
};

constexpr Form kForms[] = {
    {Kind::kInvalid, 400, 400, "invalid_request_error", nullptr, "invalid_request_error", false},
    {Kind::kContextTooLong, 400, 400, "invalid_request_error", "context_length_exceeded", "invalid_request_error",
     false},
    {Kind::kUnauthorized, 401, 401, "authentication_error", "invalid_api_key", "authentication_error", false},
    {Kind::kForbidden, 403, 403, "permission_error", nullptr, "permission_error", false},
    {Kind::kNotFound, 404, 404, "invalid_request_error", "not_found", "not_found_error", false},
    {Kind::kMethodNotAllowed, 405, 405, "invalid_request_error", nullptr, "invalid_request_error", false},
    {Kind::kBusy, 409, 409, "conflict_error", "agent_busy", "invalid_request_error", false},
    {Kind::kMoved, 307, 307, "conflict_error", "agent_moved", "invalid_request_error", false},
    {Kind::kTooLarge, 413, 413, "invalid_request_error", "request_too_large", "request_too_large", false},
    {Kind::kOverloaded, 429, 529, "rate_limit_error", "rate_limit_exceeded", "overloaded_error", true},
    {Kind::kUnavailable, 503, 529, "server_error", "server_is_overloaded", "overloaded_error", true},
    {Kind::kIncompatible, 409, 409, "conflict_error", "incompatible", "invalid_request_error", false},
    {Kind::kNoRoom, 507, 507, "server_error", "insufficient_storage", "api_error", false},
    {Kind::kInternal, 500, 500, "server_error", nullptr, "api_error", false},
    {Kind::kCancelled, 499, 499, "server_error", "cancelled", "api_error", false},
};

const Form& form_of(Kind kind) {
  return *std::find_if(std::begin(kForms), std::end(kForms), [&](const Form& form) { return form.kind == kind; });
}

Kind kind_of(ErrorCode code) {
  switch (code) {
    case ErrorCode::kNotFound: return Kind::kNotFound;
    case ErrorCode::kInvalidArgument: return Kind::kInvalid;
    case ErrorCode::kBusy: return Kind::kBusy;
    case ErrorCode::kIncompatible: return Kind::kIncompatible;
    case ErrorCode::kResourceExhausted: return Kind::kNoRoom;
    case ErrorCode::kCancelled: return Kind::kCancelled;
    case ErrorCode::kCorruption:
    case ErrorCode::kIo:
    case ErrorCode::kInternal: break;
  }
  return Kind::kInternal;
}

Failure failure_of_tier(const Error& error) {
  const bool moved = error.field() == kAgentElsewhere && !error.found().empty();
  Failure failure(moved ? Failure::Kind::kMoved : Failure::Kind::kBusy, error.what());
  moved ? void(failure.address = error.found()) : void(failure.retry_after = 1);
  failure.agent = error.agent();
  return failure;
}

std::string sentence(Dialect dialect, const Failure& failure) {
  if (failure.kind != Kind::kContextTooLong) return failure.what();
  const std::string tokens = std::to_string(failure.tokens), maximum = std::to_string(failure.maximum);
  // Claude Code and Codex compact their history on these words.
  if (dialect == Dialect::kAnthropic) return "prompt is too long: " + tokens + " tokens > " + maximum + " maximum";
  return "This model's maximum context length is " + maximum + " tokens. However, your messages resulted in " + tokens +
         " tokens. Please reduce the length of the messages.";
}

}  // namespace

Dialect dialect_of(const HttpRequest& request) {
  const std::string_view path = request.path;
  if (path.starts_with("/api/")) return Dialect::kOllama;
  if (path == "/v1/messages" || path.starts_with("/v1/messages/")) return Dialect::kAnthropic;
  return request.header("anthropic-version") ? Dialect::kAnthropic : Dialect::kOpenAi;
}

Failure current_failure() {
  try {
    throw;
  } catch (const Failure& failure) {
    return failure;
  } catch (const Error& error) {
    if (error.field() == kAgentElsewhere || error.field() == kUncommitted) return failure_of_tier(error);
    if (error.field() != kContextFull) return Failure(kind_of(error.code()), error.what());
    Failure failure(Kind::kContextTooLong, error.what());
    failure.tokens = std::stoi(error.found());
    failure.maximum = std::stoi(error.expected());
    return failure;
  } catch (const std::bad_alloc&) {
    return Failure(Kind::kNoRoom, "The server has no memory left for this request; send it again later.");
  } catch (const std::exception& error) {
    return Failure(Kind::kInternal, std::string("The server failed on this request: ") + error.what());
  }
}

HttpHeaders moved_to(const HttpRequest& request, const std::string& address, const std::string& agent) {
  HttpHeaders headers{{"location", address + request.path + (request.query.empty() ? "" : "?" + request.query)}};
  if (const auto name = agent_name_of(request.tenant, agent)) headers.emplace_back("x-torpor-agent", *name);
  return headers;
}

int failure_status(Dialect dialect, const Failure& failure) {
  const Form& form = form_of(failure.kind);
  return dialect == Dialect::kAnthropic ? form.anthropic_status : form.status;
}

HttpHeaders failure_headers(Dialect dialect, const Failure& failure) {
  HttpHeaders headers{{"content-type", "application/json"}};
  if (!form_of(failure.kind).again && failure.retry_after == 0) headers.emplace_back("x-should-retry", "false");
  if (failure.retry_after > 0) headers.emplace_back("retry-after", std::to_string(failure.retry_after));
  return headers;
}

Json failure_body(Dialect dialect, const Failure& failure) {
  const Form& form = form_of(failure.kind);
  const std::string message = sentence(dialect, failure);
  switch (dialect) {
    case Dialect::kAnthropic:
      return {{"type", "error"}, {"error", {{"type", form.anthropic_type}, {"message", message}}}};
    case Dialect::kOllama: return {{"error", message}};
    case Dialect::kOpenAi: break;
  }
  Json error{{"message", message}, {"type", form.openai_type}};
  error["param"] = failure.param.empty() ? Json() : Json(failure.param);
  error["code"] = form.openai_code ? Json(form.openai_code) : Json();
  return {{"error", error}};
}

void answer_failure(const HttpRequest& request, const Failure& failure, HttpResponse& response) {
  const Dialect dialect = dialect_of(request);
  HttpHeaders headers = failure_headers(dialect, failure);
  if (failure.kind == Kind::kMoved) {
    for (auto& header : moved_to(request, failure.address, failure.agent)) headers.push_back(std::move(header));
  }
  response.whole(failure_status(dialect, failure), std::move(headers),
                 to_text(failure_body(dialect, failure)));
}

}  // namespace torpor::server
