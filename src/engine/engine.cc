#include "torpor/engine.h"

#include <algorithm>
#include <chrono>

#include "agents/turn_transaction.h"
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

  TurnResult turn(const TurnRequest& request);
};

TurnResult Engine::Impl::turn(const TurnRequest& request) {
  const auto start = Clock::now();
  AgentHold hold = request.agent.empty() ? agents->stateless() : agents->wake(request.agent);
  TurnResult result;
  result.agent = request.agent;
  result.model = options.model;
  result.damage = hold->damage;
  result.timing_ms.load = load_ms;
  result.timing_ms.wake = hold.woke() ? ms_since(start) : 0;

  TurnTransaction turn(*agents, std::move(hold), {.prompt = request.prompt, .system = request.system, .raw = request.raw,
                                                  .tokenizer = tokenizer, .chat_template = chat_template});
  result.tokens.prompt = int(turn.tokens().size());
  result.tokens.cached = turn.reused();
  const GenerateResult generated = generate(*model, tokenizer, turn.cache(), turn.pending(), request.generate);
  result.timing_ms.ttft = ms_since(start) - generated.decode_ms;
  turn.commit(generated.text, turn.pending().empty());

  result.text = generated.text;
  result.finish_reason = generated.finish_reason;
  result.tokens.prefilled = generated.prefilled;
  result.tokens.generated = int(generated.tokens.size());
  result.tokens.context = turn.cache().length();
  result.timing_ms.decode = generated.decode_ms;
  const auto saving = Clock::now();
  result.bytes.written = turn.save(request.save);
  result.save_error = turn.save_error();
  if (request.save != SaveMode::kNo) result.timing_ms.save = ms_since(saving);
  if (turn.woke()) result.bytes.read = turn.agent().bytes_read;
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
    return impl_->agents->is_awake(agent) ? impl_->agents->save(*impl_->agents->wake(agent)) : SaveResult{};
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
    const std::unique_ptr<KvCache> copy = impl_->agents->wake(id)->cache->clone();
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
