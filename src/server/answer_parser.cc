#include "server/answer_parser.h"

#include <algorithm>

#include "server/call_syntax.h"

namespace torpor::server {
namespace {

constexpr std::string_view kSpace = " \t\r\n";

using Read = CallReading (*)(std::string_view, const Tools&, bool);

/// Where calls of a format may begin: at a mark anywhere, or also at the answer's beginning with one of these bytes or
/// a name.
struct Syntax {
  CallFormat format;
  Read read;
  std::vector<std::string> marks;
  std::string first;  // bytes
  bool names;         // a declared name
};

const Syntax* syntax_of(CallFormat format) {
  static const std::vector<Syntax> kAll{
      {CallFormat::kTagged, read_tagged_call, {"<tool_call>", "<function="}, "", false},
      {CallFormat::kFunctionTags, read_tagged_call, {"<tool_call>", "<function="}, "", false},
      {CallFormat::kArgumentTags, read_tagged_call, {"<tool_call>", "<function="}, "", false},
      {CallFormat::kLlama, read_llama_call, {"<|python_tag|>"}, "{[", false},
      {CallFormat::kMistral, read_mistral_call, {"[TOOL_CALLS]"}, "[", true},
      {CallFormat::kGemma, read_gemma_call, {"<|tool_call>", "<start_function_call>", "```tool_code"}, "", false}};
  const auto found = std::find_if(kAll.begin(), kAll.end(), [&](const Syntax& s) { return s.format == format; });
  return found == kAll.end() ? nullptr : &*found;
}

/// Length of the longest end of `text` that is the beginning of one of `marks`, but no whole one.
size_t begun(std::string_view text, const std::vector<std::string>& marks) {
  size_t longest = 0;
  for (const std::string& mark : marks) {
    for (size_t n = std::min(mark.size() - 1, text.size()); n > longest; --n) {
      if (text.ends_with(std::string_view(mark).substr(0, n))) longest = n;
    }
  }
  return longest;
}

/// Length of `text` without the white space at its end.
size_t trimmed(std::string_view text) {
  const size_t last = text.find_last_not_of(kSpace);
  return last == std::string_view::npos ? 0 : last + 1;
}

}  // namespace

AnswerFormat answer_format(std::string_view chat_template) {
  const auto has = [&](std::string_view word) { return chat_template.find(word) != std::string_view::npos; };
  AnswerFormat format;
  if (has("<|channel|>")) {
    format.calls = CallFormat::kHarmony;
    return format;
  }
  if (has("<tool_call>") && has("<arg_key>")) format.calls = CallFormat::kArgumentTags;
  else if (has("<tool_call>") && has("<function=") && has("<parameter=")) format.calls = CallFormat::kFunctionTags;
  else if (has("<tool_call>")) format.calls = CallFormat::kTagged;
  else if (has("[TOOL_CALLS]")) format.calls = CallFormat::kMistral;
  else if (has("<|tool_call>") || has("<start_function_call>") || has("<start_of_turn>"))
    format.calls = CallFormat::kGemma;
  else if (has("<|python_tag|>") || (has("<|start_header_id|>") && has("tools"))) format.calls = CallFormat::kLlama;
  if (has("<think>")) {
    format.think_open = "<think>";
    format.think_close = "</think>";
  } else if (has("[THINK]")) {
    format.think_open = "[THINK]";
    format.think_close = "[/THINK]";
  } else if (has("<|channel>thought")) {
    format.think_open = "<|channel>thought";
    format.think_close = "<channel|>";
  }
  return format;
}

bool opens_thinking(const AnswerFormat& format, std::string_view rendered_prompt) {
  return !format.think_open.empty() && rendered_prompt.substr(0, trimmed(rendered_prompt)).ends_with(format.think_open);
}

struct AnswerParser::Impl {
  Options options;
  AnswerSink& sink;
  enum class State { kBegin, kThinking, kAfterThinking, kText, kCall, kDropped } state = State::kBegin;
  std::string pending;      // generated, not told yet
  std::string space;        // white space before what may be a call
  int calls = 0;
  size_t thinking_bytes = 0;
  size_t pushed = 0, position = 0;
  const Syntax* syntax = nullptr;
  // Harmony
  enum class Body { kHeader, kThinking, kText, kCall } body = Body::kHeader;
  std::string recipient;

