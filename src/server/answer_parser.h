#pragma once
/// Parts the text that a model generates into thinking, text and calls of tools.

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "server/chat.h"

namespace torpor::server {

/// How a model writes what is not text.
enum class CallFormat {
  kNone,
  kTagged,        ///< `<tool_call>` with JSON (Hermes, Qwen)
  kFunctionTags,  ///< `<tool_call>`, or nothing, with `<function=NAME>` and `<parameter=KEY>` (Qwen3-Coder)
  kArgumentTags,  ///< `<tool_call>` with NAME and `<arg_key>` (GLM)
  kLlama,
  kMistral,
  kGemma,
  kHarmony
};

struct AnswerFormat {
  CallFormat calls = CallFormat::kNone;
  std::string think_open, think_close;  ///< empty: it does not think
};

/// The format that a chat template speaks of.
AnswerFormat answer_format(std::string_view chat_template);

/// Whether the answer to a rendered prompt begins inside thinking, because the template opened it.
bool opens_thinking(const AnswerFormat& format, std::string_view rendered_prompt);

/// Takes text in pieces, wherever it is cut, and tells a sink the same. A call reaches the sink whole, once its end has
/// come: its arguments are valid JSON. Only a call of a declared tool is one; what merely looks like a call is text,
/// and so is a call whose end never came. Thinking counts at the beginning of the answer alone, and a call is none
/// inside it.
class AnswerParser {
 public:
  struct Options {
    AnswerFormat format;
    std::vector<Tool> tools;
    bool in_thinking = false;  ///< opens_thinking
    bool one_call = false;     ///< what follows the first call is dropped
  };
  /// `sink` must outlive it. It hears no start and no finish from here.
  AnswerParser(Options options, AnswerSink& sink);
  ~AnswerParser();

  void push(std::string_view text);
  /// No more text will come.
  void finish();
  int calls() const;
  /// Nothing that is pushed now would be heard (Options::one_call).
  bool complete() const;
  /// Inside AnswerSink::text: where the piece that is told begins, in bytes of all that was pushed.
  size_t position() const;
  /// Bytes of thinking told so far.
  size_t thinking_bytes() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace torpor::server
