// The server without its sockets: who may ask, what is asked, what is counted and logged.
#include <gtest/gtest.h>

#include <sys/stat.h>

#include <condition_variable>
#include <filesystem>
#include <fstream>
#include <list>
#include <mutex>
#include <thread>
#include <utility>

#include "recording_response.h"
#include "scripted_runner.h"
#include "server/dialects.h"
#include "server/service.h"
#include "torpor/error.h"

namespace torpor::server {
namespace {

namespace fs = std::filesystem;

constexpr const char* kKey = "sk-torpor-test";
// printf sk-torpor-test | sha256sum, of coreutils
constexpr const char* kHash = "f434f6380dd9ea405fd72dcffbc848369b774f7250a19d2b966022a2a8c17551";

/// Of paths whose handlers compute.
constexpr const char* kOtherSpellings[] = {"/v1/chat/completions/", "/v1/chat/%63ompletions",
                                           "/torpor/v1/%61gents/ada/turn", "/torpor/v1/agents/ada/turn/",
                                           "/torpor/v1/%61gents"};

fs::path fresh_directory() {
  std::string name = (fs::temp_directory_path() / "torpor-service-XXXXXX").string();
  return mkdtemp(name.data());
}

fs::path written(const std::string& text) {
  const fs::path path = fresh_directory() / "keys";
  std::ofstream(path) << text;
  return path;
}

struct Agents : HttpHandler {
  void handle(const HttpRequest& request, HttpResponse& response) override { response.whole(200, {}, request.tenant); }
};

struct Server {
  explicit Server(ServiceOptions options = {}, ScriptedRunner::Script script = nullptr, int places = 64)
      : runner(std::move(script)),
        metered(runner, metrics),
        dialects(metered),
        queue(places),
        service(with_log(options), queue, dialects, agents, metrics) {
    service.set_keys(ApiKeys::read(written(std::string("acme:first:") + kHash + "\n")));
  }
  ServiceOptions with_log(ServiceOptions options) {
    options.log = [this](const std::string& line) {
      const std::lock_guard lock(log_mutex);
      log.push_back(parse_json<Json>(line));
    };
    return options;
  }
  /// An answer to a request with a key, unless other headers are given.
  RecordingResponse& ask(HttpRequest request) {
    if (request.peer.empty()) request.peer = "127.0.0.1:1";
    responses.emplace_back();
    service.handle(request, responses.back());
    return responses.back();
  }
  static HttpRequest get(const std::string& path,
                         HttpHeaders headers = {{"host", "localhost:8080"}, {"x-api-key", kKey}}) {
    HttpRequest request;
    request.method = "GET";
    request.path = path;
    request.headers = std::move(headers);
    return request;
  }
  static HttpRequest chat(const std::string& text = "Hi.", const std::string& path = "/v1/chat/completions") {
    HttpRequest request = get(path);
    request.method = "POST";
    request.body = to_text(Json{{"model", "scripted"}, {"messages", {{{"role", "user"}, {"content", text}}}}});
    return request;
  }

