#include "agents/manager.h"

#include <algorithm>
#include <set>

namespace torpor {
namespace {

// Agents being loaded ahead of their turn: each keeps pages, a tail and its lock.
constexpr size_t kMaxPrefetched = 4;
// Errors kept for finish_saves, which whoever never calls it must not pile up.
constexpr size_t kMaxUntold = 64;

int64_t common_prefix(std::span<const int32_t> a, std::span<const int32_t> b) {
  return std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin();
}

class Lru final : public EvictionPolicy {
 public:
  size_t choose(std::span<const Evictable> candidates) const override {
    const auto older = [](const Evictable& a, const Evictable& b) { return a.last_used < b.last_used; };
    return size_t(std::min_element(candidates.begin(), candidates.end(), older) - candidates.begin());
  }
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_lru() { return std::make_unique<Lru>(); }

AgentManager::AgentManager(Store& store, ManagerOptions options, std::unique_ptr<EvictionPolicy> policy)
    : store_(store),
      options_(std::move(options)),
      policy_(std::move(policy)),
      writer_(store, options_.durability, options_.write_queue_bytes) {}

AgentManager::~AgentManager() = default;

// ---- holds

void AgentHold::release() noexcept {
  Agent* const agent = std::exchange(agent_, nullptr);
  if (agent != nullptr && --agent->holds == 0) manager_->unheld(*agent);
}

void AgentManager::unheld(Agent& agent) noexcept {
  try {
    if (agent.id.empty()) {
      if (agent.save_error) remember(*agent.save_error);
    } else if (std::exchange(agent.releasable, false)) {
      release_behind_window(agent);
    }
  } catch (...) {
    // Memory that could have been let go of stays; nobody is waiting to hear it.
  }
  if (agent.id.empty()) nameless_.remove_if([&](const Agent& other) { return &other == &agent; });
}

AgentHold AgentManager::hold_alone(const std::string& id) {
  const auto found = awake_.find(id);
  if (found == awake_.end()) return {};
  if (found->second.holds > 0) {
    throw Error(ErrorCode::kBusy, "The agent '" + id + "' is in use; wait until its turn is over.");
  }
  return AgentHold(*this, found->second, false);
}

// ---- waking

Identity AgentManager::expected(const Identity& on_disk) const {
  Identity identity = options_.identity;
  if (options_.layout_of && KvFormat::parse(on_disk.kv)) identity.kv = on_disk.kv;
  return identity;
}

KvLayout AgentManager::layout_of(const Identity& identity) const {
  if (identity.kv == options_.identity.kv) return options_.layout;
  return options_.layout_of(KvFormat::parse(identity.kv).value());
}

LoadedAgent AgentManager::load(const std::string& id) const {
  const Identity identity = expected(store_.agent_info(id).identity);
  LoadOptions options;
  options.expected = &identity;
  options.salvage = true;
  options.allocate = mlx_buffer;
  options.map_rows = true;
  options.window_rows_only = true;
  return store_.load_agent_cache(id, options);
}

void AgentManager::own(Agent& agent, std::unique_ptr<KvCache> cache) {
  cache->on_growth([this](size_t bytes) { make_room(bytes); });
  agent.cache = std::move(cache);
}

void AgentManager::adopt(Agent& agent, LoadedAgent loaded) {
  std::unique_ptr<KvCache> cache = KvCache::restore(loaded.snapshot, options_.backend);
  const KvLayout layout = layout_of(loaded.info.identity);
  if (const CacheValidation sound = validate_cache_structure(*cache, &layout); !sound) {
    throw Error(ErrorCode::kIncompatible, "The cache of agent '" + agent.id + "' does not fit the model: " + sound.reason + ".");
  }
  agent.identity = std::move(loaded.info.identity);
  own(agent, std::move(cache));
  AgentRecord record = decode_record(loaded.info.user, loaded.tokens.size());
  agent.history = std::move(loaded.tokens);
  agent.history.resize(record.history);
  agent.messages = std::move(record.messages);
  agent.shortest_cut = record.shortest_cut;
  agent.pinned = record.pinned;
  agent.other = std::move(record.other);
  agent.segments = std::move(loaded.info.segments);
  agent.segments.resize(std::min(agent.segments.size(), size_t(agent.cache->length() / kSegmentTokens)));
  agent.bytes_read = loaded.bytes_read;
  agent.damage = std::move(loaded.damage);
  if (agent.damage) agent.changed();
}

Agent AgentManager::make_agent(const std::string& id) {
  Agent agent;
  agent.id = id;
  agent.ticket = ++tickets_;
  agent.identity = options_.identity;
  agent.last_used = ++clock_;
  return agent;
}

AgentHold AgentManager::wake(const std::string& id) {
  settle();
  if (const auto found = awake_.find(id); found != awake_.end()) {
    found->second.last_used = ++clock_;
    return AgentHold(*this, found->second, false);
  }
  check_agent_id(id);
  // The agent enters the map whole or not at all: a failed wake leaves it asleep and intact.
  Agent agent = make_agent(id);
  if (std::optional<Ready> ready = take_prefetched(id)) {
    make_room(bytes_to_wake(id));
    agent.lock = std::move(ready->lock);
    adopt(agent, std::move(ready->loaded));
  } else {
    agent.lock = store_.lock_agent(id);
    if (store_.contains(id)) {
      make_room(bytes_to_wake(id));
      adopt(agent, load(id));
    } else {
      own(agent, KvCache::create(options_.layout, options_.backend));
    }
  }
  return AgentHold(*this, awake_.emplace(id, std::move(agent)).first->second, true);
}

void AgentManager::require(const std::string& id) const {
  if (is_awake(id) || store_.contains(id)) return;
  throw Error(ErrorCode::kNotFound, "There is no agent '" + id + "' in '" + store_.root().string() + "'.");
}

AgentHold AgentManager::stateless() {
  nameless_.push_back(make_agent(""));
  AgentHold hold(*this, nameless_.back(), true);
  own(*hold, KvCache::create(options_.layout, options_.backend));
  return hold;
}

bool AgentManager::prefetch(const std::string& id) {
  check_agent_id(id);
  const std::lock_guard lock(prefetch_mutex_);
  if (prefetched_.count(id) != 0 || prefetched_.size() >= kMaxPrefetched || !store_.contains(id)) return false;
  prefetched_[id] = std::async(std::launch::async, [this, id] {
    // In this order: once the lock is held the file can't change any more. An agent that is awake has its lock taken.
    Ready ready;
    ready.lock = store_.lock_agent(id);
    ready.loaded = load(id);
    return ready;
  });
  return true;
}

std::optional<AgentManager::Ready> AgentManager::take_prefetched(const std::string& id) {
  std::future<Ready> future;
  {
    const std::lock_guard lock(prefetch_mutex_);
    const auto found = prefetched_.find(id);
    if (found == prefetched_.end()) return std::nullopt;
    future = std::move(found->second);
    prefetched_.erase(found);
  }
  try {
    return future.get();
  } catch (const std::exception&) {
    return std::nullopt;  // the wake that comes now finds out why, and says it
  }
}

AgentManager::Prefix AgentManager::longest_prefix(const Agent& agent, std::span<const int32_t> tokens) {
  const KvLayout& layout = agent.cache->layout();
  Prefix prefix;
  const auto nothing = [&] { prefix.cache = KvCache::create(layout, options_.backend); };
  if (tokens.size() < 2) return nothing(), std::move(prefix);
  const std::span<const int32_t> wanted = tokens.first(tokens.size() - 1);
  AgentHold best;
  int64_t in_memory = 0;
  for (auto& [id, other] : awake_) {
    const int64_t common = common_prefix(wanted, other.cache->tokens());
    if (&other == &agent || other.identity != agent.identity || common <= in_memory ||
        !other.cache->can_truncate(int(common))) {
      continue;
    }
    best = AgentHold(*this, other, false);  // it may not go while room is made for its copy
    in_memory = common;
  }
  const int64_t on_disk = store_.find_prefix(agent.identity, layout, wanted);
  if (on_disk > in_memory && has_room(bytes_of_runs(layout, 0, on_disk))) {
    LoadOptions options;
    options.allocate = mlx_buffer;
    options.map_rows = true;
    options.window_rows_only = true;
    LoadedPrefix loaded = store_.load_prefix(agent.identity, layout, wanted, options);
    if (int64_t(loaded.snapshot.tokens.size()) > in_memory) {
      prefix.cache = KvCache::restore(loaded.snapshot, options_.backend);
      prefix.segments = std::move(loaded.segments);
      prefix.bytes_read = loaded.bytes_read;
      return prefix;
    }
  }
  if (!best) return nothing(), std::move(prefix);
  prefix.cache = best->cache->clone();
  // A cut inside a sealed run copies it. Where there is no room for that, the whole runs before it are had for nothing.
  if (!has_room(prefix.cache->cut_cost(int(in_memory)))) in_memory = in_memory / kSegmentTokens * kSegmentTokens;
  prefix.cache->truncate(int(in_memory));
  prefix.segments.assign(best->segments.begin(),
                         best->segments.begin() + std::min<ptrdiff_t>(ssize(best->segments), in_memory / kSegmentTokens));
  return prefix;
}

int AgentManager::reuse_prefix(Agent& agent, std::span<const int32_t> tokens) {
  if (agent.cache->length() > 0) return 0;
  Prefix prefix = longest_prefix(agent, tokens);
  own(agent, std::move(prefix.cache));
  agent.segments = std::move(prefix.segments);
  agent.bytes_read += prefix.bytes_read;
  return agent.cache->length();
}

// ---- saving

void AgentManager::save_behind(Agent& agent) {
  settle();
  if (!agent.dirty() || !agent.whole() || agent.queued_version == agent.version) return;
  Writer::Job job{.agent = agent.id, .ticket = agent.ticket, .version = agent.version, .snapshot = agent.cache->snapshot(agent.identity),
                  .model = options_.model_name, .user = encode_record(agent.record(), agent.cache->tokens().size())};
  job.new_bytes = job.snapshot.tail.bytes.size();
  for (const auto& run : job.snapshot.sealed) {
    if (run->segment() == nullptr) job.new_bytes += run->bytes().size();
  }
  writer_.submit(std::move(job));
  agent.queued_version = agent.version;
}

SaveResult AgentManager::save(Agent& agent) {
  save_behind(agent);
  finish_writes(agent);
  if (agent.save_error) throw Error(*std::exchange(agent.save_error, std::nullopt));
  return std::exchange(agent.last_save, {});
}

void AgentManager::save_all(const Writer::Progress& progress) {
  for (auto& [id, agent] : awake_) save_behind(agent);
  finish_saves(progress);
}

void AgentManager::finish_saves(const Writer::Progress& progress) {
  writer_.wait_all(progress);
  settle();
  if (!untold_.empty()) {
    const Error first = untold_.front();
    untold_.erase(untold_.begin());
    throw first;
  }
  for (auto& [id, agent] : awake_) {
    if (agent.save_error) throw Error(*std::exchange(agent.save_error, std::nullopt));
  }
}

Agent* AgentManager::find(uint64_t ticket, const std::string& id) {
  if (const auto found = awake_.find(id); found != awake_.end()) return found->second.ticket == ticket ? &found->second : nullptr;
  for (Agent& agent : nameless_) {
    if (agent.ticket == ticket) return &agent;
  }
  return nullptr;
}

void AgentManager::settle() {
  for (Writer::Outcome& outcome : writer_.collect()) {
    Agent* const agent = find(outcome.ticket, outcome.agent);
    if (agent == nullptr) {
      // Its agent is gone. What has another name, or none, is another one's.
      if (outcome.error) remember(std::move(*outcome.error));
      continue;
    }
    if (outcome.error) {
      agent->save_error = std::move(outcome.error);
      agent->queued_version = agent->saved_version;
      continue;
    }
    agent->saved_version = outcome.version;
    agent->segments = outcome.result.segments;
    agent->last_save.bytes_written += outcome.result.bytes_written;
    agent->last_save.segments_written += outcome.result.segments_written;
    agent->last_save.segments_shared = outcome.result.segments_shared;
    agent->damage.reset();
    agent->save_error.reset();
    // Whoever holds it may be computing with its rows, so they stay where they are until then.
    agent->holds == 0 ? release_behind_window(*agent) : void(agent->releasable = true);
  }
}

void AgentManager::remember(Error error) {
  if (untold_.size() < kMaxUntold) untold_.push_back(std::move(error));
}

void AgentManager::finish_writes(Agent& agent) {
  writer_.wait(agent.ticket);
  settle();
}

void AgentManager::release_behind_window(Agent& agent) {
  if (agent.cache == nullptr || !agent.cache->layout().has_windows()) return;
  const std::vector<KvTensorSpec>& tensors = agent.cache->layout().tensors;
  const std::vector<KvCache::HeldBuffer> buffers = agent.cache->buffers();
  for (size_t i = 0; i < std::min(agent.segments.size(), buffers.size()); ++i) {
    const auto behind = [&](const KvTensorSpec& tensor) {
      return !KvLayout::attended(tensor, int64_t(i) * kSegmentTokens, kSegmentTokens, agent.cache->length());
    };
    if (buffers[i].mapped || std::none_of(tensors.begin(), tensors.end(), behind)) continue;
    if (const auto run = store_.map_segment(agent.segments[i])) agent.cache->replace_run(int(i), run);
  }
}

// ---- sleeping

void AgentManager::sleep(const std::string& id) {
  if (const AgentHold hold = hold_alone(id)) save(*hold);
  drop(id);
}

void AgentManager::drop(const std::string& id) {
  take_prefetched(id);
  AgentHold hold = hold_alone(id);
  if (!hold) return;
  finish_writes(*hold);  // the lock outlives the write
  if (hold->save_error) remember(*hold->save_error);
  hold->releasable = false;
  hold.release();
  awake_.erase(id);
}

void AgentManager::make_room(size_t bytes) {
  if (options_.memory_budget == 0) return;
  std::set<std::string> refused;
  std::string why;
  while (held_bytes() + bytes > options_.memory_budget) {
    std::vector<Evictable> candidates;
    for (const auto& [id, agent] : awake_) {
      if (agent.pinned || agent.holds > 0 || refused.count(id) != 0) continue;
      candidates.push_back({id, agent.last_used, agent.cache->nbytes(), agent.dirty()});
    }
    if (candidates.empty()) {
      throw Error(ErrorCode::kResourceExhausted,
                  std::to_string(bytes) + " bytes more of KV cache do not fit the memory budget of " +
                      std::to_string(options_.memory_budget) + " bytes: " + holders() +
                      (why.empty() ? "; raise the budget, unpin an agent or shorten the prompt." : "; " + why));
    }
    const std::string victim = candidates[policy_->choose(candidates)].id;
    try {
      sleep(victim);
    } catch (const Error& error) {
      // It stays awake, and keeps what could not be saved.
      refused.insert(victim);
      if (why.empty()) why = "agent '" + victim + "' could not be saved: " + error.what();
    }
  }
}

bool AgentManager::has_room(size_t bytes) {
  try {
    make_room(bytes);
    return true;
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kResourceExhausted) throw;
    return false;
  }
}

// ---- accounting

size_t AgentManager::bytes_of_runs(const KvLayout& layout, int64_t first_run, int64_t n_tokens) {
  size_t bytes = 0;
  for (int64_t first = first_run * kSegmentTokens; first < n_tokens; first += kSegmentTokens) {
    for (const KvTensorSpec& tensor : layout.tensors) {
      if (KvLayout::attended(tensor, first, kSegmentTokens, n_tokens)) bytes += tensor.bytes_per_token() * kSegmentTokens;
    }
  }
  return bytes;
}

size_t AgentManager::bytes_to_wake(const std::string& id) const {
  if (options_.memory_budget == 0) return 0;
  const AgentInfo info = store_.agent_info(id);
  // Segments that an awake agent has are not loaded again. Agents share prefixes: the first run that differs ends them.
  int64_t shared = 0;
  for (const auto& [other_id, other] : awake_) {
    const auto [end, ignored] = std::mismatch(info.segments.begin(), info.segments.end(), other.segments.begin(), other.segments.end());
    shared = std::max<int64_t>(shared, end - info.segments.begin());
  }
  return bytes_of_runs(layout_of(expected(info.identity)), shared, info.cache_size);
}

namespace {

/// Counts buffers, each once.
class Tally {
 public:
  void add(const KvCache& cache) {
    for (const KvCache::HeldBuffer& buffer : cache.buffers()) add(buffer);
  }
  void add(const KvCache::HeldBuffer& buffer) {
    if (!seen_.insert(buffer.data).second) return;
    bytes += buffer.bytes;
    if (buffer.mapped) mapped += buffer.bytes;
  }
  size_t bytes = 0, mapped = 0;

