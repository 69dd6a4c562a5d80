#pragma once
/// The dialects' routes: OpenAI's, Anthropic's and Ollama's.

#include <memory>

#include "server/answer_replay.h"
#include "server/answer_shelf.h"
#include "server/chat.h"
#include "server/failure.h"
#include "server/http.h"

namespace torpor::server {

/// Answers every path that begins with /v1/ or /api/, in the form of its dialect; what is not served is 404, or 405
/// when another method serves it. `tenant` of a request says whose agents and stored answers it may use. Several
/// threads call at a time.
class Dialects : public HttpHandler {
 public:
  /// `runner` must outlive this. `files`: where stored responses and answers for retries outlive it. Throws what the
  /// store
  /// says.
  explicit Dialects(TurnRunner& runner, AnswerFiles files = {});
  ~Dialects() override;
  /// What others answer with keys, too: a key is one for all paths.
  AnswerReplay& replay();

  void handle(const HttpRequest& request, HttpResponse& response) override;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace torpor::server
