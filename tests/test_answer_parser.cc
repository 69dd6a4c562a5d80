/// Thinking and calls of tools, parted from text wherever it is cut. Names end in the ids of
/// tests/server_acceptance.md.

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "server/answer_parser.h"
#include "server/stop_sink.h"

namespace torpor::server {
namespace {

/// What was told, in one line: "<thinking>", text, and "{name arguments}".
class Told : public AnswerSink {
 public:
  void start(const AnswerStart&) override {}
  void finish(const AnswerEnd&) override {}
  void thinking(std::string_view delta) override { part('<', delta, '>'); }
  void text(std::string_view delta) override { part(0, delta, 0); }
  void tool_call(const std::string& name) override {
    close();
    told += "{" + name + " ";
    end_ = '}';
    kind_ = '{';
  }
  void arguments(std::string_view delta) override {
    EXPECT_TRUE(parse_json<Json>(delta).is_object());
    told += delta;
  }
  std::string all() {
    close();
    return told;
  }

 private:
  void part(char open, std::string_view delta, char end) {
    EXPECT_FALSE(delta.empty());
    if (kind_ != open) {
      close();
      if (open) told += open;
      kind_ = open;
      end_ = end;
    }
    told += delta;
  }
  void close() {
    if (end_) told += end_;
    end_ = 0;
    kind_ = 0;
  }
  std::string told;
  char kind_ = 0, end_ = 0;
};

Tool tool(const char* name, const char* properties) {
  return {name, "", {{"type", "object"}, {"properties", parse_json<Json>(properties)}}, false};
}

AnswerParser::Options options(CallFormat calls) {
  return {{calls, "<think>", "</think>"},
          {tool("read", R"({"path":{"type":"string"},"lines":{"type":"integer"}})"),
           tool("add", R"({"a":{"type":"number"},"flag":{"type":"boolean"},"list":{"type":"array"},
             "o":{"type":"object"}})"),
           tool("weather.now", R"({"city":{"type":"string"}})")},
          false,
          false};
}

std::string parse(const AnswerParser::Options& options, const std::vector<std::string>& pieces) {
  Told told;
  AnswerParser parser(options, told);
  for (const std::string& piece : pieces) parser.push(piece);
  parser.finish();
  return told.all();
}

bool inside_character(const std::string& text, size_t at) { return at < text.size() && (text[at] & 0xC0) == 0x80; }

/// The same is told of the text in one piece, in two at every place, and in single characters.
void expect(const AnswerParser::Options& options, const std::string& text, const std::string& told) {
  SCOPED_TRACE(text);
  EXPECT_EQ(parse(options, {text}), told);
  std::vector<std::string> characters;
  for (size_t i = 0; i < text.size(); ++i) {
    if (inside_character(text, i)) characters.back() += text[i];
    else characters.push_back(text.substr(i, 1));
    if (i > 0 && !inside_character(text, i)) {
      EXPECT_EQ(parse(options, {text.substr(0, i), text.substr(i)}), told) << "cut at " << i;
    }
  }
  EXPECT_EQ(parse(options, characters), told) << "in single characters";
}

TEST(AnswerParser, TextStaysAsItIs) {
  for (const CallFormat format : {CallFormat::kNone, CallFormat::kTagged, CallFormat::kLlama, CallFormat::kMistral,
                                  CallFormat::kGemma, CallFormat::kHarmony}) {
    for (const char* text : {"", "Hi", "Caf\xc3\xa9 \xf0\x9f\x98\x80.", "a <b> c\n\n", "x < y", " lead", "r", "re", "[",
                             "{", "<", "a `b`", "[1, 2]", "{\"a\": 1}", "[TOOL", "<tool_ca", "assist", "readme"}) {
      expect(options(format), text, text);
    }
  }
}

TEST(AnswerParser, ThinkingIsPartedFromTheTextAndTheSpaceBetweenGoes) {
  const auto tagged = options(CallFormat::kTagged);
  expect(tagged, "<think>\nHm, 1 < 2.\n\nSo.\n</think>\n\nYes.\n", "<Hm, 1 < 2.\n\nSo.>Yes.\n");
  expect(tagged, "\n<think>Hm</think>Yes.", "<Hm>Yes.");
  expect(tagged, "<think>\n\n</think>\n\nYes.", "Yes.");
  expect(tagged, "<think>Hm", "<Hm>");
  expect(tagged, "<think>Hm</thin", "<Hm</thin>");
}

TEST(AnswerParser, ATemplateThatOpensThinkingIsSeenInThePrompt_llama_cpp_23320_lmstudio_1602) {
  const AnswerFormat format = answer_format("{{ '<think>' }} <tool_call>");
  EXPECT_TRUE(opens_thinking(format, "<|im_start|>assistant\n<think>\n"));
  EXPECT_FALSE(opens_thinking(format, "<|im_start|>assistant\n<think>\n\n</think>\n\n"));
  EXPECT_FALSE(opens_thinking(format, "<|im_start|>assistant\n"));
  auto inside = options(CallFormat::kTagged);
  inside.in_thinking = true;
  expect(inside, "Hm.\n</think>\n\nYes.", "<Hm.>Yes.");
}

TEST(AnswerParser, ThinkingCountsAtTheBeginningAlone) {
  expect(options(CallFormat::kTagged), "Write <think> and </think>.", "Write <think> and </think>.");
  expect(options(CallFormat::kTagged), "<think>a</think>b <think>c</think>", "<a>b <think>c</think>");
}

TEST(AnswerParser, ACallInsideThinkingIsNone) {
  expect(options(CallFormat::kTagged), R"(<think><tool_call>{"name":"read","arguments":{}}</tool_call></think>No.)",
         R"(<<tool_call>{"name":"read","arguments":{}}</tool_call>>No.)");
}

TEST(AnswerParser, HermesCallsAreReadWithTheirTagsCutAnywhere_vllm_mlx_47_55_vllm_10395_10589_9693) {
  const auto tagged = options(CallFormat::kTagged);
  expect(tagged, "I look.\n<tool_call>\n{\"name\": \"read\", \"arguments\": {\"path\": \"a b\"}}\n</tool_call>",
         R"(I look.{read {"path":"a b"}})");
  expect(tagged, "<tool_call>\n{\"name\":\"read\",\"arguments\":{\"path\":\"a\"}}\n</tool_call>\n<tool_call>\n"
                 "{\"name\":\"add\",\"arguments\":{\"a\":1}}\n</tool_call>",
         R"({read {"path":"a"}}{add {"a":1}})");
  expect(tagged, "<tool_call>{\"name\":\"read\",\"arguments\":{\"path\":\"a\"}}{\"name\":\"add\"}</tool_call>Done.",
         R"({read {"path":"a"}}{add {}}Done.)");
  expect(tagged, "<tool_call>{\"name\":\"read\",\"arguments\":\"{\\\"path\\\":\\\"a\\\"}\"}", R"({read {"path":"a"}})");
  expect(tagged, "<think>Hm</think>\n\n<tool_call>{\"name\":\"read\",\"arguments\":{}}</tool_call>", "<Hm>{read {}}");
}

TEST(AnswerParser, ClosingTagsInsideArgumentsEndNothing_mlx_serve_gotchas) {
  expect(options(CallFormat::kTagged),
         R"(<tool_call>{"name":"read","arguments":{"path":"</tool_call></think>}\"{"}}</tool_call>)",
         R"({read {"path":"</tool_call></think>}\"{"}})");
  expect(options(CallFormat::kTagged),
         "<tool_call>\n<function=read>\n<parameter=path>\na</parameter>b</function>\nc\n</parameter>\n</function>\n"
         "</tool_call>",
         R"({read {"path":"a</parameter>b</function>\nc"}})");
}

