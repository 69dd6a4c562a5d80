/// The dialects on a real Engine, with a tiny random model.

#include <unistd.h>

#include <set>

#include "dialect_fixture.h"
#include "server/engine_runner.h"
#include "tiny_model.h"

namespace torpor::server {
namespace {

namespace fs = std::filesystem;

/// The second character of a text, which may be of several bytes.
std::string second_character(const std::string& text) {
  const auto next = [&](size_t at) {
    for (++at; at < text.size() && (text[at] & 0xC0) == 0x80; ++at) {
    }
    return at;
  };
  const size_t begin = next(0);
  return text.substr(begin, next(begin) - begin);
}

class EngineRunnerTest : public ::testing::Test {
 protected:
  EngineRunnerTest() {
    fs::remove_all(root_);
    testing::write_tiny_model(root_ / "model");
    EngineOptions options;
    options.model = (root_ / "model").string();
    options.store = root_ / "store";
    engine_ = std::make_unique<Engine>(options);
    runner_ = std::make_unique<EngineRunner>(*engine_, "tiny");
    dialects_ = std::make_unique<Dialects>(*runner_);
  }
  ~EngineRunnerTest() override {
    dialects_.reset();
    runner_.reset();
    engine_.reset();
    fs::remove_all(root_);
  }

  Json ask(const std::string& path, const Json& body, HttpHeaders headers = {}, int status = 200,
           const std::string& tenant = "local") {
    HttpRequest request;
    request.method = "POST";
    request.path = path;
    request.body = dump_json(body);
    request.headers = std::move(headers);
    request.tenant = tenant;
    RecordingResponse response;
    dialects_->handle(request, response);
    EXPECT_EQ(response.status, status) << response.body;
    headers_ = response.headers;
    return parse_json<Json>(response.body);
  }
  Json chat(const Json& messages, HttpHeaders headers = {}, int status = 200, const std::string& tenant = "local") {
    return ask("/v1/chat/completions", {{"model", "tiny"}, {"messages", messages}, {"max_tokens", 8}},
               std::move(headers), status, tenant);
  }
  std::string header(std::string_view name) const {
    for (const auto& [key, value] : headers_) {
      if (key == name) return value;
    }
    return {};
  }
  std::set<std::string> agents() const {
    std::set<std::string> ids;
    for (const AgentStatus& agent : engine_->agents()) ids.insert(agent.agent);
    return ids;
  }
  static int cached(const Json& answer) { return answer["usage"]["prompt_tokens_details"]["cached_tokens"]; }

