#pragma once
/// Requests to the dialects, and their answers taken apart.

#include <gtest/gtest.h>

#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "recording_response.h"
#include "scripted_runner.h"
#include "server/dialects.h"
#include "torpor/error.h"

namespace torpor::server {

struct Event {
  std::string name;  // of its "event:" line; empty without one
  std::string data;
  Json json() const { return parse_json<Json>(data); }
};

/// The events of a stream's bytes.
inline std::vector<Event> events(const std::string& stream) {
  std::vector<Event> events;
  Event event;
  std::istringstream lines(stream);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("event: ")) event.name = line.substr(7);
    if (line.starts_with("data: ")) event.data = line.substr(6);
    if (line.empty() && !event.data.empty()) events.push_back(std::exchange(event, {}));
  }
  EXPECT_TRUE(event.data.empty()) << "the stream ends inside an event";
  return events;
}

class DialectTest : public ::testing::Test {
 protected:
  void script(ScriptedRunner::Script said) { said_ = std::move(said); }

  /// The answer to a request; `body` is JSON text, or empty.
  RecordingResponse& ask(const std::string& method, const std::string& path, const std::string& body = {},
                         HttpHeaders headers = {}) {
    HttpRequest request;
    request.method = method;
    request.path = path;
    request.body = body;
    request.headers = std::move(headers);
    request.tenant = "tenant";
    responses_.push_back(std::make_unique<RecordingResponse>());
    dialects.handle(request, *responses_.back());
    EXPECT_TRUE(responses_.back()->ended);
    return *responses_.back();
  }
  Json ask_json(const std::string& path, const Json& body, int status = 200, HttpHeaders headers = {}) {
    RecordingResponse& response = ask("POST", path, dump_json(body), std::move(headers));
    EXPECT_EQ(response.status, status) << response.body;
    EXPECT_EQ(response.header("content-type"), "application/json");
    return parse_json<Json>(response.body);
  }
  std::vector<Event> ask_stream(const std::string& path, Json body, HttpHeaders headers = {}) {
    body["stream"] = true;
    RecordingResponse& response = ask("POST", path, dump_json(body), std::move(headers));
    EXPECT_EQ(response.status, 200) << response.body;
    EXPECT_TRUE(response.streamed);
    return events(response.body);
  }

  /// What the runner was asked last.
  const ChatRequest& heard() const { return runner.heard.back(); }

  ScriptedRunner runner{[this](const ChatRequest& request, Say& say) {
    if (said_) said_(request, say);
    else say.start().text("Hel").text("lo.").finish();
  }};
  Dialects dialects{runner};

 private:
  ScriptedRunner::Script said_;
  std::vector<std::unique_ptr<RecordingResponse>> responses_;
};

inline Json user(const Json& content) { return Json::array({{{"role", "user"}, {"content", content}}}); }

}  // namespace torpor::server
