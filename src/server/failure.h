#pragma once
/// Failures as each dialect says them.

#include <exception>
#include <string>

#include "server/chat.h"
#include "server/http.h"

namespace torpor::server {

enum class Dialect { kOpenAi, kAnthropic, kOllama };

/// Whose form an answer to this request has: by path, and for the paths that two share by Anthropic's version header.
Dialect dialect_of(const HttpRequest& request);

/// What is being thrown, as a Failure. To be called in a catch block.
Failure current_failure();

/// The status, headers and body that a dialect gives a failure. Failures that a repetition would meet again forbid the
/// SDKs to repeat (`x-should-retry: false`).
int failure_status(Dialect dialect, const Failure& failure);
HttpHeaders failure_headers(Dialect dialect, const Failure& failure);
Json failure_body(Dialect dialect, const Failure& failure);

/// Headers that tell where a request for an agent of another server's belongs, and whose it is. `agent` is its id.
HttpHeaders moved_to(const HttpRequest& request, const std::string& address, const std::string& agent);

/// Answers a request of which nothing was answered yet, in the form of its path's dialect.
void answer_failure(const HttpRequest& request, const Failure& failure, HttpResponse& response);

}  // namespace torpor::server
