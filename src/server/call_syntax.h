#pragma once
/// How models write calls of tools. Each function reads a text that begins where a call may begin.

#include <string>
#include <string_view>
#include <vector>

#include "server/chat.h"

namespace torpor::server {

struct ReadCall {
  std::string name;
  Json arguments = Json::object();
};

struct CallReading {
  enum class State {
    kMore,  ///< it may be a call; its end has not come yet
    kText,  ///< it is none: the first `length` bytes are text
    kCalls  ///< `calls`, in the first `length` bytes
  } state = State::kMore;
  size_t length = 0;
  std::vector<ReadCall> calls;
};

/// Only a call of one of these is a call. Their schemas say which values are strings where the syntax doesn't.
using Tools = std::vector<Tool>;

// `last`: no more text will come, so a closing tag may be missing.
/// `<tool_call>` with JSON (Hermes, Qwen), with NAME and `<arg_key>` (GLM), or with `<function=NAME><parameter=KEY>`
/// (Qwen3-Coder); the latter also without it.
CallReading read_tagged_call(std::string_view text, const Tools& tools, bool last);
/// `{"name": ..., "parameters": {...}}`, several with ';' between them (Llama 3), or `[name(key=value), ...]` in
/// Python's syntax (Llama 3.2, 4). `<|python_tag|>` may stand before either.
CallReading read_llama_call(std::string_view text, const Tools& tools, bool last);
/// `[TOOL_CALLS]` and an array of JSON objects, or `NAME[ARGS]{...}` once or more; the marks are special tokens, and
/// may be missing.
CallReading read_mistral_call(std::string_view text, const Tools& tools, bool last);
/// `<|tool_call>call:NAME{key:value}<tool_call|>` (Gemma 4), `<start_function_call>` likewise (FunctionGemma), or a
/// fenced `tool_code` in Python's syntax (Gemma 3).
CallReading read_gemma_call(std::string_view text, const Tools& tools, bool last);

/// Arguments with values of the types that the tool's schema names, where the text leaves it open: "3" or 3.
Json conform(Json arguments, const Json& schema);

/// Which texts are strings where values stand without quotes (GLM, Qwen3-Coder). Others are JSON.
struct BareStrings {
  bool any = false;                ///< any text
  std::vector<std::string> texts;  ///< else these
  bool others = false;             ///< a value may be none
};
/// By a value's schema. `root`: the schema that its references point into.
BareStrings bare_strings(const Json& schema, const Json& root);
/// What a `$ref` points to, inside the schema; nullptr: nothing there.
const Json* referred(const Json& schema, const Json& root);

const Tool* find_tool(const Tools& tools, std::string_view name);

}  // namespace torpor::server
