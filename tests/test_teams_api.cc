/// /torpor/v1/teams on a tiny model: places of the queue, tenants, retries, and readers that read nothing.

#include <condition_variable>
#include <list>
#include <mutex>
#include <optional>
#include <thread>

#include <gtest/gtest.h>

#include "recording_response.h"
#include "server/agents_api.h"
#include "store_fixture.h"
#include "teams/team_file.h"
#include "tiny_model.h"

namespace torpor::server {
namespace {

namespace fs = std::filesystem;
using torpor::testing::TemporaryDirectory;

constexpr const char* kTeams = "/torpor/v1/teams";

class TeamsApiTest : public ::testing::Test {
 protected:
  TeamsApiTest() {
    torpor::testing::write_tiny_model((directory_.path() / "tiny").string(), torpor::testing::TinyAttention::kPlain);
    load();
  }
  void load() {
    ModelPoolOptions options;
    options.models = {{"tiny", (directory_.path() / "tiny").string()}};
    options.engine.store = directory_.path() / "store";
    options.engine.durability = Durability::kRename;
    options.engine.text_queue_bytes = 1;
    models_.emplace(std::move(options));
    serve(64);
  }
  void serve(int places) {
    queue_.emplace(places);
    replay_.emplace(AnswerFiles{});
    api_.emplace(*models_, metrics_, *replay_, *queue_);
  }
  static HttpRequest request(const std::string& path, const Json& body, const std::string& tenant = "local") {
    HttpRequest request;
    request.method = "POST";
    request.path = path;
    request.body = to_text(body);
    request.tenant = tenant;
    request.share = tenant + ":key";
    return request;
  }
  RecordingResponse& ask(HttpRequest request) {
    const std::lock_guard lock(mutex_);
    RecordingResponse& response = responses_.emplace_back();
    api_->handle(request, response);
    return response;
  }
  RecordingResponse& ask(const std::string& path, const Json& body, const std::string& tenant = "local") {
    return ask(request(path, body, tenant));
  }
  RecordingResponse& get(const std::string& path, const std::string& tenant = "local") {
    HttpRequest asked = request(path, Json());
    asked.method = "GET";
    asked.body.clear();
    asked.tenant = tenant;
    return ask(asked);
  }
  RecordingResponse& make(const std::string& name = "crew", const std::string& tenant = "local") {
    return ask(kTeams, of_team(name), tenant);
  }
  static Json of_team(const std::string& name) {
    return {{"team", name},
            {"members", {{{"name", "ada"}, {"role", "You doubt."}}, {{"name", "bob"}}, {{"name", "eve"}}}},
            {"coordinator", "eve"}};
  }
  static Json message(const std::string& text = "Hi.") { return {{"message", text}, {"max_tokens", 4}}; }

