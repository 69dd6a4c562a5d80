#pragma once
/// The server without its sockets: who may ask, what is asked, and what is told of it.
///
/// A request passes in this order: its Host and Origin, its key, the state of the server (draining, full), then the
/// handler of its path. `/health` and the dashboard's files answer anybody. Each refusal has the form of its path's dialect.

#include <atomic>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/mutex.h"
#include "server/http.h"
#include "server/keys.h"
#include "server/metrics.h"

namespace torpor::server {

struct ServiceOptions {
  bool authenticate = true;         ///< false: everybody is kLocalTenant
  /// Turns that run or wait at a time; one more is refused, with a time to come again. Where there are several keys, each has a
  /// place as long as it holds fewer than are free: half of them at most.
  int max_turns = 64;
  /// Gets a JSON object for each request that was answered, without its end of line. It holds no text of a request.
  /// Called on worker threads, by several at a time.
  std::function<void(const std::string& line)> log;
};

/// `set_keys`, `set_hosts`, `drain` and `turns` may be called by any thread at any time.
class Service : public HttpHandler {
 public:
  /// All must live longer. `dialects` answers /v1/ and /api/, `agents` /torpor/v1/.
  Service(ServiceOptions options, HttpHandler& dialects, HttpHandler& agents, Metrics& metrics);

  void handle(const HttpRequest& request, HttpResponse& response) override;

  void set_keys(ApiKeys keys);
  /// Names that Host may have, beside localhost and any address.
  void set_hosts(std::vector<std::string> hosts);
  /// From now on /health says that the server is not ready, and turns are refused.
  void drain() { draining_ = true; }
  /// Turns that run or wait.
  int turns() const;

 private:
  struct Route;
  class TurnPlace;
  const Route& route_of(const HttpRequest& request) const;
  void check_source(const HttpRequest& request) const;
  KeyOwner owner_of(const HttpRequest& request) const;
  void answer(const Route& route, HttpRequest& request, HttpResponse& response);
  /// Of all shares.
  int taken() const TORPOR_REQUIRES(mutex_);
  void answer_health(HttpResponse& response) const;

  const ServiceOptions options_;
  HttpHandler& dialects_;
  HttpHandler& agents_;
  Metrics& metrics_;
  mutable Mutex mutex_;
  std::shared_ptr<const ApiKeys> keys_ TORPOR_GUARDED_BY(mutex_);
  std::shared_ptr<const std::vector<std::string>> hosts_ TORPOR_GUARDED_BY(mutex_);
  std::map<std::string, int> turns_ TORPOR_GUARDED_BY(mutex_);  // that run or wait, by HttpRequest::share
  std::atomic<bool> draining_{false};
  std::atomic<uint64_t> next_id_{1};
};

}  // namespace torpor::server
