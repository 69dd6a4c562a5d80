#pragma once
/// /torpor/v1: agents and teams over HTTP, in Torpor's own form, and their OpenAPI description. Within v1 members are
/// only ever added.
///
/// A tenant sees and names its own agents and teams alone (server/keys.h). A failure is {"error": {"code", "message",
/// ...}} with the code of torpor::Error and the status of faces/error_table.h.

#include "server/answer_replay.h"
#include "server/http.h"
#include "server/metrics.h"
#include "server/model_pool.h"
#include "server/turn_queue.h"

namespace torpor::server {

struct Reply;

/// Several threads call `handle` at a time.
class AgentsApi : public HttpHandler {
 public:
  /// All must live longer. `replay`: of requests with an Idempotency-Key. `queue`: of teams' turns.
  AgentsApi(ModelPool& models, Metrics& metrics, AnswerReplay& replay, TurnQueue& queue)
      : models_(models), metrics_(metrics), replay_(replay), queue_(queue) {}
  void handle(const HttpRequest& request, HttpResponse& response) override;

 private:
  Reply answer(const HttpRequest& request, HttpResponse& response, std::string& allow);

  ModelPool& models_;
  Metrics& metrics_;
  AnswerReplay& replay_;
  TurnQueue& queue_;
};

}  // namespace torpor::server
