#include "server/service.h"

#include <arpa/inet.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <ctime>
#include <utility>

#include "server/dashboard.h"
#include "server/failure.h"
#include "torpor/version.h"

namespace torpor::server {

enum class Kind { kOpen, kMetrics, kDialect, kAgents, kUnknown };

struct Service::Route {
  const char* path;  ///< whole, or what it begins with where it ends with '/'
  Kind kind;
  /// What a POST computes: nothing, one turn, or turns whose places its handler takes.
  enum class Turns { kNone, kOne, kOwn } turns = Turns::kNone;
  /// What metrics call it: a closed set.
  std::string name() const { return path; }
};

namespace {

std::string lower(std::string_view text) {
  std::string out(text);
  std::transform(out.begin(), out.end(), out.begin(), [](unsigned char c) { return std::tolower(c); });
  return out;
}

/// "[::1]:8080" and "localhost:8080" without their ports.
std::string without_port(std::string_view host) {
  if (host.starts_with('[')) return std::string(host.substr(0, std::min(host.find(']') + 1, host.size())));
  return std::string(host.substr(0, host.find(':')));
}

/// A page of a stranger's reaches us only under a name that it has made lead here; an address is no such name.
bool is_address(const std::string& host) {
  unsigned char bytes[sizeof(in6_addr)];
  if (host.starts_with('[') && host.ends_with(']'))
    return inet_pton(AF_INET6, host.substr(1, host.size() - 2).c_str(), bytes) == 1;
  return inet_pton(AF_INET, host.c_str(), bytes) == 1;
}

std::string timestamp() {
  const auto now = std::chrono::system_clock::now();
  const std::time_t seconds = std::chrono::system_clock::to_time_t(now);
  const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(now.time_since_epoch()).count() % 1000;
  std::tm utc{};
  gmtime_r(&seconds, &utc);
  char text[40];
  const size_t size = std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S", &utc);
  std::snprintf(text + size, sizeof text - size, ".%03dZ", static_cast<int>(ms));
  return text;
}

/// Knows what was answered, and adds the request's id.
class Watched : public HttpResponse {
 public:
  Watched(HttpResponse& response, std::string id) : response_(response), id_(std::move(id)) {}

  void whole(int status, HttpHeaders headers, std::string body) override {
    const size_t size = body.size();
    response_.whole(status, with_id(std::move(headers)), std::move(body));
    this->status = status;
    bytes = size;
  }
  void begin(int status, HttpHeaders headers) override {
    response_.begin(status, with_id(std::move(headers)));
    this->status = status;
    streamed = true;
  }
  bool write(std::string_view text) override {
    bytes += text.size();
    return response_.write(text);
  }
  void keep_alive(std::string text, std::chrono::milliseconds idle) override {
    response_.keep_alive(std::move(text), idle);
  }
  void end() override { response_.end(); }
  const std::atomic<bool>& gone() const override { return response_.gone(); }

  int status = 0;
  size_t bytes = 0;
  bool streamed = false;

 private:
  HttpHeaders with_id(HttpHeaders headers) const {
    headers.emplace_back("x-request-id", id_);
    return headers;
  }

  HttpResponse& response_;
  const std::string id_;
};

void require_get(const HttpRequest& request) {
  if (request.method != "GET" && request.method != "HEAD")
    throw Failure(Failure::Kind::kMethodNotAllowed, request.path + " answers GET alone.");
}

}  // namespace

/// Has a place of the queue until its client hears the end, who may ask again at once.
class Service::TurnPlace final : public HttpResponse {
 public:
  TurnPlace(TurnQueue& queue, const std::string& share, HttpResponse& response)
      : place_(queue, share, 1), response_(response) {}

  void whole(int status, HttpHeaders headers, std::string body) override {
    place_.leave_all();
    response_.whole(status, std::move(headers), std::move(body));
  }
  void begin(int status, HttpHeaders headers) override { response_.begin(status, std::move(headers)); }
  bool write(std::string_view bytes) override { return response_.write(bytes); }
  void keep_alive(std::string bytes, std::chrono::milliseconds idle) override { response_.keep_alive(std::move(bytes), idle); }
  void end() override {
    place_.leave_all();
    response_.end();
  }
  const std::atomic<bool>& gone() const override { return response_.gone(); }