  Metrics metrics;
  ScriptedRunner runner;
  MeteredRunner metered;
  Dialects dialects;
  Agents agents;
  std::mutex log_mutex;
  std::vector<Json> log;
  TurnQueue queue;
  Service service;
  std::list<RecordingResponse> responses;
};

TEST(Service, AnswersHealthToAnybody) {
  Server server;
  const auto& response = server.ask(Server::get("/health", {}));
  EXPECT_EQ(response.status, 200);
  EXPECT_EQ(parse_json<Json>(response.body)["ready"], true);
  server.service.drain();
  EXPECT_EQ(server.ask(Server::get("/health", {})).status, 503);
  EXPECT_EQ(server.ask(Server::get("/health/live", {})).status, 200);
}

TEST(Service, LetsNobodyInWithoutAKey) {
  Server server;
  const HttpHeaders host{{"host", "localhost"}};
  for (const char* path : {"/v1/models", "/v1/messages", "/metrics", "/torpor/v1/agents", "/nothing"}) {
    const auto& none = server.ask(Server::get(path, host));
    auto wrong_headers = host;
    wrong_headers.emplace_back("authorization", "Bearer sk-torpor-tesu");
    const auto& wrong = server.ask(Server::get(path, wrong_headers));
    EXPECT_EQ(none.status, 401) << path;
    EXPECT_EQ(wrong.status, 401) << path;
    EXPECT_EQ(none.body, wrong.body) << path;
  }
  EXPECT_EQ(parse_json<Json>(server.ask(Server::get("/v1/messages", host)).body)["error"]["type"],
            "authentication_error");
}

TEST(Service, TakesAKeyInEitherHeader) {
  Server server;
  EXPECT_EQ(server.ask(Server::get("/v1/models")).status, 200);
  EXPECT_EQ(server
                .ask(Server::get("/v1/models",
                                 {{"host", "127.0.0.1:8080"}, {"authorization", std::string("bearer ") + kKey}}))
                .status,
            200);
}

TEST(Service, TellsTheHandlersWhoseKeyItWas) {
  Server server;
  EXPECT_EQ(server.ask(Server::get("/torpor/v1/agents")).body, "acme");
  server.ask(Server::chat());
  EXPECT_EQ(server.runner.heard.at(0).tenant, "acme");
  ServiceOptions open;
  open.authenticate = false;
  EXPECT_EQ(Server(open).ask(Server::get("/torpor/v1/agents", {{"host", "localhost"}})).body, "local");
}

TEST(Service, TellsTheRunnerWhichKeyItWasAndWhetherTheClientCanWait) {
  Server server;
  const auto heard = [&](const std::string& header, const std::string& tier) -> const ChatRequest& {
    HttpRequest request = Server::chat();
    if (!header.empty()) request.headers.emplace_back("x-torpor-background", header);
    Json body = parse_json<Json>(request.body);
    if (!tier.empty()) body["service_tier"] = tier;
    request.body = to_text(body);
    EXPECT_EQ(server.ask(request).status, 200);
    return server.runner.heard.back();
  };
  EXPECT_EQ(heard("", "").share, "acme:first");
  for (const char* no : {"", "0", "false"}) EXPECT_FALSE(heard(no, "auto").background) << no;
  for (const char* yes : {"1", "title_generation"}) EXPECT_TRUE(heard(yes, "").background) << yes;
  EXPECT_TRUE(heard("", "flex").background);
}

TEST(Service, AKeyThatWasRemovedOpensNothing) {
  Server server;
  EXPECT_EQ(server.ask(Server::get("/v1/models")).status, 200);
  server.service.set_keys(ApiKeys::read(written("acme:second:" + std::string(64, '0') + "\n")));
  EXPECT_EQ(server.ask(Server::get("/v1/models")).status, 401);
}

TEST(Service, RefusesNamesThatAStrangersPageCouldHaveMade) {
  Server server;
  server.service.set_hosts({"box.example"});
  const auto status = [&](HttpHeaders headers, const std::string& peer = "127.0.0.1:1") {
    headers.emplace_back("x-api-key", kKey);
    HttpRequest request = Server::get("/v1/models", headers);
    request.peer = peer;
    return server.ask(request).status;
  };
  for (const char* host :
       {"localhost", "LOCALHOST:1", "a.localhost", "127.0.0.1:8080", "[::1]:8080", "192.168.0.7", "box.example:8080"}) {
    EXPECT_EQ(status({{"host", host}}), 200) << host;
  }
  for (const char* host : {"evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::1"}) {
    EXPECT_EQ(status({{"host", host}}), 403) << host;
  }
  EXPECT_EQ(status({}), 403);
  EXPECT_EQ(status({{"host", "localhost"}, {"host", "evil.example"}}), 400);
  EXPECT_EQ(status({{"host", "anything"}}, "unix"), 200);
}

TEST(Service, RefusesPagesOfOtherOrigins) {
  Server server;
  const auto status = [&](const char* origin) {
    return server.ask(Server::get("/v1/models", {{"host", "localhost:8080"}, {"x-api-key", kKey}, {"origin", origin}}))
        .status;
  };
  EXPECT_EQ(status("http://localhost:8080"), 200);
  for (const char* origin :
       {"http://localhost:3000", "https://evil.example", "null", "http://localhost:8080.evil.example", ""}) {
    EXPECT_EQ(status(origin), 403) << origin;
  }
}

TEST(Service, RefusesWhatTheEdgeRefusesInTheDialectsForm) {
  Server server;
  HttpRequest request = Server::get("/v1/messages");
  request.method = "POST";
  request.refused = 413;
  const auto& response = server.ask(request);
  EXPECT_EQ(response.status, 413);
  EXPECT_EQ(parse_json<Json>(response.body)["error"]["type"], "request_too_large");
  request.refused = 503;
  EXPECT_EQ(server.ask(request).status, 529);
  EXPECT_NE(server.responses.back().header("retry-after"), "");
}

TEST(Service, ATurnTooManyIsToldWhenToComeAgain) {
  std::mutex mutex;
  std::condition_variable changed;
  bool begun = false, over = false;
  Server server({}, [&](const ChatRequest&, Say& say) {
    std::unique_lock lock(mutex);
    if (!std::exchange(begun, true)) {
      changed.notify_all();
      changed.wait(lock, [&] { return over; });
    }
    say.start().text("done").finish();
  }, 1);
  RecordingResponse first;
  std::thread worker([&] {
    HttpRequest request = Server::chat();
    request.peer = "127.0.0.1:1";
    server.service.handle(request, first);
  });
  {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return begun; });
  }
  EXPECT_EQ(server.service.turns(), 1);
  const auto& second = server.ask(Server::chat());
  EXPECT_EQ(second.status, 429);
  EXPECT_EQ(second.header("retry-after"), "5");
  for (const char* path : kOtherSpellings) EXPECT_EQ(server.ask(Server::chat("Hi.", path)).status, 429) << path;
  EXPECT_EQ(server.ask(Server::get("/v1/models")).status, 200);  // what computes nothing is answered
  {
    const std::lock_guard lock(mutex);
    over = true;
  }
  changed.notify_all();
  worker.join();
  EXPECT_EQ(first.status, 200);
  EXPECT_EQ(server.service.turns(), 0);
}

