#pragma once
/// An HttpResponse that keeps what a handler says, and a client that can be told to go.

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "server/http.h"

namespace torpor::server {

class RecordingResponse : public HttpResponse {
 public:
  void whole(int status, HttpHeaders headers, std::string body) override {
    if (this->status) throw std::logic_error("an answer has begun already");
    this->status = status;
    this->headers = std::move(headers);
    this->body = std::move(body);
    ended = true;
  }
  void begin(int status, HttpHeaders headers) override {
    if (this->status) throw std::logic_error("an answer has begun already");
    this->status = status;
    this->headers = std::move(headers);
    streamed = true;
  }
  bool write(std::string_view bytes) override {
    if (!streamed || ended) throw std::logic_error("no stream is open");
    if (leaves_after >= 0 && static_cast<int>(writes.size()) >= leaves_after) left = true;
    if (left) return false;
    writes.emplace_back(bytes);
    body += bytes;
    return true;
  }
  void keep_alive(std::string bytes, std::chrono::milliseconds) override {
    if (!streamed || ended) throw std::logic_error("no stream is open");
    ping = std::move(bytes);
  }
  void end() override {
    if (!streamed || ended) throw std::logic_error("no stream is open");
    ended = true;
  }
  const std::atomic<bool>& gone() const override { return left; }

  std::string header(std::string_view name) const {
    for (const auto& [key, value] : headers) {
      if (key == name) return value;
    }
    return {};
  }

  int status = 0;
  HttpHeaders headers;
  std::string body;                 ///< of a stream: all writes in one
  std::vector<std::string> writes;
  std::string ping;                 ///< what keep_alive was given last
  bool streamed = false, ended = false;
  int leaves_after = -1;            ///< the client goes at the write after this many; -1: never
  std::atomic<bool> left{false};    ///< set it to make the client go
};

}  // namespace torpor::server
