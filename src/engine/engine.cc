#include "torpor/engine.h"

#include <algorithm>
#include <chrono>
#include <future>
#include <map>

#include <unistd.h>

#include "engine/remote_use.h"
#include "engine/scheduler.h"
#include "engine/turn.h"
#include "torpor/agents.h"
#include "torpor/error.h"

namespace torpor {
namespace {

ConversationIdentity conversation_of(const Tokenizer& tokenizer, const ChatTemplate* chat_template) {
  return {tokenizer.digest(), chat_template != nullptr ? chat_template->digest() : ""};
}

/// Of what a turn is about: a prompt, or messages.
void check_said(const TurnRequest& request) {
  if (request.messages.empty()) {
    if (request.prompt.empty()) throw Error(ErrorCode::kInvalidArgument, "The prompt is empty; give it some text.");
  } else if (!request.prompt.empty() || request.system || request.raw) {
    throw Error(ErrorCode::kInvalidArgument, "A turn by messages has no prompt, no system prompt and no plain text beside them.")
        .with_field("TurnRequest::messages");
  }
}

}  // namespace

CacheModel describe_model(const std::string& name, const ComputeOptions& compute) {
  ModelOutline outline = outline_model(name, compute);
  const auto tokenizer = Tokenizer::load(outline.info.dir);
  const auto chat_template = ChatTemplate::load(outline.info.dir);
  const bool rotates_windows = mlx_lm_rotates_windows(outline.identity.architecture);
  return {name, std::move(outline.identity), conversation_of(*tokenizer, chat_template.get()), outline.info.max_context,
          std::move(outline.kv_layout), rotates_windows, std::move(outline.state_layout)};
}

RestoreAgentKeys agent_keys(const AgentInfo& agent, const std::string& model) {
  const std::string& name = model.empty() ? agent.model : model;
  ModelOutline outline = outline_model(name);
  outline.identity.kv = agent.identity.kv;
  if (const auto field = agent.identity.first_difference(outline.identity)) {
    throw Error(ErrorCode::kIncompatible,
                "The agent '" + agent.agent_id + "' is not of the model '" + name + "': its " + *field + " is '" +
                    agent.identity.value(*field) + "', the model's '" + outline.identity.value(*field) + "'.")
        .with_agent(agent.agent_id)
        .with_field(*field, outline.identity.value(*field), agent.identity.value(*field));
  }
  const auto format = KvFormat::parse(agent.identity.kv);
  if (!format) {
    throw Error(ErrorCode::kIncompatible,
                "The agent '" + agent.agent_id + "' has a KV format that no model has, '" + agent.identity.kv + "'.")
        .with_agent(agent.agent_id)
        .with_field("kv", "", agent.identity.kv);
  }
  return [format = *format, restore = std::move(outline.restore_keys)](int layer, int64_t position,
                                                                       std::span<float> keys) {
    restore(format, layer, position, keys);
  };
}

class EngineHost {
 public:
  EngineHost(size_t memory_budget, size_t text_queue_bytes)
      : memory(std::make_shared<ManagerGroup>(memory_budget)), scheduler(text_queue_bytes, [](auto steps, auto resting) {
          EngineTurn::step(steps, resting);
        }) {}
  const std::shared_ptr<ManagerGroup> memory;
  Scheduler scheduler;
};

std::shared_ptr<EngineHost> make_engine_host(size_t memory_budget, size_t text_queue_bytes) {
  std::shared_ptr<EngineHost> host;
  translate_errors([&] { host = std::make_shared<EngineHost>(memory_budget, text_queue_bytes); });
  return host;
}

struct Engine::Impl {
  const EngineOptions options;
  Store store;
  const pid_t process = getpid();
  EngineParts parts;  // lives and dies on the scheduler's thread
  const std::shared_ptr<EngineHost> host;
  Scheduler& scheduler = host->scheduler;

  explicit Impl(EngineOptions given)
      : options(std::move(given)), store(options.store),
        host(options.host ? options.host : std::make_shared<EngineHost>(options.memory_budget, options.text_queue_bytes)) {
    if (options.max_stall_ms < 1) {
      throw Error(ErrorCode::kInvalidArgument, "The longest stall must be a millisecond at least.")
          .with_field("EngineOptions::max_stall_ms");
    }
    store.set_disk_limits(options.disk);
    if (options.remote) store.set_reclaimer([tier = options.remote] { return tier->make_room(); });
  }