TEST(Service, AKeyThatHoldsManyPlacesLeavesSomeToOthers) {
  // printf sk-other1 | sha256sum, and sk-other2
  const std::string first = std::string("acme:first:") + kHash + "\n";
  const std::string others = "acme:second:42f7408b88d94709b6be94a3e55eeaa886e7040f2d6721cd3a9a164f03cb74ee\n"
                             "other:first:1ec8307de3759babed9951718b71c8678e8eed6a85bdfcc623e3ba47f20755af\n";
  std::mutex mutex;
  std::condition_variable changed;
  int begun = 0;
  bool over = false;
  Server server({}, [&](const ChatRequest&, Say& say) {
    std::unique_lock lock(mutex);
    ++begun;
    changed.notify_all();
    changed.wait(lock, [&] { return over; });
    say.start().text("done").finish();
  }, 8);
  std::list<RecordingResponse> answers;
  std::vector<std::thread> threads;
  /// Whether a turn with this key gets a place, which it keeps.
  const auto gets_place = [&](const std::string& key) {
    HttpRequest request = Server::chat();
    request.headers = {{"host", "localhost"}, {"x-api-key", key}};
    request.peer = "127.0.0.1:1";
    RecordingResponse& answer = answers.emplace_back();
    std::unique_lock lock(mutex);
    const int before = begun;
    const auto answered = std::make_shared<bool>(false);
    threads.emplace_back([&, request, answered] {
      server.service.handle(request, answer);
      const std::lock_guard lock(mutex);
      *answered = true;
      changed.notify_all();
    });
    changed.wait(lock, [&] { return *answered || begun > before; });
    if (begun > before) return true;
    EXPECT_EQ(answer.status, 429);
    return false;
  };
  const auto places = [&](const std::string& key) {
    int n = 0;
    while (gets_place(key)) ++n;
    return n;
  };
  server.service.set_keys(ApiKeys::read(written(first + others)));
  EXPECT_EQ(places(kKey), 4);         // half
  EXPECT_EQ(places("sk-other1"), 2);  // of the rest, another key of the tenant
  EXPECT_EQ(places("sk-other2"), 1);
  server.service.set_keys(ApiKeys::read(written(first)));
  EXPECT_EQ(places(kKey), 1);  // the only one has all
  EXPECT_EQ(server.service.turns(), 8);
  {
    const std::lock_guard lock(mutex);
    over = true;
  }
  changed.notify_all();
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(server.service.turns(), 0);
}

