#include "torpor/engine.h"

#include <algorithm>
#include <chrono>

#include "agents/manager.h"
#include "engine/engine_thread.h"
#include "torpor/error.h"
#include "torpor/generate.h"

namespace torpor {
namespace {

using Clock = std::chrono::steady_clock;

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

/// The identity of an agent, but for its KV format.
Identity complete(Identity model, const Tokenizer& tokenizer, const ChatTemplate* chat_template) {
  model.tokenizer = tokenizer.digest();
  model.chat_template = chat_template != nullptr ? chat_template->digest() : "";
  return model;
}

}  // namespace

CacheModel describe_model(const std::string& name) {
  ModelOutline outline = outline_model(name);
  const auto tokenizer = Tokenizer::load(outline.info.dir);
  const auto chat_template = ChatTemplate::load(outline.info.dir);
  return {name, complete(std::move(outline.identity), *tokenizer, chat_template.get()), outline.info.max_context,
          std::move(outline.kv_layout)};
}

struct Engine::Impl {
  EngineOptions options;
  Store store;
  double load_ms = 0;
  // Everything below lives and dies on the engine thread.
  std::unique_ptr<Model> model;
  std::shared_ptr<const Tokenizer> tokenizer;
  std::shared_ptr<const ChatTemplate> chat_template;
  std::unique_ptr<AgentManager> agents;
  EngineThread thread;

  explicit Impl(EngineOptions given) : options(std::move(given)), store(options.store) { store.set_disk_limits(options.disk); }

  void load() {
    const auto start = Clock::now();
    model = Model::load(options.model);
    tokenizer = Tokenizer::load(model->info().dir);
    chat_template = ChatTemplate::load(model->info().dir);
    const KvFormat format = options.kv_format.value_or(model->default_kv_format());
    Identity identity = complete(model->identity(), *tokenizer, chat_template.get());
    identity.kv = format.name();
    agents = std::make_unique<AgentManager>(
        store, ManagerOptions{.model_name = options.model, .identity = std::move(identity), .layout = model->kv_layout(format),
                              .layout_of = options.kv_format ? std::function<KvLayout(const KvFormat&)>()
                                                             : [this](const KvFormat& own) { return model->kv_layout(own); },
                              .backend = model->backend(), .durability = options.durability,
                              .memory_budget = options.memory_budget, .write_queue_bytes = options.write_queue_bytes});
    load_ms = ms_since(start);
  }

  void unload() {
    agents.reset();
    model.reset();
  }