 private:
  TurnQueue::Places place_;
  HttpResponse& response_;
};

Service::Service(ServiceOptions options, TurnQueue& queue, HttpHandler& dialects, HttpHandler& agents, Metrics& metrics)
    : options_(std::move(options)),
      queue_(queue),
      dialects_(dialects),
      agents_(agents),
      metrics_(metrics),
      keys_(std::make_shared<const ApiKeys>()),
      hosts_(std::make_shared<const std::vector<std::string>>()) {}

void Service::set_keys(ApiKeys keys) {
  auto fresh = std::make_shared<const ApiKeys>(std::move(keys));
  queue_.set_alone(!options_.authenticate || fresh->size() <= 1);
  const MutexLock lock(mutex_);
  keys_ = std::move(fresh);
}

void Service::set_hosts(std::vector<std::string> hosts) {
  auto fresh = std::make_shared<const std::vector<std::string>>(std::move(hosts));
  const MutexLock lock(mutex_);
  hosts_ = std::move(fresh);
}

const Service::Route& Service::route_of(const HttpRequest& request) const {
  constexpr auto kOne = Route::Turns::kOne, kOwn = Route::Turns::kOwn;
  // The first that fits.
  static const Route kRoutes[] = {
      {"/", Kind::kOpen},
      {"/dashboard/", Kind::kOpen},
      {"/health", Kind::kOpen},
      {"/health/live", Kind::kOpen},
      {"/health/ready", Kind::kOpen},
      {"/metrics", Kind::kMetrics},
      {"/v1/chat/completions", Kind::kDialect, kOne},
      {"/v1/completions", Kind::kDialect, kOne},
      {"/v1/responses", Kind::kDialect, kOne},
      {"/v1/messages", Kind::kDialect, kOne},
      {"/api/chat", Kind::kDialect, kOne},
      {"/api/generate", Kind::kDialect, kOne},
      {"/v1/", Kind::kDialect},
      {"/api/", Kind::kDialect},
      {"/torpor/v1/agents", Kind::kAgents, kOne},
      {"/torpor/v1/teams", Kind::kAgents},
      {"/torpor/v1/", Kind::kAgents},
  };
  static const Route kUnknown{"unknown", Kind::kUnknown}, kAgentsTurn{"/torpor/v1/agents/turn", Kind::kAgents, kOne};
  static const Route kTeamsStep{"/torpor/v1/teams/step", Kind::kAgents, kOwn};
  // Handlers go by the path's parts: escapes and a slash at the end make no other route. The others go by their names.
  const std::vector<std::string> parts = request.path_parts();
  std::string plain;
  for (const std::string& part : parts) plain += "/" + part;
  if (plain.starts_with("/torpor/v1/teams/") && parts.size() == 5) return kTeamsStep;
  if (plain.starts_with("/torpor/v1/agents/") && parts.size() == 5 && parts[4] == "turn") return kAgentsTurn;
  for (const Route& route : kRoutes) {
    const std::string_view own = route.path;
    const bool by_name = route.kind == Kind::kOpen || route.kind == Kind::kMetrics;
    const std::string_view path = by_name ? request.path : plain;
    if (own == path || (own.size() > 1 && own.ends_with('/') && path.starts_with(own))) return route;
  }
  return kUnknown;
}

void Service::check_source(const HttpRequest& request) const {
  const auto hosts = std::count_if(request.headers.begin(), request.headers.end(),
                                   [](const auto& header) { return header.first == "host"; });
  if (hosts > 1) throw Failure(Failure::Kind::kInvalid, "A request has one Host header.", "host");
  const std::string host = lower(request.header("host").value_or(""));
  if (request.peer != "unix") {  // no page of a browser's reaches a UNIX socket
    const std::string name = without_port(host);
    std::shared_ptr<const std::vector<std::string>> hosts;
    {
      const MutexLock lock(mutex_);
      hosts = hosts_;
    }
    const bool known = name == "localhost" || name.ends_with(".localhost") || is_address(name) ||
                       std::find(hosts->begin(), hosts->end(), name) != hosts->end();
    if (!known)
      throw Failure(Failure::Kind::kForbidden, "This server does not go by the name in the Host header.", "host");
  }
  if (const auto origin = request.header("origin")) {
    const size_t scheme = origin->find("://");
    if (scheme == std::string_view::npos || lower(origin->substr(scheme + 3)) != host) {
      throw Failure(Failure::Kind::kForbidden, "Pages of other origins may not use this server.", "origin");
    }
  }
}

KeyOwner Service::owner_of(const HttpRequest& request) const {
  if (!options_.authenticate) return {kLocalTenant, ""};
  std::string_view key = request.header("x-api-key").value_or("");
  const std::string_view bearer = request.header("authorization").value_or("");
  if (bearer.size() > 7 && lower(bearer.substr(0, 7)) == "bearer ") key = bearer.substr(7);
  std::shared_ptr<const ApiKeys> keys;
  {
    const MutexLock lock(mutex_);
    keys = keys_;
  }
  if (const auto owner = keys->owner_of(key)) return *owner;
  throw Failure(Failure::Kind::kUnauthorized,
                "This needs a key of the server's; send it as a Bearer token or as x-api-key.");
}

void Service::answer_health(HttpResponse& response) const {
  const bool ready = !draining_;
  const Json body{{"status", ready ? "ready" : "draining"},
                  {"live", true},
                  {"ready", ready},
                  {"turns", turns()},
                  {"version", TORPOR_VERSION}};
  response.whole(ready ? 200 : 503, {{"content-type", "application/json"}}, to_text(body));
}

void Service::answer(const Route& route, HttpRequest& request, HttpResponse& response) {
  if (route.kind == Kind::kOpen && !request.refused) {
    require_get(request);
    if (is_dashboard_path(request.path)) return answer_dashboard(request, response);
    if (request.path.starts_with("/dashboard/"))
      throw Failure(Failure::Kind::kNotFound, "There is no " + request.path + " here.");
    if (request.path == "/health/live")
      return response.whole(200, {{"content-type", "application/json"}}, R"({"live":true})");
    return answer_health(response);
  }
  check_source(request);
  const KeyOwner owner = owner_of(request);
  request.tenant = owner.tenant;
  request.share = owner.tenant + ":" + owner.name;
  switch (request.refused) {
    case 0: break;
    case 413: throw Failure(Failure::Kind::kTooLarge, "The request's body is longer than this server takes.");
    case 408: throw Failure(Failure::Kind::kInvalid, "The request's body came too slowly.");
    default: {
      Failure full(Failure::Kind::kOverloaded, "The bodies of requests under way fill the server; try again later.");
      full.retry_after = 5;
      throw full;
    }
  }
  switch (route.kind) {
    case Kind::kMetrics:
      require_get(request);
      return response.whole(200, {{"content-type", "text/plain; version=0.0.4"}}, metrics_.text());
    case Kind::kAgents:
    case Kind::kDialect: break;
    default: throw Failure(Failure::Kind::kNotFound, "There is no " + request.path + " here.");
  }
  HttpHandler& handler = route.kind == Kind::kAgents ? agents_ : dialects_;
  if (route.turns == Route::Turns::kNone || request.method != "POST") return handler.handle(request, response);
  if (draining_) {
    Failure leaving(Failure::Kind::kUnavailable, "The server is about to stop.");
    leaving.retry_after = 5;
    throw leaving;
  }
  if (route.turns == Route::Turns::kOwn) return handler.handle(request, response);
  TurnPlace place(queue_, request.share, response);
  handler.handle(request, place);
}

void Service::handle(const HttpRequest& given, HttpResponse& plain) {
  const auto begin = std::chrono::steady_clock::now();
  const std::string id = "req-" + std::to_string(next_id_++);
  const Route& route = route_of(given);
  Watched response(plain, id);
  HttpRequest request = given;
  std::exception_ptr late;
  try {
    answer(route, request, response);
  } catch (...) {
    if (response.status) {
      late = std::current_exception();
    } else {
      answer_failure(request, current_failure(), response);
    }
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  const bool gone = response.gone();
  metrics_.request(route.name(), gone ? 499 : response.status, seconds);
  if (options_.log) {
    const Json line{{"time", timestamp()},
                    {"id", id},
                    {"peer", request.peer},
                    {"tenant", request.tenant},
                    {"method", request.method},
                    {"path", request.path},
                    {"status", response.status},
                    {"gone", gone},
                    {"ms", std::lround(seconds * 1000)},
                    {"in", request.body.size()},
                    {"out", response.bytes},
                    {"stream", response.streamed}};
    options_.log(to_text(line));
  }
  if (late) std::rethrow_exception(late);
}

}  // namespace torpor::server