  void load() {
    const auto start = std::chrono::steady_clock::now();
    parts.model_name = options.model;
    // The tokenizer takes about as long as the weights, and needs nothing of them.
    auto tokenizer = std::async(std::launch::async, [&] { return Tokenizer::load(resolve_model(options.model)); });
    parts.model = Model::load(options.model, options.compute);
    const Model& model = *parts.model;
    parts.tokenizer = tokenizer.get();
    parts.chat_template = ChatTemplate::load(model.info().dir);
    parts.pace.emplace(model.backend(), options.max_stall_ms / 1000.0);
    const KvFormat format = model.refined(options.kv_format.value_or(model.default_kv_format()));
    Identity identity = model.identity();
    identity.kv = format.name();
    parts.agents = std::make_unique<AgentManager>(
        store, ManagerOptions{.model_name = options.model, .identity = std::move(identity), .numerics = model.numerics(),
                              .conversation = conversation_of(*parts.tokenizer, parts.chat_template.get()),
                              .layout = model.kv_layout(format), .state_layout = model.state_layout(),
                              .layout_of = [&model](const KvFormat& own) { return model.kv_layout(own); },
                              .any_kv_format = !options.kv_format,
                              .backend = model.backend(), .durability = options.durability,
                              .memory_budget = options.memory_budget, .write_queue_bytes = options.write_queue_bytes,
                              .map_rows = options.map_rows, .group = host->memory});
    parts.load_ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  }
  void unload() noexcept {
    parts.agents.reset();
    parts.model.reset();
  }

  /// In a process that fork(2) made of the engine's own there is nobody to answer.
  void check_process() const {
    if (getpid() == process) return;
    throw Error(ErrorCode::kInvalidArgument, "The process that made this Engine was forked, and its threads are not here; make "
                                             "another Engine, in a process that was not forked from one with an Engine.");
  }
  /// Runs `work` on the calling thread; what it throws is an Error.
  template <class F>
  auto guard(F work) const -> std::invoke_result_t<F> {
    check_process();
    if constexpr (std::is_void_v<std::invoke_result_t<F>>) {
      translate_errors(work);
    } else {
      std::optional<std::invoke_result_t<F>> result;
      translate_errors([&] { result.emplace(work()); });
      return std::move(*result);
    }
  }
  /// Runs `work` on the engine thread when no turn or earlier call on one of `agents` is under way.
  template <class F>
  auto call(std::vector<std::string> agents, F work, const std::atomic<bool>* give_up = nullptr)
      -> std::invoke_result_t<F> {
    return guard([&] { return scheduler.call(std::move(agents), work, nullptr, give_up); });
  }

  /// The agent as the remote tier has it, if there is one. Not on the engine thread.
  RemoteUse use(const std::string& agent, bool make = false) {
    return RemoteUse(options.remote.get(), agent, make, [&] { forget(agent); });
  }
  /// Memory lets go of an agent that isn't this worker's any more.
  void forget(const std::string& agent) {
    call({agent}, [&] {
      if (!options.remote->owns(agent)) parts.agents->drop(agent);
    });
  }
  /// After an error, which is the one to tell: where this fails the agent's next use tries again.
  void forget_after(const RemoteUse& remote, const std::string& agent) noexcept {
    try {
      if (remote) forget(agent);
    } catch (...) {
    }
  }