TEST(Service, AClientThatHasHeardTheEndFindsItsPlaceFree) {
  Server server({}, [](const ChatRequest&, Say& say) { say.start().text("done").finish(); }, 1);
  /// Asks again in the moment in which it hears the end.
  struct Again : RecordingResponse {
    explicit Again(Server& server) : server(server) {}
    void whole(int status, HttpHeaders headers, std::string body) override {
      RecordingResponse::whole(status, std::move(headers), std::move(body));
      again = server.ask(Server::chat()).status;
    }
    void end() override {
      RecordingResponse::end();
      again = server.ask(Server::chat()).status;
    }
    Server& server;
    int again = 0;
  };
  for (const bool stream : {false, true}) {
    HttpRequest request = Server::chat();
    request.peer = "127.0.0.1:1";
    if (stream) request.body.insert(request.body.find('{') + 1, "\"stream\": true, ");
    Again answer(server);
    server.service.handle(request, answer);
    EXPECT_EQ(answer.status, 200);
    EXPECT_EQ(answer.again, 200) << (stream ? "streamed" : "whole");
  }
  EXPECT_EQ(server.service.turns(), 0);
}

TEST(Service, TakesNoTurnWhileItDrains) {
  Server server;
  server.service.drain();
  EXPECT_EQ(server.ask(Server::chat()).status, 503);
  for (const char* path : kOtherSpellings) EXPECT_EQ(server.ask(Server::chat("Hi.", path)).status, 503) << path;
  EXPECT_EQ(server.ask(Server::get("/v1/models")).status, 200);
}

TEST(Service, LogsEachRequestWithoutItsText) {
  Server server;
  const auto& response = server.ask(Server::chat("the secret word"));
  ASSERT_EQ(server.log.size(), 1u);
  const Json& line = server.log[0];
  EXPECT_EQ(line["status"], 200);
  EXPECT_EQ(line["tenant"], "acme");
  EXPECT_EQ(line["path"], "/v1/chat/completions");
  EXPECT_EQ(line["id"], response.header("x-request-id"));
  EXPECT_EQ(to_text(line).find("secret"), std::string::npos);
  EXPECT_EQ(to_text(line).find(kKey), std::string::npos);
}

TEST(Service, CountsRequestsAndTokensForPrometheus) {
  Server server;
  server.ask(Server::chat());
  server.ask(Server::get("/v1/responses/resp_secret"));
  server.ask(Server::get("/somewhere/else"));
  const std::string text = server.ask(Server::get("/metrics")).body;
  for (const char* sample : {"torpor_requests_total{route=\"/v1/chat/completions\",status=\"200\"} 1\n",
                             "torpor_requests_total{route=\"unknown\",status=\"404\"} 1\n",
                             "torpor_prompt_tokens_total 10\n", "torpor_prompt_tokens_cached_total 4\n",
                             "torpor_generation_tokens_total 7\n", "torpor_time_to_first_token_seconds_count 1\n",
                             "torpor_turns_total{reason=\"stop\"} 1\n", "torpor_turns_running 0\n"}) {
    EXPECT_NE(text.find(sample), std::string::npos) << sample << text;
  }
  EXPECT_EQ(text.find("secret"), std::string::npos);
  EXPECT_EQ(text.find("vllm:"), std::string::npos);
  EXPECT_NE(Metrics(true).text().find("vllm:num_requests_running 0\n"), std::string::npos);
}

TEST(Metrics, AHistogramsBucketsAddUp) {
  Metrics metrics;
  for (const double seconds : {0.001, 0.2, 1e6}) metrics.first_token(seconds);
  const std::string text = metrics.text();
  for (const char* sample : {"_bucket{le=\"0.005\"} 1\n", "_bucket{le=\"0.1\"} 1\n", "_bucket{le=\"0.25\"} 2\n",
                             "_bucket{le=\"300\"} 2\n", "_bucket{le=\"+Inf\"} 3\n"}) {
    EXPECT_NE(text.find(std::string("torpor_time_to_first_token_seconds") + sample), std::string::npos) << sample;
  }
}

TEST(TurnLog, KeepsTheLastTurnsTheNewestFirstAndTenantsApart) {
  TurnLog log;
  {
    TurnLog::Turn running(log, "acme", "ada");
    running.starts(10, 4);
    running.reads(3, 6);
    ASSERT_EQ(log.running("acme").size(), 1u);
    EXPECT_EQ(log.running("acme")[0].state, TurnRecord::State::kReading);
    EXPECT_EQ(log.running("acme")[0].done, 3);
    EXPECT_TRUE(log.running("other").empty());
    EXPECT_EQ(log.running(), 1u);
    for (size_t i = 0; i < TurnLog::kKept + 10; ++i) TurnLog::Turn(log, "other", "bea").end("stop", int(i));
    EXPECT_EQ(log.ended("other").size(), TurnLog::kKept);
    EXPECT_EQ(log.ended("other")[0].generated_tokens, int(TurnLog::kKept + 9));
  }  // a turn that nobody ends has failed
  EXPECT_EQ(log.running(), 0u);
  ASSERT_EQ(log.ended("acme").size(), 1u);
  EXPECT_EQ(log.ended("acme")[0].reason, "error");
  EXPECT_EQ(log.ended("other").size(), TurnLog::kKept - 1);
}

