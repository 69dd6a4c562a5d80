#include "server/model_pool.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <map>
#include <utility>

#include "base/gguf.h"
#include "server/keys.h"
#include "server/models.h"
#include "torpor/agents.h"
#include "torpor/error.h"
#include "torpor/log.h"
#include "torpor/model_info.h"

namespace torpor::server {
namespace {

bool fits(std::string_view pattern, const std::string& name) {
  return pattern.ends_with('*') ? name.starts_with(pattern.substr(0, pattern.size() - 1)) : name == pattern;
}

/// What is known of a model before it is loaded for the first time.
ModelEntry entry_of(const ServedModel& model) {
  ModelEntry entry;
  entry.name = model.name;
  const std::filesystem::path dir = resolve_model(model.source);
  entry.created = model_time(dir);
  if (is_gguf(dir)) {
    const GgufModel gguf = GgufModel::open(dir);
    entry.format = "gguf";
    for (const GgufFile& piece : gguf.pieces()) {
      for (const GgufTensor& tensor : piece.tensors()) entry.bytes += int64_t(tensor.data.size());
    }
    entry.family = gguf.metadata().text("general.architecture").value_or("");
    entry.context = gguf.metadata().integer(entry.family + ".context_length").value_or(0);
    return entry;
  }
  std::error_code ignored;
  for (const auto& file : std::filesystem::directory_iterator(dir, ignored)) {
    if (file.path().extension() == ".safetensors") entry.bytes += int64_t(file.file_size(ignored));
  }
  std::ifstream file(dir / "config.json", std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  const Json config = parse_json<Json>(text, nullptr, false);
  if (!config.is_object()) return entry;
  if (const auto family = config.find("model_type"); family != config.end() && family->is_string()) entry.family = *family;
  if (const auto context = config.find("max_position_embeddings"); context != config.end() && context->is_number_integer())
    entry.context = *context;
  return entry;
}

void add(EngineWork& all, const EngineWork& own) {
  all.passes += own.passes;
  all.turns += own.turns;
  all.most_turns = std::max(all.most_turns, own.most_turns);
  all.prompt_tokens += own.prompt_tokens;
  all.answer_tokens += own.answer_tokens;
  all.accepted_tokens += own.accepted_tokens;
  all.rejected_tokens += own.rejected_tokens;
  all.put_aside += own.put_aside;
}

}  // namespace

struct ModelPool::Slot {
  ServedModel model;
  ModelEntry entry;    ///< as it was when last loaded
  std::mutex loading;  ///< of whoever loads or unloads
  std::shared_ptr<Loaded> loaded;
  Clock::time_point used = Clock::now();
};

ModelPool::Lease::~Lease() {
  if (!loaded_) return;
  const MutexLock lock(pool_->mutex_);
  if (uses_) slot_->used = Clock::now();
  loaded_.reset();  // the slot holds it
}

const std::string& ModelPool::Lease::name() const { return slot_->model.name; }

ModelPool::ModelPool(ModelPoolOptions options)
    : options_(std::move(options)),
      host_(make_engine_host(options_.engine.memory_budget, options_.engine.text_queue_bytes)) {
  for (const ServedModel& model : options_.models) {
    const bool twice = std::any_of(slots_.begin(), slots_.end(), [&](const auto& slot) { return slot->model.name == model.name; });
    if (twice) {
      throw Error(ErrorCode::kInvalidArgument, "two models are called '" + model.name + "'; rename the directory of one")
          .with_field("model");
    }
    slots_.push_back(std::make_unique<Slot>());
    slots_.back()->model = model;
    slots_.back()->entry = entry_of(model);
  }
  for (const ModelAlias& alias : options_.aliases) {
    const bool known = std::any_of(slots_.begin(), slots_.end(), [&](const auto& slot) { return slot->model.name == alias.name; });
    if (!known) {
      throw Error(ErrorCode::kInvalidArgument, "the alias '" + alias.pattern + "' is for the model '" + alias.name + "', which is not served")
          .with_field("alias");
    }
  }
  lease(*slots_.front());
  housekeeper_ = std::thread([this] { keep_house(); });
}

void ModelPool::set_times(std::chrono::milliseconds idle_unload, std::chrono::seconds session_ttl) {
  {
    const MutexLock lock(mutex_);
    idle_unload_ = idle_unload;
    session_ttl_ = session_ttl;
    changed_ = true;
  }
  wake_.notify_all();
}

void ModelPool::keep_house() {
  MutexLock lock(mutex_);
  while (!stopping_) {
    const auto idle = idle_unload_;
    const auto ttl = session_ttl_;
    std::chrono::milliseconds pause = std::chrono::minutes(10);
    if (idle.count() > 0) pause = std::min(pause, std::max(idle / 2, std::chrono::milliseconds(1)));
    if (ttl.count() > 0) pause = std::min<std::chrono::milliseconds>(pause, ttl);
    if (!changed_) wake_.wait_for(lock, pause);
    if (stopping_ || std::exchange(changed_, false)) continue;
    lock.unlock();
    if (idle.count() > 0) unload_idle(idle);
    if (ttl.count() > 0) forget_sessions(ttl);
    lock.lock();
  }
}

ModelPool::~ModelPool() {
  {
    const MutexLock lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  housekeeper_.join();
}

ModelPool::Slot& ModelPool::find(const std::string& name) {
  if (name.empty()) return *slots_.front();
  for (const auto& slot : slots_) {
    if (slot->model.name == name || slot->model.source == name) return *slot;
  }
  const auto alias = std::find_if(options_.aliases.begin(), options_.aliases.end(),
                                  [&](const ModelAlias& alias) { return fits(alias.pattern, name); });
  if (alias != options_.aliases.end()) return find(alias->name);
  refuse(name);
}

void ModelPool::refuse(const std::string& model) const {
  std::string names;
  for (const auto& slot : slots_) names += (names.empty() ? "'" : ", '") + slot->model.name + "'";
  throw Failure(Failure::Kind::kNotFound, "There is no model '" + model + "' here; there is " + names + ".", "model");
}

ModelPool::Lease ModelPool::lease(Slot& slot) {
  const std::lock_guard loading(slot.loading);
  {
    const MutexLock lock(mutex_);
    if (slot.loaded) return {*this, slot, slot.loaded, true};
  }
  std::shared_ptr<Engine> engine = slot.model.engine;
  if (engine == nullptr) {
    EngineOptions options = options_.engine;
    options.model = slot.model.source;
    options.host = host_;
    engine = std::make_shared<Engine>(std::move(options));
  }
  auto loaded = std::make_shared<Loaded>(std::move(engine), slot.model.name, options_.share_prefixes);
  ModelEntry entry = loaded->runner.models().front();
  const MutexLock lock(mutex_);
  slot.entry = std::move(entry);
  slot.loaded = std::move(loaded);
  return {*this, slot, slot.loaded, true};
}

ModelPool::Lease ModelPool::model(const std::string& name) { return lease(find(name)); }

ModelPool::Lease ModelPool::of_agent(const std::string& id, bool looks) {
  // Which model it is of, the last commit says.
  if (const auto& tier = options_.engine.remote; tier && tier->open(id, false)) tier->done(id);
  if (slots_.size() == 1) return lease(*slots_.front());
  for (const Lease& other : loaded()) {
    const MemoryUsage usage = other.engine().memory_usage();
    const bool awake = std::any_of(usage.agents.begin(), usage.agents.end(), [&](const AgentMemory& agent) { return agent.agent == id; });
    if (awake) return lease(*other.slot_);
  }
  Lease first = lease(*slots_.front());
  if (looks || !first.engine().store().contains(id)) return first;
  // Of an agent of a model that isn't served the first one says what differs.
  Slot* own = find_source(first.engine().store().agent_info(id).model);
  return own == nullptr ? std::move(first) : lease(*own);
}

ModelPool::Slot* ModelPool::find_source(const std::string& source) {
  const auto find = [&](auto is) {
    const auto found = std::find_if(slots_.begin(), slots_.end(), is);
    return found == slots_.end() ? nullptr : found->get();
  };
  Slot* own = find([&](const auto& slot) { return slot->model.name == source || slot->model.source == source; });
  if (own != nullptr) return own;
  try {
    return find([dir = resolve_model(source)](const auto& slot) {
      std::error_code ignored;
      return std::filesystem::equivalent(dir, resolve_model(slot->model.source), ignored);
    });
  } catch (const Error&) {  // there is no such model, or no longer
    const std::string last = std::filesystem::path(source).filename().string();
    return find([&](const auto& slot) { return slot->model.name == last; });
  }
}

ModelPool::Lease ModelPool::of_source(const std::string& source) {
  Slot* own = source.empty() ? slots_.front().get() : find_source(source);
  if (own == nullptr) refuse(source);
  return lease(*own);
}

std::vector<ModelPool::Lease> ModelPool::loaded() { return loaded(nullptr); }

std::vector<ModelPool::Lease> ModelPool::loaded(EngineWork* unloaded_work, int64_t* unloaded_evictions) {
  std::vector<Lease> leases;
  leases.reserve(slots_.size());  // a lease that moves needs the mutex for nothing, but one that goes does
  const MutexLock lock(mutex_);
  if (unloaded_work != nullptr) *unloaded_work = unloaded_work_;
  if (unloaded_evictions != nullptr) *unloaded_evictions = unloaded_evictions_;
  for (const auto& slot : slots_) {
    if (slot->loaded) leases.push_back({*this, *slot, slot->loaded, false});
  }
  return leases;
}

std::vector<AgentStatus> ModelPool::agents() {
  std::map<std::string, AgentStatus> all;
  for (const Lease& lease : loaded()) {
    for (AgentStatus& status : lease.engine().agents()) {
      if (status.awake || !all.contains(status.agent)) all[status.agent] = std::move(status);
    }
  }
  std::vector<AgentStatus> list;
  for (auto& [id, status] : all) list.push_back(std::move(status));
  return list;
}

MemoryUsage ModelPool::memory_usage() {
  MemoryUsage all;
  for (const Lease& lease : loaded(nullptr, &all.evictions)) {
    MemoryUsage own = lease.engine().memory_usage();
    all.model_bytes += own.model_bytes;
    all.queued_bytes += own.queued_bytes;
    all.evictions += own.evictions;
    // These are of all engines together.
    all.kv_bytes = own.kv_bytes;
    all.mapped_bytes = own.mapped_bytes;
    all.budget = own.budget;
    std::move(own.agents.begin(), own.agents.end(), std::back_inserter(all.agents));
  }
  return all;
}

EngineWork ModelPool::work() {
  EngineWork all;
  for (const Lease& lease : loaded(&all)) add(all, lease.engine().work());
  return all;
}

std::string ModelPool::salt(const std::string& tenant) const {
  return options_.share_prefixes ? std::string() : salt_of(tenant);
}

void ModelPool::save_all() {
  for (const Lease& lease : loaded()) {
    lease.engine().save_all();
    lease.engine().finish_saves();
  }
}

void ModelPool::unload_idle(std::chrono::milliseconds idle) {
  for (size_t i = 1; i < slots_.size(); ++i) {
    Slot& slot = *slots_[i];
    const std::unique_lock loading(slot.loading, std::try_to_lock);
    if (!loading) continue;  // somebody is about to use it
    const auto is_unused = [&] { return slot.loaded && slot.loaded.use_count() == 1 && Clock::now() - slot.used >= idle; };
    std::shared_ptr<Loaded> unused;
    {
      const MutexLock lock(mutex_);
      if (!is_unused()) continue;
      unused = slot.loaded;
    }
    try {
      unused->engine->save_all();
    } catch (const Error& error) {
      log(LogLevel::kWarning, "the model '" + slot.model.name + "' stays loaded, for an agent of it can't be saved: " + error.what());
      continue;
    }
    const EngineWork work = unused->engine->work();
    const int64_t evictions = unused->engine->memory_usage().evictions;
    unused.reset();
    {
      const MutexLock lock(mutex_);
      if (!is_unused()) continue;  // somebody looks at it
      add(unloaded_work_, work);
      unloaded_evictions_ += evictions;
      unused = std::move(slot.loaded);
    }
    log(LogLevel::kInfo, "the model '" + slot.model.name + "' was not used for a while, and is unloaded");
    unused.reset();  // its agents' locks go with it, before anybody loads it again
  }
}

void ModelPool::forget_sessions(std::chrono::seconds ttl) {
  if (options_.engine.remote) return;  // another server may have used them since
  const auto now = std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch());
  // Texts of one form, to the second: the order of texts is that of times.
  std::string before = utc_time((now - ttl).count());
  before.pop_back();
  std::vector<AgentInfo> all;
  try {
    all = model("").engine().store().list_cached_agents();
  } catch (const Error& error) {
    log(LogLevel::kWarning, std::string("sessions can't be looked at: ") + error.what());
  }
  for (const AgentInfo& info : all) {
    if (!is_session_agent(info.agent_id) || is_pinned(info) || info.hash.empty() || info.updated_at > before) continue;
    try {
      const Lease lease = of_agent(info.agent_id, true);
      // What has used it since it was listed has saved it.
      if (lease.engine().store().agent_info(info.agent_id).hash != info.hash) continue;
      lease.engine().remove(info.agent_id);
    } catch (const Error& error) {
      log(LogLevel::kInfo, "the expired session '" + info.agent_id + "' was not removed: " + error.what());
    }
  }
}

void ModelPool::run(const ChatRequest& request, AnswerSink& sink, const std::atomic<bool>& gone) {
  const Lease lease = model(request.model);
  ChatRequest named = request;
  named.model = lease.name();
  lease.runner().run(named, sink, gone);
}

int ModelPool::count_tokens(const ChatRequest& request) {
  const Lease lease = model(request.model);
  ChatRequest named = request;
  named.model = lease.name();
  return lease.runner().count_tokens(named);
}

std::vector<ModelEntry> ModelPool::models() {
  std::vector<ModelEntry> entries;
  const MutexLock lock(mutex_);
  for (const auto& slot : slots_) {
    entries.push_back(slot->entry);
    entries.back().loaded = slot->loaded != nullptr;
  }
  return entries;
}

}  // namespace torpor::server