  /// Every id the agent is to hold before it answers. Changes nothing but a new agent's messages.
  std::vector<int32_t> turn_tokens(Agent& agent, const TurnRequest& request) const;
  /// Leaves in the agent's cache the rows that `tokens` can start from, and says how many: one token at least is computed,
  /// for its logits.
  int reuse(Agent& agent, std::span<const int32_t> tokens);
  void save(Agent& agent, SaveMode mode, TurnResult& result);
  TurnResult turn(const TurnRequest& request);
  TurnResult turn_awake(Agent& agent, const TurnRequest& request, Clock::time_point start, double wake_ms);
};

std::vector<int32_t> Engine::Impl::turn_tokens(Agent& agent, const TurnRequest& request) const {
  std::vector<int32_t> added;
  if (request.raw) {
    added = tokenizer->encode(request.prompt, agent.history.empty());
  } else if (chat_template == nullptr) {
    throw Error(ErrorCode::kInvalidArgument,
                "The model '" + options.model + "' has no chat template; use --raw to append plain text.");
  } else {
    added = encode_user_turn(*tokenizer, *chat_template, agent.messages, agent.history, request.prompt);
  }
  std::vector<int32_t> tokens = agent.history;
  tokens.insert(tokens.end(), added.begin(), added.end());
  return tokens;
}

int Engine::Impl::reuse(Agent& agent, std::span<const int32_t> tokens) {
  const std::vector<int32_t>& held = agent.cache->tokens();
  if (held.empty()) {
    agents->reuse_prefix(agent, tokens);
  } else {
    const auto agree = std::mismatch(held.begin(), held.end(), tokens.begin(), tokens.end());
    const int common = int(std::min<ptrdiff_t>(agree.first - held.begin(), std::max<ptrdiff_t>(ssize(tokens) - 1, 0)));
    if (common < agent.cache->length()) agents->truncate(agent, common);
  }
  if (has_unknown_tokens(tokens.subspan(size_t(agent.cache->length())))) {
    throw Error(ErrorCode::kCorruption, "The agent '" + agent.id + "' is damaged, and can't be computed again: it was imported "
                                        "without its token ids. Import it once more.");
  }
  return agent.cache->length();
}

TurnResult Engine::Impl::turn(const TurnRequest& request) {
  const auto start = Clock::now();
  const bool was_awake = agents->is_awake(request.agent);
  Agent& agent = request.agent.empty() ? agents->stateless() : agents->wake(request.agent);
  const AgentManager::Turn turn(*agents, agent);
  const double wake_ms = was_awake ? 0 : ms_since(start);
  try {
    TurnResult result = turn_awake(agent, request, start, wake_ms);
    if (!was_awake) result.bytes.read = agent.bytes_read;
    if (request.agent.empty()) agents->drop("");
    return result;
  } catch (...) {
    // An agent that this turn woke and did not change goes back to sleep; one that is unsaved stays.
    if (!was_awake && !agent.dirty()) agents->drop(request.agent);
    throw;
  }
}

void Engine::Impl::save(Agent& agent, SaveMode mode, TurnResult& result) {
  const auto start = Clock::now();
  // Of a save behind an earlier turn. One that waits now tries again.
  if (mode != SaveMode::kWait) result.save_error = std::exchange(agent.save_error, std::nullopt);
  if (mode == SaveMode::kNo) return;
  try {
    if (mode == SaveMode::kWait) {
      result.bytes.written = agents->save(agent).bytes_written;
    } else {
      agents->save_behind(agent);
    }
  } catch (const Error& error) {
    const std::string what = agent.id.empty() ? "its segments" : "agent '" + agent.id + "'";
    result.save_error.emplace(error.code(), "The answer is complete, but " + what + " could not be saved: " + error.what());
  }
  result.timing_ms.save = ms_since(start);
}

TurnResult Engine::Impl::turn_awake(Agent& agent, const TurnRequest& request, Clock::time_point start,
                                    double wake_ms) {
  TurnResult result;
  result.agent = request.agent;
  result.model = options.model;
  result.damage = agent.damage;
  result.timing_ms.load = load_ms;
  result.timing_ms.wake = wake_ms;

  const std::vector<Message> messages_before = agent.messages;
  if (request.system) {
    const bool has_own = !agent.messages.empty() && agent.messages.front().role == "system";
    if (agent.history.empty() && agent.messages.empty()) {
      agent.messages.push_back({"system", *request.system});
    } else if (!has_own || agent.messages.front().content != *request.system) {
      throw Error(ErrorCode::kInvalidArgument, "Agent '" + agent.id + "' already has another system prompt; leave --system "
                                               "out, or start a new agent.");
    }
  }

  GenerateResult generated;
  const int held_before = agent.cache->length();
  uint64_t version = agent.version;
  try {
    if (request.system && request.raw) {
      throw Error(ErrorCode::kInvalidArgument, "--system needs the chat template; leave out --raw, or put the text into the prompt.");
    }
    const std::vector<int32_t> tokens = turn_tokens(agent, request);
    const int reused = reuse(agent, tokens);
    version = agent.version;
    result.tokens.prompt = int(tokens.size());
    result.tokens.cached = reused;
    generated = generate(*model, tokenizer, *agent.cache, std::span(tokens).subspan(size_t(reused)), request.generate);
    result.timing_ms.ttft = ms_since(start) - generated.decode_ms;
    if (generated.prefilled + reused < int(tokens.size())) {
      // Cancelled in the prefill: the turn did not happen, but the rows stay for when it is asked again.
      agent.messages = messages_before;
    } else {
      for (Message& message : agent.messages) {
        if (message.end == 0) message.end = int(tokens.size());  // a new system message
      }
      agent.messages.push_back({"user", request.prompt, int(tokens.size())});
      agent.messages.push_back({"assistant", generated.text, agent.cache->length()});
      agent.history = agent.cache->tokens();
    }
  } catch (...) {
    agent.messages = messages_before;
    if (agent.cache->length() > held_before) {
      agents->truncate(agent, held_before);
      if (agent.cache->length() == held_before) agent.version = version;  // as it was: there is nothing to save
    }
    throw;
  }
  agent.changed();

  result.text = generated.text;
  result.finish_reason = generated.finish_reason;
  result.tokens.prefilled = generated.prefilled;
  result.tokens.generated = int(generated.tokens.size());
  result.tokens.context = agent.cache->length();
  result.timing_ms.decode = generated.decode_ms;
  save(agent, request.save, result);
  return result;
}

Engine::Engine(EngineOptions options) : impl_(std::make_unique<Impl>(std::move(options))) {
  impl_->thread.call([this] {
    try {
      impl_->load();
    } catch (...) {
      impl_->unload();
      throw;
    }
  });
}

Engine::~Engine() {
  impl_->thread.call([this] { impl_->unload(); });
}

TurnResult Engine::turn(const TurnRequest& request) {
  if (!request.agent.empty()) check_agent_id(request.agent);
  if (request.prompt.empty()) throw Error(ErrorCode::kInvalidArgument, "The prompt is empty; give it some text.");
  return impl_->thread.call([&] { return impl_->turn(request); });
}

bool Engine::prefetch(const std::string& agent) { return impl_->agents->prefetch(agent); }

SaveResult Engine::save(const std::string& agent) {
  return impl_->thread.call([&] {
    impl_->agents->require(agent);
    return impl_->agents->is_awake(agent) ? impl_->agents->save(impl_->agents->wake(agent)) : SaveResult{};
  });
}

void Engine::save_all(const std::function<void(int, int)>& progress) {
  impl_->thread.call([&] { impl_->agents->save_all(progress); });
}

void Engine::finish_saves() {
  impl_->thread.call([&] { impl_->agents->finish_saves(); });
}

void Engine::sleep(const std::string& agent) {
  impl_->thread.call([&] { impl_->agents->sleep(agent); });
}

void Engine::fork(const std::string& src, const std::string& dst, std::optional<int64_t> at_token) {
  impl_->thread.call([&] { impl_->agents->fork(src, dst, at_token); });
}

void Engine::rewind(const std::string& agent, int64_t n_tokens) {
  impl_->thread.call([&] { impl_->agents->rewind(agent, n_tokens); });
}

void Engine::pin(const std::string& agent, bool pinned) {
  impl_->thread.call([&] { impl_->agents->pin(agent, pinned); });
}

void Engine::rename(const std::string& agent, const std::string& new_id) {
  impl_->thread.call([&] { impl_->agents->rename(agent, new_id); });
}

void Engine::remove(const std::string& agent) {
  impl_->thread.call([&] { impl_->agents->remove(agent); });
}

MemoryUsage Engine::memory_usage() const {
  return impl_->thread.call([&] {
    MemoryUsage usage = impl_->agents->memory_usage();
    usage.model_bytes = impl_->model->info().weight_bytes;
    return usage;
  });
}

std::vector<float> Engine::next_logits(const std::string& id) {
  return impl_->thread.call([&] {
    impl_->agents->require(id);
    const bool was_awake = impl_->agents->is_awake(id);
    const std::unique_ptr<KvCache> copy = impl_->agents->wake(id).cache->clone();
    if (!was_awake) impl_->agents->drop(id);
    if (copy->length() == 0) throw Error(ErrorCode::kInvalidArgument, "Agent '" + id + "' holds no tokens yet.");
    const int32_t last = copy->tokens().back();
    if (last < 0) throw Error(ErrorCode::kInvalidArgument, "The last token of agent '" + id + "' is not known; say something to it.");
    copy->truncate(copy->length() - 1);
    const ForwardSequence sequence{{&last, 1}, copy.get(), false};
    const mx::array logits = impl_->model->forward({&sequence, 1});
    return std::vector<float>(logits.data<float>(), logits.data<float>() + logits.size());
  });
}

const ModelInfo& Engine::model() const { return impl_->model->info(); }
Store& Engine::store() { return impl_->store; }

}  // namespace torpor
