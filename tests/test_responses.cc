/// /v1/responses. Names end in the ids of tests/server_acceptance.md.

#include <set>

#include "dialect_fixture.h"
#include "server/response_store.h"

namespace torpor::server {
namespace {

constexpr const char* kResponses = "/v1/responses";

class Responses : public DialectTest {
 protected:
  static Json body_of(const char* members = "{}") {
    Json body = parse_json<Json>(members);
    if (!body.contains("input")) body["input"] = "Hi";
    return body;
  }
  Json ask_about(const char* members = "{}") { return ask_json(kResponses, body_of(members)); }
  static std::vector<std::string> names(const std::vector<Event>& events) {
    std::vector<std::string> names;
    for (const Event& event : events) {
      names.push_back(event.name.substr(std::string("response.").size()));
      EXPECT_EQ(event.json()["type"], event.name);
      EXPECT_EQ(event.json()["sequence_number"], int(names.size()) - 1);
    }
    return names;
  }
};

TEST_F(Responses, AWholeAnswerHasItsItemsAndUsage) {
  script([](const ChatRequest&, Say& say) {
    say.start(10, 4).thinking("Hm").text("I look.").call("read", {R"({"path":)", R"("a"})"});
    say.finish(StopReason::kToolCalls, 7, 2);
  });
  const Json answer = ask_about();
  EXPECT_EQ(answer["object"], "response");
  EXPECT_EQ(answer["status"], "completed");
  EXPECT_TRUE(std::string(answer["id"]).starts_with("resp_"));
  ASSERT_EQ(answer["output"].size(), 3u);
  EXPECT_EQ(answer["output"][0]["type"], "reasoning");
  EXPECT_EQ(answer["output"][0]["content"][0]["text"], "Hm");
  EXPECT_FALSE(answer["output"][0].contains("encrypted_content"));
  EXPECT_EQ(answer["output"][1]["content"][0]["text"], "I look.");
  EXPECT_EQ(answer["output"][2]["type"], "function_call");
  EXPECT_EQ(answer["output"][2]["arguments"], R"({"path":"a"})");
  EXPECT_EQ(answer["usage"], parse_json<Json>(R"({"input_tokens":10,"input_tokens_details":{"cached_tokens":4},
    "output_tokens":7,"output_tokens_details":{"reasoning_tokens":2},"total_tokens":17})"));
}

TEST_F(Responses, DeltasStandInsideAnOpenItemAndTheEndHasIdAndUsage_sub2api_2875_llm_rosetta_56_litellm_28899) {
  script([](const ChatRequest&, Say& say) {
    say.start(10, 4).thinking("Hm").text("Lo").text("ok.").call("read", {R"({"path":)", R"("a"})"});
    say.finish(StopReason::kToolCalls, 7);
  });
  const auto events = ask_stream(kResponses, body_of());
  EXPECT_EQ(names(events), (std::vector<std::string>{
      "created", "in_progress",
      "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done",
      "output_item.done",
      "output_item.added", "content_part.added", "output_text.delta", "output_text.delta", "output_text.done",
      "content_part.done", "output_item.done",
      "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
      "function_call_arguments.done", "output_item.done",
      "completed"}));
  std::string open;
  std::set<std::string> seen;
  for (const Event& event : events) {
    const Json json = event.json();
    if (event.name == "response.output_item.added") {
      EXPECT_EQ(open, "");
      open = json["item"]["id"];
      EXPECT_TRUE(seen.insert(open).second);
      EXPECT_EQ(json["output_index"], int(seen.size()) - 1);
    } else if (event.name == "response.output_item.done") {
      EXPECT_EQ(json["item"]["id"], open);
      open.clear();
    } else if (json.contains("item_id")) {
      EXPECT_EQ(json["item_id"], open);
    }
  }
  const Json response = events.back().json()["response"];
  EXPECT_EQ(response["id"], events[0].json()["response"]["id"]);
  EXPECT_EQ(response["status"], "completed");
  EXPECT_EQ(response["output"].size(), 3u);
  EXPECT_EQ(response["output"][1]["content"][0]["text"], "Look.");
  EXPECT_EQ(response["usage"]["input_tokens_details"]["cached_tokens"], 4);
  EXPECT_EQ(events[19].json()["item"], response["output"][2]);
}

TEST_F(Responses, AnAnswerThatWasCutIsIncomplete) {
  script([](const ChatRequest&, Say& say) { say.start().text("a").finish(StopReason::kLength); });
  const Json answer = ask_about();
  EXPECT_EQ(answer["status"], "incomplete");
  EXPECT_EQ(answer["incomplete_details"]["reason"], "max_output_tokens");
  EXPECT_EQ(ask_stream(kResponses, body_of()).back().name, "response.incomplete");
}

TEST_F(Responses, AnErrorAfterTheStartIsAFailedResponse) {
  script([](const ChatRequest&, Say& say) {
    say.start().text("Hel");
    throw Error(ErrorCode::kIo, "The disk is full.");
  });
  const Event last = ask_stream(kResponses, body_of()).back();
  EXPECT_EQ(last.name, "response.failed");
  EXPECT_EQ(last.json()["response"]["status"], "failed");
  EXPECT_EQ(last.json()["response"]["error"]["message"], "The disk is full.");
}

TEST_F(Responses, ATooLongPromptHasTheCodeThatCodexKnows) {
  script([](const ChatRequest&, Say&) {
    Failure failure(Failure::Kind::kContextTooLong, "too long");
    failure.tokens = 5000;
    failure.maximum = 4096;
    throw failure;
  });
  EXPECT_EQ(ask_json(kResponses, body_of(), 400)["error"]["code"], "context_length_exceeded");
}

TEST_F(Responses, ARequestOfCodexsShapeIsRead_llama_cpp_20156_23041_codex_10635_23465) {
  Json body = body_of(R"({"model":"scripted","store":false,"stream":false,"tool_choice":"auto",
    "parallel_tool_calls":true,"reasoning":{"summary":"auto","effort":"high"},"include":["reasoning.encrypted_content"],
    "prompt_cache_key":"s-1","client_metadata":{"x":"y"},"text":{"verbosity":"low"},
    "tools":[{"type":"function","name":"shell","description":"Runs.","strict":false,"parameters":{"type":"object"}},
      {"type":"namespace","name":"mcp__files","description":"Files.","tools":[{"type":"function","name":"read",
        "parameters":{"type":"object"}}]},
      {"type":"web_search","external_web_access":false}],
    "input":[{"type":"message","role":"developer","content":[{"type":"input_text","text":"You are."}]},
      {"type":"message","role":"developer","content":[{"type":"input_text","text":"Rules."}]},
      {"type":"message","role":"user","content":[{"type":"input_text","text":"<environment/>"}]},
      {"type":"message","role":"user","content":[{"type":"input_text","text":"Read a."}]},
      {"type":"reasoning","summary":[],"content":null,"encrypted_content":"elsewhere"},
      {"type":"message","role":"assistant","content":[{"type":"output_text","text":"I read."}]},
      {"type":"function_call","name":"read","namespace":"mcp__files","arguments":"{\"path\":\"a\"}","call_id":"c1"},
      {"type":"function_call","name":"shell","arguments":"{}","call_id":"c2"},
      {"type":"function_call_output","call_id":"c1","output":"text of a"},
      {"type":"function_call_output","call_id":"c2","output":[{"type":"input_text","text":"done"}]}]})");
  script([](const ChatRequest&, Say& say) {
    say.start().call("mcp__files__read", {"{}"}).finish(StopReason::kToolCalls);
  });
  const Json answer = ask_json(kResponses, body);
  EXPECT_EQ(answer["output"][0]["name"], "read");
  EXPECT_EQ(answer["output"][0]["namespace"], "mcp__files");
  const ChatRequest& request = heard();
  EXPECT_EQ(request.session, "s-1");
  EXPECT_EQ(request.template_arguments, parse_json<Json>(R"({"reasoning_effort":"high"})"));
  ASSERT_EQ(request.tools.size(), 2u);
  EXPECT_EQ(request.tools[1].name, "mcp__files__read");
  ASSERT_EQ(request.messages.size(), 7u);
  EXPECT_EQ(request.messages[0].role, Role::kSystem);
  EXPECT_EQ(request.messages[1].role, Role::kSystem);
  EXPECT_EQ(request.messages[4].text, "I read.");
  ASSERT_EQ(request.messages[4].tool_calls.size(), 2u);
  EXPECT_EQ(request.messages[4].tool_calls[0].name, "mcp__files__read");
  EXPECT_EQ(request.messages[5].tool_name, "mcp__files__read");
  EXPECT_EQ(request.messages[5].text, "text of a");
  EXPECT_EQ(request.messages[6].text, "done");
  EXPECT_EQ(ask("GET", std::string(kResponses) + "/" + std::string(answer["id"])).status, 404) << "it was stored";
}

TEST_F(Responses, ReasoningThatIsSentBackIsTheThinkingThatWasThought) {
  script([](const ChatRequest&, Say& say) { say.start().thinking("Hm").text("Yes").finish(); });
  for (const bool show : {true, false}) {
    Json body = body_of(R"({"include":["reasoning.encrypted_content"]})");
    Json output = ask_json(kResponses, body)["output"];
    if (!show) output[0]["content"] = Json();  // Codex sends it back so
    body["input"] = Json::array({{{"role", "user"}, {"content", "Hi"}}, output[0], output[1],
                                 {{"role", "user"}, {"content", "And?"}}});
    ask_json(kResponses, body);
    ASSERT_EQ(heard().messages.size(), 3u);
    EXPECT_EQ(heard().messages[1].thinking, "Hm");
    EXPECT_EQ(heard().messages[1].text, "Yes");
  }
}

TEST_F(Responses, APreviousResponseIsGoneOnFrom) {
  const Json first = ask_about(R"({"instructions":"Be short."})");
  EXPECT_EQ(first["store"], true);
  Json body = body_of(R"({"input":"And?"})");
  body["previous_response_id"] = first["id"];
  const Json second = ask_json(kResponses, body);
  ASSERT_EQ(heard().messages.size(), 3u);  // instructions are the request's own
  EXPECT_EQ(heard().messages[0].text, "Hi");
  EXPECT_EQ(heard().messages[1].text, "Hello.");
  EXPECT_EQ(heard().messages[2].text, "And?");
  body["previous_response_id"] = second["id"];
  for (const Event& event : ask_stream(kResponses, body)) {
    if (event.name == "response.completed") body["previous_response_id"] = event.json()["response"]["id"];
  }
  ask_json(kResponses, body);
  EXPECT_EQ(heard().messages.size(), 7u);
  const std::string path = std::string(kResponses) + "/" + std::string(first["id"]);
  EXPECT_EQ(parse_json<Json>(ask("GET", path).body), first);
  EXPECT_EQ(parse_json<Json>(ask("GET", path + "/input_items").body)["data"][0]["content"], "Hi");
  EXPECT_EQ(parse_json<Json>(ask("DELETE", path).body)["deleted"], true);
  EXPECT_EQ(ask("GET", path).status, 404);
  EXPECT_EQ(ask("DELETE", path).status, 404);
  body["previous_response_id"] = first["id"];
  EXPECT_EQ(ask_json(kResponses, body, 404)["error"]["param"], "previous_response_id");
}

TEST_F(Responses, AnAnswerIsKeptFromOtherTenants_gonka_1550) {
  const Json first = ask_about();
  HttpRequest request;
  request.method = "GET";
  request.path = std::string(kResponses) + "/" + std::string(first["id"]);
  request.tenant = "another";
  RecordingResponse response;
  dialects.handle(request, response);
  EXPECT_EQ(response.status, 404);
}

TEST_F(Responses, WhatIsNotServedIsRefusedByName) {
  for (const auto& [body, param] : std::vector<std::pair<const char*, const char*>>{
           {R"({"background":true})", "background"},
           {R"({"conversation":"c"})", "conversation"},
           {R"({"prompt":{"id":"p"}})", "prompt"},
           {R"({"top_logprobs":21})", "top_logprobs"},
           {R"({"input":[]})", "input"},
           {R"({"input":[{"type":"computer_call"}]})", "input[0].type"},
           {R"({"input":[{"role":"user","content":[{"type":"input_image","image_url":"x"}]}]})", "input[0].content[0]"},
           {R"({"max_output_tokens":0})", "max_output_tokens"},
           {R"({"text":{"format":{"type":"json_schema","name":"x"}}})", "text.format.schema"}}) {
    EXPECT_EQ(ask_json(kResponses, body_of(body), 400)["error"]["param"], param) << body;
  }
  EXPECT_TRUE(runner.heard.empty());
}

TEST_F(Responses, LogprobsStandInTheItemInItsDeltasAndAtItsEnd) {
  script([](const ChatRequest& request, Say& say) {
    const int top = *request.logprobs;
    say.start().tokens({"He", "l"}, top).text("Hel").tokens({"lo."}, top, 3).text("lo.").finish();
  });
  const Json included = ask_json(kResponses, body_of(R"({"include":["message.output_text.logprobs"]})"));
  EXPECT_EQ(heard().logprobs, 0);
  const Json all = included["output"][0]["content"][0]["logprobs"];
  ASSERT_EQ(all.size(), 3u);
  EXPECT_EQ(all[2]["token"], "lo.");
  EXPECT_TRUE(all[2]["top_logprobs"].empty());
  const Json wanted = body_of(R"({"top_logprobs":1})");
  const Json whole = ask_json(kResponses, wanted);
  EXPECT_EQ(whole["top_logprobs"], 1);
  const Json tokens = whole["output"][0]["content"][0]["logprobs"];
  EXPECT_EQ(tokens[0]["top_logprobs"][0]["token"], "He");
  Json deltas = Json::array();
  for (const Event& event : ask_stream(kResponses, wanted)) {
    const Json json = event.json();
    if (event.name == "response.output_text.delta") {
      deltas.insert(deltas.end(), json["logprobs"].begin(), json["logprobs"].end());
    }
    if (event.name == "response.output_text.done") EXPECT_EQ(json["logprobs"], tokens);
    if (event.name == "response.content_part.added") EXPECT_TRUE(json["part"]["logprobs"].empty());
  }
  EXPECT_EQ(deltas, tokens);
}

StoredResponse stored(const std::string& id, const std::string& text = {}) {
  return {id, "tenant", Json{{"text", text}}, Json::array(), Json::array()};
}

TEST(ResponseStore, TheOldestGoesFirstByCountAndByBytes) {
  ResponseStore few({}, {std::chrono::hours(1), 2, 1000});
  for (const char* id : {"a", "b", "c"}) few.put(stored(id));
  EXPECT_FALSE(few.find("tenant", "a"));
  EXPECT_TRUE(few.find("tenant", "b"));
  EXPECT_TRUE(few.find("tenant", "c"));
  ResponseStore small({}, {std::chrono::hours(1), 9, 600});
  small.put(stored("a", std::string(300, 'x')));
  EXPECT_TRUE(small.find("tenant", "a"));
  small.put(stored("b", std::string(300, 'x')));
  EXPECT_FALSE(small.find("tenant", "a"));
  EXPECT_TRUE(small.find("tenant", "b"));
}

TEST(ResponseStore, AnAnswerThatHasLivedItsTimeIsGone) {
  ResponseStore none({}, {std::chrono::seconds(0), 9, 1000});
  none.put(stored("a"));
  EXPECT_FALSE(none.find("tenant", "a"));
}

}  // namespace
}  // namespace torpor::server
