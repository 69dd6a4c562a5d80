/// /api/chat, generate, tags, show, ps and version.

#include "dialect_fixture.h"

namespace torpor::server {
namespace {

class Ollama : public DialectTest {
 protected:
  static Json body_of(const char* members = "{}") {
    Json body = parse_json<Json>(members);
    body["model"] = "scripted";
    if (!body.contains("messages")) body["messages"] = user("Hi");
    return body;
  }
  Json ask_whole(const std::string& path, Json body) {
    body["stream"] = false;
    return ask_json(path, body);
  }
  /// Without "stream" an answer is streamed.
  std::vector<Json> ask_lines(const std::string& path, const Json& body) {
    RecordingResponse& response = ask("POST", path, dump_json(body));
    EXPECT_EQ(response.status, 200) << response.body;
    EXPECT_EQ(response.header("content-type"), "application/x-ndjson");
    EXPECT_FALSE(parse_json<Json>(response.ping)["done"]);
    EXPECT_TRUE(response.ping.ends_with("\n"));
    std::vector<Json> lines;
    std::istringstream stream(response.body);
    for (std::string line; std::getline(stream, line);) lines.push_back(parse_json<Json>(line));
    return lines;
  }
};

TEST_F(Ollama, AWholeChatHasMessageAndCounts) {
  script([](const ChatRequest&, Say& say) {
    say.start(10, 4).thinking("Hm").text("Look.").call("read", {R"({"path":)", R"("a"})"});
    say.finish(StopReason::kToolCalls, 7);
  });
  const Json answer = ask_whole("/api/chat", body_of());
  EXPECT_EQ(answer["model"], "scripted");
  EXPECT_EQ(answer["message"]["content"], "Look.");
  EXPECT_EQ(answer["message"]["thinking"], "Hm");
  EXPECT_EQ(answer["message"]["tool_calls"][0]["function"]["name"], "read");
  EXPECT_EQ(answer["message"]["tool_calls"][0]["function"]["arguments"], parse_json<Json>(R"({"path":"a"})"));
  EXPECT_EQ(answer["done"], true);
  EXPECT_EQ(answer["done_reason"], "stop");
  EXPECT_EQ(answer["prompt_eval_count"], 10);
  EXPECT_EQ(answer["eval_count"], 7);
  EXPECT_GE(answer["total_duration"], answer["eval_duration"]);
}

TEST_F(Ollama, AChatIsStreamedAsLinesWithWholeCalls) {
  script([](const ChatRequest&, Say& say) {
    say.start().thinking("Hm").text("Lo").text("ok.").call("read", {R"({"path":)", R"("a"})"}).call("list", {"{}"});
    say.finish(StopReason::kToolCalls, 7);
  });
  const auto lines = ask_lines("/api/chat", body_of());
  ASSERT_EQ(lines.size(), 6u);
  EXPECT_EQ(lines[0]["message"]["thinking"], "Hm");
  EXPECT_EQ(lines[0]["message"]["content"], "");
  EXPECT_EQ(lines[1]["message"]["content"], "Lo");
  EXPECT_FALSE(lines[1]["message"].contains("thinking"));
  EXPECT_EQ(lines[3]["message"]["tool_calls"][0]["function"]["arguments"], parse_json<Json>(R"({"path":"a"})"));
  EXPECT_EQ(lines[4]["message"]["tool_calls"][0]["function"]["index"], 1);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(lines[i]["done"], false);
  EXPECT_EQ(lines[5]["done"], true);
}

TEST_F(Ollama, AnErrorAfterTheStartIsALine) {
  script([](const ChatRequest&, Say& say) {
    say.start().text("Hel");
    throw Error(ErrorCode::kIo, "The disk is full.");
  });
  EXPECT_EQ(ask_lines("/api/chat", body_of()).back(), parse_json<Json>(R"({"error":"The disk is full."})"));
}

TEST_F(Ollama, AChatsMessagesToolsAndOptionsAreRead) {
  ask_whole("/api/chat", body_of(R"({"messages":[{"role":"system","content":"You help."},{"role":"user","content":"Hi"},
      {"role":"assistant","content":"","thinking":"Hm",
        "tool_calls":[{"function":{"name":"read","arguments":{"path":"a"}}}]},
      {"role":"tool","tool_name":"read","content":"text of a"}],
    "tools":[{"type":"function","function":{"name":"read","description":"Reads.","parameters":{"type":"object"}}}],
    "think":false,"format":{"type":"object"},"keep_alive":"5m","options":{"temperature":0.5,"top_k":3,"top_p":0.5,
      "min_p":0.1,"repeat_penalty":1.1,"seed":7,"num_predict":9,"num_ctx":8192,"stop":["END"]}})"));
  const ChatRequest& request = heard();
  EXPECT_EQ(request.model, "scripted");
  ASSERT_EQ(request.messages.size(), 4u);
  EXPECT_EQ(request.messages[2].thinking, "Hm");
  EXPECT_EQ(request.messages[2].tool_calls[0].arguments, R"({"path":"a"})");
  EXPECT_EQ(request.messages[3].tool_name, "read");
  EXPECT_EQ(request.tools[0].name, "read");
  EXPECT_EQ(request.template_arguments, parse_json<Json>(R"({"enable_thinking":false})"));
  EXPECT_EQ(request.response_format.kind, ResponseFormat::Kind::kJsonSchema);
  EXPECT_EQ(request.sampling.temperature, 0.5);
  EXPECT_EQ(request.sampling.top_k, 3);
  EXPECT_EQ(request.sampling.min_p, 0.1);
  EXPECT_EQ(request.sampling.repetition_penalty, 1.1);
  EXPECT_EQ(request.sampling.penalty_context, 64);
  EXPECT_EQ(request.sampling.seed, 7u);
  EXPECT_EQ(request.max_tokens, 9);
  EXPECT_EQ(request.stop, std::vector<std::string>{"END"});
  Json body = body_of(R"({"options":{"num_predict":-1},"format":"json","think":"low"})");
  body["model"] = "scripted:latest";
  ask_whole("/api/chat", body);
  EXPECT_EQ(heard().model, "scripted");
  EXPECT_FALSE(heard().max_tokens);
  EXPECT_EQ(heard().response_format.kind, ResponseFormat::Kind::kJsonObject);
  EXPECT_EQ(heard().template_arguments["reasoning_effort"], "low");
}

TEST_F(Ollama, ThePenaltysContextIsBoundedWholeOrNone) {
  ask_whole("/api/chat", body_of(R"({"options":{"repeat_penalty":1.1,"repeat_last_n":-1}})"));
  EXPECT_EQ(heard().sampling.penalty_context, 0);
  EXPECT_EQ(heard().sampling.repetition_penalty, 1.1);
  ask_whole("/api/chat", body_of(R"({"options":{"repeat_penalty":1.1,"repeat_last_n":0}})"));
  EXPECT_EQ(heard().sampling.repetition_penalty, 1);
  ask_whole("/api/chat", body_of(R"({"options":{"repeat_penalty":1.1,"repeat_last_n":9}})"));
  EXPECT_EQ(heard().sampling.penalty_context, 9);
}

TEST_F(Ollama, LogprobsStandInTheAnswerAndInTheLinesOfTheirText) {
  script([](const ChatRequest& request, Say& say) {
    const int top = *request.logprobs;
    say.start().tokens({"He", "l"}, top).text("Hel").tokens({"lo."}, top, 3).text("lo.").finish();
  });
  Json body = body_of(R"({"logprobs":true,"top_logprobs":1})");
  const Json whole = ask_whole("/api/chat", body)["logprobs"];
  ASSERT_EQ(whole.size(), 3u);
  EXPECT_EQ(whole[0]["top_logprobs"][0]["token"], "He");
  Json streamed = Json::array();
  for (const Json& line : ask_lines("/api/chat", body)) {
    if (line.contains("logprobs")) streamed.insert(streamed.end(), line["logprobs"].begin(), line["logprobs"].end());
  }
  EXPECT_EQ(streamed, whole);
}

TEST_F(Ollama, GenerateAnswersAPromptAndContinuesARawOne) {
  const Json asked{{"model", "scripted"}, {"prompt", "Hi"}, {"system", "You help."}};
  const Json answer = ask_whole("/api/generate", asked);
  EXPECT_EQ(answer["response"], "Hello.");
  EXPECT_FALSE(answer.contains("message"));
  ASSERT_EQ(heard().messages.size(), 2u);
  EXPECT_EQ(heard().messages[0].text, "You help.");
  const auto lines = ask_lines("/api/generate", parse_json<Json>(R"({"model":"scripted","prompt":"Once","raw":true})"));
  EXPECT_EQ(heard().prompt, "Once");
  EXPECT_EQ(lines[0]["response"], "Hel");
  EXPECT_EQ(lines.back()["done"], true);
}

TEST_F(Ollama, ARequestWithoutAPromptAsksForTheModelAlone) {
  EXPECT_EQ(ask_whole("/api/generate", parse_json<Json>(R"({"model":"scripted"})"))["done_reason"], "load");
  EXPECT_EQ(ask_whole("/api/chat", parse_json<Json>(R"({"model":"scripted","messages":[]})"))["done_reason"], "load");
  EXPECT_TRUE(runner.heard.empty());
  EXPECT_EQ(ask_json("/api/generate", parse_json<Json>(R"({"model":"none"})"), 404).size(), 1u);
}

TEST_F(Ollama, WhatIsNotServedIsRefused) {
  for (const char* body : {R"({"messages":[{"role":"user","content":"x","images":["aGk="]}]})",
                           R"({"messages":[{"role":"pope","content":"x"}]})", R"({"format":"xml"})",
                           R"({"options":{"temperature":"hot"}})", R"({"tools":[{}]})"}) {
    EXPECT_TRUE(ask_json("/api/chat", body_of(body), 400)["error"].is_string()) << body;
  }
  for (const char* body : {R"({"prompt":"x","suffix":"y"})", R"({"prompt":"x","context":[1]})",
                           R"({"prompt":"x","images":["y"]})", R"({"prompt":"x","template":"y"})"}) {
    EXPECT_EQ(ask("POST", "/api/generate", body).status, 400) << body;
  }
  EXPECT_EQ(ask("POST", "/api/pull", "{}").status, 404);
}

TEST_F(Ollama, ModelsAreListedShownAndLoaded) {
  runner.entries.push_back({"asleep", 1, 10});
  const Json tags = parse_json<Json>(ask("GET", "/api/tags").body);
  EXPECT_EQ(tags["models"].size(), 2u);
  EXPECT_EQ(tags["models"][0]["name"], "scripted");
  EXPECT_EQ(tags["models"][0]["details"]["quantization_level"], "F16");
  const Json ps = parse_json<Json>(ask("GET", "/api/ps").body);
  ASSERT_EQ(ps["models"].size(), 1u);
  EXPECT_EQ(ps["models"][0]["context_length"], 4096);
  const Json show = ask_json("/api/show", {{"model", "scripted"}});
  EXPECT_EQ(show["capabilities"], parse_json<Json>(R"(["completion","tools","thinking"])"));
  EXPECT_EQ(show["model_info"]["scripted.context_length"], 4096);
  EXPECT_EQ(ask_json("/api/show", {{"name", "scripted:latest"}})["details"]["family"], "scripted");
  EXPECT_EQ(ask_json("/api/show", {{"model", "none"}}, 404).size(), 1u);
  EXPECT_TRUE(parse_json<Json>(ask("GET", "/api/version").body)["version"].is_string());
}

}  // namespace
}  // namespace torpor::server
