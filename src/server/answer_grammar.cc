#include "server/answer_grammar.h"

#include <algorithm>
#include <string_view>

#include "server/gemma_grammar.h"
#include "server/tagged_grammar.h"

namespace torpor::server {
namespace {

/// A text as a Lark string.
std::string lark_string(std::string_view text) { return to_text(Json(text)); }

/// A text as it stands in a regular expression between slashes.
std::string escaped(std::string_view text) {
  std::string regex;
  for (const char c : text) {
    if (std::string_view("\\/.*+?()[]{}|^$&~-#").find(c) != std::string_view::npos) regex += '\\';
    regex += c;
  }
  return regex;
}

/// A schema to put in. What can't be held to is left out, unless the schema is a promise.
std::string schema_of(Json schema, bool strict) {
  if (!strict) {
    if (!schema.is_object() || schema.empty()) schema = {{"type", "object"}};
    schema["x-guidance"] = {{"lenient", true}};
  }
  return "%json " + to_text(schema);
}

/// A mark in the answer: the token of that text where that is a special one, else its text.
struct Mark {
  Mark(std::string_view text, const Tokenizer& tokenizer) : text(text) {
    const auto id = tokenizer.token_to_id(text);
    special = id && tokenizer.decode({*id}, true).empty();
    rule = special ? "<[" + std::to_string(*id) + "]>" : lark_string(text);
  }
  /// The rule `name`: anything up to the first such mark, and the mark. `text`: a terminal of what may come before.
  std::string up_to(const std::string& name, const std::string& text = "/(?s:.*)/") const {
    return special ? name + ": " + text + " " + rule + "\n" : name + "[suffix=" + rule + "]: " + text + "\n";
  }
  /// The terminal `name`: anything without the mark, of what `text` may be.
  std::string without(const std::string& name, const std::string& text = "/(?s:.*)/") const {
    return name + ": " + text + (special ? "" : " & ~/(?s:.*)" + escaped(this->text) + "(?s:.*)/") + "\n";
  }

