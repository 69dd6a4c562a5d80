/// /v1/messages and /v1/messages/count_tokens. Names end in the ids of tests/server_acceptance.md.

#include "dialect_fixture.h"

namespace torpor::server {
namespace {

constexpr const char* kMessages = "/v1/messages";

class Anthropic : public DialectTest {
 protected:
  static Json body_of(const char* members = "{}") {
    Json body = parse_json<Json>(members);
    if (!body.contains("messages")) body["messages"] = user("Hi");
    if (!body.contains("max_tokens")) body["max_tokens"] = 100;
    return body;
  }
  Json ask_about(const char* members = "{}") { return ask_json(kMessages, body_of(members)); }
  Json refused(const char* members) {
    const size_t before = runner.heard.size();
    const Json answer = ask_json(kMessages, body_of(members), 400);
    EXPECT_EQ(runner.heard.size(), before) << "it was refused after it had run";
    EXPECT_EQ(answer["type"], "error");
    EXPECT_EQ(answer["error"]["type"], "invalid_request_error");
    return answer["error"]["message"];
  }
  static std::vector<std::string> names(const std::vector<Event>& events) {
    std::vector<std::string> names;
    for (const Event& event : events) {
      names.push_back(event.name);
      EXPECT_EQ(event.json()["type"], event.name);
    }
    return names;
  }
};

TEST_F(Anthropic, AWholeAnswerHasItsBlocksInOrderAndInputTokensWithoutCachedOnes_copilot_api_210) {
  script([](const ChatRequest&, Say& say) {
    say.start(10, 4).thinking("Hm").text("I look.").call("read", {R"({"path":)", R"("a"})"});
    say.finish(StopReason::kToolCalls, 7);
  });
  const Json answer = ask_about();
  EXPECT_EQ(answer["type"], "message");
  EXPECT_EQ(answer["role"], "assistant");
  EXPECT_TRUE(std::string(answer["id"]).starts_with("msg_"));
  ASSERT_EQ(answer["content"].size(), 3u);
  EXPECT_EQ(answer["content"][0]["thinking"], "Hm");
  EXPECT_NE(answer["content"][0]["signature"], "");
  EXPECT_EQ(answer["content"][1], parse_json<Json>(R"({"type":"text","text":"I look."})"));
  EXPECT_EQ(answer["content"][2]["input"], parse_json<Json>(R"({"path":"a"})"));
  EXPECT_TRUE(std::string(answer["content"][2]["id"]).starts_with("toolu_"));
  EXPECT_EQ(answer["stop_reason"], "tool_use");
  EXPECT_TRUE(answer["stop_sequence"].is_null());
  EXPECT_EQ(answer["usage"], parse_json<Json>(R"({"input_tokens":6,"cache_creation_input_tokens":0,
    "cache_read_input_tokens":4,"output_tokens":7})"));
}

TEST_F(Anthropic, AStreamHasOneBlockOpenAtATimeAndOneStart_litellm_33224_32357_13373_opencode_3596) {
  script([](const ChatRequest&, Say& say) {
    say.start(10, 4).thinking("H").thinking("m").text("Look.");
    say.call("read", {R"({"path":)", R"("a"})"}).call("list", {"{}"});
    say.finish(StopReason::kToolCalls, 7);
  });
  const auto events = ask_stream(kMessages, body_of());
  EXPECT_EQ(names(events), (std::vector<std::string>{
      "message_start", "ping",
      "content_block_start", "content_block_delta", "content_block_delta", "content_block_delta", "content_block_stop",
      "content_block_start", "content_block_delta", "content_block_stop",
      "content_block_start", "content_block_delta", "content_block_delta", "content_block_stop",
      "content_block_start", "content_block_delta", "content_block_stop",
      "message_delta", "message_stop"}));
  int open = -1, last = -1;
  for (const Event& event : events) {
    const Json json = event.json();
    if (event.name == "content_block_start") {
      EXPECT_EQ(open, -1);
      open = json["index"];
      EXPECT_EQ(open, ++last);
    } else if (event.name.starts_with("content_block")) {
      EXPECT_EQ(json["index"], open);
      if (event.name == "content_block_stop") open = -1;
    }
  }
  const Json start = events[0].json()["message"];
  EXPECT_EQ(start["content"], Json::array());
  EXPECT_TRUE(start["stop_reason"].is_null());
  EXPECT_EQ(start["usage"]["input_tokens"], 6);
  EXPECT_EQ(start["usage"]["cache_read_input_tokens"], 4);
  EXPECT_EQ(events[3].json()["delta"], parse_json<Json>(R"({"type":"thinking_delta","thinking":"H"})"));
  EXPECT_EQ(events[5].json()["delta"]["type"], "signature_delta");
  EXPECT_EQ(events[8].json()["delta"], parse_json<Json>(R"({"type":"text_delta","text":"Look."})"));
  const Json delta = events[17].json();
  EXPECT_EQ(delta["delta"]["stop_reason"], "tool_use");
  EXPECT_EQ(delta["usage"]["output_tokens"], 7);
  EXPECT_EQ(delta["usage"]["input_tokens"], 6);
}

TEST_F(Anthropic, AToolUseStartsWithAnEmptyInputAndStreamsItsJson_litellm_25561) {
  script([](const ChatRequest&, Say& say) {
    say.start().call("read", {R"({"path":)", R"("a"})"}).finish(StopReason::kToolCalls);
  });
  const auto events = ask_stream(kMessages, body_of());
  const Json block = events[2].json()["content_block"];
  EXPECT_EQ(block["type"], "tool_use");
  EXPECT_EQ(block["name"], "read");
  EXPECT_EQ(block["input"], Json::object());
  std::string input;
  for (const Event& event : events) {
    if (event.name != "content_block_delta") continue;
    EXPECT_EQ(event.json()["delta"]["type"], "input_json_delta");
    input += event.json()["delta"]["partial_json"];
  }
  EXPECT_EQ(input, R"({"path":"a"})");
}

TEST_F(Anthropic, SilenceIsFilledByPingEvents_Router_Maestro_61_llmtrim_221) {
  RecordingResponse& response = ask("POST", kMessages, dump_json(body_of(R"({"stream":true})")));
  EXPECT_EQ(response.ping, "event: ping\ndata: {\"type\": \"ping\"}\n\n");
}

TEST_F(Anthropic, AnErrorAfterTheStartIsAnEvent) {
  script([](const ChatRequest&, Say& say) {
    say.start().text("Hel");
    throw Error(ErrorCode::kIo, "The disk is full.");
  });
  const auto events = ask_stream(kMessages, body_of());
  EXPECT_EQ(events.back().name, "error");
  EXPECT_EQ(events.back().json()["error"], parse_json<Json>(R"({"type":"api_error","message":"The disk is full."})"));
}

TEST_F(Anthropic, ATooLongPromptIsSaidInTheWordsThatClaudeCodeKnows_claude_code_820_12556) {
  script([](const ChatRequest&, Say&) {
    Failure failure(Failure::Kind::kContextTooLong, "too long");
    failure.tokens = 5000;
    failure.maximum = 4096;
    throw failure;
  });
  const Json error = ask_json(kMessages, body_of(R"({"stream":true})"), 400)["error"];
  EXPECT_EQ(error["type"], "invalid_request_error");
  EXPECT_EQ(error["message"], "prompt is too long: 5000 tokens > 4096 maximum");
}

TEST_F(Anthropic, AFullQueueIsOverloaded) {
  script([](const ChatRequest&, Say&) {
    Failure failure(Failure::Kind::kOverloaded, "The queue is full.");
    failure.retry_after = 3;
    throw failure;
  });
  EXPECT_EQ(ask_json(kMessages, body_of(), 529)["error"]["type"], "overloaded_error");
}

TEST_F(Anthropic, TheBillingBlockIsDroppedWhereverItStands_claude_code_24168_llama_cpp_21793) {
  ask_about(R"({"system":[{"type":"text","text":"x-anthropic-billing-header: cc_version=2.1.332.bd5; cc_entrypoint=x"},
    {"type":"text","text":"You help.","cache_control":{"type":"ephemeral"}},{"type":"text","text":"Be short."}]})");
  EXPECT_EQ(heard().messages[0].role, Role::kSystem);
  EXPECT_EQ(heard().messages[0].text, "You help.\nBe short.");
  ask_about(R"({"system":"x-anthropic-billing-header: cc_version=2.1.332.34c;\nYou help."})");
  EXPECT_EQ(heard().messages[0].text, "You help.");
  ask_about(R"({"system":[{"type":"text","text":"x-anthropic-billing-header: a"}]})");
  EXPECT_EQ(heard().messages[0].role, Role::kUser);
}

