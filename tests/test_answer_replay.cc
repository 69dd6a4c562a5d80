/// Requests that a client repeats with the same Idempotency-Key.

#include <limits>
#include <thread>

#include "base/hash.h"
#include "dialect_fixture.h"
#include "server/answer_replay.h"
#include "server/response_store.h"
#include "store/records.h"
#include "store_fixture.h"

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

struct Got {
  int status;
  std::string body;
};

TEST_F(Replay, AnAnswerIsKeptBeforeItsEndIsTold) {
  const torpor::testing::TemporaryDirectory directory{torpor::testing::TemporaryDirectory::in_memory()};
  Store store(directory.path());
  Dialects durable(runner, {&store, Durability::kRename});
  script([&](const ChatRequest&, Say& say) {
    say.start().text("Hel");
    EXPECT_TRUE(store.records().empty());
    say.text("lo.").finish();
  });
  /// Looks at the store whenever it is told something.
  struct Watching : RecordingResponse {
    explicit Watching(Store& store) : store(store) {}
    void whole(int status, HttpHeaders headers, std::string body) override {
      kept_before_last = !store.records().empty();
      RecordingResponse::whole(status, std::move(headers), std::move(body));
    }
    bool write(std::string_view bytes) override {
      kept_before_last = !store.records().empty();
      if (body.find("Hel") == std::string::npos && bytes.find("Hel") != std::string_view::npos) {
        EXPECT_FALSE(kept_before_last);  // the first of the text
      }
      return RecordingResponse::write(bytes);
    }
    Store& store;
    bool kept_before_last = false;
  };
  for (const char* path : {kChat, "/v1/completions", "/v1/messages", "/v1/responses", "/api/chat"}) {
    for (const bool stream : {false, true}) {
      HttpRequest request;
      request.method = "POST";
      request.path = path;
      Json body{{"model", "scripted"}, {"stream", stream}, {"max_tokens", 9}, {"store", false}};
      if (request.path == "/v1/responses") body["input"] = "Hi";
      else if (request.path == "/v1/completions") body["prompt"] = "Hi";
      else body["messages"] = Json::array({Json{{"role", "user"}, {"content", "Hi"}}});
      request.body = to_text(body);
      request.headers = {{"idempotency-key", "a"}};
      Watching response(store);
      durable.handle(request, response);
      EXPECT_EQ(response.status, 200) << path << response.body;
      EXPECT_TRUE(response.kept_before_last) << path << stream;
      EXPECT_EQ(response.streamed, stream);
      for (const Record& answer : store.records()) store.drop_record(answer);
    }
  }
}

TEST_F(Replay, ARestartLosesNoAnswer) {
  const torpor::testing::TemporaryDirectory directory{torpor::testing::TemporaryDirectory::in_memory()};
  Store store(directory.path());
  const AnswerFiles files{&store, Durability::kRename};
  std::string first[2], id;
  const auto ask_of = [&](Dialects& dialects, const std::string& path, const std::string& body, const std::string& tenant = {}) {
    HttpRequest request;
    request.method = "POST";
    request.path = path;
    request.body = body;
    request.tenant = tenant;
    if (path == kChat) request.headers = {{"idempotency-key", "a"}};
    RecordingResponse response;
    dialects.handle(request, response);
    return Got{response.status, response.body};
  };
  {
    Dialects dialects(runner, files);
    first[0] = ask_of(dialects, kChat, kBody).body;
    id = parse_json<Json>(ask_of(dialects, "/v1/responses", R"({"model":"scripted","input":"Hi"})", "acme").body)["id"];
  }
  EXPECT_EQ(runner.heard.size(), 2u);
  Dialects dialects(runner, files);
  EXPECT_EQ(ask_of(dialects, kChat, kBody).body, first[0]);
  EXPECT_EQ(runner.heard.size(), 2u);
  const std::string next = to_text(Json{{"model", "scripted"}, {"input", "And?"}, {"previous_response_id", id}});
  EXPECT_EQ(ask_of(dialects, "/v1/responses", next).status, 404);  // another tenant's
  EXPECT_EQ(ask_of(dialects, "/v1/responses", next, "acme").status, 200);
  EXPECT_EQ(runner.heard.back().messages.size(), 3u);
  // A damaged one is as none.
  for (const auto& file : std::filesystem::directory_iterator(directory.path() / "records")) {
    std::filesystem::resize_file(file.path(), std::filesystem::file_size(file.path()) - 1);
  }
  EXPECT_EQ(ask_of(dialects, "/v1/responses", next, "acme").status, 404);
  EXPECT_EQ(ask_of(dialects, kChat, kBody).status, 200);
  EXPECT_EQ(runner.heard.size(), 4u);
}