  Impl(Options given, AnswerSink& sink) : options(std::move(given)), sink(sink) {
    if (!options.tools.empty()) syntax = syntax_of(options.format.calls);
    if (options.in_thinking) state = State::kThinking;
  }

  /// A piece that begins where `pending` does, or with the `space` before it.
  void text(std::string_view piece) {
    position = pushed - pending.size() - space.size();
    if (!piece.empty()) sink.text(piece);
  }
  void think(std::string_view piece) {
    thinking_bytes += piece.size();
    if (!piece.empty()) sink.thinking(piece);
  }
  void call(const ReadCall& read) {
    if (state == State::kDropped) return;
    ++calls;
    sink.tool_call(read.name);
    sink.arguments(to_text(read.arguments));
    if (options.one_call) state = State::kDropped;
  }

  /// One step on `pending`. False: it needs more text.
  bool step(bool last) {
    switch (state) {
      case State::kBegin: return begin(last);
      case State::kThinking: return in_thinking(last);
      case State::kAfterThinking: {
        pending.erase(0, std::min(pending.find_first_not_of(kSpace), pending.size()));
        if (pending.empty()) return false;
        state = State::kBegin;
        options.format.think_open.clear();  // it thinks once
        return true;
      }
      case State::kText: return in_text(last);
      case State::kCall: return in_call(last);
      case State::kDropped: pending.clear(); return false;
    }
    return false;
  }

  /// The beginning: an opening of thinking counts here alone, and a call may begin without a mark.
  bool begin(bool last) {
    const size_t first = pending.find_first_not_of(kSpace);
    if (first == std::string::npos && !last) return false;
    const std::string_view rest = std::string_view(pending).substr(std::min(first, pending.size()));
    const std::string& open = options.format.think_open;
    if (!open.empty() && !rest.empty()) {
      if (rest.starts_with(open)) {
        pending.erase(0, first + open.size());
        state = State::kThinking;
        return true;
      }
      if (rest.size() < open.size() && open.starts_with(rest) && !last) return false;
    }
    state = State::kText;
    if (!syntax || rest.empty()) return true;
    bool may = syntax->first.find(rest[0]) != std::string::npos;
    for (const Tool& tool : options.tools) may |= syntax->names && !tool.name.empty() && tool.name[0] == rest[0];
    if (may) open_call(first);
    return true;
  }

  void open_call(size_t at) {
    const size_t end = trimmed(std::string_view(pending).substr(0, at));
    text(std::string_view(pending).substr(0, end));
    space = pending.substr(end, at - end);
    pending.erase(0, at);
    state = State::kCall;
  }

  bool in_thinking(bool last) {
    const std::string& close = options.format.think_close;
    if (thinking_bytes == 0) pending.erase(0, std::min(pending.find_first_not_of(kSpace), pending.size()));
    const size_t end = pending.find(close);
    if (end != std::string::npos) {
      think(std::string_view(pending).substr(0, trimmed(std::string_view(pending).substr(0, end))));
      pending.erase(0, end + close.size());
      state = State::kAfterThinking;
      return true;
    }
    size_t safe = pending.size() - (last ? 0 : begun(pending, {close}));
    safe = trimmed(std::string_view(pending).substr(0, safe));
    think(std::string_view(pending).substr(0, safe));
    pending.erase(0, safe);
    return false;
  }

  bool in_text(bool last) {
    if (!syntax) {
      text(pending);
      pending.clear();
      return false;
    }
    size_t at = std::string::npos;
    for (const std::string& mark : syntax->marks) at = std::min(at, pending.find(mark));
    if (at != std::string::npos) {
      open_call(at);
      return true;
    }
    size_t safe = pending.size();
    if (!last) safe = trimmed(std::string_view(pending).substr(0, safe - begun(pending, syntax->marks)));
    text(std::string_view(pending).substr(0, safe));
    pending.erase(0, safe);
    return false;
  }

