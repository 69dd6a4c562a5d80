#include "server/engine_runner.h"

#include <algorithm>
#include <climits>
#include <deque>
#include <fstream>
#include <iterator>
#include <regex>

#include "base/gguf.h"
#include "base/hash.h"
#include "base/mutex.h"
#include "server/answer_grammar.h"
#include "server/grammar.h"
#include "server/keys.h"
#include "server/models.h"
#include "server/request.h"
#include "server/stop_sink.h"
#include "server/template_fit.h"
#include "torpor/error.h"

namespace torpor::server {
namespace {

/// What generation_config.json says of sampling. Without it, or where it says so, the likeliest token is taken.
SamplingOptions default_sampling(const std::filesystem::path& dir) {
  SamplingOptions sampling;
  std::ifstream file(dir / "generation_config.json", std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  const Json config = parse_json<Json>(text, nullptr, false);
  if (!config.is_object() || config.value("do_sample", Json(false)) != Json(true)) return sampling;
  const auto number = [&](const char* key, float otherwise) {
    const auto value = config.find(key);
    return value != config.end() && value->is_number() ? value->get<float>() : otherwise;
  };
  sampling.temperature = number("temperature", 1);
  sampling.top_p = number("top_p", 1);
  sampling.top_k = int(number("top_k", 0));
  sampling.min_p = number("min_p", 0);
  sampling.repetition_penalty = number("repetition_penalty", 1);
  sampling.penalty_context = 0;  // as transformers counts it
  return sampling;
}

/// An answer as it goes into the history.
class AnswerReader : public AnswerSink {
 public:
  Message message{Role::kAssistant};
  void start(const AnswerStart&) override {}
  void thinking(std::string_view delta) override { message.thinking += delta; }
  void text(std::string_view delta) override { message.text += delta; }
  void tool_call(const std::string& name) override { message.tool_calls.push_back({{}, name, {}}); }
  void arguments(std::string_view delta) override { message.tool_calls.back().arguments += delta; }
  void finish(const AnswerEnd&) override {}
};

/// Finds where a stop string begins in the text that is told of an answer, so that the engine takes its tokens back. On the
/// engine's thread.
class StopFinder {
 public:
  StopFinder(std::vector<std::string> stop, const AnswerParser::Options& parsing)
      : filter_(std::move(stop), true, nobody_), parser_(parsing, filter_) {
    filter_.follow(parser_);
  }
  std::optional<StopFound> push(std::string_view piece) {
    parser_.push(piece);
    if (filter_.met().empty()) return std::nullopt;
    return StopFound{filter_.cut(), filter_.met()};
  }

 private:
  AnswerReader nobody_;
  StopSink filter_;
  AnswerParser parser_;
};

/// Gives each piece of text the tokens that begin in it. They come from the engine's thread, before their text.
class TokenSink : public AnswerSink {
 public:
  explicit TokenSink(AnswerSink& sink) : sink_(sink) {}
  void follow(const StopSink& filter) { filter_ = &filter; }
  void push(const TokenLogprobs& token) {
    const MutexLock lock(mutex_);
    tokens_.push_back(token);
  }

  void start(const AnswerStart& start) override { sink_.start(start); }
  void progress(int done, int total) override { sink_.progress(done, total); }
  void thinking(std::string_view delta) override { sink_.thinking(delta); }
  void text(std::string_view delta) override {
    std::vector<TokenLogprobs> own = take(filter_->position(), filter_->position() + delta.size());
    for (TokenLogprobs& token : own) token.begin += told_ - filter_->position();
    told_ += delta.size();
    if (!own.empty()) sink_.logprobs(std::move(own));
    sink_.text(delta);
  }
  void tool_call(const std::string& name) override { sink_.tool_call(name); }
  void arguments(std::string_view delta) override { sink_.arguments(delta); }
  void finish(const AnswerEnd& end) override { sink_.finish(end); }

 private:
  /// Those that begin in these bytes of the answer. Those before them belong to no text.
  std::vector<TokenLogprobs> take(size_t begin, size_t end) {
    const MutexLock lock(mutex_);
    std::vector<TokenLogprobs> own;
    for (; !tokens_.empty() && tokens_.front().begin < end; tokens_.pop_front()) {
      if (tokens_.front().begin >= begin) own.push_back(std::move(tokens_.front()));
    }
    return own;
  }

  AnswerSink& sink_;
  const StopSink* filter_ = nullptr;
  Mutex mutex_;
  std::deque<TokenLogprobs> tokens_ TORPOR_GUARDED_BY(mutex_);
  size_t told_ = 0;
};

/// Where a history parts from what the agent holds, in one line.
std::string why(const MessageDivergence& parted) {
  if (parted.beginning) return "tools or template arguments differ";
  constexpr size_t kShown = 100;
  const auto shown = [](const std::string& text) {
    return text.empty() ? "nothing" : text.size() > kShown ? text.substr(0, kShown) + "..." : text;
  };
  return "message " + std::to_string(parted.message) + ": held " + shown(parted.held) + ", given " + shown(parted.given);
}

/// Of a JSON array for the template: those that have a name.
std::vector<Tool> declared_tools(const std::string& json) {
  std::vector<Tool> tools;
  for (const Json& item : json.empty() ? Json::array() : parse_json<Json>(json)) {
    const Json& tool = item.is_object() && item.contains("function") ? item["function"] : item;
    const auto name = tool.is_object() ? tool.find("name") : tool.end();
    if (name == tool.end() || !name->is_string()) continue;
    tools.push_back({.name = *name, .parameters = tool.value("parameters", Json::object())});
  }
  return tools;
}

bool must_call(const ChatRequest& request) {
  const ToolChoice::Kind kind = request.tool_choice.kind;
  return kind == ToolChoice::Kind::kRequired || kind == ToolChoice::Kind::kNamed;
}

}  // namespace

std::string session_agent(const std::string& tenant, const std::string& model, const std::string& session) {
  return agent_id_of(tenant, "session-" + hash_hex(tenant + '\0' + model + '\0' + session).substr(0, 32));
}

bool is_session_agent(const std::string& id) {
  static const std::regex form(R"((t\.[A-Za-z0-9_-]+\.)?session-[0-9a-f]{32}(\.[0-9]+)?)");
  return std::regex_match(id, form);
}

struct EngineRunner::Impl {
  Engine& engine;
  std::string name;
  bool share_prefixes;
  TemplateFit fit;
  SamplingOptions sampling;
  Grammars grammars;

