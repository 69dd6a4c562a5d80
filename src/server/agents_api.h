#pragma once
/// /torpor/v1: agents over HTTP, in Torpor's own form, and its OpenAPI description. Within v1 members are only ever
/// added.
///
/// A tenant sees and names its own agents alone (server/keys.h). A failure is {"error": {"code", "message", ...}} with
/// the code of torpor::Error and the status of faces/error_table.h.

#include "server/answer_replay.h"
#include "server/http.h"
#include "server/metrics.h"
#include "server/model_pool.h"

namespace torpor::server {

/// Several threads call `handle` at a time.
class AgentsApi : public HttpHandler {
 public:
  /// All must live longer. `replay`: of requests with an Idempotency-Key.
  AgentsApi(ModelPool& models, Metrics& metrics, AnswerReplay& replay)
      : models_(models), metrics_(metrics), replay_(replay) {}
  void handle(const HttpRequest& request, HttpResponse& response) override;

 private:
  ModelPool& models_;
  Metrics& metrics_;
  AnswerReplay& replay_;
};

}  // namespace torpor::server
