#include "server/answer_replay.h"

#include <optional>
#include <utility>

#include "base/hash.h"
#include "server/chat.h"
#include "torpor/error.h"
#include "torpor/log.h"

namespace torpor::server {
namespace {

/// Passes an answer on, and has it kept before its end.
class Recorder : public HttpResponse {
 public:
  using Keep = std::function<void(bool streamed, const HttpHeaders& headers, const std::string& body)>;
  Recorder(HttpResponse& response, Keep keep) : response_(response), keep_(std::move(keep)) {}

  void whole(int status, HttpHeaders headers, std::string body) override {
    if (status == 200) keep_(false, headers, body);
    response_.whole(status, std::move(headers), std::move(body));
  }
  void begin(int status, HttpHeaders headers) override {
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
  void ending(bool whole) override { ending_ = whole; }
  void end() override {
    if (ending_) keep_(true, headers_, body_);
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
  HttpHeaders headers_;
  std::string body_;
  size_t passed_ = 0;  // bytes of it
  bool ending_ = false;
};

/// A kept answer is a line of JSON, and the body.
struct Kept {
  std::string digest;  ///< of the request's body
  bool streamed = false;
  HttpHeaders headers;
  std::string body;

  std::string text() const {
    return to_text(Json{{"digest", digest}, {"streamed", streamed}, {"headers", headers}}) + "\n" + body;
  }
  /// nullopt for what this version did not write.
  static std::optional<Kept> read(const std::string& text) {
    const size_t end = text.find('\n');
    if (end == std::string::npos) return std::nullopt;
    try {
      const Json json = Json::parse(text.substr(0, end));
      return Kept{json.at("digest"), json.at("streamed"), json.at("headers").get<HttpHeaders>(), text.substr(end + 1)};
    } catch (const Json::exception&) {
      return std::nullopt;
    }
  }
};

}  // namespace

void AnswerReplay::handle(const HttpRequest& request, HttpResponse& response, const Answer& answer) {
  const auto given = request.header("idempotency-key");
  if (!given || request.method != "POST") return answer(response);
  const std::string key = to_text(Json::array({request.tenant, request.path, *given}));
  const std::string digest = hash_hex(request.body);
  const auto text = shelf_.find(key);
  if (const auto kept = text ? Kept::read(*text) : std::nullopt) {
    if (kept->digest != digest) {
      throw Failure(Failure::Kind::kInvalid, "This Idempotency-Key came with another body before; use a new one.");
    }
    if (!kept->streamed) return response.whole(200, kept->headers, kept->body);
    response.begin(200, kept->headers);
    response.write(kept->body);
    return response.end();
  }
  Recorder recorder(response, [&](bool streamed, const HttpHeaders& headers, const std::string& body) {
    try {
      shelf_.put(key, Kept{digest, streamed, headers, body}.text());
    } catch (const Error& error) {
      log(LogLevel::kWarning, std::string("An answer is not kept for when it is asked for again: ") + error.what());
    }
  });
  answer(recorder);
}

}  // namespace torpor::server