 private:
  std::set<const void*> seen_;
};

}  // namespace

MemoryUsage AgentManager::memory_usage() const {
  MemoryUsage usage;
  Tally tally;
  std::map<const void*, int> holders;
  for (const auto& [id, agent] : awake_) {
    tally.add(*agent.cache);
    for (const KvCache::HeldBuffer& buffer : agent.cache->buffers()) ++holders[buffer.data];
  }
  for (const auto& [id, agent] : awake_) {
    AgentMemory memory{.agent = id, .tokens = agent.cache->length(), .pinned = agent.pinned, .unsaved = agent.dirty()};
    for (const KvCache::HeldBuffer& buffer : agent.cache->buffers()) {
      memory.bytes += int64_t(buffer.bytes);
      if (holders[buffer.data] > 1) memory.shared_bytes += int64_t(buffer.bytes);
    }
    usage.agents.push_back(std::move(memory));
  }
  for (const Agent& agent : nameless_) tally.add(*agent.cache);
  usage.kv_bytes = int64_t(tally.bytes);
  usage.mapped_bytes = int64_t(tally.mapped);
  usage.queued_bytes = int64_t(writer_.queued_bytes());
  usage.budget = int64_t(options_.memory_budget);
  return usage;
}

size_t AgentManager::held_bytes() const { return size_t(memory_usage().kv_bytes); }

std::string AgentManager::holders() const {
  std::string text;
  for (const AgentMemory& memory : memory_usage().agents) {
    if (!text.empty()) text += ", ";
    text += "agent '" + memory.agent + "' holds " + std::to_string(memory.bytes);
    text += memory.pinned ? " (pinned)" : awake_.at(memory.agent).holds > 0 ? " (in its turn)" : "";
  }
  return text.empty() ? "no agent can go to sleep" : text;
}

}  // namespace torpor