  bool in_call(bool last) {
    if (pending.empty()) return false;
    const CallReading reading = syntax->read(pending, options.tools, last);
    if (reading.state == CallReading::State::kMore) return false;
    state = State::kText;
    if (reading.state == CallReading::State::kText) {
      const size_t length = std::min(std::max<size_t>(reading.length, 1), pending.size());
      text(space + pending.substr(0, length));
      pending.erase(0, length);
    } else {
      pending.erase(0, reading.length);
      for (const ReadCall& read : reading.calls) call(read);
      // White space between calls belongs to neither.
      if (state == State::kText) state = State::kAfterThinking;
    }
    space.clear();
    return true;
  }

  // Harmony: messages with a header, a channel, and perhaps the tool to which they go.
  bool harmony_step(bool last) {
    static const std::vector<std::string> kEnds{"<|end|>", "<|call|>", "<|return|>", "<|start|>"};
    if (body == Body::kHeader) {
      if (pending.empty()) return false;
      const bool header = pending.starts_with("<|") || pending.starts_with("assistant");
      if (!header) {
        const bool may = std::string_view("<|").starts_with(pending) || std::string_view("assistant").starts_with(pending);
        if (may && !last) return false;
        body = Body::kText;  // none at all
        return true;
      }
      const size_t end = pending.find("<|message|>");
      if (end == std::string::npos) {
        if (!last) return false;
        if (!pending.starts_with("<|")) {
          body = Body::kText;
          return true;
        }
        pending.clear();  // a header that was cut off
        return false;
      }
      read_header(std::string_view(pending).substr(0, end));
      pending.erase(0, end + std::string_view("<|message|>").size());
      return true;
    }
    size_t end = std::string::npos, length = 0;
    for (const std::string& mark : kEnds) {
      const size_t found = pending.find(mark);
      if (found < end) end = found, length = mark == "<|start|>" ? 0 : mark.size();
    }
    const bool ended = end != std::string::npos;
    if (body == Body::kCall) {
      if (!ended && !last) return false;
      const std::string_view content = std::string_view(pending).substr(0, end);
      Json arguments = parse_json<Json>(trimmed(content) == 0 ? "{}" : content, nullptr, false);
      const Tool* tool = find_tool(options.tools, recipient);
      if (arguments.is_object()) call({recipient, conform(std::move(arguments), tool->parameters)});
      else text(content);
    } else {
      const size_t safe = ended ? end : pending.size() - (last ? 0 : begun(pending, kEnds));
      const std::string_view piece = std::string_view(pending).substr(0, safe);
      if (state == State::kDropped) {
      } else if (body == Body::kThinking) {
        think(piece);
      } else {
        text(piece);
      }
      if (!ended) {
        pending.erase(0, safe);
        return false;
      }
    }
    pending.erase(0, ended ? end + length : pending.size());
    body = Body::kHeader;
    return ended;
  }

  void read_header(std::string_view header) {
    const auto word_after = [&](std::string_view mark) {
      const size_t at = header.find(mark);
      if (at == std::string_view::npos) return std::string_view();
      const std::string_view rest = header.substr(at + mark.size());
      return rest.substr(0, std::min(rest.find_first_of(" \n<"), rest.size()));
    };
    recipient = word_after("to=functions.");
    if (find_tool(options.tools, recipient)) body = Body::kCall;
    else body = word_after("<|channel|>") == "analysis" ? Body::kThinking : Body::kText;
  }

  void run(bool last) {
    if (options.format.calls == CallFormat::kHarmony) {
      while (harmony_step(last)) {
      }
    } else {
      while (step(last)) {
      }
    }
  }
};

AnswerParser::AnswerParser(Options options, AnswerSink& sink)
    : impl_(std::make_unique<Impl>(std::move(options), sink)) {}
AnswerParser::~AnswerParser() = default;

void AnswerParser::push(std::string_view text) {
  impl_->pending += text;
  impl_->pushed += text.size();
  impl_->run(false);
}

void AnswerParser::finish() { impl_->run(true); }
int AnswerParser::calls() const { return impl_->calls; }
bool AnswerParser::complete() const { return impl_->state == Impl::State::kDropped; }
size_t AnswerParser::position() const { return impl_->position; }
size_t AnswerParser::thinking_bytes() const { return impl_->thinking_bytes; }

}  // namespace torpor::server
