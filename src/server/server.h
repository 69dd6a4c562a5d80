#pragma once
/// The whole server without its sockets, put together: models, dialects, agents' and teams' routes, keys, metrics.
///
/// A face gives it requests: the command line's is HttpEdge, Python's is torpor.asgi.

#include <chrono>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "server/agents_api.h"
#include "server/dialects.h"
#include "server/http.h"
#include "server/keys.h"
#include "server/metrics.h"
#include "server/model_pool.h"
#include "server/service.h"
#include "server/turn_queue.h"

namespace torpor::server {

struct ServerOptions {
  ModelPoolOptions pool;
  int queue = 64;            ///< places of turns that run or wait
  bool vllm_names = false;   ///< of metrics, too
  ServiceOptions service;
};

/// `handle` is called by several threads at a time; the others by any thread at any time.
class Server : public HttpHandler {
 public:
  /// Loads the first model. Throws what ModelPool and the store throw.
  explicit Server(ServerOptions options);

  void handle(const HttpRequest& request, HttpResponse& response) override { service_.handle(request, response); }

  ModelPool& models() { return models_; }
  Metrics& metrics() { return metrics_; }
  Service& service() { return service_; }

 private:
  void write_samples(std::string& out);

  ModelPool models_;
  Metrics metrics_;
  MeteredRunner metered_;
  Dialects dialects_;
  TurnQueue queue_;
  AgentsApi agents_;
  Service service_;
};

/// By which requests ask for a model: its directory's name, or a repo id as it stands.
std::string served_name(const std::string& model);

/// A model's alias as users write it, PATTERN=NAME. kInvalidArgument.
ModelAlias parse_alias(const std::string& text);

}  // namespace torpor::server
