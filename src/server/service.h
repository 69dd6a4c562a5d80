#pragma once
/// The server without its sockets: who may ask, what is asked, and what is told of it.
///
/// A request passes in this order: its Host and Origin, its key, the state of the server (draining, full), then the
/// handler of its path. `/health` and the dashboard's files answer anybody. Each refusal has the form of its path's dialect.

#include <atomic>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/mutex.h"
#include "server/http.h"
#include "server/keys.h"
#include "server/metrics.h"
#include "server/turn_queue.h"

namespace torpor::server {

struct ServiceOptions {
  bool authenticate = true;         ///< false: everybody is kLocalTenant
  /// Gets a JSON object for each request that was answered, without its end of line. It holds no text of a request.
  /// Called on worker threads, by several at a time.
  std::function<void(const std::string& line)> log;
};

/// `set_keys`, `set_hosts`, `drain` and `turns` may be called by any thread at any time.
class Service : public HttpHandler {
 public:
  /// All must live longer. `dialects` answers /v1/ and /api/, `agents` /torpor/v1/. A request that computes has a place
  /// of the `queue` until its client hears the end; teams' requests take their places themselves.
  Service(ServiceOptions options, TurnQueue& queue, HttpHandler& dialects, HttpHandler& agents, Metrics& metrics);

  void handle(const HttpRequest& request, HttpResponse& response) override;

  void set_keys(ApiKeys keys);
  /// Names that Host may have, beside localhost and any address.
  void set_hosts(std::vector<std::string> hosts);
  /// From now on /health says that the server is not ready, and turns are refused.
  void drain() { draining_ = true; }
  /// Turns that run or wait.
  int turns() const { return queue_.taken(); }

 private:
  struct Route;
  class TurnPlace;
  const Route& route_of(const HttpRequest& request) const;
  void check_source(const HttpRequest& request) const;
  KeyOwner owner_of(const HttpRequest& request) const;
  void answer(const Route& route, HttpRequest& request, HttpResponse& response);
  void answer_health(HttpResponse& response) const;

  const ServiceOptions options_;
  TurnQueue& queue_;
  HttpHandler& dialects_;
  HttpHandler& agents_;
  Metrics& metrics_;
  mutable Mutex mutex_;
  std::shared_ptr<const ApiKeys> keys_ TORPOR_GUARDED_BY(mutex_);
  std::shared_ptr<const std::vector<std::string>> hosts_ TORPOR_GUARDED_BY(mutex_);
  std::atomic<bool> draining_{false};
  std::atomic<uint64_t> next_id_{1};
};

}  // namespace torpor::server