  TurnResult turn(const TurnRequest& request, const std::string& branch_of);
  TurnResult turn_of_branch(const TurnRequest& request);
  TurnResult turn_again(const TurnRequest& request, const std::string& result);
  /// Runs `work` as `call` does. With kWait, or where `remote` has it, `saved` is then saved, if it is awake, and
  /// committed; the calling thread waits, and turns of other agents go on. (An agent that is asleep was changed on
  /// disk.)
  template <class F>
  SaveResult change(std::vector<std::string> named, const std::string& saved, SaveMode mode, F work,
                    const RemoteUse& remote = {}) {
    Writer::Saving saving;
    const auto change_and_save = [&] {
      work();
      if (mode == SaveMode::kWait || remote) saving = parts.agents->begin_save(saved);
    };
    const auto wait = [&] {
      if (saving.valid()) saving.wait();
      if (!remote) return;
      if (saving.valid()) saving.get();
      remote.commit();
    };
    const auto run = [&] {
      return guard([&] {
        scheduler.call(std::move(named), change_and_save, wait);
        return saving.valid() ? saving.get() : SaveResult{};
      });
    };
    try {
      return run();
    } catch (const Error&) {
      forget_after(remote, saved);
      throw;
    }
  }
};

TurnResult Engine::Impl::turn_of_branch(const TurnRequest& request) {
  TurnRequest branched = request;
  if (options.remote) {  // it and its branches come here before they are compared
    std::string name = request.agent;
    for (int n = 2; const RemoteUse remote = use(name); name = request.agent + "." + std::to_string(n++)) {
      branched.agent = name;
      if (!request.id.empty() && remote.answered(known_turn(request))) return turn(branched, "");
    }
  }
  for (int tries = 1;; ++tries) {
    const AgentManager::Branch branch = call({}, [&] { return parts.agents->find_branch(request.agent, request.messages); });
    branched.agent = branch.id;
    try {
      return turn(branched, branch.of);
    } catch (const Error& error) {
      // Another turn was given that agent first, and took it elsewhere.
      if (error.code() != ErrorCode::kBusy || error.field() != kBranchTaken || tries == 100) throw;
    }
  }
}

TurnResult Engine::Impl::turn_again(const TurnRequest& request, const std::string& result) {
  const Remembered held = call({request.agent}, [&] { return parts.agents->remembered(request.agent); });
  Message answer;
  if (!held.messages.empty()) answer = held.messages.back();
  TurnResult again;
  translate_errors([&] { again = decode_result(result, request, held.history, answer, *parts.tokenizer); });
  again.model = options.model;
  // As if it were computed all at once.
  const int read = std::max(again.tokens.prefilled, 1);
  if (request.generate.on_prefill) request.generate.on_prefill(read, read);
  if (request.generate.on_text && !again.text.empty()) request.generate.on_text(again.text);
  return again;
}

TurnResult Engine::Impl::turn(const TurnRequest& request, const std::string& branch_of) {
  const RemoteUse remote = use(request.agent, request.presence != TurnRequest::Presence::kThere);
  KnownTurn known = known_turn(request);
  std::optional<std::string> answered;
  TurnOutcome outcome;
  TurnResult& result = outcome.result;
  result.agent = request.agent;
  result.model = options.model;
  // What a callback throws comes out as it is; everything else as an Error.
  std::exception_ptr thrown;
  const auto heard = [&thrown](const auto& callback, auto... news) {
    try {
      callback(news...);
    } catch (...) {
      thrown = std::current_exception();
      throw;
    }
  };
  Scheduler::TurnCall call{.agent = request.agent, .share = request.share, .background = request.background,
                           .cancel = request.generate.cancel, .give_up = request.give_up,
                           .begin = [&](Scheduler::Listener& listener) {
                             if (remote && (answered = remote.answered(known))) {
                               throw Error(ErrorCode::kCancelled, "The turn is over already.");
                             }
                             return std::make_unique<EngineTurn>(parts, request, branch_of, listener, outcome);
                           },
                           .after = [&] {
                             outcome.wait_for_save();
                             if (!remote || request.save == SaveMode::kNo) return;
                             if (result.save_error) throw Error(*result.save_error);
                             if (result.finish_reason == FinishReason::kCancelled) known.id.clear();
                             if (!known.id.empty()) known.result = encode_result(result);
                             remote.commit(known);
                           }};
  if (const auto& on_text = request.generate.on_text) call.on_text = [&](std::string_view text) { heard(on_text, text); };
  if (const auto& on_prefill = request.generate.on_prefill) {
    call.on_prefill = [&](int done, int total) { heard(on_prefill, done, total); };
  }
  Scheduler::Ended ended;
  try {
    ended = guard([&] { return scheduler.turn(call); });
  } catch (const Error&) {
    if (answered) return turn_again(request, *answered);
    if (thrown) std::rethrow_exception(thrown);
    forget_after(remote, request.agent);
    throw;
  }
  if (ended == Scheduler::Ended::kCommitted) return result;
  if (ended == Scheduler::Ended::kGivenUp || (request.give_up != nullptr && request.give_up->load())) {
    throw Error(ErrorCode::kCancelled, "The turn was given up; the agent is as it was before.").with_agent(request.agent);
  }
  result.finish_reason = FinishReason::kCancelled;
  return result;
}

Engine::Engine(EngineOptions options) {
  translate_errors([&] { impl_ = std::make_unique<Impl>(std::move(options)); });
  impl_->call({}, [this] {
    try {
      impl_->load();
    } catch (...) {
      impl_->unload();
      throw;
    }
  });
}

Engine::~Engine() {
  if (getpid() != impl_->process) {
    static_cast<void>(impl_.release());  // its threads, which would have to end first, are in another process
    return;
  }
  if (impl_->options.host) {
    impl_->scheduler.call({}, [this] { impl_->unload(); });
  } else {
    impl_->scheduler.finish([this] { impl_->unload(); });
  }
}

TurnResult Engine::turn(const TurnRequest& request) {
  if (!request.agent.empty()) check_agent_id(request.agent);
  check_said(request);
  if (impl_->options.remote && request.save == SaveMode::kBehind) {
    TurnRequest waits = request;
    waits.save = SaveMode::kWait;
    return turn(waits);
  }
  const bool branches = !request.agent.empty() && !request.messages.empty() && request.on_divergence == OnDivergence::kBranch;
  return branches ? impl_->turn_of_branch(request) : impl_->turn(request, "");
}

std::vector<int32_t> Engine::prompt_tokens(const TurnRequest& request) const {
  return impl_->guard([&] {
    check_said(request);
    const EngineParts& parts = impl_->parts;
    if (request.raw) return parts.tokenizer->encode(request.prompt, true);
    if (parts.chat_template == nullptr) {
      throw Error(ErrorCode::kInvalidArgument, "The model has no chat template; append the prompt as plain text instead.")
          .with_field("TurnRequest::raw");
    }
    std::vector<Message> messages = request.messages;
    if (messages.empty()) {
      if (request.system) messages.push_back({"system", *request.system});
      messages.push_back({"user", request.prompt});
    }
    const Phrasing phrasing{*parts.tokenizer, *parts.chat_template,
                            template_variables(request.tools, request.template_arguments), request.special};
    return encode_conversation(phrasing, messages);
  });
}

bool Engine::prefetch(const std::string& agent) {
  const RemoteUse remote = impl_->use(agent);
  return impl_->guard([&] { return impl_->parts.agents->prefetch(agent); });
}

SaveResult Engine::save(const std::string& agent) {
  const RemoteUse remote = impl_->use(agent);
  return impl_->change({agent}, agent, SaveMode::kWait, [&] { impl_->parts.agents->require(agent); }, remote);
}

void Engine::save_all(const std::function<void(int, int)>& progress) {
  impl_->guard([&] { impl_->scheduler.refuse_in_callbacks(); });
  AgentManager& agents = *impl_->parts.agents;
  std::exception_ptr first;
  std::vector<Writer::Saving> begun;
  size_t unsaved = 0;
  for (const AgentMemory& memory : memory_usage().agents) {
    unsaved += memory.unsaved ? 1 : 0;
    try {
      begun.push_back(impl_->call({memory.agent}, [&] { return agents.begin_save(memory.agent); }));
    } catch (const Error&) {
      if (!first) first = std::current_exception();
    }
  }
  impl_->guard([&] { agents.wait_for_writes(progress, unsaved); });
  try {
    for (const Writer::Saving& saving : begun) {
      if (saving.valid()) saving.get();
    }
    finish_saves();
  } catch (const Error&) {
    if (!first) first = std::current_exception();
  }
  if (impl_->options.remote) {
    for (const AgentMemory& memory : memory_usage().agents) {
      try {
        if (impl_->options.remote->owns(memory.agent)) save(memory.agent);
      } catch (const Error&) {
        if (!first) first = std::current_exception();
      }
    }
  }
  if (first) std::rethrow_exception(first);
}

void Engine::finish_saves() {
  impl_->guard([&] { impl_->parts.agents->wait_for_writes(); });
  impl_->call({}, [&] { impl_->parts.agents->tell_errors(); });
}

void Engine::sleep(const std::string& agent) {
  RemoteTier* const tier = impl_->options.remote.get();
  {
    RemoteUse remote;
    if (tier != nullptr && tier->owns(agent)) remote = impl_->use(agent);
    impl_->change({agent}, agent, SaveMode::kWait, [] {}, remote);  // so that the engine thread has nothing to wait for
    impl_->call({agent}, [&] { impl_->parts.agents->sleep(agent); });
  }
  if (tier != nullptr) tier->close(agent);
}

void Engine::fork(const std::string& src, const std::string& dst, std::optional<int64_t> at_token, SaveMode save) {
  const RemoteUse from = impl_->use(src);
  const RemoteUse to = impl_->use(dst, true);
  impl_->change({src, dst}, dst, save, [&] { impl_->parts.agents->fork(src, dst, at_token); }, to);
}

void Engine::rewind(const std::string& agent, int64_t n_tokens, SaveMode save) {
  const RemoteUse remote = impl_->use(agent);
  impl_->change({agent}, agent, save, [&] { impl_->parts.agents->rewind(agent, n_tokens); }, remote);
}

void Engine::pin(const std::string& agent, bool pinned, SaveMode save) {
  const RemoteUse remote = impl_->use(agent);
  impl_->change({agent}, agent, save, [&] { impl_->parts.agents->pin(agent, pinned); }, remote);
}

void Engine::rename(const std::string& agent, const std::string& new_id) {
  const RemoteUse from = impl_->use(agent);
  const RemoteUse to = impl_->use(new_id, true);
  impl_->change({agent}, agent, SaveMode::kWait, [] {}, from);
  impl_->call({agent, new_id}, [&] { impl_->parts.agents->rename(agent, new_id); });
  impl_->change({new_id}, new_id, SaveMode::kWait, [] {}, to);
  from.remove();
}

void Engine::remove(const std::string& agent) {
  const RemoteUse remote = impl_->use(agent);
  remote.remove();
  impl_->call({agent}, [&] { impl_->parts.agents->remove(agent); });
}

EngineWork Engine::work() const {
  return impl_->call({}, [&] { return impl_->parts.work; });
}

MemoryUsage Engine::memory_usage() const {
  return impl_->call({}, [&] {
    MemoryUsage usage = impl_->parts.agents->memory_usage();
    usage.model_bytes = impl_->parts.model->info().weight_bytes;
    return usage;
  });
}

std::vector<AgentStatus> Engine::agents() const {
  std::map<std::string, AgentStatus> found;
  for (const AgentInfo& info : impl_->guard([&] { return impl_->store.list_cached_agents(); })) {
    found[info.agent_id] = {.agent = info.agent_id, .model = info.model, .tokens = info.cache_size, .pinned = is_pinned(info),
                            .disk_bytes = info.bytes};
  }
  for (const AgentMemory& memory : memory_usage().agents) {
    AgentStatus& status = found[memory.agent];
    status.agent = memory.agent;
    if (status.model.empty()) status.model = impl_->options.model;
    status.tokens = memory.tokens;
    status.awake = true;
    status.pinned = memory.pinned;
    status.unsaved = memory.unsaved;
    status.memory_bytes = memory.bytes;
  }
  for (const std::string& agent : impl_->scheduler.in_turn()) {
    if (const auto status = found.find(agent); status != found.end()) status->second.in_turn = true;
  }
  std::vector<AgentStatus> all;
  for (auto& [id, status] : found) all.push_back(std::move(status));
  return all;
}

std::vector<int32_t> Engine::tokens(const std::string& agent) const {
  const RemoteUse remote = impl_->use(agent);
  return impl_->call({agent}, [&] { return impl_->parts.agents->remembered(agent).history; });
}

std::vector<Message> Engine::messages(const std::string& agent, const std::atomic<bool>* give_up) const {
  const RemoteUse remote = impl_->use(agent);
  const auto read = [&] {
    const Remembered held = impl_->parts.agents->remembered(agent);
    return std::vector<Message>(held.messages.begin(), held.messages.end());
  };
  return impl_->call({agent}, read, give_up);
}

std::vector<float> Engine::next_logits(const std::string& id) {
  const RemoteUse remote = impl_->use(id);
  return impl_->call({id}, [&] {
    AgentManager& agents = *impl_->parts.agents;
    agents.require(id);
    const bool was_awake = agents.is_awake(id);
    std::unique_ptr<KvCache> copy;
    std::vector<int32_t> tokens;
    {
      const AgentHold agent = agents.wake(id);
      copy = agent->cache->clone();
      // Those behind the last state of recurrent layers have no rows yet.
      tokens = agent->whole() ? copy->tokens() : agent->history;
      agents.hold_state(*agent, *copy, std::min(copy->length(), int(tokens.size()) - 1));
    }
    if (!was_awake) agents.drop(id);
    if (tokens.empty()) throw Error(ErrorCode::kInvalidArgument, "The agent '" + id + "' holds no tokens yet.");
    if (tokens.back() < 0) {
      throw Error(ErrorCode::kInvalidArgument, "The last token of agent '" + id + "' is not known; say something to it.");
    }
    copy->truncate(copy->resumable(std::min(copy->length(), int(tokens.size()) - 1)));
    const std::span<const int32_t> rest = std::span(tokens).subspan(size_t(copy->length()));
    const Growth growth{copy.get(), int(rest.size())};
    agents.reserve({&growth, 1});
    const ForwardSequence sequence{rest, copy.get(), false};
    const mx::array logits = impl_->parts.model->forward({&sequence, 1});
    return std::vector<float>(logits.data<float>(), logits.data<float>() + logits.size());
  });
}

const ModelInfo& Engine::model() const { return impl_->parts.model->info(); }
std::shared_ptr<const Tokenizer> Engine::tokenizer() const { return impl_->parts.tokenizer; }
Store& Engine::store() { return impl_->store; }

}  // namespace torpor