  fs::path root_ = fs::path(::testing::TempDir()) / ("engine_runner_" + std::to_string(::getpid()));
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<EngineRunner> runner_;
  std::unique_ptr<Dialects> dialects_;
  HttpHeaders headers_;
};

TEST_F(EngineRunnerTest, AHistoryThatIsSentBackIsNotComputedAgain) {
  Json messages = Json::array({{{"role", "system"}, {"content", "Be short."}}});
  messages.push_back({{"role", "user"}, {"content", "One."}});
  const Json first = chat(messages, {{"x-torpor-agent", "ada"}});
  EXPECT_EQ(cached(first), 0);
  messages.push_back(first["choices"][0]["message"]);
  messages.push_back({{"role", "user"}, {"content", "Two."}});
  const Json second = chat(messages, {{"x-torpor-agent", "ada"}});
  const int held = int(first["usage"]["prompt_tokens"]) + int(first["usage"]["completion_tokens"]);
  EXPECT_GE(cached(second), held - 1);
  EXPECT_EQ(agents(), std::set<std::string>{"ada"});
}

TEST_F(EngineRunnerTest, AHistoryWhoseToolsComeInAnotherOrderIsNotComputedAgain) {
  const auto tool = [](const char* name) { return Json{{"type", "function"}, {"function", {{"name", name}}}}; };
  Json body{{"model", "tiny@ada"}, {"messages", user("One.")}, {"max_tokens", 8}, {"tool_choice", "auto"}};
  body["tools"] = Json::array({tool("to_keeper"), tool("to_clerk")});
  const Json first = ask("/v1/chat/completions", body);
  body["messages"].push_back(first["choices"][0]["message"]);
  body["messages"].push_back({{"role", "user"}, {"content", "Two."}});
  body["tools"] = Json::array({tool("to_clerk"), tool("to_keeper")});
  const Json second = ask("/v1/chat/completions", body);
  EXPECT_EQ(header("x-torpor-why"), "");
  EXPECT_GE(cached(second), int(first["usage"]["prompt_tokens"]));
}

TEST_F(EngineRunnerTest, TheSameIsSaidStreamedAndWholeInEachDialect) {
  const std::string whole = chat(user("Hi."))["choices"][0]["message"]["content"];
  const Json message = ask("/v1/messages", {{"model", "tiny"}, {"messages", user("Hi.")}, {"max_tokens", 8}});
  EXPECT_EQ(message["content"][0]["text"], whole);
  EXPECT_EQ(message["stop_reason"], "max_tokens");
  const Json response = ask("/v1/responses", {{"model", "tiny"}, {"input", "Hi."}, {"max_output_tokens", 8}});
  EXPECT_EQ(response["output"][0]["content"][0]["text"], whole);
  const Json ollama = ask("/api/chat", {{"model", "tiny"}, {"messages", user("Hi.")}, {"stream", false},
                                        {"options", {{"num_predict", 8}}}});
  EXPECT_EQ(ollama["message"]["content"], whole);
  HttpRequest request;
  request.method = "POST";
  request.path = "/v1/chat/completions";
  request.body = dump_json(Json{{"messages", user("Hi.")}, {"max_tokens", 8}, {"stream", true}});
  RecordingResponse streamed;
  dialects_->handle(request, streamed);
  std::string text;
  std::istringstream lines(streamed.body);
  for (std::string line; std::getline(lines, line);) {
    if (!line.starts_with("data: {")) continue;
    const Json choices = parse_json<Json>(line.substr(6))["choices"];
    if (!choices.empty() && choices[0]["delta"].contains("content")) text += choices[0]["delta"]["content"];
  }
  EXPECT_EQ(text, whole);
}

TEST_F(EngineRunnerTest, OneSessionWithTwoConversationsKeepsBoth) {
  const HttpHeaders session{{"x-session-id", "s-1"}};
  const Json first = chat(user("The task is long."), session);
  EXPECT_EQ(header("x-torpor-why"), "");
  const std::string agent = header("x-torpor-agent");
  chat(user("A title, please."), session);
  EXPECT_EQ(header("x-torpor-agent"), agent + ".2");
  EXPECT_TRUE(header("x-torpor-why").starts_with("message 0: ")) << header("x-torpor-why");
  const auto after = agents();
  EXPECT_EQ(after.size(), 2u);
  for (const std::string& id : after) EXPECT_TRUE(id.starts_with("session-")) << id;
  Json messages = user("The task is long.");
  messages.push_back(first["choices"][0]["message"]);
  messages.push_back({{"role", "user"}, {"content", "Go on."}});
  EXPECT_GT(cached(chat(messages, session)), int(first["usage"]["prompt_tokens"]));
  EXPECT_EQ(agents(), after);
}

TEST_F(EngineRunnerTest, ATenantsAgentsAreItsOwn) {
  chat(user("Mine."), {{"x-torpor-agent", "ada"}}, 200, "acme");
  chat(user("Mine."), {{"x-session-id", "s"}}, 200, "acme");
  chat(user("Ours."), {{"x-torpor-agent", "ada"}});
  const auto all = agents();
  EXPECT_EQ(all.size(), 3u);
  EXPECT_TRUE(all.contains("ada"));
  EXPECT_TRUE(all.contains("t.acme.ada"));
  EXPECT_EQ(session_agent("acme", "tiny", "s"), *std::find_if(all.begin(), all.end(), [](const std::string& id) {
              return id.starts_with("t.acme.session-");
            }));
  EXPECT_NE(session_agent("acme", "tiny", "s"), session_agent("evil", "tiny", "s"));
}

TEST_F(EngineRunnerTest, CallsOfToolsThatAreDeclaredArePartedFromTheTextOfAnAnswer) {
  const std::string text = "So.\n<tool_call>\n{\"name\": \"look\", \"arguments\": {\"at\": 3}}\n</tool_call>";
  for (const char* tools : {R"([{"type":"function","function":{"name":"look"}}])", R"([7, {"name":"look"}])"}) {
    // The tests' template has no place for calls, so they are kept as text of one form.
    EXPECT_EQ(runner_->answer_reader(tools)(text).content,
              "So.\n<tool_call>\n{\"name\":\"look\",\"arguments\":{\"at\":3}}\n</tool_call>");
  }
  for (const char* tools : {"", "[]", R"([{"name":"listen"}])"})
    EXPECT_EQ(runner_->answer_reader(tools)(text).content, text);
}

TEST_F(EngineRunnerTest, WithoutAnAgentOrASessionNoNameIsLeft) {
  chat(user("Hi."));
  EXPECT_TRUE(agents().empty());
}

TEST_F(EngineRunnerTest, TokensAreCountedAsTheTurnCountsThem) {
  const Json body{{"model", "tiny"}, {"messages", user("How many are there?")}, {"max_tokens", 1}};
  const Json count = ask("/v1/messages/count_tokens", body);
  const Json usage = ask("/v1/messages", body)["usage"];
  EXPECT_EQ(count["input_tokens"], int(usage["input_tokens"]) + int(usage["cache_read_input_tokens"]));
}

TEST_F(EngineRunnerTest, WhatDoesNotFitOrIsNotThereIsRefused) {
  const Json other{{"model", "other"}, {"messages", user("Hi.")}};
  EXPECT_EQ(ask("/v1/chat/completions", other, {}, 404)["error"]["param"], "model");
  std::string words;
  for (int i = 0; i < 5000; ++i) words += "word ";
  EXPECT_EQ(chat(user(words), {}, 400)["error"]["code"], "context_length_exceeded");
  const Json unique{{"type", "array"}, {"uniqueItems", true}};
  const Json error = ask("/v1/chat/completions", {{"messages", user("Hi.")}, {"response_format", {{"type", "json_schema"},
                         {"json_schema", {{"name", "x"}, {"schema", unique}}}}}}, {}, 400)["error"];
  EXPECT_EQ(error["param"], "response_format");
  EXPECT_NE(std::string(error["message"]).find("uniqueItems"), std::string::npos);
  EXPECT_EQ(chat(user("Hi."), {{"x-torpor-agent", "../etc"}}, 400)["error"]["param"], "agent");
}

TEST_F(EngineRunnerTest, ACallThatIsDemandedAndDoesNotComeIsAnErrorAndNoText_mlx_vlm_2000) {
  const Json tools = Json::array({{{"type", "function"}, {"function", {{"name", "read"}}}}});
  const Json error = ask("/v1/chat/completions", {{"messages", user("Hi.")}, {"max_tokens", 4}, {"tools", tools},
                                                  {"tool_choice", "required"}}, {}, 500)["error"];
  EXPECT_NE(std::string(error["message"]).find("tool_choice"), std::string::npos);
}

TEST_F(EngineRunnerTest, AnAnswerIsHeldToItsFormatAndACallToItsSchema) {
  const Json port = parse_json<Json>(
      R"({"type": "object", "properties": {"port": {"enum": [7, 8]}}, "required": ["port"],
                                    "additionalProperties": false})");
  const auto holds = [](const std::string& text) {
    const Json json = parse_json<Json>(text);
    return json == Json{{"port", 7}} || json == Json{{"port", 8}};
  };
  for (const int seed : {1, 2, 3}) {
    Json body{{"messages", user("Hi.")}, {"max_tokens", 200}, {"temperature", 1}, {"seed", seed}};
    body["response_format"] = {{"type", "json_schema"}, {"json_schema", {{"name", "x"}, {"schema", port}}}};
    const Json choice = ask("/v1/chat/completions", body)["choices"][0];
    if (choice["finish_reason"] == "stop") EXPECT_TRUE(holds(choice["message"]["content"])) << choice;
    body.erase("response_format");
    body["tools"] = Json::array({{{"type", "function"}, {"function", {{"name", "open"}, {"parameters", port}, {"strict", true}}}}});
    body["tool_choice"] = "required";
    body["parallel_tool_calls"] = false;
    const Json call = ask("/v1/chat/completions", body)["choices"][0];
    ASSERT_EQ(call["finish_reason"], "tool_calls") << call;
    EXPECT_EQ(call["message"]["tool_calls"][0]["function"]["name"], "open");
    EXPECT_TRUE(holds(call["message"]["tool_calls"][0]["function"]["arguments"])) << call;
  }
}

TEST_F(EngineRunnerTest, AClientThatHasGoneLeavesTheAgentAsItWas) {
  HttpRequest request;
  request.method = "POST";
  request.path = "/v1/chat/completions";
  request.headers = {{"x-torpor-agent", "ada"}};
  request.body = dump_json(Json{{"messages", user("Hi.")}, {"max_tokens", 8}});
  RecordingResponse response;
  response.left = true;
  dialects_->handle(request, response);
  EXPECT_EQ(response.status, 499);
  EXPECT_TRUE(agents().empty());
}

TEST_F(EngineRunnerTest, AStopStringEndsTheAnswerAndIsNamed) {
  const std::string whole = chat(user("Hi."))["choices"][0]["message"]["content"];
  const std::string stop = second_character(whole);
  ASSERT_NE(stop, "");
  const Json message = ask("/v1/messages", {{"messages", user("Hi.")}, {"max_tokens", 8},
                                            {"stop_sequences", Json::array({stop})}});
  EXPECT_EQ(message["stop_reason"], "stop_sequence");
  EXPECT_EQ(message["stop_sequence"], stop);
  EXPECT_EQ(message["content"][0]["text"], whole.substr(0, whole.find(stop)));
}

TEST_F(EngineRunnerTest, OfAnAnswerThatAStopStringEndedNothingIsComputedAgain) {
  for (const bool tools : {false, true}) {
    const std::string agent = tools ? "with-tools" : "without";
    Json body{{"model", "tiny"}, {"messages", user("Hi.")}, {"max_tokens", 8}};
    if (tools) body["tools"] = parse_json<Json>(R"([{"type":"function","function":{"name":"read","parameters":{}}}])");
    const std::string whole = ask("/v1/chat/completions", body)["choices"][0]["message"]["content"];
    const std::string stop = second_character(whole);
    body["stop"] = Json::array({"never", stop});
    const Json first = ask("/v1/chat/completions", body, {{"x-torpor-agent", agent}});
    EXPECT_EQ(first["choices"][0]["finish_reason"], "stop");
    EXPECT_EQ(first["choices"][0]["message"]["content"], whole.substr(0, whole.find(stop)));
    int64_t held = 0;
    for (const AgentStatus& status : engine_->agents()) held = status.agent == agent ? status.tokens : held;
    ASSERT_GT(held, int(first["usage"]["prompt_tokens"]));
    body["messages"].push_back(first["choices"][0]["message"]);
    body["messages"].push_back({{"role", "user"}, {"content", "Two."}});
    const Json second = ask("/v1/chat/completions", body, {{"x-torpor-agent", agent}});
    EXPECT_EQ(header("x-torpor-why"), "");
    EXPECT_EQ(cached(second), held);
  }
}

TEST_F(EngineRunnerTest, AStopStringEndsAStreamAndEachDialectsAnswer) {
  const std::string whole = chat(user("Hi."))["choices"][0]["message"]["content"];
  const std::string stop = second_character(whole), kept = whole.substr(0, whole.find(stop));
  HttpRequest request;
  request.method = "POST";
  request.path = "/v1/chat/completions";
  request.body = dump_json(Json{{"messages", user("Hi.")}, {"max_tokens", 8}, {"stream", true}, {"stop", stop}});
  RecordingResponse streamed;
  dialects_->handle(request, streamed);
  std::string text, reason;
  for (const Event& event : events(streamed.body)) {
    if (event.data == "[DONE]") continue;
    const Json choice = event.json()["choices"][0];
    text += choice["delta"].value("content", "");
    if (choice["finish_reason"].is_string()) reason = choice["finish_reason"];
  }
  EXPECT_EQ(text, kept);
  EXPECT_EQ(reason, "stop");
  const Json ollama = ask("/api/chat", {{"messages", user("Hi.")}, {"stream", false},
                                        {"options", {{"num_predict", 8}, {"stop", Json::array({stop})}}}});
  EXPECT_EQ(ollama["message"]["content"], kept);
  EXPECT_EQ(ollama["done_reason"], "stop");
}

TEST_F(EngineRunnerTest, ACompletionStopsAtASpecialTokensText) {
  const int32_t id = engine_->prompt_tokens({.prompt = "<|im_start|>", .raw = true}).at(0);
  const Json answer = ask("/v1/completions", {{"prompt", "Once"}, {"stop", "<|im_start|>"}, {"max_tokens", 4},
                                              {"logit_bias", {{std::to_string(id), 100}}}});
  EXPECT_EQ(answer["choices"][0]["text"], "");
  EXPECT_EQ(answer["choices"][0]["finish_reason"], "stop");
  EXPECT_EQ(answer["usage"]["completion_tokens"], 1);
}

TEST_F(EngineRunnerTest, EachSamplerReachesTheEngineFromEachDialect) {
  struct Case {
    Json openai, ollama;
    SamplingOptions options;
  };
  const std::vector<Case> cases{
      {{{"top_k", 3}}, {{"top_k", 3}}, {.top_k = 3}},
      {{{"min_p", 0.5}}, {{"min_p", 0.5}}, {.min_p = 0.5f}},
      {{{"top_p", 0}}, {{"top_p", 0}}, {.top_p = 1e-6f}},
      {{{"repetition_penalty", 3}}, {{"repeat_penalty", 3}, {"repeat_last_n", -1}},
       {.repetition_penalty = 3, .penalty_context = 0}},
      {{{"presence_penalty", 2}}, {{"presence_penalty", 2}}, {.presence_penalty = 2}},
      {{{"frequency_penalty", -2}}, {{"frequency_penalty", -2}}, {.frequency_penalty = -2}},
      {{{"logit_bias", {{"7", 9}, {"8", 8.5}}}}, {{"logit_bias", {{"7", 9}, {"8", 8.5}}}},
       {.logit_bias = {{7, 9}, {8, 8.5f}}}}};
  std::set<std::string> texts;
  for (const auto& [openai, ollama, options] : cases) {
    TurnRequest turn;
    turn.messages = {{.role = "user", .content = "Hi."}};
    turn.generate.max_tokens = 24;
    turn.generate.sampling = options;
    turn.generate.sampling.temperature = 1;
    turn.generate.sampling.seed = 5;
    const std::string text = engine_->turn(turn).text;
    texts.insert(text);
    Json body{{"messages", user("Hi.")}, {"max_tokens", 24}, {"temperature", 1}, {"seed", 5}};
    body.update(openai);
    EXPECT_EQ(ask("/v1/chat/completions", body)["choices"][0]["message"]["content"], text) << openai;
    Json local{{"messages", user("Hi.")}, {"stream", false},
               {"options", {{"num_predict", 24}, {"temperature", 1}, {"seed", 5}}}};
    local["options"].update(ollama);
    EXPECT_EQ(ask("/api/chat", local)["message"]["content"], text) << ollama;
  }
  EXPECT_EQ(texts.size(), cases.size());
  const Json one = ask("/v1/messages", {{"messages", user("Hi.")}, {"max_tokens", 24}, {"temperature", 1},
                                        {"top_k", 1}});
  TurnRequest greedy;
  greedy.messages = {{.role = "user", .content = "Hi."}};
  greedy.generate.max_tokens = 24;
  EXPECT_EQ(one["content"][0]["text"], engine_->turn(greedy).text);
  const Json unknown = ask("/v1/chat/completions", {{"messages", user("Hi.")}, {"logit_bias", {{"605", 1}}}}, {}, 400);
  EXPECT_EQ(unknown["error"]["param"], "logit_bias");
}

TEST_F(EngineRunnerTest, LogprobsAreTheEnginesAndOfTheTextAlone) {
  TurnRequest turn;
  turn.messages = {{.role = "user", .content = "Hi."}};
  turn.generate.max_tokens = 12;
  turn.generate.logprobs = 3;
  const TurnResult expected = engine_->turn(turn);
  Json body{{"messages", user("Hi.")}, {"max_tokens", 12}, {"logprobs", true}, {"top_logprobs", 3}};
  const Json choice = ask("/v1/chat/completions", body)["choices"][0];
  const Json tokens = choice["logprobs"]["content"];
  ASSERT_EQ(tokens.size(), 12u);
  std::string joined;
  for (size_t i = 0; i < tokens.size(); ++i) {
    EXPECT_EQ(tokens[i]["token"], expected.logprobs[i].text);
    EXPECT_EQ(float(tokens[i]["logprob"]), expected.logprobs[i].logprob);
    ASSERT_EQ(tokens[i]["top_logprobs"].size(), 3u);
    EXPECT_EQ(tokens[i]["top_logprobs"][2]["token"], expected.logprobs[i].top[2].text);
    joined += tokens[i]["token"];
  }
  if (joined.find("\uFFFD") == std::string::npos) EXPECT_EQ(joined, std::string(choice["message"]["content"]));
  // Of a stop string's tokens none is told.
  const std::string stop = second_character(choice["message"]["content"]);
  body["stop"] = stop;
  const Json cut = ask("/v1/chat/completions", body)["choices"][0];
  size_t before = 0;
  const std::string text = cut["message"]["content"];
  for (const TokenLogprobs& token : expected.logprobs) before += token.begin < text.size() ? 1 : 0;
  EXPECT_EQ(cut["logprobs"]["content"].size(), before);
  const Json response = ask("/v1/responses", {{"input", "Hi."}, {"max_output_tokens", 12}, {"top_logprobs", 3}});
  EXPECT_EQ(response["output"][0]["content"][0]["logprobs"], tokens);
  const Json ollama = ask("/api/chat", {{"messages", user("Hi.")}, {"stream", false}, {"logprobs", true},
                                        {"top_logprobs", 3}, {"options", {{"num_predict", 12}}}});
  EXPECT_EQ(ollama["logprobs"], tokens);
}

TEST_F(EngineRunnerTest, TheModelIsListed) {
  const auto models = runner_->models();
  ASSERT_EQ(models.size(), 1u);
  EXPECT_EQ(models[0].name, "tiny");
  EXPECT_EQ(models[0].context, 4096);
  EXPECT_EQ(models[0].family, "llama");
  EXPECT_GT(models[0].created, 1600000000);
}

}  // namespace
}  // namespace torpor::server