TEST_F(Anthropic, SystemMessagesInMidConversationAreTheSameAsAStringAndAsBlocks) {
  const char* shapes[] = {R"("Now be long.")",
                          R"([{"type":"text","text":"Now be long.","cache_control":{"type":"ephemeral"}}])"};
  for (const char* shape : shapes) {
    Json body = body_of();
    body["messages"].push_back({{"role", "system"}, {"content", parse_json<Json>(shape)}});
    ask_json(kMessages, body);
    ASSERT_EQ(heard().messages.size(), 2u);
    EXPECT_EQ(heard().messages[1].role, Role::kSystem);
    EXPECT_EQ(heard().messages[1].text, "Now be long.");
  }
}

TEST_F(Anthropic, ATurnThatIsSentBackIsTheMessageThatWasSaid) {
  script([](const ChatRequest&, Say& say) {
    say.start().thinking("Hm \xc3\xa9").text("I look.").call("read", {R"({"path":"a"})"});
    say.finish(StopReason::kToolCalls);
  });
  for (const char* thinking : {R"({"type":"adaptive","display":"omitted"})",
                               R"({"type":"enabled","budget_tokens":1024})"}) {
    Json body = body_of();
    body["thinking"] = parse_json<Json>(thinking);
    const Json answer = ask_json(kMessages, body);
    EXPECT_EQ(answer["content"][0]["thinking"] == "", std::string(thinking).find("omitted") != std::string::npos);
    body["messages"].push_back({{"role", "assistant"}, {"content", answer["content"]}});
    body["messages"].push_back({{"role", "user"}, {"content", Json::array({
        {{"type", "tool_result"}, {"tool_use_id", answer["content"][2]["id"]}, {"content", "text of a"}},
        {{"type", "text"}, {"text", "Go on."}}})}});
    ask_json(kMessages, body);
    ASSERT_EQ(heard().messages.size(), 4u);
    EXPECT_EQ(heard().messages[1].thinking, "Hm \xc3\xa9");
    EXPECT_EQ(heard().messages[1].text, "I look.");
    EXPECT_EQ(heard().messages[1].tool_calls[0].name, "read");
    EXPECT_EQ(heard().messages[1].tool_calls[0].arguments, R"({"path":"a"})");
    EXPECT_EQ(heard().messages[2].role, Role::kTool);
    EXPECT_EQ(heard().messages[2].tool_name, "read");
    EXPECT_EQ(heard().messages[2].text, "text of a");
    EXPECT_EQ(heard().messages[3].text, "Go on.");
  }
}