TEST_F(Replay, AResponseThatTheStoreHasNoRoomForIsToldAsNotStored) {
  const torpor::testing::TemporaryDirectory directory{torpor::testing::TemporaryDirectory::in_memory()};
  Store store(directory.path());
  store.set_disk_limits({.budget = 1});
  Dialects dialects(runner, {&store, Durability::kRename});
  for (const bool stream : {false, true}) {
    HttpRequest request;
    request.method = "POST";
    request.path = "/v1/responses";
    request.body = to_text(Json{{"model", "scripted"}, {"input", "Hi"}, {"stream", stream}});
    RecordingResponse response;
    dialects.handle(request, response);
    EXPECT_EQ(response.status, 200) << response.body;
    const std::string last = stream ? response.body.substr(response.body.rfind("response.completed")) : response.body;
    EXPECT_NE(last.find(R"("store":false)"), std::string::npos) << last;
  }
  EXPECT_TRUE(store.records().empty());
}

TEST_F(Replay, WhatAnotherVersionMayHaveKeptIsAsNone) {
  const torpor::testing::TemporaryDirectory directory{torpor::testing::TemporaryDirectory::in_memory()};
  Store store(directory.path());
  const AnswerFiles files{&store, Durability::kNone};
  const auto ask_of = [&](Dialects& dialects) {
    HttpRequest request;
    request.method = "POST";
    request.path = kChat;
    request.body = kBody;
    request.headers = {{"idempotency-key", "a"}};
    RecordingResponse response;
    dialects.handle(request, response);
    return Got{response.status, response.body};
  };
  {
    Dialects dialects(runner, files);
    ask_of(dialects);
  }
  ASSERT_EQ(store.records().size(), 1u);
  const Record record = store.records().front();
  const std::string kept = store.read_record(record);
  const size_t body = kept.find('\n', kept.find('\n') + 1) + 1;
  for (const std::string& other : {std::string(), kept.substr(0, 5), kept.substr(0, body - 1), kept.substr(0, body / 2) + "\n",
                                   kept.substr(0, kept.find('\n') + 1) + "{}\n", kept.substr(0, kept.find('\n') + 1) + "7\n{}",
                                   kept.substr(0, kept.find('\n') + 1) + R"({"digest":1,"streamed":[],"headers":[[]]})" + "\n",
                                   "another key" + kept.substr(kept.find('\n'))}) {
    store.keep_record(record, other, Durability::kNone);
    Dialects dialects(runner, files);
    const size_t asked = runner.heard.size();
    EXPECT_EQ(ask_of(dialects).status, 200) << other;
    EXPECT_EQ(runner.heard.size(), asked + 1) << other;
    for (const Record& one : store.records()) store.drop_record(one);
  }
}

TEST(AnswerShelf, TheOldestGoesFirstAlsoOfFilesAndEachKindHasItsOwn) {
  const torpor::testing::TemporaryDirectory directory{torpor::testing::TemporaryDirectory::in_memory()};
  Store store(directory.path());
  const AnswerFiles files{&store, Durability::kNone};
  const AnswerShelf::Limits limits{std::chrono::hours(1), 2, 1000};
  {
    AnswerShelf shelf("a", limits, files), other("b", limits, files);
    for (const char* key : {"1", "2", "3"}) shelf.put("acme", key, key);
    other.put("acme", "1", "other");
    shelf.put("acme", "2", "again");
    EXPECT_FALSE(shelf.find("acme", "1"));
    EXPECT_EQ(shelf.find("acme", "2"), "again");
    EXPECT_EQ(other.find("acme", "1"), "other");
  }
  EXPECT_EQ(store.records().size(), 3u);
  AnswerShelf shelf("a", {std::chrono::hours(1), 1, 1000}, files);
  EXPECT_FALSE(shelf.find("acme", "3"));
  EXPECT_EQ(shelf.find("acme", "2"), "again");
  EXPECT_TRUE(shelf.remove("acme", "2"));
  EXPECT_FALSE(shelf.remove("acme", "2"));
  EXPECT_EQ(store.records().size(), 1u);
  shelf.put("acme", "3", "three");
  // More than there is room for, and no reason to drop others.
  EXPECT_THROW(shelf.put("acme", "4", std::string(2000, 'x')), Error);
  EXPECT_FALSE(shelf.find("acme", "4"));
  EXPECT_EQ(shelf.find("acme", "3"), "three");
  EXPECT_EQ(AnswerShelf("b", {std::chrono::seconds(0), 9, 9999}, files).find("acme", "1"), "other");  // its own time
}

TEST(AnswerShelf, ATenantsLimitsAreItsOwnAlsoAfterARestart) {
  const torpor::testing::TemporaryDirectory directory{torpor::testing::TemporaryDirectory::in_memory()};
  Store store(directory.path());
  const AnswerFiles files{&store, Durability::kNone};
  const AnswerShelf::Limits limits{std::chrono::hours(1), 2, 120};
  for (const bool bytes : {false, true}) {
    AnswerShelf shelf("a", limits, files);
    shelf.put("acme", "first", "kept");
    for (const char* key : {"1", "2", "3", "4"}) shelf.put("other", key, bytes ? std::string(40, 'x') : key);
    EXPECT_EQ(shelf.find("acme", "first"), "kept");
    EXPECT_FALSE(shelf.find("other", "first"));
    EXPECT_EQ(shelf.find("other", "3").has_value(), !bytes);
    EXPECT_TRUE(shelf.find("other", "4"));
    AnswerShelf again("a", limits, files);
    EXPECT_EQ(again.find("acme", "first"), "kept");
    again.put("other", "5", "five");
    EXPECT_EQ(again.find("acme", "first"), "kept");
    EXPECT_EQ(again.find("other", "4").has_value(), !bytes);
    EXPECT_FALSE(again.find("other", "3"));
  }
}