  Impl(Engine& engine, std::string given, bool share_prefixes)
      : engine(engine), name(std::move(given)), share_prefixes(share_prefixes),
        fit(ChatTemplate::load(engine.model().dir), template_source(engine.model().dir)),
        sampling(default_sampling(engine.model().dir)),
        grammars(engine.tokenizer(), engine.model().vocab_size, engine.model().eos_token_ids) {}

  bool answers_to(const std::string& model) const {
    return model.empty() || model == name || model == engine.model().name;
  }

  void refuse_what_is_not_served(const ChatRequest& request) const {
    if (!answers_to(request.model)) {
      throw Failure(Failure::Kind::kNotFound,
                    "There is no model '" + request.model + "' here; there is '" + name + "'.", "model");
    }
  }

  std::vector<Tool> tools_of(const ChatRequest& request) const {
    if (request.tool_choice.kind == ToolChoice::Kind::kNone) return {};
    if (request.tool_choice.kind != ToolChoice::Kind::kNamed) return request.tools;
    std::vector<Tool> named;
    std::copy_if(request.tools.begin(), request.tools.end(), std::back_inserter(named),
                 [&](const Tool& tool) { return tool.name == request.tool_choice.name; });
    return named;
  }

  TurnRequest turn_of(const ChatRequest& request) const {
    refuse_what_is_not_served(request);
    TurnRequest turn;
    const std::string tenant = request.tenant.empty() ? kLocalTenant : request.tenant;
    if (!share_prefixes) turn.salt = salt_of(tenant);
    turn.share = request.share;
    turn.id = request.id;
    turn.background = request.background;
    if (!request.agent.empty()) {
      turn.agent = agent_id_of(tenant, request.agent);
    } else if (!request.session.empty()) {
      turn.agent = session_agent(tenant, name, request.session);
      turn.on_divergence = OnDivergence::kBranch;
    }
    if (request.prompt) {
      turn.agent.clear();
      turn.prompt = *request.prompt;
      turn.raw = true;
    } else {
      FittedConversation fitted = fit.fit(request.messages, tools_of(request));
      turn.messages = std::move(fitted.messages);
      turn.tools = std::move(fitted.tools);
      if (!request.template_arguments.empty()) turn.template_arguments = to_text(request.template_arguments);
    }
    turn.generate.sampling = sampling_options(request.sampling, sampling, engine.model().vocab_size);
    turn.generate.logprobs = request.logprobs;
    // The engine ends an answer where the context does. Clients ask for more than it has as a matter of course.
    const int context = engine.model().max_context > 0 ? engine.model().max_context : INT_MAX;
    turn.generate.max_tokens = std::min(request.max_tokens.value_or(context), context);
    return turn;
  }