TEST_F(Anthropic, OmittedThinkingIsNotStreamedButCanBeSentBack) {
  script([](const ChatRequest&, Say& say) { say.start().thinking("Hm").text("Yes").finish(); });
  std::string signature;
  for (const Event& event : ask_stream(kMessages, body_of(R"({"thinking":{"type":"adaptive","display":"omitted"}})"))) {
    if (event.name != "content_block_delta") continue;
    const Json delta = event.json()["delta"];
    EXPECT_NE(delta["type"], "thinking_delta");
    if (delta["type"] == "signature_delta") signature = delta["signature"];
  }
  Json body = body_of();
  body["messages"].push_back({{"role", "assistant"}, {"content", Json::array({
      {{"type", "thinking"}, {"thinking", ""}, {"signature", signature}}, {{"type", "text"}, {"text", "Yes"}}})}});
  body["messages"].push_back({{"role", "user"}, {"content", "And?"}});
  ask_json(kMessages, body);
  EXPECT_EQ(heard().messages[1].thinking, "Hm");
}

TEST_F(Anthropic, ToolResultsAreTextOrBlocks) {
  ask_about(R"({"messages":[{"role":"assistant","content":[{"type":"tool_use","id":"t1","name":"read","input":{}}]},
    {"role":"user","content":[{"type":"tool_result","tool_use_id":"t1","content":[{"type":"text","text":"a"},
      {"type":"text","text":"b"}]},{"type":"tool_result","tool_use_id":"t2"}]}]})");
  EXPECT_EQ(heard().messages[1].text, "a\nb");
  EXPECT_EQ(heard().messages[2].text, "");
  EXPECT_EQ(heard().messages[2].tool_name, "");
}