TEST(AnswerParser, OnlyADeclaredToolIsCalledAndOtherTextStays_openclaude_380) {
  const auto tagged = options(CallFormat::kTagged);
  for (const char* text : {"<tool_call>{\"name\":\"rm\",\"arguments\":{}}</tool_call>",
                           "<tool_call>not json</tool_call> after", "<tool_call>{\"name\":\"read\"", "<tool_call>",
                           "Write <tool_call> to call.", "<tool_call>{\"name\":\"read\",\"arguments\":[1]}</tool_call>",
                           "<function=rm>\n</function>", "<function=read>\n<parameter=path>a", "<function=read> x"}) {
    expect(tagged, text, text);
  }
  auto none = tagged;
  none.tools.clear();
  expect(none, "<tool_call>{\"name\":\"read\",\"arguments\":{}}</tool_call>",
         "<tool_call>{\"name\":\"read\",\"arguments\":{}}</tool_call>");
}

TEST(AnswerParser, ACallThatLooksWrongDoesNotHideTheNext) {
  expect(options(CallFormat::kTagged), "<tool_call>x <tool_call>{\"name\":\"read\",\"arguments\":{}}</tool_call>",
         "<tool_call>x{read {}}");
}

TEST(AnswerParser, QwenCoderValuesHaveTheirSchemasTypes_llama_cpp_15019_16377_16932) {
  const auto tagged = options(CallFormat::kTagged);
  expect(tagged, "<tool_call>\n<function=add>\n<parameter=a>\n1.5\n</parameter>\n<parameter=flag>\nTrue\n</parameter>\n"
                 "<parameter=list>\n[1, \"x\"]\n</parameter>\n<parameter=o>\n{\"k\": null}\n</parameter>\n</function>\n"
                 "</tool_call>",
         R"({add {"a":1.5,"flag":true,"list":[1,"x"],"o":{"k":null}}})");
  expect(tagged, "<function=read>\n<parameter=path>\n12\n</parameter>\n<parameter=lines>\n12\n</parameter>\n"
                 "</function>\n",
         R"({read {"path":"12","lines":12}})");
  expect(tagged, "<function=read>\n<parameter=path>\n\n  two\n lines \n\n</parameter>\n</function>\n</tool_call>\nDone",
         "{read {\"path\":\"\\n  two\\n lines \\n\"}}</tool_call>\nDone");
}

