#pragma once
/// A TurnRunner without a model: it keeps what it is asked, and says what the test tells it to.

#include <atomic>
#include <cmath>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "server/chat.h"

namespace torpor::server {

/// What the script of one answer says, in the order of its calls.
class Say {
 public:
  Say(AnswerSink& sink, const std::atomic<bool>& gone) : sink_(sink), gone_(gone) {}

  Say& start(int prompt = 10, int cached = 4, const std::string& agent = {}, const std::string& why = {}) {
    begin_ = {"scripted", agent, prompt, cached, why};
    sink_.start(begin_);
    return *this;
  }
  Say& thinking(std::string_view delta) { return sink_.thinking(delta), *this; }
  Say& text(std::string_view delta) { return sink_.text(delta), *this; }
  /// Tokens for the text that comes next: their texts, each with `top` alternatives.
  Say& tokens(const std::vector<std::string>& texts, int top, size_t begin = 0) {
    std::vector<TokenLogprobs> tokens;
    for (const std::string& text : texts) {
      TokenLogprobs& token = tokens.emplace_back();
      static_cast<TokenLogprob&>(token) = {int(tokens.size()), -0.5f, text};
      token.begin = begin;
      begin += text == "\uFFFD" ? 0 : text.size();
      for (int i = 0; i < top; ++i) token.top.push_back({i, i == 0 ? -0.5f : -INFINITY, i == 0 ? text : "other"});
    }
    sink_.logprobs(std::move(tokens));
    return *this;
  }
  Say& call(const std::string& name, const std::vector<std::string>& arguments) {
    sink_.tool_call(name);
    for (const std::string& delta : arguments) sink_.arguments(delta);
    return *this;
  }
  void finish(StopReason reason = StopReason::kEnd, int generated = 7, int thought = 0, const std::string& stop = {}) {
    sink_.finish({reason, stop, begin_.prompt_tokens, begin_.cached_tokens, generated, thought, {}, {}});
  }
  bool gone() const { return gone_; }

 private:
  AnswerSink& sink_;
  const std::atomic<bool>& gone_;
  AnswerStart begin_;
};

class ScriptedRunner : public TurnRunner {
 public:
  using Script = std::function<void(const ChatRequest&, Say&)>;
  explicit ScriptedRunner(Script script = nullptr) : script_(std::move(script)) {
    if (!script_) script_ = [](const ChatRequest&, Say& say) { say.start().text("Hel").text("lo.").finish(); };
  }

  void run(const ChatRequest& request, AnswerSink& sink, const std::atomic<bool>& gone) override {
    {
      const std::lock_guard lock(mutex_);
      heard.push_back(request);
    }
    Say say(sink, gone);
    script_(request, say);
  }
  int count_tokens(const ChatRequest& request) override {
    const std::lock_guard lock(mutex_);
    heard.push_back(request);
    return 42;
  }
  std::vector<ModelEntry> models() override { return entries; }

  std::vector<ChatRequest> heard;
  std::vector<ModelEntry> entries{
      {"scripted", 1700000000, 4096, true, 1000, "abcdef0123", "scripted", "1M", "F16", true, true}};

 private:
  Script script_;
  std::mutex mutex_;
};

}  // namespace torpor::server
