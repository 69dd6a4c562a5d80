/// /v1/chat/completions, /v1/completions and /v1/models. Names end in the ids of tests/server_acceptance.md.

#include "dialect_fixture.h"
#include "torpor/model_info.h"

namespace torpor::server {
namespace {

constexpr const char* kChat = "/v1/chat/completions";

class OpenAiChat : public DialectTest {
 protected:
  Json ask_about(Json body) {
    if (!body.contains("messages")) body["messages"] = user("Hi");
    return ask_json(kChat, body);
  }
  /// The error of a body that is refused.
  Json refused(Json body) {
    if (!body.contains("messages")) body["messages"] = user("Hi");
    const size_t before = runner.heard.size();
    const Json error = ask_json(kChat, body, 400)["error"];
    EXPECT_EQ(runner.heard.size(), before) << "it was refused after it had run";
    EXPECT_EQ(error["type"], "invalid_request_error");
    return error;
  }
};

TEST_F(OpenAiChat, AWholeAnswerHasTextUsageAndTheHeadersOfItsAgent) {
  script([](const ChatRequest&, Say& say) {
    say.start(10, 4, "ada", "message 2: \"caf\xc3\xa9\n\"").thinking("Hm").text("Hel").text("lo.");
    say.finish(StopReason::kEnd, 7, 2);
  });
  RecordingResponse& response = ask("POST", kChat, R"({"messages":[{"role":"user","content":"Hi"}]})");
  EXPECT_EQ(response.status, 200);
  EXPECT_EQ(response.header("x-torpor-agent"), "ada");
  EXPECT_EQ(response.header("x-torpor-cached"), "4");
  EXPECT_EQ(response.header("x-torpor-why"), "message 2: \"caf???\"");
  const Json answer = parse_json<Json>(response.body);
  EXPECT_EQ(answer["object"], "chat.completion");
  EXPECT_EQ(answer["model"], "scripted");
  EXPECT_TRUE(std::string(answer["id"]).starts_with("chatcmpl-"));
  const Json& choice = answer["choices"][0];
  EXPECT_EQ(choice["finish_reason"], "stop");
  EXPECT_EQ(choice["message"]["role"], "assistant");
  EXPECT_EQ(choice["message"]["content"], "Hello.");
  EXPECT_EQ(choice["message"]["reasoning_content"], "Hm");
  EXPECT_EQ(answer["usage"], parse_json<Json>(R"({"prompt_tokens":10,"completion_tokens":7,"total_tokens":17,
    "prompt_tokens_details":{"cached_tokens":4},"completion_tokens_details":{"reasoning_tokens":2}})"));
}

TEST_F(OpenAiChat, AStreamBeginsWithTheRoleAndEndsWithTheReasonAndDone) {
  const auto events = ask_stream(kChat, {{"messages", user("Hi")}});
  ASSERT_EQ(events.size(), 5u);
  EXPECT_EQ(events[0].json()["choices"][0]["delta"], parse_json<Json>(R"({"role":"assistant","content":""})"));
  EXPECT_EQ(events[1].json()["choices"][0]["delta"]["content"], "Hel");
  EXPECT_EQ(events[2].json()["choices"][0]["delta"]["content"], "lo.");
  EXPECT_TRUE(events[2].json()["choices"][0]["finish_reason"].is_null());
  EXPECT_EQ(events[3].json()["choices"][0]["finish_reason"], "stop");
  EXPECT_FALSE(events[3].json().contains("usage"));
  EXPECT_EQ(events[4].data, "[DONE]");
  for (const Event& event : events) EXPECT_EQ(event.name, "");
}

TEST_F(OpenAiChat, TheUsageChunkThatWasAskedForHasNoChoices_mlx_serve_PR147) {
  const auto events = ask_stream(kChat, {{"messages", user("Hi")}, {"stream_options", {{"include_usage", true}}}});
  ASSERT_EQ(events.size(), 6u);
  const Json usage = events[4].json();
  EXPECT_EQ(usage["choices"], Json::array());
  EXPECT_EQ(usage["usage"]["prompt_tokens_details"]["cached_tokens"], 4);
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(events[i].json()["usage"].is_null());
}

TEST_F(OpenAiChat, StreamedCallsHaveIndexAndIdAndTheirArgumentsTheIndexAlone_ollama_7881_7963_continue_13225) {
  script([](const ChatRequest&, Say& say) {
    say.start().text("I look.").call("read", {R"({"path":)", R"("a"})"}).call("list", {"{}"});
    say.finish(StopReason::kToolCalls);
  });
  const auto events = ask_stream(kChat, {{"messages", user("Hi")}});
  std::vector<Json> calls;
  for (const Event& event : events) {
    if (event.data == "[DONE]") continue;
    const Json delta = event.json()["choices"][0]["delta"];
    if (delta.contains("tool_calls")) calls.push_back(delta["tool_calls"][0]);
  }
  ASSERT_EQ(calls.size(), 5u);
  EXPECT_EQ(calls[0]["index"], 0);
  EXPECT_EQ(calls[0]["type"], "function");
  EXPECT_TRUE(std::string(calls[0]["id"]).starts_with("call_"));
  EXPECT_EQ(calls[0]["function"], parse_json<Json>(R"({"name":"read","arguments":""})"));
  EXPECT_EQ(calls[1], parse_json<Json>(R"({"index":0,"function":{"arguments":"{\"path\":"}})"));
  EXPECT_EQ(calls[2]["index"], 0);
  EXPECT_EQ(calls[3]["index"], 1);
  EXPECT_NE(calls[3]["id"], calls[0]["id"]);
  EXPECT_EQ(calls[4]["index"], 1);
  EXPECT_EQ(events[events.size() - 2].json()["choices"][0]["finish_reason"], "tool_calls");
}

TEST_F(OpenAiChat, StreamedAndWholeAnswersHaveTheSameCalls_litellm_35663_37792_mlx_serve_287) {
  script([](const ChatRequest&, Say& say) {
    say.start().call("read", {R"({"path":)", R"("a"})"}).call("read", {R"({"path":"b"})"});
    say.finish(StopReason::kToolCalls);
  });
  const Json whole = ask_about({});
  const Json& message = whole["choices"][0]["message"];
  EXPECT_TRUE(message["content"].is_null());
  EXPECT_EQ(whole["choices"][0]["finish_reason"], "tool_calls");
  std::vector<std::string> streamed(2);
  for (const Event& event : ask_stream(kChat, {{"messages", user("Hi")}})) {
    if (event.data == "[DONE]") continue;
    const Json delta = event.json()["choices"][0]["delta"];
    if (!delta.contains("tool_calls")) continue;
    const Json& call = delta["tool_calls"][0];
    streamed[size_t(call["index"])] += call["function"]["arguments"].get<std::string>();
  }
  ASSERT_EQ(message["tool_calls"].size(), 2u);
  for (size_t i = 0; i < 2; ++i) EXPECT_EQ(message["tool_calls"][i]["function"]["arguments"], streamed[i]);
}

TEST_F(OpenAiChat, ReasoningIsStreamedBesideTheText) {
  script([](const ChatRequest&, Say& say) { say.start().thinking("Hm").text("Yes").finish(); });
  const auto events = ask_stream(kChat, {{"messages", user("Hi")}});
  EXPECT_EQ(events[1].json()["choices"][0]["delta"], parse_json<Json>(R"({"reasoning_content":"Hm"})"));
  EXPECT_EQ(events[2].json()["choices"][0]["delta"], parse_json<Json>(R"({"content":"Yes"})"));
}

TEST_F(OpenAiChat, AStreamIsKeptAliveByComments_omlx_839) {
  const char* body = R"({"stream":true,"messages":[{"role":"user","content":"Hi"}]})";
  EXPECT_TRUE(ask("POST", kChat, body).ping.starts_with(":"));
}

TEST_F(OpenAiChat, AnErrorBeforeTheStartIsAnHttpStatusAlsoOfAStream_lmstudio_2322) {
  script([](const ChatRequest&, Say&) { throw Failure(Failure::Kind::kNotFound, "There is no model 'x'.", "model"); });
  RecordingResponse& response = ask("POST", kChat, R"({"stream":true,"messages":[{"role":"user","content":"Hi"}]})");
  EXPECT_EQ(response.status, 404);
  EXPECT_EQ(response.header("x-should-retry"), "false");
  EXPECT_EQ(parse_json<Json>(response.body)["error"]["param"], "model");
}

TEST_F(OpenAiChat, AnErrorAfterTheStartIsSaidInTheStreamWhichThenEndsWithoutDone) {
  script([](const ChatRequest&, Say& say) {
    say.start().text("Hel");
    throw Error(ErrorCode::kIo, "The disk is full.");
  });
  const auto events = ask_stream(kChat, {{"messages", user("Hi")}});
  EXPECT_EQ(events.back().json()["error"]["message"], "The disk is full.");
  EXPECT_EQ(events.back().json()["error"]["type"], "server_error");
}

TEST_F(OpenAiChat, ATooLongPromptHasTheCodeThatClientsCompactOn_ollama_3839_14259) {
  for (const bool found_late : {false, true}) {  // by the server, or by the engine: with the tokens that the agent holds
    script([found_late](const ChatRequest&, Say&) {
      if (found_late) throw Error(ErrorCode::kResourceExhausted, "too long").with_field(kContextFull, "4096", "5000");
      Failure failure(Failure::Kind::kContextTooLong, "too long");
      failure.tokens = 5000;
      failure.maximum = 4096;
      throw failure;
    });
    const Json error = ask_json(kChat, {{"messages", user("Hi")}}, 400)["error"];
    EXPECT_EQ(error["code"], "context_length_exceeded");
    EXPECT_NE(std::string(error["message"]).find("4096 tokens"), std::string::npos);
  }
}

TEST_F(OpenAiChat, AFullQueueIs429WithRetryAfterAndMayBeRetried) {
  script([](const ChatRequest&, Say&) {
    Failure failure(Failure::Kind::kOverloaded, "The queue is full.");
    failure.retry_after = 3;
    throw failure;
  });
  RecordingResponse& response = ask("POST", kChat, R"({"messages":[{"role":"user","content":"Hi"}]})");
  EXPECT_EQ(response.status, 429);
  EXPECT_EQ(response.header("retry-after"), "3");
  EXPECT_EQ(response.header("x-should-retry"), "");
}

TEST_F(OpenAiChat, AClientThatGoesIsSeenInEachShape_mlx_serve) {
  bool seen = false;
  script([&](const ChatRequest&, Say& say) {
    seen = say.gone();
    throw Error(ErrorCode::kCancelled, "The turn was cancelled.");
  });
  for (const char* stream : {"true", "false"}) {
    HttpRequest request;
    request.method = "POST";
    request.path = kChat;
    request.body = std::string(R"({"messages":[{"role":"user","content":"Hi"}],"stream":)") + stream + "}";
    RecordingResponse response;
    response.left = true;
    dialects.handle(request, response);
    EXPECT_TRUE(std::exchange(seen, false));
  }
}

TEST_F(OpenAiChat, AllTextPartsOfAMessageAreUsed_mlx_serve_195) {
  ask_about({{"messages", user(parse_json<Json>(R"([{"type":"text","text":"One"},{"type":"text","text":"two"}])"))}});
  EXPECT_EQ(heard().messages[0].text, "One\ntwo");
  ask_about({{"messages", user(parse_json<Json>(R"([{"type":"text","text":"One"}])"))}});
  EXPECT_EQ(heard().messages[0].text, "One");
}

TEST_F(OpenAiChat, AnImageIsRefusedByItsPlace) {
  const Json error = refused({{"messages", user(parse_json<Json>(
      R"([{"type":"text","text":"One"},{"type":"image_url","image_url":{"url":"data:"}}])"))}});
  EXPECT_EQ(error["param"], "messages[0].content[1]");
}

TEST_F(OpenAiChat, DeveloperAndSystemMessagesStandWhereTheyWere_ollama_17774) {
  ask_about({{"messages",
              parse_json<Json>(R"([{"role":"developer","content":"Be short."},{"role":"user","content":"Hi"},
    {"role":"assistant","content":"Yes?"},{"role":"system","content":"Now be long."},
    {"role":"user","content":"Go"}])")}});
  const auto& messages = heard().messages;
  ASSERT_EQ(messages.size(), 5u);
  EXPECT_EQ(messages[0].role, Role::kSystem);
  EXPECT_EQ(messages[3].role, Role::kSystem);
  EXPECT_EQ(messages[3].text, "Now be long.");
}

TEST_F(OpenAiChat, AHistoryWithCallsAndThinkingIsRead) {
  ask_about({{"messages", parse_json<Json>(R"([{"role":"user","content":"Hi"},
    {"role":"assistant","content":null,"reasoning_content":"Hm","tool_calls":[{"id":"c1","type":"function",
      "function":{"name":"read","arguments":"{\"path\": \"a\"}"}}]},
    {"role":"tool","tool_call_id":"c1","content":"text of a"}])")}});
  const Message& call = heard().messages[1];
  EXPECT_EQ(call.thinking, "Hm");
  EXPECT_EQ(call.text, "");
  ASSERT_EQ(call.tool_calls.size(), 1u);
  EXPECT_EQ(call.tool_calls[0].arguments, R"({"path": "a"})");
  EXPECT_EQ(heard().messages[2].tool_name, "read");
  EXPECT_EQ(heard().messages[2].text, "text of a");
}

TEST_F(OpenAiChat, ArgumentsThatAreNoJsonAreRefused) {
  const Json error = refused({{"messages", parse_json<Json>(R"([{"role":"assistant","tool_calls":[{"id":"c1",
    "function":{"name":"read","arguments":"{\"path\""}}]}])")}});
  EXPECT_EQ(error["param"], "messages[0].tool_calls[0].function.arguments");
}

TEST_F(OpenAiChat, OptionsAreRead) {
  ask_about(parse_json<Json>(R"({"model":"scripted@ada","temperature":0.5,"top_p":0.9,"top_k":40,"min_p":0.05,"seed":7,
    "presence_penalty":0.5,"frequency_penalty":-0.5,"repetition_penalty":1.1,"logit_bias":{"12":-100},
    "max_tokens":5,"max_completion_tokens":6,"stop":["a","b"],"reasoning_effort":"low","prompt_cache_key":"s1",
    "chat_template_kwargs":{"enable_thinking":false},"metadata":{"x":"y"},"unknown":{"deep":[1]},
    "tools":[{"type":"function","function":{"name":"read","description":"Reads.","parameters":{"type":"object"},
      "strict":true}},{"type":"web_search"}],"tool_choice":{"type":"function","function":{"name":"read"}},
    "parallel_tool_calls":false})"));
  const ChatRequest& request = heard();
  EXPECT_EQ(request.model, "scripted");
  EXPECT_EQ(request.agent, "ada");
  EXPECT_EQ(request.session, "s1");
  EXPECT_EQ(request.tenant, "tenant");
  EXPECT_EQ(request.sampling.temperature, 0.5);
  EXPECT_EQ(request.sampling.top_p, 0.9);
  EXPECT_EQ(request.sampling.top_k, 40);
  EXPECT_EQ(request.sampling.min_p, 0.05);
  EXPECT_EQ(request.sampling.seed, 7u);
  EXPECT_EQ(request.sampling.presence_penalty, 0.5);
  EXPECT_EQ(request.sampling.frequency_penalty, -0.5);
  EXPECT_EQ(request.sampling.repetition_penalty, 1.1);
  EXPECT_EQ(request.sampling.logit_bias, (std::vector<std::pair<int, double>>{{12, -100}}));
  EXPECT_EQ(request.max_tokens, 6);
  EXPECT_EQ(request.stop, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(request.template_arguments, parse_json<Json>(R"({"reasoning_effort":"low","enable_thinking":false})"));
  ASSERT_EQ(request.tools.size(), 1u);
  EXPECT_EQ(request.tools[0].name, "read");
  EXPECT_TRUE(request.tools[0].strict);
  EXPECT_EQ(request.tool_choice.kind, ToolChoice::Kind::kNamed);
  EXPECT_EQ(request.tool_choice.name, "read");
  EXPECT_FALSE(request.parallel_tool_calls);
}

TEST_F(OpenAiChat, TheHeaderNamesTheAgentBeforeTheModelDoes) {
  ask_json(kChat, {{"model", "scripted@ada"}, {"messages", user("Hi")}}, 200,
           {{"x-torpor-agent", "bob"}, {"x-session-id", "s2"}});
  EXPECT_EQ(heard().agent, "bob");
  EXPECT_EQ(heard().session, "s2");
}

TEST_F(OpenAiChat, WhatIsNotServedIsRefusedByName_vllm_4795_llama_cpp_11346_ollama_16117) {
  for (const auto& [body, param] : std::vector<std::pair<const char*, const char*>>{
           {R"({"n":2})", "n"},
           {R"({"modalities":["text","audio"]})", "modalities"},
           {R"({"audio":{}})", "audio"},
           {R"({"functions":[]})", "functions"},
           {R"({"web_search_options":{}})", "web_search_options"},
           {R"({"tool_choice":{"type":"allowed_tools"}})", "tool_choice.type"}}) {
    EXPECT_EQ(refused(parse_json<Json>(body))["param"], param) << body;
  }
}

TEST_F(OpenAiChat, ValuesOfTheWrongTypeOrRangeAreRefusedByName) {
  for (const auto& [body, param] : std::vector<std::pair<const char*, const char*>>{
           {R"({"model":3})", "model"},
           {R"({"messages":{}})", "messages"},
           {R"({"messages":[]})", "messages"},
           {R"({"messages":[null]})", "messages[0]"},
           {R"({"messages":["x"]})", "messages[0]"},
           {R"({"messages":[{"role":"pope","content":"x"}]})", "messages[0].role"},
           {R"({"messages":[{"role":"user","content":3}]})", "messages[0].content"},
           {R"({"messages":[{"role":"user","content":[{"text":"x"}]}]})", "messages[0].content[0].type"},
           {R"({"temperature":"hot"})", "temperature"},
           {R"({"temperature":-1})", "temperature"},
           {R"({"top_p":1.5})", "top_p"},
           {R"({"repetition_penalty":0})", "repetition_penalty"},
           {R"({"presence_penalty":2.5})", "presence_penalty"},
           {R"({"logprobs":1})", "logprobs"},
           {R"({"top_logprobs":3})", "top_logprobs"},
           {R"({"logprobs":true,"top_logprobs":21})", "top_logprobs"},
           {R"({"max_tokens":0})", "max_tokens"},
           {R"({"max_tokens":1.5})", "max_tokens"},
           {R"({"stop":[""]})", "stop"},
           {R"({"stream":"yes"})", "stream"},
           {R"({"logit_bias":{"x":1}})", "logit_bias"},
           {R"({"logit_bias":{"1":101}})", "logit_bias.1"},
           {R"({"response_format":{"type":"xml"}})", "response_format.type"},
           {R"({"response_format":{"type":"json_schema","json_schema":{"name":"x"}}})",
            "response_format.json_schema.schema"},
           {R"({"tools":[{"type":"function"}]})", "tools[0].function"},
           {R"({"tool_choice":"required"})", "tool_choice"},
           {R"({"tool_choice":"maybe"})", "tool_choice"},
           {R"({"tool_choice":{"type":"function","function":{"name":"x"}}})", "tool_choice"}}) {
    EXPECT_EQ(refused(parse_json<Json>(body))["param"], param) << body;
  }
}

TEST_F(OpenAiChat, LogprobsAreToldWithTheTextOfTheirTokensStreamedAndWhole_vllm_4795_llama_cpp_11346) {
  script([](const ChatRequest& request, Say& say) {
    ASSERT_EQ(request.logprobs, 2);
    say.start().thinking("So.").tokens({"He", "l"}, 2).text("Hel");
    say.tokens({"\uFFFD", "ö"}, 2, 3).text("ö").text("!").finish();
  });
  const Json request{{"messages", user("Hi")}, {"logprobs", true}, {"top_logprobs", 2}};
  const Json whole = ask_json(kChat, request)["choices"][0]["logprobs"]["content"];
  ASSERT_EQ(whole.size(), 4u);
  EXPECT_EQ(whole[0], parse_json<Json>(R"({"token":"He","logprob":-0.5,"bytes":[72,101],"top_logprobs":[
    {"token":"He","logprob":-0.5,"bytes":[72,101]},{"token":"other","logprob":-9999.0,"bytes":[111,116,104,101,114]}]})"));
  EXPECT_TRUE(whole[2]["bytes"].is_null());  // a part of a character
  EXPECT_EQ(whole[3]["bytes"], (std::vector<int>{0xC3, 0xB6}));
  Json streamed = Json::array();
  for (const Event& event : ask_stream(kChat, request)) {
    if (event.data == "[DONE]") continue;
    const Json choice = event.json()["choices"][0];
    if (choice["logprobs"].is_null()) continue;
    EXPECT_TRUE(choice["delta"].contains("content"));
    streamed.insert(streamed.end(), choice["logprobs"]["content"].begin(), choice["logprobs"]["content"].end());
  }
  EXPECT_EQ(streamed, whole);
}

TEST_F(OpenAiChat, WithoutBeingAskedForLogprobsAreNull) {
  ask_about(parse_json<Json>(R"({"logprobs":false,"top_logprobs":0})"));
  EXPECT_FALSE(heard().logprobs);
  EXPECT_TRUE(ask_json(kChat, {{"messages", user("Hi")}})["choices"][0]["logprobs"].is_null());
}

TEST_F(OpenAiChat, BodiesThatAreNoObjectOrTooDeepAreRefused) {
  for (const std::string& body : {std::string(), std::string("{"), std::string("[]"), std::string("{\"a\":\"\xff\"}"),
                                  "{\"a\":" + std::string(100000, '[') + std::string(100000, ']') + "}"}) {
    RecordingResponse& response = ask("POST", kChat, body);
    EXPECT_EQ(response.status, 400) << body.substr(0, 10);
    EXPECT_EQ(parse_json<Json>(response.body)["error"]["type"], "invalid_request_error");
  }
}

TEST_F(OpenAiChat, NullsCountAsAbsent) {
  ask_about(parse_json<Json>(R"({"model":"scripted","temperature":null,"stop":null,"tools":null,"tool_choice":null,
    "stream":null,"response_format":null,"stream_options":null,"max_tokens":null,"n":null,"logprobs":null})"));
  EXPECT_FALSE(heard().sampling.temperature);
}

TEST_F(OpenAiChat, AResponseFormatIsRead) {
  ask_about(parse_json<Json>(R"({"response_format":{"type":"json_schema",
    "json_schema":{"name":"x","schema":{"type":"object"},"strict":true}}})"));
  EXPECT_EQ(heard().response_format.kind, ResponseFormat::Kind::kJsonSchema);
  EXPECT_EQ(heard().response_format.schema, parse_json<Json>(R"({"type":"object"})"));
  EXPECT_TRUE(heard().response_format.strict);
}

TEST_F(OpenAiChat, APathIsLookedAtBeforeABody_mlx_serve_gotchas) {
  EXPECT_EQ(ask("POST", "/v1/chat/complete", "{").status, 404);
  EXPECT_EQ(ask("GET", kChat).status, 405);
}

TEST_F(OpenAiChat, ModelsAreListedAndFoundByName) {
  runner.entries.push_back({"org/model", 1, 10});
  const Json list = parse_json<Json>(ask("GET", "/v1/models").body);
  EXPECT_EQ(list["object"], "list");
  EXPECT_EQ(list["data"][0]["id"], "scripted");
  EXPECT_EQ(list["data"][0]["object"], "model");
  EXPECT_EQ(parse_json<Json>(ask("GET", "/v1/models/scripted").body)["id"], "scripted");
  EXPECT_EQ(parse_json<Json>(ask("GET", "/v1/models/org/model").body)["id"], "org/model");
  EXPECT_EQ(parse_json<Json>(ask("GET", "/v1/models/org%2Fmodel").body)["id"], "org/model");
  RecordingResponse& missing = ask("GET", "/v1/models/none");
  EXPECT_EQ(missing.status, 404);
  EXPECT_EQ(parse_json<Json>(missing.body)["error"]["param"], "model");
}

TEST_F(OpenAiChat, CompletionsContinueTheirPrompt) {
  const Json answer = ask_json("/v1/completions", {{"prompt", "Once"}, {"max_tokens", 3}});
  EXPECT_EQ(heard().prompt, "Once");
  EXPECT_EQ(heard().max_tokens, 3);
  EXPECT_EQ(answer["object"], "text_completion");
  EXPECT_EQ(answer["choices"][0]["text"], "Hello.");
  EXPECT_EQ(answer["usage"]["prompt_tokens"], 10);
  const auto events = ask_stream("/v1/completions", {{"prompt", Json::array({"Once"})}});
  EXPECT_EQ(events[0].json()["choices"][0]["text"], "Hel");
  EXPECT_EQ(events[2].json()["choices"][0]["finish_reason"], "stop");
  EXPECT_EQ(events.back().data, "[DONE]");
  script([](const ChatRequest&, Say& say) {
    say.start().tokens({"é"}, 1).text("é").tokens({"a", "b"}, 1, 2).text("ab").finish();
  });
  const Json weighed{{"prompt", "Once"}, {"logprobs", 1}};
  const Json logprobs = ask_json("/v1/completions", weighed)["choices"][0]["logprobs"];
  EXPECT_EQ(logprobs, parse_json<Json>(R"({"tokens":["é","a","b"],"token_logprobs":[-0.5,-0.5,-0.5],
    "top_logprobs":[{"é":-0.5},{"a":-0.5},{"b":-0.5}],"text_offset":[0,1,2]})"));
  const auto pieces = ask_stream("/v1/completions", weighed);
  EXPECT_EQ(pieces[0].json()["choices"][0]["logprobs"]["text_offset"], parse_json<Json>("[0]"));
  EXPECT_EQ(pieces[1].json()["choices"][0]["logprobs"]["text_offset"], parse_json<Json>("[1,2]"));
  for (const char* body : {R"({"prompt":"x","n":2})", R"({"prompt":"x","best_of":2})", R"({"prompt":"x","logprobs":21})",
                           R"({"prompt":"x","echo":true})", R"({"prompt":"x","suffix":"y"})", R"({"prompt":[1,2]})",
                           R"({"prompt":["x","y"]})", R"({})"}) {
    EXPECT_EQ(ask("POST", "/v1/completions", body).status, 400) << body;
  }
}

}  // namespace
}  // namespace torpor::server