TEST_F(Anthropic, ARequestOfClaudeCodesShapeIsRead) {
  const Json body = body_of(R"({"model":"scripted","max_tokens":32000,"stream":false,
    "thinking":{"type":"adaptive","display":"omitted"},
    "context_management":{"edits":[{"type":"clear_thinking_20251015"}]},
    "output_config":{"effort":"high"},"stop_sequences":["END"],"temperature":1,"top_k":5,"top_p":0.5,
    "metadata":{"user_id":"{\"device_id\":\"d\",\"account_uuid\":\"\",\"session_id\":\"s-1\"}"},
    "tools":[{"name":"read","description":"Reads.","input_schema":{
      "$schema":"https://json-schema.org/draft/2020-12/schema","type":"object"},"defer_loading":true},{"type":"web_search_20250305","name":"web_search"}],
    "tool_choice":{"type":"auto","disable_parallel_tool_use":true}})");
  ask_json(kMessages, body, 200, {{"anthropic-beta", "a-2025,b-2026"}, {"x-claude-code-session-id", "s-2"}});
  const ChatRequest& request = heard();
  EXPECT_EQ(request.session, "s-1");
  EXPECT_EQ(request.max_tokens, 32000);
  EXPECT_EQ(request.stop, std::vector<std::string>{"END"});
  EXPECT_EQ(request.sampling.top_k, 5);
  EXPECT_EQ(request.template_arguments, parse_json<Json>(R"({"enable_thinking":true,"reasoning_effort":"high"})"));
  ASSERT_EQ(request.tools.size(), 1u);
  EXPECT_EQ(request.tools[0].parameters["type"], "object");
  EXPECT_FALSE(request.parallel_tool_calls);
  ask_json(kMessages, body_of(), 200, {{"x-claude-code-session-id", "s-2"}});
  EXPECT_EQ(heard().session, "s-2");
}

TEST_F(Anthropic, ToolChoicesAreRead_mlx_vlm_2000) {
  const std::string tools = R"({"tools":[{"name":"read","input_schema":{}}],"tool_choice":)";
  ask_about((tools + R"({"type":"any"}})").c_str());
  EXPECT_EQ(heard().tool_choice.kind, ToolChoice::Kind::kRequired);
  ask_about((tools + R"({"type":"tool","name":"read"}})").c_str());
  EXPECT_EQ(heard().tool_choice.kind, ToolChoice::Kind::kNamed);
  EXPECT_EQ(heard().tool_choice.name, "read");
  ask_about((tools + R"({"type":"none"}})").c_str());
  EXPECT_EQ(heard().tool_choice.kind, ToolChoice::Kind::kNone);
}

TEST_F(Anthropic, AStopSequenceIsNamed) {
  script([](const ChatRequest&, Say& say) { say.start().text("a").finish(StopReason::kStopString, 1, 0, "END"); });
  const Json answer = ask_about();
  EXPECT_EQ(answer["stop_reason"], "stop_sequence");
  EXPECT_EQ(answer["stop_sequence"], "END");
}

TEST_F(Anthropic, WhatIsNotServedIsRefused) {
  for (const auto& [body, param] : std::vector<std::pair<const char*, const char*>>{
           {R"({"messages":[]})", "messages"},
           {R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]})", "messages"},
           {R"({"messages":[{"role":"user","content":[{"type":"image","source":{}}]}]})", "messages[0].content[0]"},
           {R"({"messages":[{"role":"user","content":[{"type":"document","source":{"type":"base64"}}]}]})",
            "messages[0].content[0]"},
           {R"({"messages":[{"role":"user"}]})", "messages[0].content"},
           {R"({"messages":[{"role":"tool","content":"x"}]})", "messages[0].role"},
           {R"({"mcp_servers":[{"type":"url"}]})", "mcp_servers"},
           {R"({"max_tokens":0})", "max_tokens"},
           {R"({"tool_choice":{"type":"any"}})", "tool_choice"},
           {R"({"tool_choice":{"type":"tool","name":"x"}})", "tool_choice.name"},
           {R"({"system":[{"type":"image"}]})", "system[0].type"}}) {
    EXPECT_NE(refused(body).get<std::string>().find("'" + std::string(param) + "'"), std::string::npos) << body;
  }
}

TEST_F(Anthropic, TokensAreCountedAsTheTurnWouldHaveThem) {
  Json body = body_of(R"({"system":"You help."})");
  body.erase("max_tokens");
  EXPECT_EQ(ask_json("/v1/messages/count_tokens", body), parse_json<Json>(R"({"input_tokens":42})"));
  EXPECT_EQ(heard().messages.size(), 2u);
}

TEST_F(Anthropic, ErrorsAndModelsHaveAnthropicsForm) {
  EXPECT_EQ(ask_json("/v1/messages/what", Json::object(), 404)["error"]["type"], "not_found_error");
  const HttpHeaders version{{"anthropic-version", "2023-06-01"}};
  const Json list = parse_json<Json>(ask("GET", "/v1/models", "", version).body);
  EXPECT_EQ(list["data"][0]["type"], "model");
  EXPECT_EQ(list["data"][0]["created_at"], "2023-11-14T22:13:20Z");
  EXPECT_EQ(list["has_more"], false);
  EXPECT_EQ(list["last_id"], "scripted");
  EXPECT_EQ(parse_json<Json>(ask("GET", "/v1/models/none", "", version).body)["type"], "error");
}

}  // namespace
}  // namespace torpor::server
