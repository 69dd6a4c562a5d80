#include "server/answer_replay.h"

#include <optional>
#include <utility>

#include "base/hash.h"
#include "server/chat.h"
#include "torpor/error.h"
#include "torpor/log.h"

namespace torpor::server {
namespace {

/// Passes an answer on, has it kept before its end, and tells before the client hears that.
class Recorder : public HttpResponse {
 public:
  using Keep = std::function<void(int status, bool streamed, const HttpHeaders& headers, const std::string& body)>;
  Recorder(HttpResponse& response, Keep keep, std::function<void()> over)
      : response_(response), keep_(std::move(keep)), over_(std::move(over)) {}

  void whole(int status, HttpHeaders headers, std::string body) override {
    if (status / 100 == 2 && !partial_) keep_(status, false, headers, body);
    over_();
    response_.whole(status, std::move(headers), std::move(body));
  }
  void begin(int status, HttpHeaders headers) override {
    status_ = status;
    headers_ = headers;
    response_.begin(status, std::move(headers));
  }
  bool write(std::string_view bytes) override {
    body_ += bytes;
    return ending_ ? !gone() : pass();
  }
  void keep_alive(std::string bytes, std::chrono::milliseconds idle) override {
    response_.keep_alive(std::move(bytes), idle);
  }
  void ending(bool whole) override {
    ending_ = whole;
    partial_ = !whole;
  }
  void end() override {
    if (ending_) keep_(status_, true, headers_, body_);
    over_();
    pass();
    response_.end();
  }
  const std::atomic<bool>& gone() const override { return response_.gone(); }

 private:
  /// What is held back.
  bool pass() {
    const size_t from = std::exchange(passed_, body_.size());
    return from == body_.size() ? !gone() : response_.write(std::string_view(body_).substr(from));
  }

  HttpResponse& response_;
  const Keep keep_;
  const std::function<void()> over_;
  int status_ = 0;
  HttpHeaders headers_;
  std::string body_;
  size_t passed_ = 0;  // bytes of it
  bool ending_ = false, partial_ = false;
};

[[noreturn]] void refuse_other_body() {
  throw Failure(Failure::Kind::kInvalid, "This Idempotency-Key came with another body before; use a new one.");
}

/// A kept answer is a line of JSON, and the body.
struct Kept {
  std::string digest;  ///< of the request's body
  int status = 200;
  bool streamed = false;
  HttpHeaders headers;
  std::string body;

  std::string text() const {
    const Json head{{"digest", digest}, {"status", status}, {"streamed", streamed}, {"headers", headers}};
    return to_text(head) + "\n" + body;
  }
  /// nullopt for what this version did not write.
  static std::optional<Kept> read(const std::string& text) {
    const size_t end = text.find('\n');
    if (end == std::string::npos) return std::nullopt;
    try {
      const Json json = parse_json<Json>(text.substr(0, end));
      return Kept{json.at("digest"), json.value("status", 200), json.at("streamed"),
                  json.at("headers").get<HttpHeaders>(), text.substr(end + 1)};
    } catch (const Json::exception&) {
      return std::nullopt;
    }
  }
};

}  // namespace

/// A key, from its request to the answer's end, or to its destruction.
class AnswerReplay::Running {
 public:
  Running(AnswerReplay& replay, std::string key, const std::string& digest) : replay_(replay), key_(std::move(key)) {
    const MutexLock lock(replay_.mutex_);
    const auto [before, is_new] = replay_.running_.try_emplace(key_, digest);
    if (is_new) return;
    if (before->second != digest) refuse_other_body();
    Failure busy(Failure::Kind::kBusy,
                 "The first request with this Idempotency-Key is still being answered; send it again later.");
    busy.retry_after = 1;
    throw busy;
  }
  ~Running() { release(); }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;

  void release() {
    if (std::exchange(released_, true)) return;
    const MutexLock lock(replay_.mutex_);
    replay_.running_.erase(key_);
  }

 private:
  AnswerReplay& replay_;
  const std::string key_;
  bool released_ = false;
};

void AnswerReplay::handle(const HttpRequest& request, HttpResponse& response, const Answer& answer) {
  const auto given = request.header("idempotency-key");
  if (!given || request.method != "POST") return answer(response);
  const std::string key = to_text(Json::array({request.path, *given}));
  const std::string digest = hash_hex(request.body);
  Running running(*this, to_text(Json::array({request.tenant, key})), digest);
  const auto text = shelf_.find(request.tenant, key);
  if (const auto kept = text ? Kept::read(*text) : std::nullopt) {
    if (kept->digest != digest) refuse_other_body();
    running.release();
    if (!kept->streamed) return response.whole(kept->status, kept->headers, kept->body);
    response.begin(kept->status, kept->headers);
    response.write(kept->body);
    return response.end();
  }
  const auto keep = [&](int status, bool streamed, const HttpHeaders& headers, const std::string& body) {
    try {
      shelf_.put(request.tenant, key, Kept{digest, status, streamed, headers, body}.text());
    } catch (const Error& error) {
      log(LogLevel::kWarning, std::string("An answer is not kept for when it is asked for again: ") + error.what());
    }
  };
  Recorder recorder(response, keep, [&] { running.release(); });
  answer(recorder);
}

}  // namespace torpor::server