  const TemporaryDirectory directory_{TemporaryDirectory::in_memory()};
  Metrics metrics_{false};
  std::optional<AnswerReplay> replay_;
  std::optional<ModelPool> models_;
  std::optional<TurnQueue> queue_;
  std::optional<AgentsApi> api_;
  std::mutex mutex_;
  std::list<RecordingResponse> responses_;
};

TEST_F(TeamsApiTest, OfTwoMakersOfOneNameOneWins) {
  std::vector<RecordingResponse> made(6);
  std::vector<std::thread> makers;
  for (RecordingResponse& response : made)
    makers.emplace_back([&] { api_->handle(request(kTeams, of_team("crew")), response); });
  for (std::thread& maker : makers) maker.join();
  int won = 0;
  for (const RecordingResponse& response : made) {
    won += response.status == 201;
    EXPECT_TRUE(response.status == 201 || response.status == 409) << response.body;
  }
  EXPECT_EQ(won, 1);
}

TEST_F(TeamsApiTest, AStepTakesAPlaceForEachTurnOrNothingBegins) {
  make();
  serve(2);
  TurnQueue::Places other(*queue_, "local:key", 1);
  EXPECT_THROW(ask("/torpor/v1/teams/crew/ask", message()), Failure);  // which the service tells as 429
  EXPECT_FALSE(parse_json<Json>(get("/torpor/v1/teams/crew").body).contains("step"));
  EXPECT_TRUE(models_->agents().empty());
  EXPECT_EQ(queue_->taken(), 1);
  other.leave_all();
  const RecordingResponse& answered = ask("/torpor/v1/teams/crew/ask", message());
  EXPECT_EQ(answered.status, 200) << answered.body;
  EXPECT_EQ(queue_->taken(), 0);
  serve(1);
  EXPECT_EQ(ask("/torpor/v1/teams/crew/ask", message()).status, 400);  // there never is room for it
}

TEST_F(TeamsApiTest, ATenantsTeamIsItsOwn) {
  EXPECT_EQ(make("crew", "acme").status, 201);
  EXPECT_EQ(ask("/torpor/v1/teams/crew/ask", message(), "acme").status, 200);
  EXPECT_EQ(get("/torpor/v1/teams/crew").status, 404);
  EXPECT_EQ(get("/torpor/v1/teams/t.acme.crew").status, 400);
  EXPECT_EQ(ask("/torpor/v1/teams/crew/ask", message()).status, 404);
  EXPECT_EQ(parse_json<Json>(get(kTeams).body)["teams"].size(), 0u);
  EXPECT_EQ(make().status, 201);
  EXPECT_EQ(parse_json<Json>(get(kTeams, "acme").body)["teams"].size(), 1u);
  const Json taken = parse_json<Json>(make("crew", "acme").body);
  EXPECT_EQ(taken["error"]["message"].get<std::string>().find("t.acme"), std::string::npos) << taken;
  const Json answers = parse_json<Json>(ask("/torpor/v1/teams/crew/round", message(), "acme").body);
  EXPECT_EQ(answers["answers"][0]["agent"], "crew.ada");
}

TEST_F(TeamsApiTest, NoTeamReachesAnotherTenantsAgents) {
  EXPECT_EQ(make("acme", "acme").status, 201);
  EXPECT_EQ(ask("/torpor/v1/teams/acme/ask", message("A secret."), "acme").status, 200);
  Json body = of_team("t");
  body["members"] = {{{"name", "acme.acme.ada"}}, {{"name", "acme.acme.eve"}}};
  body["coordinator"] = "acme.acme.eve";
  EXPECT_EQ(ask(kTeams, body).status, 400);
  // A program that shares the store calls its teams as it likes.
  Store& store = models_->model("").engine().store();
  TeamSpec spec{.id = "t", .members = {{"acme.acme.bob", ""}, {"acme.acme.eve", ""}}, .coordinator = "acme.acme.eve"};
  store.make_team("t", encode_team({.spec = spec, .speaker = spec.coordinator}));
  const auto held = [&] { return get("/torpor/v1/agents/acme.bob", "acme").body; };
  const std::string before = held();
  for (const char* step : {"ask", "turn", "conclude"})
    EXPECT_EQ(ask("/torpor/v1/teams/t/" + std::string(step), message()).status, 400) << step;
  HttpRequest removal = request("/torpor/v1/teams/t", Json());
  removal.method = "DELETE";
  EXPECT_EQ(ask(removal).status, 400);
  EXPECT_EQ(held(), before);
}

TEST_F(TeamsApiTest, ATeamTakesNoAgentOverThatIsInMemoryAlone) {
  Engine& engine = models_->model("").engine();
  TurnRequest turn{.agent = "crew.bob", .prompt = "Hi.", .save = SaveMode::kNo};
  turn.generate.max_tokens = 2;
  engine.turn(turn);
  ASSERT_FALSE(engine.store().contains("crew.bob"));
  const RecordingResponse& refused = make();
  EXPECT_EQ(refused.status, 409) << refused.body;
  EXPECT_TRUE(engine.store().teams().empty());
}

TEST_F(TeamsApiTest, MembersHearNoneOfTheOthersThinking) {
  const fs::path file = directory_.path() / "tiny" / "chat_template.jinja";
  std::string text = torpor::testing::read_all(file);
  const std::string mark = "assistant\\n'";
  text.replace(text.rfind(mark), mark.size(), "assistant\\n<think>\\n'");
  torpor::testing::write_all(file, text);
  load();
  make();
  const Json asked = parse_json<Json>(ask("/torpor/v1/teams/crew/ask", message()).body);
  EXPECT_EQ(asked["complete"], true) << asked;
  const torpor::Message kept = models_->model("").engine().messages("crew.ada").back();
  EXPECT_NE(kept.thinking, "");  // random tokens never close it
  EXPECT_EQ(kept.content, "");
  EXPECT_EQ(asked["answers"][0]["text"], "");
  EXPECT_EQ(ask("/torpor/v1/teams/crew/conclude", message()).status, 400);  // nobody has said anything
}

TEST_F(TeamsApiTest, ATeamOfAProgramIsComputedWhateverItCallsTheModel) {
  TeamSpec spec{.id = "crew", .members = {{"ada", ""}, {"eve", ""}}, .coordinator = "eve", .model = "their/tiny"};
  models_->model("").engine().store().make_team("crew", encode_team({.spec = spec, .speaker = "eve"}));
  const RecordingResponse& asked = ask("/torpor/v1/teams/crew/ask", message());
  EXPECT_EQ(asked.status, 200) << asked.body;
}

TEST_F(TeamsApiTest, ARetryWithTheSameKeyGetsTheSameAnswers) {
  make();
  HttpRequest keyed = request("/torpor/v1/teams/crew/ask", message());
  keyed.headers = {{"idempotency-key", "k"}};
  const std::string first = ask(keyed).body;
  EXPECT_EQ(ask(keyed).body, first);
  serve(64);  // as a crash between the last save and the answer's end leaves it
  const Json again = parse_json<Json>(ask(keyed).body);
  EXPECT_TRUE(again["answers"][0]["kept"]);
  EXPECT_EQ(again["answers"][0]["text"], parse_json<Json>(first)["answers"][0]["text"]);
  HttpRequest create = request("/torpor/v1/agents", {{"agent", "zoe"}, {"prompt", "Hi."}, {"max_tokens", 4}});
  create.headers = keyed.headers;
  const std::string made = ask(create).body;
  EXPECT_EQ(ask(create).status, 201);
  EXPECT_EQ(responses_.back().body, made);
}

/// A reader that takes nothing from the first such event on, until it is cut off.
class Unread : public RecordingResponse {
 public:
  explicit Unread(std::string event) : event_("event: " + std::move(event) + "\n") {}
  bool write(std::string_view bytes) override {
    std::unique_lock lock(mutex_);
    if (!stuck && bytes.find(event_) == std::string_view::npos) return RecordingResponse::write(bytes);
    stuck = true;
    changed_.notify_all();
    changed_.wait(lock, [&] { return left.load(); });
    return false;
  }
  void wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return stuck; });
  }
  void cut() {
    const std::lock_guard lock(mutex_);
    left = true;
    changed_.notify_all();
  }

 private:
  const std::string event_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stuck = false;
};

