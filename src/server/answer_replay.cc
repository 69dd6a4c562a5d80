#include "server/answer_replay.h"

#include <algorithm>
#include <optional>

#include "base/hash.h"
#include "server/chat.h"

namespace torpor::server {
namespace {

constexpr std::chrono::hours kLifetime(1);  // clients repeat within minutes

/// Passes an answer on, and remembers it.
class Recorder : public HttpResponse {
 public:
  explicit Recorder(HttpResponse& response) : response_(response) {}

  void whole(int status, HttpHeaders headers, std::string body) override {
    status_ = status;
    headers_ = headers;
    body_ = body;
    complete_ = true;
    response_.whole(status, std::move(headers), std::move(body));
  }
  void begin(int status, HttpHeaders headers) override {
    status_ = status;
    headers_ = headers;
    streamed_ = true;
    response_.begin(status, std::move(headers));
  }
  bool write(std::string_view bytes) override {
    body_ += bytes;
    return response_.write(bytes);
  }
  void keep_alive(std::string bytes, std::chrono::milliseconds idle) override {
    response_.keep_alive(std::move(bytes), idle);
  }
  void end() override {
    complete_ = true;
    response_.end();
  }
  const std::atomic<bool>& gone() const override { return response_.gone(); }

  bool complete() const { return complete_ && status_ == 200; }
  bool streamed() const { return streamed_; }
  const HttpHeaders& headers() const { return headers_; }
  const std::string& body() const { return body_; }

 private:
  HttpResponse& response_;
  int status_ = 0;
  HttpHeaders headers_;
  std::string body_;
  bool streamed_ = false, complete_ = false;
};

}  // namespace

bool AnswerReplay::replay(const std::string& key, const std::string& digest, HttpResponse& response) {
  std::optional<Entry> found;
  {
    const MutexLock lock(mutex_);
    const auto now = std::chrono::steady_clock::now();
    while (!entries_.empty() && now - entries_.front().kept >= kLifetime) {
      bytes_ -= entries_.front().body.size();
      entries_.pop_front();
    }
    const auto entry = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& e) { return e.key == key; });
    if (entry == entries_.end()) return false;
    found = *entry;
  }
  if (found->body_digest != digest) {
    throw Failure(Failure::Kind::kInvalid, "This Idempotency-Key came with another body before; use a new one.");
  }
  if (found->streamed) {
    response.begin(200, found->headers);
    response.write(found->body);
    response.end();
  } else {
    response.whole(200, found->headers, found->body);
  }
  return true;
}

void AnswerReplay::keep(Entry entry) {
  const MutexLock lock(mutex_);
  bytes_ += entry.body.size();
  entries_.push_back(std::move(entry));
  while (bytes_ > most_bytes_) {
    bytes_ -= entries_.front().body.size();
    entries_.pop_front();
  }
}

void AnswerReplay::handle(const HttpRequest& request, HttpResponse& response, const Answer& answer) {
  const auto given = request.header("idempotency-key");
  if (!given || request.method != "POST") return answer(response);
  const std::string key = request.tenant + '\0' + request.path + '\0' + std::string(*given);
  const std::string digest = hash_hex(request.body);
  if (replay(key, digest, response)) return;
  Recorder recorder(response);
  answer(recorder);
  if (recorder.complete()) {
    keep({key, digest, recorder.headers(), recorder.body(), recorder.streamed(), std::chrono::steady_clock::now()});
  }
}

}  // namespace torpor::server
