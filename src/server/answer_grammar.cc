#include "server/answer_grammar.h"

#include <algorithm>
#include <string_view>

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
  /// The rule `name`: anything up to the first such mark, and the mark.
  std::string up_to(const std::string& name) const {
    return special ? name + ": /(?s:.*)/ " + rule + "\n" : name + "[suffix=" + rule + "]: /(?s:.*)/\n";
  }
  /// The terminal `name`: anything without the mark.
  std::string without(const std::string& name) const {
    return name + ": /(?s:.*)/" + (special ? "" : " & ~/(?s:.*)" + escaped(text) + "(?s:.*)/") + "\n";
  }

  std::string text, rule;
  bool special = false;
};

constexpr const char* kOpenCall = "<tool_call>";

/// `call_rest`, a call after kOpenCall where there is one, of each tool as the model writes it. Empty for a way of writing that no
/// grammar is known of.
std::string call_rules(const AnswerParser::Options& parsing, const Tokenizer& tokenizer) {
  const bool tagged = parsing.format.calls == CallFormat::kTagged;
  if (!tagged && parsing.format.calls != CallFormat::kLlama) return {};
  const std::string arguments = tagged ? "arguments" : "parameters";
  const std::string open = tagged ? "/\\n?/ " : "";
  const std::string close = tagged ? " /\\n?/ " + Mark("</tool_call>", tokenizer).rule : "";
  std::string rules = "call_rest: ", each;
  for (size_t i = 0; i < parsing.tools.size(); ++i) {
    const Tool& tool = parsing.tools[i];
    const std::string name = "call_" + std::to_string(i);
    rules += (i > 0 ? " | " : "") + name;
    each += name + ": " + open + lark_string("{\"name\": " + to_text(Json(tool.name)) + ", \"" + arguments + "\": ") + " " +
            schema_of(tool.parameters, tool.strict) + " \"}\"" + close + "\n";
  }
  return rules + "\n" + each + "call: " + (tagged ? Mark(kOpenCall, tokenizer).rule + " " : "") + "call_rest\n";
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
    } else if (parsing.format.calls == CallFormat::kTagged) {
      const Mark open(kOpenCall, tokenizer);
      rules += open.up_to("before_call") + open.without("TEXT");
      answer = "(before_call call_rest)* TEXT";
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