TEST_F(TeamsApiTest, AnUnreadStreamHoldsUpItsOwnTurnsAndEndsWhenItsReaderIsCutOff) {
  make();
  make("other");
  Unread unread("text");
  Json body = message();
  body["stream"] = true;
  body["max_tokens"] = 200;
  std::thread reader([&] { api_->handle(request("/torpor/v1/teams/crew/ask", body), unread); });
  unread.wait();
  EXPECT_EQ(ask("/torpor/v1/teams/other/ask", message()).status, 200);  // others go on
  EXPECT_EQ(ask("/torpor/v1/teams/crew/ask", message()).status, 423);   // this one is in a step
  EXPECT_EQ(queue_->taken(), 2);
  unread.cut();
  reader.join();
  EXPECT_EQ(queue_->taken(), 0);
  const Json again = parse_json<Json>(ask("/torpor/v1/teams/crew/ask", message()).body);
  EXPECT_EQ(again["complete"], true) << again;
}

TEST_F(TeamsApiTest, ATurnThatIsOverLeavesItsPlaceToOthers) {
  make();
  Unread unread("answer");
  Json body = message();
  body["stream"] = true;
  std::thread reader([&] { api_->handle(request("/torpor/v1/teams/crew/ask", body), unread); });
  unread.wait();
  EXPECT_LT(queue_->taken(), 2);
  unread.cut();
  reader.join();
}

TEST(TurnQueue, SeveralPlacesAreTakenAsOneAfterTheOther) {
  TurnQueue queue(8);
  {
    const TurnQueue::Places all(queue, "a", 8);
    EXPECT_EQ(queue.taken(), 8);
    EXPECT_THROW(TurnQueue::Places(queue, "b", 1), Failure);
    EXPECT_EQ(queue.taken(), 8);
  }
  queue.set_alone(false);
  EXPECT_THROW(TurnQueue::Places(queue, "a", 5), Failure);  // half is left to others
  TurnQueue::Places four(queue, "a", 4);
  EXPECT_THROW(TurnQueue::Places(queue, "a", 1), Failure);
  const TurnQueue::Places two(queue, "b", 2);
  EXPECT_THROW(TurnQueue::Places(queue, "b", 1), Failure);
  four.leave_one();
  four.leave_one();
  EXPECT_EQ(queue.taken(), 4);
  four.leave_all();
  four.leave_all();
  four.leave_one();
  EXPECT_EQ(queue.taken(), 2);
}

}  // namespace
}  // namespace torpor::server