TEST(AnswerShelf, ATextThatFillsWhatATenantMayHavePushesNothingOut) {
  AnswerShelf shelf("a", {std::chrono::hours(1), 9, 120}, {});
  const size_t head = std::string("[\"acme\",\"1\"]\n").size() + size_t(Records::kHeader);
  shelf.put("acme", "0", "kept");
  EXPECT_THROW(shelf.put("acme", "1", std::string(120 - head + 1, 'x')), Error);
  EXPECT_EQ(shelf.find("acme", "0"), "kept");
  shelf.put("acme", "1", std::string(120 - head, 'x'));
  EXPECT_TRUE(shelf.find("acme", "1"));
}

TEST(AnswerShelf, WhenAllTogetherHaveTooMuchTheOldestOfTheTenantGoesThatHasMost) {
  AnswerShelf shelf("a", {std::chrono::hours(1), 2, 1000}, {});
  for (const char* key : {"1", "2"}) shelf.put("many", key, key);
  const int others = 2 * int(AnswerShelf::kMostTenants) - 1;
  for (int i = 0; i < others; ++i) shelf.put("few" + std::to_string(i), "1", "one");
  EXPECT_FALSE(shelf.find("many", "1"));
  EXPECT_EQ(shelf.find("many", "2"), "2");
  for (int i = 0; i < others; ++i) EXPECT_TRUE(shelf.find("few" + std::to_string(i), "1")) << i;
}

TEST(AnswerShelf, AnAnswerUnderTheNameThatItHadBeforeIsFoundReplacedAndRemoved) {
  const torpor::testing::TemporaryDirectory directory{torpor::testing::TemporaryDirectory::in_memory()};
  Store store(directory.path());
  const std::string head = "[\"acme\",\"1\"]\n", whole = head + "old";
  const Record record{"a-" + hash_hex(head), std::numeric_limits<int32_t>::max()};
  for (const bool replaced : {false, true}) {
    store.keep_record(record, whole, Durability::kNone);
    AnswerShelf shelf("a", {std::chrono::hours(1), 2, 1000}, {&store, Durability::kNone});
    EXPECT_EQ(shelf.find("acme", "1"), "old");
    EXPECT_FALSE(shelf.find("other", "1"));
    if (replaced) shelf.put("acme", "1", "new");
    EXPECT_EQ(store.records().size(), 1u);
    EXPECT_EQ(shelf.find("acme", "1"), replaced ? "new" : "old");
    EXPECT_TRUE(shelf.remove("acme", "1"));
    EXPECT_TRUE(store.records().empty());
    EXPECT_FALSE(shelf.find("acme", "1"));
  }
}

TEST_F(Replay, AKeyIsNotRunTwiceAtATimeAndIsFreeOnceItsEndIsTold) {
  std::atomic<bool> running{false}, go_on{false};
  script([&](const ChatRequest&, Say& say) {
    say.start().text("Hel");
    running = true;
    while (!go_on) std::this_thread::yield();
    say.text("lo.").finish();
  });
  /// Asks again from within the call that ends the first answer.
  struct Asking : RecordingResponse {
    void whole(int status, HttpHeaders headers, std::string body) override {
      RecordingResponse::whole(status, std::move(headers), std::move(body));
      then();
    }
    std::function<void()> then;
  };
  Asking first;
  std::string again;
  first.then = [&] { again = repeat("a").body; };
  HttpRequest request;
  request.method = "POST";
  request.path = kChat;
  request.body = kBody;
  request.headers = {{"idempotency-key", "a"}};
  request.tenant = "tenant";
  std::thread thread([&] { dialects.handle(request, first); });
  while (!running) std::this_thread::yield();
  RecordingResponse& busy = repeat("a");
  EXPECT_EQ(busy.status, 409);
  EXPECT_EQ(busy.header("retry-after"), "1");
  EXPECT_EQ(busy.header("x-should-retry"), "");
  EXPECT_EQ(repeat("a", kStream).status, 400);
  go_on = true;
  thread.join();
  EXPECT_EQ(runner.heard.size(), 1u);
  EXPECT_EQ(first.status, 200);
  EXPECT_EQ(again, first.body);
}

TEST(AnswerReplay, TheOldestGoesFirst) {
  // Each is an empty body's digest, a key, a record's head and some 45 bytes.
  AnswerReplay replay({}, {std::chrono::hours(1), 100, 450});
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