TEST(AnswerParser, GlmCallsAreNamesWithKeysAndValues_GLM_4_5_146) {
  const auto tagged = options(CallFormat::kTagged);
  expect(tagged, "I look.\n<tool_call>read\n<arg_key>path</arg_key>\n<arg_value>12</arg_value>\n"
                 "<arg_key>lines</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n"
                 "<tool_call>add<arg_key>o</arg_key><arg_value>{\"k\": [1]}</arg_value></tool_call>",
         R"(I look.{read {"path":"12","lines":3}}{add {"o":{"k":[1]}}})");
  expect(tagged, "<tool_call>weather.now\n</tool_call>", "{weather.now {}}");
  expect(tagged, "<tool_call>read<arg_key>path</arg_key><arg_value>a</arg_value>b</arg_value></tool_call>",
         R"({read {"path":"a</arg_value>b"}})");
  expect(tagged, "<tool_call>read<arg_key>path</arg_key><arg_value>a</arg_value>", R"({read {"path":"a"}})");
  for (const char* text : {"<tool_call>rm\n<arg_key>path</arg_key>\n<arg_value>/</arg_value>\n</tool_call>",
                           "<tool_call>reads\n</tool_call>", "<tool_call>read\n<arg_key>path</arg_key>",
                           "<tool_call>read\n<arg_key>path</arg_key>\n<arg_value>a"}) {
    expect(tagged, text, text);
  }
}

TEST(AnswerParser, LlamaCallsAreJsonAtTheBeginning_vllm_46863_47612) {
  const auto llama = options(CallFormat::kLlama);
  expect(llama, R"({"name": "read", "parameters": {"path": "a", "lines": "3"}})", R"({read {"path":"a","lines":3}})");
  expect(llama, R"(<|python_tag|>{"name": "read", "parameters": {"path": "a"}}; )"
                R"({"name": "add", "parameters": {"a": 2}})",
         R"({read {"path":"a"}}{add {"a":2}})");
  expect(llama, R"({"type": "function", "function": "read", "parameters": {"path": "a"}})", R"({read {"path":"a"}})");
  for (const char* text : {R"({"name": "Ada", "born": 1815})", R"({"answer": 42})", R"({"name": "read")",
                           R"(Use {"name": "read", "parameters": {}} for it)"}) {
    expect(llama, text, text);
  }
}