  std::string text, rule;
  bool special = false;
};

/// Gemma's marks: those of FunctionGemma where its tokenizer has them, else Gemma 4's.
struct GemmaMarks {
  const char *open, *close, *quote;
};
GemmaMarks gemma_marks(const Tokenizer& tokenizer) {
  if (Mark("<start_function_call>", tokenizer).special) return {"<start_function_call>", "<end_function_call>", "<escape>"};
  return {"<|tool_call>", "<tool_call|>", "<|\"|>"};
}

/// What opens a call of a format; empty where nothing does, or no grammar is known.
std::string open_mark(CallFormat calls, const Tokenizer& tokenizer) {
  const auto tagged = {CallFormat::kTagged, CallFormat::kFunctionTags, CallFormat::kArgumentTags};
  if (std::find(tagged.begin(), tagged.end(), calls) != tagged.end()) return "<tool_call>";
  if (calls == CallFormat::kMistral) return "[TOOL_CALLS]";
  if (calls == CallFormat::kGemma) return gemma_marks(tokenizer).open;
  return {};
}

/// A JSON object that calls the tool.
std::string call_object(const Tool& tool, const char* arguments) {
  return lark_string("{\"name\": " + to_text(Json(tool.name)) + ", \"" + arguments + "\": ") + " " +
         schema_of(tool.parameters, tool.strict) + " \"}\"";
}

/// The rule `name`: what `each` gives for one of the tools.
template <class Each>
std::string any_tool(const std::string& name, const std::vector<Tool>& tools, Each each) {
  std::string any = name + ": ", rules;
  for (size_t i = 0; i < tools.size(); ++i) {
    const std::string one = name + "_" + std::to_string(i);
    any += (i > 0 ? " | " : "") + one;
    rules += one + ": " + each(tools[i]) + "\n";
  }
  return any + "\n" + rules;
}

/// The rule `name`: a tool's name, its arguments between tags, and `close`.
std::string tagged_calls(const std::string& name, const std::vector<Tool>& tools, const std::string& after_name,
                         const ArgumentTags& tags, const std::string& close) {
  std::string rules;
  int n = 0;
  const std::string calls = any_tool(name, tools, [&](const Tool& tool) {
    const TaggedArguments arguments(tool.parameters, tool.strict, "arguments_" + std::to_string(n++), tags);
    rules += arguments.rules();
    return lark_string(tool.name) + " " + after_name + " " + tags.space + " " + arguments.value() + close;
  });
  return calls + rules;
}

/// `call_rest`, a call after its open_mark where there is one, and `call`, all of it. Empty for a way of writing that
/// no grammar
/// is known of.
std::string call_rules(const AnswerParser::Options& parsing, const Tokenizer& tokenizer) {
  const CallFormat calls = parsing.format.calls;
  std::string rules;
  switch (calls) {
    case CallFormat::kTagged: {
      const std::string close = Mark("</tool_call>", tokenizer).rule;
      rules = any_tool("call_rest", parsing.tools, [&](const Tool& tool) {
        return "/\\n?/ " + call_object(tool, "arguments") + " /\\n?/ " + close;
      });
      break;
    }
    case CallFormat::kFunctionTags: {
      const Mark close("</parameter>", tokenizer);
      const ArgumentTags tags{.open = "\"<parameter=\"", .key = "\">\"", .space = "/\\n?/", .text = "parameter_text",
                              .close = close.rule, .keys = "/[^>\\n]+/"};
      rules = "call_rest: /\\n?/ \"<function=\" function /\\n?/ " + Mark("</tool_call>", tokenizer).rule + "\n" +
              tagged_calls("function", parsing.tools, "\">\"", tags, "\"</function>\"") + close.up_to(tags.text);
      break;
    }
    case CallFormat::kArgumentTags: {
      const auto rule = [&](const char* mark) { return Mark(mark, tokenizer).rule; };
      const Mark close("</arg_value>", tokenizer);
      const ArgumentTags tags{.open = rule("<arg_key>"), .key = rule("</arg_key>") + " /\\n?/ " + rule("<arg_value>"),
                              .space = "/\\n?/", .text = "argument_text", .close = close.rule, .keys = "/[^<>\\n]+/"};
      rules = tagged_calls("call_rest", parsing.tools, "", tags, rule("</tool_call>")) + close.up_to(tags.text);
      break;
    }
    case CallFormat::kLlama:
      rules = any_tool("call_rest", parsing.tools, [](const Tool& tool) { return call_object(tool, "parameters"); });
      break;
    case CallFormat::kMistral: {
      // Old models write an array of objects, new ones a name and its arguments, some with an id between them.
      const std::string id = "(" + Mark("[CALL_ID]", tokenizer).rule + " /[A-Za-z0-9]+/)? ";
      const std::string arguments = id + Mark("[ARGS]", tokenizer).rule + " ";
      rules = "call_rest: named | \"[\" object" + std::string(parsing.one_call ? "" : " (/, ?/ object)*") + " \"]\"\n" +
              any_tool("object", parsing.tools, [](const Tool& tool) { return call_object(tool, "arguments"); }) +
              any_tool("named", parsing.tools, [&](const Tool& tool) {
                return lark_string(tool.name) + " " + arguments + schema_of(tool.parameters, tool.strict);
              });
      break;
    }
    case CallFormat::kGemma: {
      const GemmaMarks marks = gemma_marks(tokenizer);
      const Mark quote(marks.quote, tokenizer);
      std::string values = quote.up_to("gemma_string");
      int n = 0;
      rules = any_tool("call_rest", parsing.tools, [&](const Tool& tool) {
        const GemmaValues arguments(tool.parameters, tool.strict, "gemma_" + std::to_string(n++), quote.rule, "gemma_string");
        values += arguments.rules();
        return lark_string("call:" + tool.name) + " " + arguments.value() + " " + Mark(marks.close, tokenizer).rule;
      });
      rules += values;
      break;
    }
    default: return {};
  }
  const std::string open = open_mark(calls, tokenizer);
  return rules + "call: " + (open.empty() ? "" : Mark(open, tokenizer).rule + " ") + "call_rest\n";
}

/// Harmony's messages, each with a header that names its channel, and for a call its tool. The answer begins in a
/// header. A call, and
/// the answer itself, end with a token that ends all.
std::string harmony_grammar(const std::string& format, bool must_call, const AnswerParser::Options& parsing,
                            const Tokenizer& tokenizer) {
  const auto rule = [&](std::string_view text) { return Mark(text, tokenizer).rule; };
  const std::string channel = rule("<|channel|>"), message = rule("<|message|>"), json = "(/ ?/ " + rule("<|constrain|>") + " \"json\")? ";
  const Mark end("<|end|>", tokenizer);
  std::string rules = end.up_to("said") + end.without("TEXT");
  std::string last = must_call ? "" : "final";
  // Before what counts the model may think, and where any text may come, speak.
  const std::string before = format.empty() && !must_call ? "(\"analysis\" | \"commentary\" | \"final\")" : "\"analysis\"";
  rules += "message: " + channel + " " + before + " " + message + " said " + rule("<|start|>") + " \"assistant\"\n";
  rules += "final: " + channel + (format.empty() ? " (\"final\" | \"analysis\" | \"commentary\") " + message + " TEXT\n"
                                                : " \"final\" " + json + message + " " + format + "\n");
  if (!parsing.tools.empty()) {
    last += last.empty() ? "call" : " | call";
    rules += any_tool("call", parsing.tools, [&](const Tool& tool) {
      const std::string to = lark_string("to=functions." + tool.name);
      return "(" + channel + " \"commentary \" " + to + " | \" \" " + to + " " + channel + " \"commentary\") " + json + "/ ?/ " + message +
             " " + schema_of(tool.parameters, tool.strict);
    });
  }
  return "start: message* (" + last + ")\n" + rules;
}

}  // namespace

std::optional<std::string> answer_grammar(const ChatRequest& request, const AnswerParser::Options& parsing,
                                          const Tokenizer& tokenizer) {
  const ResponseFormat& format = request.response_format;
  const ToolChoice::Kind choice = request.tool_choice.kind;
  const bool must_call = choice == ToolChoice::Kind::kRequired || choice == ToolChoice::Kind::kNamed;
  std::string answer, rules;  // the rule of the answer after thinking, and the rules that it needs
  switch (format.kind) {
    case ResponseFormat::Kind::kText: break;
    case ResponseFormat::Kind::kJsonObject: answer = "%json {\"type\": \"object\"}"; break;
    case ResponseFormat::Kind::kJsonSchema: answer = schema_of(format.schema, true); break;
    case ResponseFormat::Kind::kLark: answer = "%lark {\n" + format.grammar + "\n}"; break;
  }
  if (parsing.format.calls == CallFormat::kHarmony) {
    if (answer.empty() && parsing.tools.empty()) return std::nullopt;
    return harmony_grammar(answer, must_call && !parsing.tools.empty(), parsing, tokenizer);
  }
  bool free = false;  // the answer may begin with any text
  if (!parsing.tools.empty()) {
    rules = call_rules(parsing, tokenizer);
    const std::string calls = parsing.one_call ? "call" : "call (/\\n?/ call)*";
    if (!rules.empty() && must_call) {
      answer = calls;
    } else if (!answer.empty() && rules.empty()) {
      throw Failure(Failure::Kind::kInvalid, "A response format can't be held to beside this model's tools; leave one of them out.",
                    "response_format");
    } else if (!answer.empty()) {
      answer = "(" + answer + ") | " + calls;
    } else if (const std::string mark = open_mark(parsing.format.calls, tokenizer); !mark.empty()) {
      const Mark open(mark, tokenizer);
      if (parsing.format.calls == CallFormat::kFunctionTags) {  // a call that lacks its first tag is one, too
        const Mark function("<function=", tokenizer);
        rules += function.without("NO_FUNCTION") + open.up_to("before_call", "NO_FUNCTION") + open.without("NO_CALL") +
                 function.up_to("before_function", "NO_CALL") + open.without("TEXT", "NO_FUNCTION");
        answer = "(before_call call_rest | before_function function)* TEXT";
      } else {
        rules += open.up_to("before_call") + open.without("TEXT");
        answer = "(before_call call_rest)* TEXT";
      }
      free = true;
    }
  }
  if (answer.empty()) return std::nullopt;
  std::string start = "answer";
  if (!parsing.format.think_close.empty() && (parsing.in_thinking || !free)) {
    // Where the model opens it itself and any text may come, thinking is such text.
    const std::string open = parsing.in_thinking ? "" : "/\\s*/ " + Mark(parsing.format.think_open, tokenizer).rule + " ";
    rules += Mark(parsing.format.think_close, tokenizer).up_to("thought") + "thinking: " + open + "thought" + (free ? "" : " /\\s*/") + "\n";
    start = parsing.in_thinking ? "thinking answer" : "thinking? answer";
  }
  return "start: " + start + "\nanswer: " + answer + "\n" + rules;
}

}  // namespace torpor::server
