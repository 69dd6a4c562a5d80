#pragma once
/// HTTP as the server sees it: plain data and two abstract classes, without sockets or threads.
///
/// The edge (server/http_edge.h) parses a request, hands it to an HttpHandler on a worker thread, and sends what the handler
/// says to its HttpResponse. Each request that is being answered has one worker thread. Tests call a handler directly, with a
/// response that records (tests/recording_response.h).

#include <atomic>
#include <chrono>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace torpor::server {

/// In the order they are sent. Names are lower case.
using HttpHeaders = std::vector<std::pair<std::string, std::string>>;

struct HttpRequest {
  std::string method;   ///< as sent: "GET", "POST"
  std::string path;     ///< as sent, percent-encoding kept; begins with '/'
  std::string query;    ///< what follows '?', as sent; empty without one
  HttpHeaders headers;
  std::string body;     ///< whole; the edge bounds its size
  std::string peer;     ///< "127.0.0.1:40312", "[::1]:40312"; "unix" from a UNIX socket
  /// The status that the edge refuses the request with: 413 (body too large), 408 (too slow), 503 (too many at once). The body is
  /// empty then, and the handler words the answer. 0: none.
  int refused = 0;
  std::string tenant;   ///< whose key it came with, as the Service found (server/service.h); empty: nobody has looked yet
  std::string share;    ///< TurnRequest::share: one for each key

  /// The first header of that name (lower case); nullopt without one.
  std::optional<std::string_view> header(std::string_view name) const;
  /// Whether the client can wait: a header `x-torpor-background` that is not empty, "0" or "false".
  bool background() const;
  /// TurnRequest::id: the Idempotency-Key of a POST, or a digest of one that is longer than an id may be; empty: none.
  std::string turn_id() const;
  /// The decoded value of a query parameter; nullopt without one.
  std::optional<std::string> parameter(std::string_view name) const;
  /// The path's parts between slashes, decoded: "/v1/models/a%2Fb" is {"v1", "models", "a/b"}. A slash at the end adds none.
  std::vector<std::string> path_parts() const;
};

/// The answer to one request: either `whole` once, or `begin`, any number of `write`, and `end`.
///
/// Calls out of that order are a defect of the caller's and throw kInternal. Any thread may call, one at a time. A client that
/// goes away is no error: what is said to it is dropped. A handler that returns without an answer, or throws before one,
/// makes the edge answer 500. One that returns or throws after `begin` and before `end` makes it cut the connection, so that
/// no client takes the part for the whole.
class HttpResponse {
 public:
  virtual ~HttpResponse() = default;

  /// Status, headers and body at once. The edge adds content-length and date.
  virtual void whole(int status, HttpHeaders headers, std::string body) = 0;
  /// Begins a stream. The edge adds `x-accel-buffering: no` and `cache-control: no-cache`, and never compresses.
  virtual void begin(int status, HttpHeaders headers) = 0;
  /// Sends bytes of a stream. Waits while the reader is slow, up to the edge's limit. False: the client has gone.
  virtual bool write(std::string_view bytes) = 0;
  /// From now to `end` the edge sends `bytes` whenever it has sent nothing for `idle`: always between two writes, never within
  /// one. A later call replaces them. Only after `begin`.
  virtual void keep_alive(std::string bytes, std::chrono::milliseconds idle) = 0;
  /// Of a stream: with `whole`, what is written from now to `end` completes the answer. Who keeps answers does so before
  /// that is sent. Without, it has failed after all. Of another answer, without: it is not one to be kept.
  virtual void ending(bool /*whole*/) {}
  /// Ends a stream. Does not wait for the reader.
  virtual void end() = 0;
  /// Becomes true when the client has gone, whatever the answer's shape, also before anything was said. Stays valid as long as
  /// the response.
  virtual const std::atomic<bool>& gone() const = 0;
};

/// Answers requests. Several threads call `handle` at a time.
class HttpHandler {
 public:
  virtual ~HttpHandler() = default;
  /// Returns when the answer is complete. `response` must not be used afterwards.
  virtual void handle(const HttpRequest& request, HttpResponse& response) = 0;
};

}  // namespace torpor::server
