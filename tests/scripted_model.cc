/// A server whose model says what a script wants, for the coding agents of tests/test_clients.py. All else is the
/// program's: keys, dialects, template, agents, and an engine that computes each token.
///
///     scripted_model MODEL STORE KEYS RECORD
///
/// It makes the key file KEYS unless it is there, prints its port, and ends with its standard input. MODEL is a
/// directory; its weights don't matter. The last message that is one of these says what is answered:
///
///     a result of a tool         "The tool says: " and its first words
///     ... call NAME JSON ...     a call of the tool NAME, where the request has one
///
/// Else it says "Hello there." RECORD gets a JSON object a line for each answer.

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <sstream>

#include "base/mutex.h"
#include "server/dialects.h"
#include "server/engine_runner.h"
#include "server/http_edge.h"
#include "server/keys.h"
#include "server/service.h"
#include "server/turn_queue.h"

namespace torpor::server {
namespace {

/// The call that a message asks for; empty: none, or of a tool that isn't there.
std::string call_in(const std::string& text, const std::vector<Tool>& tools) {
  static constexpr std::string_view kWord = "call ";
  for (size_t at = 0; (at = text.find(kWord, at)) != std::string::npos;) {
    at += kWord.size();
    std::istringstream rest(text.substr(at));
    std::string name;
    rest >> name;
    if (std::none_of(tools.begin(), tools.end(), [&](const Tool& tool) { return tool.name == name; })) continue;
    try {
      Json arguments;
      rest >> arguments;
      return "<tool_call>\n" + to_text(Json{{"name", name}, {"arguments", arguments}}) + "\n</tool_call>";
    } catch (const Json::exception&) {
      continue;
    }
  }
  return {};
}

std::string answer_to(const ChatRequest& request) {
  constexpr int kWords = 60;
  for (auto message = request.messages.rbegin(); message != request.messages.rend(); ++message) {
    if (message->role == Role::kTool) {
      std::istringstream words(message->text);
      std::string answer = "The tool says:", word;
      for (int i = 0; i < kWords && words >> word; ++i) answer += " " + word;
      return answer;
    }
    if (message->role != Role::kUser) continue;
    if (std::string call = call_in(message->text, request.tools); !call.empty()) return call;
  }
  return "Hello there.";
}

/// Tokens of a text as no tokenizer would choose them: short pieces of it. Read again, that text has others, so a
/// history goes on from its agent only by the ids that were generated.
std::vector<int32_t> odd_tokens(const Tokenizer& tokenizer, std::string_view text) {
  constexpr size_t kBytes = 3;
  std::vector<int32_t> tokens;
  while (!text.empty()) {
    size_t end = std::min(kBytes, text.size());
    while (end < text.size() && (text[end] & 0xC0) == 0x80) ++end;  // inside a character
    const std::vector<int32_t> piece = tokenizer.encode(text.substr(0, end), false);
    tokens.insert(tokens.end(), piece.begin(), piece.end());
    text.remove_prefix(end);
  }
  return tokens;
}

/// These tokens, then one that ends the answer.
class Script : public TokenFilter {
 public:
  Script(std::vector<int32_t> tokens, std::vector<int32_t> ends) : tokens_(std::move(tokens)), ends_(std::move(ends)) {}
  void allow(std::span<uint32_t> words) override {
    std::fill(words.begin(), words.end(), 0);
    const auto set = [&](int32_t token) { words[size_t(token) / 32] |= 1u << (token % 32); };
    if (said_ < tokens_.size()) set(tokens_[said_]);
    else std::for_each(ends_.begin(), ends_.end(), set);
  }
  void accept(int32_t) override { ++said_; }

 private:
  const std::vector<int32_t> tokens_, ends_;
  size_t said_ = 0;
};

/// Passes an answer on, and has its numbers kept before its end is heard.
class Recorder : public AnswerSink {
 public:
  using Keep = std::function<void(const AnswerEnd&)>;
  Recorder(AnswerSink& sink, Keep keep) : sink_(sink), keep_(std::move(keep)) {}
  void start(const AnswerStart& start) override { sink_.start(start); }
  void progress(int done, int total) override { sink_.progress(done, total); }
  void thinking(std::string_view delta) override { sink_.thinking(delta); }
  void text(std::string_view delta) override { sink_.text(delta); }
  void tool_call(const std::string& name) override { sink_.tool_call(name); }
  void arguments(std::string_view delta) override { sink_.arguments(delta); }
  void finish(const AnswerEnd& end) override {
    keep_(end);
    sink_.finish(end);
  }

 private:
  AnswerSink& sink_;
  const Keep keep_;
};

class ScriptedModel : public EngineRunner {
 public:
  ScriptedModel(Engine& engine, const std::string& record)
      : EngineRunner(engine, "scripted"), engine_(engine), record_(record, std::ios::app) {}

  void run(const ChatRequest& request, AnswerSink& sink, const std::atomic<bool>& gone) override {
    Recorder recorder(sink, [&](const AnswerEnd& end) { record(request, end); });
    EngineRunner::run(request, recorder, gone);
  }

 protected:
  std::shared_ptr<TokenFilter> filter_of(const ChatRequest& request, const AnswerParser::Options&) override {
    const std::string answer = answer_to(request);
    // Without an agent a history is looked for by its text's own tokens.
    const bool has_agent = !request.agent.empty() || !request.session.empty();
    return std::make_shared<Script>(
        has_agent ? odd_tokens(*engine_.tokenizer(), answer) : engine_.tokenizer()->encode(answer, false),
        engine_.model().eos_token_ids);
  }

 private:
  void record(const ChatRequest& request, const AnswerEnd& end) {
    // What a conversation begins with, whatever is asked in it.
    ChatRequest beginning = request;
    const auto first = std::find_if(beginning.messages.begin(), beginning.messages.end(),
                                    [](const Message& message) { return message.role != Role::kSystem; });
    const bool begins = first != beginning.messages.begin();
    beginning.messages.erase(first, beginning.messages.end());
    const Json line{{"agent", end.agent},
                    {"tools", request.tools.size()},
                    {"messages", request.messages.size()},
                    {"last", int(request.messages.back().role)},
                    {"beginning", begins ? count_tokens(beginning) : 0},
                    {"prompt", end.prompt_tokens},
                    {"cached", end.cached_tokens},
                    {"generated", end.generated_tokens},
                    {"why", end.why}};
    const MutexLock lock(mutex_);
    record_ << to_text(line) << std::endl;
  }

  Engine& engine_;
  Mutex mutex_;
  std::ofstream record_ TORPOR_GUARDED_BY(mutex_);
};

}  // namespace
}  // namespace torpor::server

int main(int, char** words) {
  using namespace torpor::server;
  torpor::EngineOptions options;
  options.model = words[1];
  options.store = words[2];
  torpor::Engine engine(options);
  ScriptedModel model(engine, words[4]);
  Dialects dialects(model, {&engine.store()});
  Metrics metrics;
  TurnQueue queue(64);
  Service service({}, queue, dialects, dialects, metrics);
  if (!std::filesystem::exists(words[3])) make_key_file(words[3]);
  service.set_keys(ApiKeys::read(words[3]));
  HttpEdgeOptions edge_options;
  edge_options.port = 0;
  HttpEdge edge(edge_options, service);
  std::cout << edge.port() << std::endl;
  while (std::cin.get() != EOF) {
  }
}
