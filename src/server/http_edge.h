#pragma once
/// Sockets: HTTP/1.1 over TCP and a UNIX socket, for one HttpHandler. The only file that knows the C ABI of the Rust half
/// (rust/include/torpor_http_shim.h), where one thread reads and writes all connections.
///
/// A request is read whole, within the limits below, before the handler sees it. A worker thread then calls the handler; there are
/// as many workers as requests are being answered. A client that closes its connection, or one side of it, counts as gone. A
/// reader that is slow holds up its own writer only.

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

#include "server/http.h"

namespace torpor::server {

struct HttpEdgeOptions {
  std::string host = "127.0.0.1";   ///< address or name to listen on; empty: no TCP
  uint16_t port = 8080;             ///< 0: any that is free
  std::filesystem::path socket;     ///< of a UNIX socket, made with mode 0600; empty: none
  size_t max_body_bytes = size_t(64) << 20;     ///< of one request; a longer one is refused with 413
  size_t max_bodies_bytes = size_t(512) << 20;  ///< of all that are being answered; beyond it 503
  size_t max_head_bytes = size_t(64) << 10;     ///< request line and headers, at least 8 KiB; a longer head gets 431
  size_t max_connections = 1024;                ///< one more gets 503
  size_t max_workers = 256;                     ///< requests that are answered at a time; one more gets 503
  std::chrono::milliseconds head_timeout{30'000};   ///< from a head's first byte to its end
  std::chrono::milliseconds body_timeout{120'000};  ///< from a head's end to its body's; then 408
  std::chrono::milliseconds idle_timeout{90'000};   ///< of a connection without a request
  size_t stream_buffer_bytes = size_t(256) << 10;   ///< of one stream that may wait for its reader
  std::chrono::milliseconds stall_timeout{120'000}; ///< a reader that takes nothing for so long is cut off
};

/// Any thread may call, except the handler's for the destructor.
class HttpEdge {
 public:
  /// Listens, and serves until it is destroyed. `handler` must live longer. Throws kInvalidArgument when an address can't be
  /// bound or there is none.
  HttpEdge(HttpEdgeOptions options, HttpHandler& handler);
  /// Cuts all connections and waits for the handlers, whose clients are gone then. Does nothing in a forked process.
  ~HttpEdge();
  HttpEdge(const HttpEdge&) = delete;
  HttpEdge& operator=(const HttpEdge&) = delete;

  uint16_t port() const;        ///< that was bound; 0 without TCP
  size_t connections() const;   ///< that are open
  /// Closes listeners and idle connections, and waits for the answers under way. False: `timeout` has passed first.
  bool drain(std::chrono::milliseconds timeout);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace torpor::server