TEST(TurnLog, IsReadWhileTurnsComeAndGo) {
  TurnLog log;
  std::vector<std::thread> turns;
  for (int i = 0; i < 4; ++i) {
    turns.emplace_back([&] {
      for (int n = 0; n < 50; ++n) {
        TurnLog::Turn turn(log, "acme", "ada");
        turn.reads(1, 2);
        turn.answers();
        turn.end("stop", n);
      }
    });
  }
  while (log.ended("acme").size() < 200) EXPECT_LE(log.running("acme").size(), 4u);
  for (std::thread& thread : turns) thread.join();
  EXPECT_EQ(log.running(), 0u);
}

TEST(ApiKeys, ALineThatIsNoKeyIsNamed) {
  const auto expect_refused = [](const std::string& text, const std::string& part) {
    try {
      ApiKeys::read(written(text));
      ADD_FAILURE() << text;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::kInvalidArgument);
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
  };
  const std::string good = std::string("a:b:") + kHash + "\n";
  expect_refused(good + "a:b:12\n", "line 2");
  expect_refused("a.b:c:" + std::string(kHash), "line 1");  // a tenant has no '.'
  expect_refused(":c:" + std::string(kHash), "line 1");
  expect_refused(std::string(kHash), "line 1");
  expect_refused("# nothing\n\n", "holds no key");
  EXPECT_EQ(ApiKeys::read(written("# a comment\r\n\n" + good)).owner_of(kKey)->tenant, "a");
  EXPECT_THROW(ApiKeys::read(fresh_directory() / "absent"), Error);
}

TEST(ApiKeys, TheFirstStartMakesAKeyForItsOwnerAlone) {
  const fs::path file = fresh_directory() / "config" / "torpor" / "api-keys";
  const std::string key = make_key_file(file);
  EXPECT_EQ(ApiKeys::read(file).owner_of(key)->tenant, "local");
  EXPECT_FALSE(ApiKeys::read(file).owner_of(key + "x").has_value());
  std::string stored;
  std::getline(std::ifstream(local_key_file(file)), stored);
  EXPECT_EQ(stored, key);
  for (const auto& path : {file, local_key_file(file)}) {
    struct stat found{};
    ASSERT_EQ(stat(path.c_str(), &found), 0);
    EXPECT_EQ(found.st_mode & 0777, 0600u);
  }
  struct stat directory{};
  ASSERT_EQ(stat(file.parent_path().c_str(), &directory), 0);
  EXPECT_EQ(directory.st_mode & 0777, 0700u);
  EXPECT_THROW(make_key_file(file), Error);  // it never replaces one
  EXPECT_NE(make_key_file(fresh_directory() / "keys"), key);
}

TEST(Tenants, NoTenantNamesAnothersAgent) {
  EXPECT_EQ(agent_id_of("local", "ada"), "ada");
  EXPECT_EQ(agent_id_of("acme", "ada"), "t.acme.ada");
  EXPECT_EQ(agent_name_of("acme", "t.acme.ada"), "ada");
  EXPECT_EQ(agent_name_of("acme", "t.acme.a.b"), "a.b");
  EXPECT_EQ(agent_name_of("acme", "t.acmes.ada"), std::nullopt);
  EXPECT_EQ(agent_name_of("acme", "ada"), std::nullopt);
  EXPECT_EQ(agent_name_of("local", "t.acme.ada"), std::nullopt);
  EXPECT_THROW(agent_id_of("local", "t.acme.ada"), Failure);
  for (const char* name : {"", "../ada", ".hidden", "a b"}) {
    EXPECT_THROW(agent_id_of("local", name), Failure);
    EXPECT_THROW(agent_id_of("acme", name), Failure);
  }
}

}  // namespace
}  // namespace torpor::server
