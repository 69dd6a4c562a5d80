/// Answers of a random model, held to a grammar: whatever it would have said, what comes is of the grammar.

#include <algorithm>
#include <filesystem>
#include <thread>

#include <unistd.h>

#include <gtest/gtest.h>

#include "base/json.h"
#include "server/answer_grammar.h"
#include "server/grammar.h"
#include "tiny_model.h"
#include "torpor/engine.h"
#include "torpor/error.h"

namespace torpor::server {
namespace {

namespace fs = std::filesystem;

class GrammarTest : public ::testing::Test {
 protected:
  GrammarTest() {
    fs::remove_all(root_);
    testing::write_tiny_model(root_ / "model");
    engine_ = std::make_unique<Engine>(EngineOptions{.model = (root_ / "model").string(), .store = root_ / "store"});
    grammars_ = std::make_unique<Grammars>(engine_->tokenizer(), engine_->model().vocab_size, engine_->model().eos_token_ids);
  }
  ~GrammarTest() override {
    grammars_.reset();
    engine_.reset();
    fs::remove_all(root_);
  }

  TurnResult answer(std::shared_ptr<TokenFilter> filter, uint64_t seed, int max_tokens = 200) {
    TurnRequest turn;
    turn.prompt = "Say something.";
    turn.save = SaveMode::kNo;
    turn.generate.max_tokens = max_tokens;
    turn.generate.sampling = {.temperature = 1.5f, .seed = seed};
    turn.generate.filter = std::move(filter);
    return engine_->turn(turn);
  }

  fs::path root_ = fs::path(::testing::TempDir()) / ("grammar_" + std::to_string(::getpid()));
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<Grammars> grammars_;
};

TEST_F(GrammarTest, AnAnswerIsJsonOfItsSchema) {
  const std::string schema = R"({"type": "object", "additionalProperties": false, "required": ["kind", "ports"], "properties": {
    "kind": {"enum": ["lamp", "keeper"]}, "ports": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 99},
    "minItems": 1, "maxItems": 3}}})";
  int whole = 0;
  for (uint64_t seed = 0; seed < 10; ++seed) {
    const TurnResult result = answer(grammars_->lark("start: %json " + schema), seed);
    if (result.finish_reason != FinishReason::kStop) continue;  // white space without end is JSON, too
    ++whole;
    const auto json = parse_json<nlohmann::json>(result.text);
    EXPECT_EQ(json.size(), 2u) << result.text;
    EXPECT_TRUE(json.at("kind") == "lamp" || json.at("kind") == "keeper") << result.text;
    ASSERT_GE(json.at("ports").size(), 1u);
    ASSERT_LE(json.at("ports").size(), 3u);
    for (const auto& port : json.at("ports")) EXPECT_TRUE(port.is_number_integer() && port >= 1 && port <= 99) << result.text;
  }
  EXPECT_GT(whole, 3);
}

TEST_F(GrammarTest, ManyAnswersAtOnceAreEachHeldToTheirOwnGrammar) {
  std::vector<std::thread> threads;
  std::vector<std::string> texts(8);
  for (size_t i = 0; i < texts.size(); ++i) {
    threads.emplace_back([&, i] { texts[i] = answer(grammars_->lark("start: /[" + std::string(1, char('a' + i)) + "]{12}/"), i).text; });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < texts.size(); ++i) EXPECT_EQ(texts[i], std::string(12, char('a' + i)));
}

TEST_F(GrammarTest, AFilterThatAllowsEverythingChangesNothing) {
  struct Everything : TokenFilter {
    void allow(std::span<uint32_t> words) override { std::fill(words.begin(), words.end(), ~0u); }
    void accept(int32_t token) override { accepted.push_back(token); }
    std::vector<int32_t> accepted;
  };
  const auto filter = std::make_shared<Everything>();
  const TurnResult filtered = answer(filter, 3, 20), free = answer(nullptr, 3, 20);
  EXPECT_EQ(filtered.text, free.text);
  EXPECT_EQ(engine_->tokenizer()->decode(filter->accepted, true), free.text);
}