TEST(AnswerParser, PythonCallsAreReadWithTheirLiterals_vllm_20028_46890) {
  const auto llama = options(CallFormat::kLlama);
  expect(llama, R"([read(path='it\'s "a"', lines=3), add(a=-1.5e3, flag=True, list=[1, 'x', None], o={'k': (1, 2)})])",
         R"({read {"path":"it's \"a\"","lines":3}})"
         R"({add {"a":-1500.0,"flag":true,"list":[1,"x",null],"o":{"k":[1,2]}}})");
  expect(llama, "[weather.now(city=\"Z\xc3\xbcrich\\n\\u00e9\")]",
         "{weather.now {\"city\":\"Z\xc3\xbcrich\\n\xc3\xa9\"}}");
  expect(llama, "[read()]", "{read {}}");
  for (const char* text : {"[1, 2, 3]", "[read]", "[rm(path='/')]", "[read(path=open('x'))]", "[read(path='a'",
                           "[reads(a=1)]"}) {
    expect(llama, text, text);
  }
}

TEST(AnswerParser, MistralCallsAreReadInBothForms_Rapid_MLX_579_vllm_10821_47734) {
  const auto mistral = options(CallFormat::kMistral);
  expect(mistral, R"([TOOL_CALLS][{"name": "read", "arguments": {"path": "a]"}}, {"name": "add", "arguments": {}}])",
         R"({read {"path":"a]"}}{add {}})");
  expect(mistral, R"([TOOL_CALLS]read[ARGS]{"path": "a"}[TOOL_CALLS]add[ARGS]{"a": 1})",
         R"({read {"path":"a"}}{add {"a":1}})");
  expect(mistral, R"([TOOL_CALLS]read[CALL_ID]123456789[ARGS]{"path": "a"})", R"({read {"path":"a"}})");
  // The marks are special tokens, of which the text may know nothing.
  expect(mistral, R"([{"name": "read", "arguments": {"path": "a"}}])", R"({read {"path":"a"}})");
  expect(mistral, R"(read{"path": "a"})", R"({read {"path":"a"}})");
  for (const char* text : {"[TOOL_CALLS]rm[ARGS]{}", "read the {file}", "reader{}", R"([{"name": "x"}])",
                           "[TOOL_CALLS]"}) {
    expect(mistral, text, text);
  }
}

TEST(AnswerParser, GemmaCallsAreRead_vllm_44522_omlx_1830_vllm_mlx_254_267_274) {
  const auto gemma = options(CallFormat::kGemma);
  expect(gemma, "Look: <|tool_call>call:read{path:<|\"|>a, {b}<|\"|>,lines:3}<tool_call|>",
         R"(Look:{read {"path":"a, {b}","lines":3}})");
  expect(gemma, "<start_function_call>call:add{a:1.5,flag:true,list:[<escape>x<escape>,2],o:{k:null}}"
                "<end_function_call>",
         R"({add {"a":1.5,"flag":true,"list":["x",2],"o":{"k":null}}})");
  expect(gemma, "```tool_code\nread(path='a')\n```", R"({read {"path":"a"}})");
  for (const char* text : {"```tool_code\nprint('a')\n```", "<|tool_call>call:rm{}<tool_call|>",
                           "<|tool_call>call:read{path:", "<|tool_call>x"}) {
    expect(gemma, text, text);
  }
}

TEST(AnswerParser, HarmonysChannelsAreParted_vllm_32587_32633_mlx_lm_875_1867) {
  const auto harmony = options(CallFormat::kHarmony);
  expect(harmony, "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
         "<Hm.>Yes.");
  expect(harmony, "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.read "
                  "<|constrain|>json<|message|>{\"path\": \"a\"}<|call|>", R"(<Hm.>{read {"path":"a"}})");
  expect(harmony, "<|channel|>commentary<|message|>I look.<|end|>"
                  "<|start|>assistant to=functions.add<|channel|>commentary json<|message|>{}<|call|>",
         "I look.{add {}}");
  expect(harmony, "<|channel|>final<|message|>Yes", "Yes");
  expect(harmony, "channel|>final<|message|>Yes", "channel|>final<|message|>Yes");
  expect(harmony, "<|channel|>commentary to=functions.read<|message|>{\"path\"", "{\"path\"");
}

TEST(AnswerParser, OneCallIsEnoughWhereOnlyOneIsAllowed) {
  auto one = options(CallFormat::kTagged);
  one.one_call = true;
  const std::string call = "<tool_call>{\"name\":\"read\",\"arguments\":{}}</tool_call>";
  expect(one, call + call + "text", "{read {}}");
}

