/// Requests that a client repeats with the same Idempotency-Key.

#include "dialect_fixture.h"
#include "server/answer_replay.h"

namespace torpor::server {
namespace {

constexpr const char* kChat = "/v1/chat/completions";
constexpr const char* kBody = R"({"messages":[{"role":"user","content":"Hi"}]})";
constexpr const char* kStream = R"({"messages":[{"role":"user","content":"Hi"}],"stream":true})";

class Replay : public DialectTest {
 protected:
  RecordingResponse& repeat(const std::string& key, const std::string& body = kBody) {
    return ask("POST", kChat, body, {{"idempotency-key", key}});
  }
};

TEST_F(Replay, ARepeatedRequestGetsTheSameAnswerAndIsNotRunAgain) {
  for (const char* body : {kBody, kStream}) {
    runner.heard.clear();
    RecordingResponse& first = repeat(body, body);
    RecordingResponse& second = repeat(body, body);
    EXPECT_EQ(runner.heard.size(), 1u);
    EXPECT_EQ(second.body, first.body);
    EXPECT_EQ(second.headers, first.headers);
    EXPECT_EQ(second.streamed, first.streamed);
  }
}

TEST_F(Replay, AnotherKeyPathTenantOrNoneIsRun) {
  repeat("a");
  repeat("b");
  ask("POST", kChat, kBody);
  ask("POST", kChat, kBody);
  ask("POST", "/api/chat", kBody, {{"idempotency-key", "a"}});
  EXPECT_EQ(runner.heard.size(), 5u);
  HttpRequest request;
  request.method = "POST";
  request.path = kChat;
  request.body = kBody;
  request.headers = {{"idempotency-key", "a"}};
  request.tenant = "another";
  RecordingResponse response;
  dialects.handle(request, response);
  EXPECT_EQ(runner.heard.size(), 6u);
}

TEST_F(Replay, AKeyWithAnotherBodyIsRefused) {
  repeat("a");
  EXPECT_EQ(repeat("a", kStream).status, 400);
  EXPECT_EQ(runner.heard.size(), 1u);
}

TEST_F(Replay, WhatFailedIsRunAgain) {
  int n = 0;
  script([&](const ChatRequest&, Say& say) {
    if (++n % 2 == 0) return say.start().text("Hello.").finish();
    if (n > 2) say.start().text("Hel");
    throw Error(ErrorCode::kIo, "The disk is full.");
  });
  EXPECT_EQ(repeat("a").status, 500);
  EXPECT_EQ(repeat("a").status, 200);
  EXPECT_NE(repeat("b", kStream).body.find("The disk is full."), std::string::npos);
  EXPECT_NE(repeat("b", kStream).body.find("[DONE]"), std::string::npos);
}

TEST(AnswerReplay, TheOldestGoesFirst) {
  AnswerReplay replay(100);
  int asked = 0;
  const auto ask = [&](const std::string& key) {
    HttpRequest request;
    request.method = "POST";
    request.headers = {{"idempotency-key", key}};
    RecordingResponse response;
    replay.handle(request, response, [&](HttpResponse& given) {
      given.whole(200, {}, std::string(size_t(40 + ++asked), 'x'));
    });
    return response.body.size();
  };
  EXPECT_EQ(ask("a"), 41u);
  EXPECT_EQ(ask("b"), 42u);
  EXPECT_EQ(ask("a"), 41u);
  EXPECT_EQ(ask("c"), 43u);
  EXPECT_EQ(ask("b"), 42u);
  EXPECT_EQ(ask("a"), 44u);
}

}  // namespace
}  // namespace torpor::server
