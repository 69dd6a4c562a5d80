#pragma once
/// /torpor/v1: agents over HTTP, in Torpor's own form, and its OpenAPI description. Within v1 members are only ever
/// added.
///
/// A tenant sees and names its own agents alone (server/keys.h). A failure is {"error": {"code", "message", ...}} with
/// the code of torpor::Error and the status of faces/error_table.h.

#include "server/http.h"
#include "server/metrics.h"
#include "torpor/engine.h"

namespace torpor::server {

/// Several threads call `handle` at a time.
class AgentsApi : public HttpHandler {
 public:
  /// Both must live longer. `share_prefixes` as of EngineRunner.
  AgentsApi(Engine& engine, Metrics& metrics, bool share_prefixes = false)
      : engine_(engine), metrics_(metrics), share_prefixes_(share_prefixes) {}
  void handle(const HttpRequest& request, HttpResponse& response) override;

 private:
  Engine& engine_;
  Metrics& metrics_;
  const bool share_prefixes_;
};

}  // namespace torpor::server