TEST(AnswerParser, TheFormatIsTheTemplates) {
  EXPECT_EQ(answer_format("<tool_call> <think>").calls, CallFormat::kTagged);
  EXPECT_EQ(answer_format("<tool_call> <think>").think_open, "<think>");
  EXPECT_EQ(answer_format("[TOOL_CALLS]").calls, CallFormat::kMistral);
  EXPECT_EQ(answer_format("<start_of_turn>").calls, CallFormat::kGemma);
  EXPECT_EQ(answer_format("<|start_header_id|> tools").calls, CallFormat::kLlama);
  EXPECT_EQ(answer_format("<|channel|>").calls, CallFormat::kHarmony);
  EXPECT_EQ(answer_format("<|im_start|>").calls, CallFormat::kNone);
  EXPECT_EQ(answer_format("<|im_start|>").think_open, "");
}

/// What is told of text in which stop strings are looked for, and which was met.
std::string stopped(const std::vector<std::string>& stop, const std::vector<std::string>& pieces,
                    bool call_only = false) {
  Told told;
  StopSink sink(stop, call_only, told);
  AnswerParser parser(options(CallFormat::kTagged), sink);
  for (const std::string& piece : pieces) parser.push(piece);
  parser.finish();
  sink.finish({});
  return told.all() + "|" + sink.met();
}

TEST(StopSink, AStopStringEndsTheTextWhereverItIsCut_vllm_3574_SwiftLM_126_llama_cpp_9867_koboldcpp_1031) {
  const std::string text = "One END two EN ENDING";
  for (size_t i = 0; i <= text.size(); ++i) {
    EXPECT_EQ(stopped({"END"}, {text.substr(0, i), text.substr(i)}), "One |END") << i;
    EXPECT_EQ(stopped({"two", "ENDING"}, {text.substr(0, i), text.substr(i)}), "One END |two") << i;
    EXPECT_TRUE(stopped({"ENDI", "ENDING"}, {text.substr(0, i), text.substr(i)}).starts_with("One END two EN |")) << i;
    EXPECT_EQ(stopped({"three"}, {text.substr(0, i), text.substr(i)}), text + "|") << i;
  }
  EXPECT_EQ(stopped({"END"}, {"One EN"}), "One EN|");
}

TEST(StopSink, WhereItBeginsIsKnownInAllThatWasGenerated) {
  const std::string call = R"(<tool_call>{"name":"read","arguments":{"path":"END"}}</tool_call>)";
  for (const std::string& raw : {std::string("<think>END</think>\n\nOne <b END two"), std::string("  One END"),
                                 call + " a  <tool_call>END"}) {
    for (size_t i = 0; i <= raw.size(); ++i) {
      /// Each piece that is told stands where it says.
      struct Placed : Told {
        void text(std::string_view delta) override {
          EXPECT_EQ(raw->substr(stop->position(), delta.size()), delta);
          Told::text(delta);
        }
        const std::string* raw = nullptr;
        const StopSink* stop = nullptr;
      } told;
      StopSink sink({"END"}, false, told);
      AnswerParser parser(options(CallFormat::kTagged), sink);
      sink.follow(parser);
      told.raw = &raw;
      told.stop = &sink;
      parser.push(raw.substr(0, i));
      parser.push(raw.substr(i));
      parser.finish();
      EXPECT_EQ(sink.met(), "END") << raw << i;
      EXPECT_EQ(sink.cut(), raw.rfind("END")) << raw << i;
    }
  }
}

TEST(StopSink, AStopStringInThinkingOrArgumentsEndsNothing_mlx_knife_68_smg_2203) {
  const std::string call = R"(<tool_call>{"name":"read","arguments":{"path":"END"}}</tool_call>)";
  EXPECT_EQ(stopped({"END"}, {"<think>END</think>Yes " + call}),
            R"(<END>Yes{read {"path":"END"}}|)");
}

TEST(StopSink, AnAnswerThatMustBeACallHasNoText_ollama_17921) {
  EXPECT_EQ(stopped({}, {"I will. <tool_call>{\"name\":\"read\"}</tool_call> So."}, true), "{read {}}|");
}

}  // namespace
}  // namespace torpor::server