TEST_F(GrammarTest, WhatCantBeHeldToIsNamed) {
  const auto message = [&](const auto& make) {
    try {
      make();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      return std::string(error.what());
    }
    return std::string("no error");
  };
  EXPECT_NE(message([&] { grammars_->lark(R"(start: %json {"type": "array", "uniqueItems": true})"); }).find("uniqueItems"), std::string::npos);
  EXPECT_NE(message([&] { grammars_->lark("start: %json {"); }), "no error");
  EXPECT_NE(message([&] { grammars_->lark("start: nothing_of_that_name"); }).find("nothing_of_that_name"), std::string::npos);
}

TEST_F(GrammarTest, ALogitBiasAgainstTheWholeGrammarIsAnError) {
  TurnRequest turn;
  turn.prompt = "Say something.";
  turn.save = SaveMode::kNo;
  for (int32_t id = 0; id < engine_->model().vocab_size; ++id) {
    if (engine_->tokenizer()->decode({id}).starts_with("a")) turn.generate.sampling.logit_bias.emplace_back(id, -INFINITY);
  }
  turn.generate.filter = grammars_->lark("start: \"a\"");
  try {
    engine_->turn(turn);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument) << error.what();
  }
}

// ---- grammars of requests

class AnswerGrammarTest : public GrammarTest {
 protected:
  AnswerGrammarTest() {
    parsing_.format = {CallFormat::kTagged, "<think>", "</think>"};
    parsing_.tools = {{"look", "",
                       parse_json<Json>(R"({"type": "object", "additionalProperties": false, "required": ["room"],
                        "properties": {"room": {"type": "integer", "minimum": 0, "maximum": 9}}})"), true}};
    request_.tools = parsing_.tools;
  }
  std::optional<std::string> grammar() { return answer_grammar(request_, parsing_, *engine_->tokenizer()); }
  /// The text goes through the grammar from its first byte to an end.
  bool takes(const std::string& text) {
    const auto filter = grammars_->lark(grammar().value());
    std::vector<uint32_t> words(size_t(engine_->model().vocab_size + 31) / 32);
    const auto allowed = [&](int32_t id) {
      filter->allow(words);
      return (words[size_t(id) / 32] >> (id % 32) & 1) != 0;
    };
    for (const int32_t id : engine_->tokenizer()->encode(text, false)) {
      if (!allowed(id)) return false;
      filter->accept(id);
    }
    return allowed(engine_->model().eos_token_ids.front());
  }

  /// The arguments of the last call that the parser reads in a text; null: there is none.
  Json read(const std::string& text) const {
    struct Reader : AnswerSink {
      void start(const AnswerStart&) override {}
      void thinking(std::string_view) override {}
      void text(std::string_view) override {}
      void tool_call(const std::string& name) override { EXPECT_EQ(name, "look"); }
      void arguments(std::string_view delta) override { arguments_read = parse_json<Json>(delta); }
      void finish(const AnswerEnd&) override {}
      Json arguments_read;
    } reader;
    AnswerParser parser(parsing_, reader);
    parser.push(text);
    parser.finish();
    return reader.arguments_read;
  }

  ChatRequest request_;
  AnswerParser::Options parsing_;
};

const std::string kCall = "<tool_call>\n{\"name\": \"look\", \"arguments\": {\"room\": 3}}\n</tool_call>";

TEST_F(AnswerGrammarTest, CallsThatMayComeHaveArgumentsOfTheirSchema) {
  EXPECT_TRUE(takes("Just text."));
  EXPECT_TRUE(takes("Let me look. " + kCall));
  EXPECT_TRUE(takes("<think>Which?</think>\n" + kCall + "\n" + kCall + " Done."));
  parsing_.in_thinking = true;
  EXPECT_TRUE(takes("I could <tool_call> now.</think>\n" + kCall + " Done."));
  EXPECT_FALSE(takes("Which?</think>" + kCall + "<tool_call>"));
  parsing_.in_thinking = false;
  EXPECT_FALSE(takes("<tool_call>\n{\"name\": \"look\", \"arguments\": {\"room\": \"3\"}}\n</tool_call>"));
  EXPECT_FALSE(takes("<tool_call>\n{\"name\": \"jump\", \"arguments\": {}}\n</tool_call>"));
  EXPECT_FALSE(takes("Text <tool_call> and more"));
}

TEST_F(AnswerGrammarTest, ACallThatMustComeComes) {
  request_.tool_choice.kind = ToolChoice::Kind::kRequired;
  EXPECT_TRUE(takes(kCall));
  EXPECT_TRUE(takes("<think>Which?</think>\n\n" + kCall + "\n" + kCall));
  EXPECT_FALSE(takes("Just text."));
  EXPECT_FALSE(takes(kCall + " Done."));
  parsing_.one_call = true;
  EXPECT_FALSE(takes(kCall + "\n" + kCall));
  parsing_.in_thinking = true;
  EXPECT_TRUE(takes("Which?</think>\n" + kCall));
  EXPECT_FALSE(takes(kCall));
}

TEST_F(AnswerGrammarTest, AResponseFormatHoldsBesideToolsAndAfterThinking) {
  request_.response_format = {ResponseFormat::Kind::kJsonSchema,
                              parse_json<Json>(R"({"type": "object", "properties": {"a": {"type": "null"}},
                              "required": ["a"], "additionalProperties": false})"), {}, true};
  EXPECT_TRUE(takes(R"({"a": null})"));
  EXPECT_TRUE(takes("<think>Null?</think>\n{\"a\": null}"));
  EXPECT_TRUE(takes(kCall));
  EXPECT_FALSE(takes("Null."));
  EXPECT_FALSE(takes(R"({"a": 1})"));
  parsing_.tools.clear();
  EXPECT_FALSE(takes(kCall));
  request_.response_format = {ResponseFormat::Kind::kLark, {}, "start: \"yes\" | \"no\"", true};
  EXPECT_TRUE(takes("no"));
  EXPECT_TRUE(takes("<think>Hm.</think>yes"));
  EXPECT_FALSE(takes("maybe"));
  request_.response_format = {ResponseFormat::Kind::kJsonObject, {}, {}, true};
  EXPECT_TRUE(takes(R"({"b": [1, {"c": "d"}]})"));
  EXPECT_FALSE(takes("[]"));
}

TEST_F(AnswerGrammarTest, ASchemaThatIsNoPromiseIsHeldToAsFarAsCanBe) {
  parsing_.tools[0].parameters["uniqueItems"] = true;
  EXPECT_THROW(takes(kCall), Error);
  parsing_.tools[0].strict = false;
  EXPECT_TRUE(takes(kCall));
  EXPECT_FALSE(takes("<tool_call>\n{\"name\": \"look\", \"arguments\": {\"room\": \"3\"}}\n</tool_call>"));
}

TEST_F(AnswerGrammarTest, CallsOfMistralsModelsAreHeldToTheirSchemasInBothForms) {
  parsing_.format = {CallFormat::kMistral, "", ""};
  const std::string array = R"([TOOL_CALLS][{"name": "look", "arguments": {"room": 3}}])", named = R"([TOOL_CALLS]look[ARGS]{"room": 3})";
  const std::string both = R"([TOOL_CALLS][{"name": "look", "arguments": {"room": 3}}, {"name": "look", "arguments": {"room": 4}}])";
  EXPECT_TRUE(takes("Just text."));
  for (const std::string& call : {array, both, named, named + named, std::string(R"([TOOL_CALLS]look[CALL_ID]a1B2c3d4e[ARGS]{"room": 3})")}) {
    EXPECT_TRUE(takes("Let me look. " + call)) << call;
  }
  for (const char* wrong : {R"([TOOL_CALLS][{"name": "look", "arguments": {"room": "3"}}])", R"([TOOL_CALLS]look[ARGS]{"room": 30})",
                            R"([TOOL_CALLS]jump[ARGS]{})", "[TOOL_CALLS] and more", "[TOOL_CALLS][]"}) {
    EXPECT_FALSE(takes(wrong)) << wrong;
  }
  request_.tool_choice.kind = ToolChoice::Kind::kRequired;
  EXPECT_FALSE(takes("Let me look. " + named));
  EXPECT_TRUE(takes(named));
  EXPECT_TRUE(takes(both));
  parsing_.one_call = true;
  EXPECT_TRUE(takes(array));
  EXPECT_FALSE(takes(both));
  EXPECT_FALSE(takes(named + named));
  request_.response_format.kind = ResponseFormat::Kind::kJsonObject;
  request_.tool_choice.kind = ToolChoice::Kind::kAuto;
  EXPECT_TRUE(takes(R"({"b": 1})"));
  EXPECT_TRUE(takes(named));
  EXPECT_FALSE(takes("Text."));
}

TEST_F(AnswerGrammarTest, CallsAndFormatsOfHarmonyAreHeldToInTheirMessages) {
  parsing_.format = {CallFormat::kHarmony, "", ""};
  const std::string thought = "<|channel|>analysis<|message|>Which?<|end|><|start|>assistant";
  const auto call = [](const std::string& name, const std::string& arguments) {
    return "<|channel|>commentary to=functions." + name + " <|constrain|>json<|message|>" + arguments;
  };
  const std::string look = call("look", R"({"room": 3})");
  const std::string in_role = R"( to=functions.look<|channel|>commentary <|constrain|>json<|message|>{"room": 3})";
  EXPECT_TRUE(takes("<|channel|>final<|message|>Just text."));
  EXPECT_TRUE(takes(thought + "<|channel|>final<|message|>Just text."));
  for (const std::string& one : {look, in_role, call("look", R"({"room": 0})")}) {
    EXPECT_TRUE(takes(one)) << one;
    EXPECT_TRUE(takes(thought + one)) << one;
  }
  EXPECT_TRUE(takes("<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + look));
  EXPECT_FALSE(takes(call("look", R"({"room": "3"})")));
  EXPECT_FALSE(takes(call("jump", "{}")));
  request_.tool_choice.kind = ToolChoice::Kind::kRequired;
  EXPECT_TRUE(takes(thought + look));
  EXPECT_FALSE(takes("<|channel|>final<|message|>Just text."));
  EXPECT_FALSE(takes("<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + look));
  request_.tool_choice.kind = ToolChoice::Kind::kAuto;
  request_.response_format.kind = ResponseFormat::Kind::kJsonObject;
  EXPECT_TRUE(takes(thought + R"(<|channel|>final <|constrain|>json<|message|>{"b": 1})"));
  EXPECT_TRUE(takes(look));
  EXPECT_FALSE(takes("<|channel|>final<|message|>Just text."));
  parsing_.tools.clear();
  EXPECT_TRUE(takes(R"(<|channel|>final<|message|>{"b": 1})"));
  EXPECT_FALSE(takes(look));
}

TEST_F(AnswerGrammarTest, CallsOfGemmaAreHeldToTheirSchemas) {
  parsing_.format = {CallFormat::kGemma, "", ""};
  const auto call = [](const std::string& arguments, const std::string& name = "look") {
    return "<|tool_call>call:" + name + arguments + "<tool_call|>";
  };
  EXPECT_TRUE(takes("Just text."));
  EXPECT_TRUE(takes("Let me look. " + call("{room:3}") + call("{room:9}")));
  for (const char* wrong : {"{}", "{room:10}", "{room:<|\"|>3<|\"|>}", "{room:3,more:1}", "{\"room\":3}"}) EXPECT_FALSE(takes(call(wrong))) << wrong;
  EXPECT_FALSE(takes(call("{room:3}", "jump")));
  parsing_.tools[0].parameters = parse_json<Json>(R"({"type": "object", "required": ["to", "many"], "properties": {
    "note": {"type": "string"}, "to": {"enum": ["lamp", 7, {"a b": [true]}]}, "deep": {"$ref": "#/$defs/node"},
    "many": {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "minItems": 1, "maxItems": 2},
    "free": {}, "two words": {"type": ["boolean", "number"]}},
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "additionalProperties": false}}})");
  const std::string q = "<|\"|>";
  for (const std::string& right : std::initializer_list<std::string>{
        "{to:7,many:[null]}", "{note:" + q + "a {b}, \"c\"" + q + ",to:" + q + "lamp" + q + ",many:[" + q + q + ",null]}",
        "{to:{" + q + "a b" + q + ":[true]},deep:{next:{next:{}}},many:[null],free:{x:[1," + q + "y" + q + "]}," + q + "two words" + q + ":1.5}"}) {
    EXPECT_TRUE(takes(call(right))) << right;
    EXPECT_TRUE(read(call(right)).at("many").is_array()) << right;
  }
  for (const std::string& wrong : std::initializer_list<std::string>{"{many:[null]}", "{to:7}", "{to:7,many:[]}", "{to:7,many:[null,null,null]}",
                                                                     "{many:[null],to:7}", "{to:7,many:[1]}", "{to:7,deep:{next:1},many:[null]}"}) {
    EXPECT_FALSE(takes(call(wrong))) << wrong;
  }
  // A keyword that nothing holds to is named, unless the schema is no promise.
  parsing_.tools[0].parameters["properties"]["note"]["pattern"] = "a+";
  try {
    grammar();
    ADD_FAILURE();
  } catch (const Failure& failure) {
    EXPECT_NE(std::string(failure.what()).find("'pattern'"), std::string::npos);
  }
  parsing_.tools[0].strict = false;
  EXPECT_TRUE(takes(call("{note:" + q + "b" + q + ",to:7,many:[null]}")));
}

TEST_F(AnswerGrammarTest, AKeywordThatNothingHoldsGemmasCallsToIsNamedWhereTheSchemaIsAPromise) {
  parsing_.format = {CallFormat::kGemma, "", ""};
  for (const auto& [schema, keyword] : {std::pair(R"({"required": ["other"]})", "required"),
                                        {R"({"properties": {"a": {"type": "array", "minContains": 1}}})", "minContains"},
                                        {R"({"properties": {"a": {"oneOf": [{}, {}]}}})", "oneOf"},
                                        {R"({"properties": {"a": {"anyOf": [{"type": "object"}], "required": ["b"]}}})", "required"},
                                        {R"({"properties": {"a": {"$ref": "#/nothing"}}})", "$ref"},
                                        {R"({"properties": {"a": {"$ref": "#/properties/a"}}, "required": ["b"]})", "required"},
                                        {R"({"additionalProperties": false, "required": ["b"]})", "required"}}) {
    parsing_.tools[0] = {"look", "", parse_json<Json>(schema), true};
    try {
      grammar();
      ADD_FAILURE() << schema;
    } catch (const Failure& failure) {
      EXPECT_NE(std::string(failure.what()).find("'" + std::string(keyword) + "'"), std::string::npos) << failure.what();
    }
    parsing_.tools[0].strict = false;
    EXPECT_NO_THROW(grammars_->lark(grammar().value())) << schema;
  }
}

/// A call with values that stand between tags as they are given here, in the form of Qwen3-Coder or of GLM.
std::string tagged_call(CallFormat format, const std::vector<std::pair<std::string, std::string>>& values) {
  const bool functions = format == CallFormat::kFunctionTags;
  std::string call = functions ? "<tool_call>\n<function=look>\n" : "<tool_call>look\n";
  for (const auto& [key, value] : values) {
    call += functions ? "<parameter=" + key + ">\n" + value + "\n</parameter>\n"
                      : "<arg_key>" + key + "</arg_key>\n<arg_value>" + value + "</arg_value>\n";
  }
  return call + (functions ? "</function>\n</tool_call>" : "</tool_call>");
}

TEST_F(AnswerGrammarTest, CallsBetweenTagsAreHeldToTheirSchemasAndReadSo) {
  parsing_.tools[0].parameters = parse_json<Json>(R"({"type": "object", "required": ["to", "many"], "properties": {
    "note": {"type": "string"}, "to": {"enum": ["lamp", 7, "8"]}, "deep": {"$ref": "#/$defs/node"},
    "many": {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "minItems": 1, "maxItems": 2},
    "flag": {"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 5}]},
    "mode": {"type": "string", "enum": ["a b"]}},
    "$defs": {"node": {"type": "object", "properties": {"n": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
                       "additionalProperties": false, "required": ["n"]}}})");
  using Values = std::vector<std::pair<std::string, std::string>>;
  for (const CallFormat format : {CallFormat::kFunctionTags, CallFormat::kArgumentTags}) {
    parsing_.format = {format, "<think>", "</think>"};
    request_.tool_choice.kind = ToolChoice::Kind::kAuto;
    EXPECT_TRUE(takes("Just text."));
    EXPECT_FALSE(takes("Text <tool_call> and more"));
    const std::pair<Values, const char*> rights[] = {
        {{{"to", "7"}, {"many", "[null]"}}, R"({"to": 7, "many": [null]})"},
        {{{"to", "8"}, {"many", "[null]"}}, R"({"to": "8", "many": [null]})"},
        {{{"note", "a \"b\"\n<c> & 3"}, {"to", "lamp"}, {"many", "[\"x\", null]"}},
         R"({"note": "a \"b\"\n<c> & 3", "to": "lamp", "many": ["x", null]})"},
        {{{"note", "5"}, {"to", "lamp"}, {"deep", "{\"n\": 1}"}, {"many", "[null]"}, {"flag", "true"}},
         R"({"note": "5", "to": "lamp", "deep": {"n": 1}, "many": [null], "flag": true})"},
        {{{"to", "7"}, {"many", "[null]"}, {"flag", "6"}, {"mode", "a b"}},
         R"({"to": 7, "many": [null], "flag": 6, "mode": "a b"})"}};
    for (const auto& [values, arguments] : rights) {
      const std::string call = tagged_call(format, values);
      EXPECT_TRUE(takes(call)) << call;
      EXPECT_TRUE(takes("<think>Which?</think>\nI look. " + call + "\n" + call)) << call;
      EXPECT_EQ(read(call), parse_json<Json>(arguments)) << call;
    }
    for (const Values& wrong : {Values{}, {{"to", "7"}}, {{"many", "[null]"}}, {{"to", "9"}, {"many", "[null]"}},
                                {{"to", "\"lamps\""}, {"many", "[null]"}}, {{"to", "7"}, {"many", "null"}},
                                {{"to", "7"}, {"many", "[1]"}}, {{"many", "[null]"}, {"to", "7"}},
                                {{"to", "7"}, {"many", "[null]"}, {"flag", "4"}},
                                {{"to", "7"}, {"many", "[null]"}, {"mode", "b"}},
                                {{"to", "7"}, {"deep", "{\"n\": 1, \"next\": 1}"}, {"many", "[null]"}},
                                {{"to", "7"}, {"many", "[null]"}, {"more", "1"}}}) {
      EXPECT_FALSE(takes(tagged_call(format, wrong))) << tagged_call(format, wrong);
    }
    EXPECT_FALSE(takes("<tool_call>\n{\"name\": \"look\", \"arguments\": {}}\n</tool_call>"));
    const std::string call = tagged_call(format, rights[0].first);
    request_.tool_choice.kind = ToolChoice::Kind::kRequired;
    EXPECT_TRUE(takes(call));
    EXPECT_TRUE(takes("<think>Which?</think>\n" + call + "\n" + call));
    EXPECT_FALSE(takes("I look. " + call));
    request_.response_format.kind = ResponseFormat::Kind::kJsonObject;
    request_.tool_choice.kind = ToolChoice::Kind::kAuto;
    EXPECT_TRUE(takes(R"({"b": 1})"));
    EXPECT_TRUE(takes(call));
    EXPECT_FALSE(takes("Text."));
    request_.response_format.kind = ResponseFormat::Kind::kText;
  }
}

TEST_F(AnswerGrammarTest, ReferencesThatMultiplyAreFollowedOnce) {
  // Each of ten steps through twenty references: 20^10 paths.
  Json again = Json::array();
  for (int i = 0; i < 20; ++i) again.push_back({{"$ref", "#/$defs/a"}});
  again.push_back({{"type", "integer"}});
  parsing_.tools[0].parameters = {{"type", "object"}, {"properties", {{"n", {{"$ref", "#/$defs/a"}}}}},
                                  {"$defs", {{"a", {{"anyOf", again}}}}}};
  for (const CallFormat format : {CallFormat::kFunctionTags, CallFormat::kArgumentTags}) {
    parsing_.format = {format, "", ""};
    EXPECT_TRUE(grammar().has_value());
    EXPECT_EQ(read(tagged_call(format, {{"n", "7"}})), Json({{"n", 7}}));
  }
}

TEST_F(AnswerGrammarTest, SchemasThatWouldBeCopiedWithoutEndAreRefused) {
  Json properties = Json::object();
  for (int i = 0; i < 2000; ++i) properties["p" + std::to_string(i)] = {{"$ref", "#/$defs/a"}};
  parsing_.tools[0].parameters = {{"properties", properties}, {"$defs", {{"a", {{"type", "integer"}}}}}};
  parsing_.format = {CallFormat::kArgumentTags, "", ""};
  EXPECT_THROW(grammar(), Failure);
}

TEST_F(AnswerGrammarTest, ACallThatLacksItsFirstTagIsHeldToItsSchemaToo) {
  parsing_.format = {CallFormat::kFunctionTags, "", ""};
  const std::string call = "<function=look>\n<parameter=room>\n3\n</parameter>\n</function>";
  EXPECT_TRUE(takes("I look. " + call));
  EXPECT_EQ(read("I look. " + call), Json({{"room", 3}}));
  EXPECT_TRUE(takes("I look. " + call + " And: <tool_call>\n" + call + "\n</tool_call>"));
  EXPECT_FALSE(takes("<function=look>\n<parameter=room>\n33\n</parameter>\n</function>"));
  EXPECT_FALSE(takes("<function=jump>\n</function>"));
  EXPECT_FALSE(takes("A <function=look> is a tag."));
}

TEST_F(AnswerGrammarTest, AKeywordThatNothingHoldsCallsBetweenTagsToIsNamedWhereTheSchemaIsAPromise) {
  for (const CallFormat format : {CallFormat::kFunctionTags, CallFormat::kArgumentTags}) {
    parsing_.format = {format, "", ""};
    for (const auto& [schema, keyword] : {std::pair(R"({"required": ["other"]})", "required"),
                                          {R"({"minProperties": 1})", "minProperties"},
                                          {R"({"anyOf": [{}, {}]})", "anyOf"},
                                          {R"({"properties": {"a": {"type": "string", "pattern": "b+"}}})", "pattern"},
                                          {R"({"properties": {"a": {"$ref": "#/nothing"}}})", "$ref"},
                                          {R"({"properties": {"a": {"$ref": "#/properties/a"}}})", "$ref"}}) {
      parsing_.tools[0] = {"look", "", parse_json<Json>(schema), true};
      try {
        grammar();
        ADD_FAILURE() << schema;
      } catch (const Failure& failure) {
        const std::string named = "'" + std::string(keyword) + "'";
        EXPECT_NE(std::string(failure.what()).find(named), std::string::npos) << failure.what();
      }
      parsing_.tools[0].strict = false;
      EXPECT_NO_THROW(grammars_->lark(grammar().value())) << schema;
    }
    parsing_.tools[0] = {"look", "", parse_json<Json>(R"({"properties": 7, "required": 7})"), false};
    EXPECT_TRUE(takes(tagged_call(format, {{"a", "b"}})));
    EXPECT_TRUE(takes(tagged_call(format, {})));
    parsing_.tools[0].parameters = parse_json<Json>(R"({"type": "object", "additionalProperties": false})");
    EXPECT_FALSE(takes(tagged_call(format, {{"a", "b"}})));
    EXPECT_TRUE(takes(tagged_call(format, {})));
    // Of a value: left out where the schema is no promise.
    parsing_.tools[0].parameters = parse_json<Json>(R"({"properties": {"a": {"type": "array", "uniqueItems": true}}})");
    EXPECT_TRUE(takes(tagged_call(format, {{"a", "[1]"}})));
    EXPECT_FALSE(takes(tagged_call(format, {{"a", "1"}})));
  }
}

TEST_F(AnswerGrammarTest, AnAnswerWithoutToolsOrFormatIsFree) {
  parsing_.tools.clear();
  EXPECT_FALSE(grammar().has_value());
  parsing_.tools = request_.tools;
  parsing_.format.calls = CallFormat::kNone;
  EXPECT_FALSE(grammar().has_value());
  request_.response_format.kind = ResponseFormat::Kind::kJsonObject;
  EXPECT_THROW(grammar(), Failure);
}

}  // namespace
}  // namespace torpor::server