  /// How answers are written where nothing but the tools is known of the request.
  AnswerParser::Options parsing_of(std::vector<Tool> tools, const Json& template_arguments, bool parallel) const {
    return {.format = fit.format(),
            .tools = std::move(tools),
            .in_thinking = fit.opens_thinking(template_arguments),
            .one_call = !parallel || !fit.parallel_calls()};
  }

  /// An answer as the agent keeps it.
  torpor::Message kept(const AnswerParser::Options& parsing, const std::string& text) const {
    AnswerReader reader;
    AnswerParser parser(parsing, reader);
    parser.push(text);
    parser.finish();
    return fit.fit_answer(reader.message);
  }

  /// Tokens of the prompt. Failure kContextTooLong when no room is left for an answer.
  int measured(const TurnRequest& turn) const {
    const int tokens = int(engine.prompt_tokens(turn).size());
    const int maximum = engine.model().max_context;
    if (maximum > 0 && tokens >= maximum) {
      Failure failure(Failure::Kind::kContextTooLong, "The prompt does not fit the model's context.");
      failure.tokens = tokens;
      failure.maximum = maximum;
      throw failure;
    }
    return tokens;
  }
};

EngineRunner::EngineRunner(Engine& engine, std::string name, bool share_prefixes) {
  if (!ChatTemplate::load(engine.model().dir)) {
    throw Error(ErrorCode::kInvalidArgument,
                "Model " + name + " has no chat template; serve an instruction-tuned model.");
  }
  impl_ = std::make_unique<Impl>(engine, std::move(name), share_prefixes);
}
EngineRunner::~EngineRunner() = default;

void EngineRunner::run(const ChatRequest& request, AnswerSink& sink, const std::atomic<bool>& gone) {
  TurnRequest turn = impl_->turn_of(request);
  const int prompt_tokens = impl_->measured(turn);

  AnswerParser::Options parsing;
  if (!request.prompt) {
    parsing = impl_->parsing_of(impl_->tools_of(request), request.template_arguments, request.parallel_tool_calls);
    turn.read_answer = [this, parsing](const std::string& text) { return impl_->kept(parsing, text); };
  }
  turn.generate.filter = filter_of(request, parsing);
  // All of a completion is text, and special tokens are part of it. Of an answer to messages only some is.
  if (request.prompt) {
    turn.generate.stop = request.stop;
  } else if (!request.stop.empty()) {
    turn.generate.find_stop = [finder = std::make_shared<StopFinder>(request.stop, parsing)](std::string_view piece) {
      return finder->push(piece);
    };
  }
  TokenSink tokens(sink);
  if (request.logprobs) turn.generate.on_token = [&](const TokenLogprobs& token) { tokens.push(token); };
  StopSink filter(request.prompt ? std::vector<std::string>() : request.stop, must_call(request), tokens);
  AnswerParser parser(parsing, filter);
  filter.follow(parser);
  tokens.follow(filter);

  bool started = false;
  size_t bytes = 0;
  const auto start = [&](int computed) {
    if (started) return;
    started = true;
    filter.start({impl_->name, turn.agent, prompt_tokens, std::max(0, prompt_tokens - computed), {}});
  };
  std::atomic<bool> enough{false};
  turn.give_up = &gone;
  turn.generate.cancel = &enough;
  turn.generate.on_prefill = [&](int done, int total) {
    start(total);  // at the first chunk, before any text
    filter.progress(done, total);
  };
  turn.generate.on_text = [&](std::string_view text) {
    if (enough) return;
    bytes += text.size();
    parser.push(text);
    if (parser.complete()) enough = true;
  };
  const TurnResult result = impl_->engine.turn(turn);
  parser.finish();

  AnswerEnd end;
  end.agent = result.agent;
  if (const auto& parted = result.divergence) end.why = why(*parted);
  end.prompt_tokens = result.tokens.prompt;
  end.cached_tokens = result.tokens.cached;
  end.generated_tokens = result.tokens.generated;
  // The engine counts tokens, not their kinds: thinking's part is that of its text.
  if (bytes > 0) end.thinking_tokens = int(parser.thinking_bytes() * size_t(result.tokens.generated) / bytes);
  end.stop_string = filter.met().empty() ? result.stop : filter.met();
  if (!end.stop_string.empty()) end.reason = StopReason::kStopString;
  else if (result.finish_reason == FinishReason::kLength) end.reason = StopReason::kLength;
  else if (parser.calls() > 0) end.reason = StopReason::kToolCalls;
  if (must_call(request) && parser.calls() == 0) {
    throw Failure(Failure::Kind::kInternal,
                  "The model answered without the call that 'tool_choice' demands; ask again, or let it choose.");
  }
  filter.finish(end);
}

std::shared_ptr<TokenFilter> EngineRunner::filter_of(const ChatRequest& request, const AnswerParser::Options& parsing) {
  const auto grammar = answer_grammar(request, parsing, *impl_->engine.tokenizer());
  if (!grammar) return nullptr;
  try {
    return impl_->grammars.lark(*grammar);
  } catch (const Error& error) {
    const bool format = request.response_format.kind != ResponseFormat::Kind::kText;
    const std::string what = format ? "'response_format'" : "the tools";
    throw Failure(Failure::Kind::kInvalid, "No answer can be held to " + what + ": " + error.what() + ".",
                  format ? "response_format" : "tools");
  }
}

std::function<torpor::Message(const std::string&)> EngineRunner::answer_reader(const std::string& tools) const {
  return [this, parsing = impl_->parsing_of(declared_tools(tools), Json::object(), true)](const std::string& text) {
    return impl_->kept(parsing, text);
  };
}

int EngineRunner::count_tokens(const ChatRequest& request) {
  return int(impl_->engine.prompt_tokens(impl_->turn_of(request)).size());
}

std::vector<ModelEntry> EngineRunner::models() {
  const ModelInfo& info = impl_->engine.model();
  ModelEntry entry;
  entry.name = impl_->name;
  entry.created = model_time(info.dir);
  entry.context = info.max_context;
  entry.loaded = true;
  entry.bytes = info.weight_bytes;
  entry.family = info.architecture;
  if (is_gguf(info.dir)) entry.format = "gguf";
  entry.tools = true;
  entry.thinking = !impl_->fit.format().think_open.empty();
  return {entry};
}

}  // namespace torpor::server
