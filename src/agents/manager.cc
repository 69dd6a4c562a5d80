#include "agents/manager.h"

#include <algorithm>
#include <iterator>
#include <new>
#include <utility>

namespace torpor {
namespace {

int64_t common_prefix(std::span<const int32_t> a, std::span<const int32_t> b) {
  return std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin();
}

}  // namespace

AgentManager::AgentManager(Store& store, ManagerOptions options, std::unique_ptr<EvictionPolicy> policy)
    : store_(store),
      options_(std::move(options)),
      format_(KvFormat::parse(options_.identity.kv).value_or(KvFormat())),
      policy_(std::move(policy)),
      group_(options_.group ? options_.group : std::make_shared<ManagerGroup>(options_.memory_budget)),
      ledger_(group_->ledger),
      prefetcher_(store_, ledger_, [this](const std::string& id) { return load(id); }, options_.prefetch),
      writer_(store, options_.durability, options_.write_queue_bytes) {
  group_->members.push_back(this);
}

AgentManager::~AgentManager() { std::erase(group_->members, this); }

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
  const auto own = KvFormat::parse(on_disk.kv);
  if (options_.layout_of && own && (options_.any_kv_format || own->same_size(format_))) identity.kv = on_disk.kv;
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
  options.map_rows = options_.map_rows;
  options.window_rows_only = options_.map_rows;
  options.tail_in_run = options_.backend == Backend::kKernels;
  return store_.load_agent_cache(id, options);
}

void AgentManager::own(Agent& agent, std::unique_ptr<KvCache> cache) {
  cache->count_in(ledger_);
  agent.cache = std::move(cache);
}

void AgentManager::adopt(Agent& agent, LoadedAgent loaded) {
  KvSnapshot& snapshot = loaded.snapshot;
  if (!options_.state_layout.empty() && snapshot.states.empty()) {
    // Rows are of no use without a state: all of it is computed again.
    snapshot.sealed.clear();
    snapshot.tail = {};
    snapshot.tokens.clear();
    snapshot.state_layout = options_.state_layout;
  }
  if (!(snapshot.state_layout == options_.state_layout)) {
    throw Error(ErrorCode::kIncompatible, "The states of agent '" + agent.id + "' are not of the model's layout.")
        .with_agent(agent.id)
        .with_field("state");
  }
  const KvLayout layout = layout_of(loaded.info.identity);
  if (snapshot.layout != layout) {
    // Saved before rows of windows were kept apart: the next save writes all of it anew.
    if (auto moved = in_layout(snapshot, layout)) {
      snapshot = std::move(*moved);
      loaded.info.segments.clear();
      loaded.info.states.reset();
    }
  }
  std::unique_ptr<KvCache> cache = KvCache::restore(snapshot, options_.backend);
  if (const CacheValidation sound = validate_cache_structure(*cache, &layout); !sound) {
    throw Error(ErrorCode::kIncompatible, "The cache of agent '" + agent.id + "' does not fit the model: " + sound.reason + ".")
        .with_agent(agent.id)
        .with_field("layout");
  }
  agent.identity = std::move(loaded.info.identity);
  own(agent, std::move(cache));
  agent.lineage = std::move(loaded.info.lineage);
  agent.conversation = std::move(loaded.info.conversation);
  AgentRecord record = decode_record({std::move(loaded.messages), loaded.info.record}, loaded.tokens.size());
  agent.history = std::move(loaded.tokens);
  agent.history.resize(record.history);
  agent.messages = std::move(record.messages);
  agent.variables = std::move(record.variables);
  agent.shortest_cut = record.shortest_cut;
  agent.pinned = record.pinned;
  agent.checkpoints = std::move(record.checkpoints);
  agent.user = std::move(loaded.info.user);
  agent.segments = std::move(loaded.info.segments);
  if (loaded.info.states) agent.states = std::move(*loaded.info.states);
  agent.cut_files(agent.cache->length());
  agent.lineage.cut(agent.cache->length());
  agent.bytes_read = loaded.bytes_read;
  agent.damage = std::move(loaded.damage);
  if (agent.damage) agent.changed();
}

int64_t AgentManager::intact_tokens(const Agent& agent, std::optional<std::string>& damage) const {
  const KvLayout& layout = agent.cache->layout();
  const int64_t length = agent.cache->length();
  const auto runs = agent.cache->sealed_runs();
  for (size_t i = 0; i < runs.size(); ++i) {
    const int64_t first = int64_t(i) * kSegmentTokens;
    try {
      store_.recheck(layout, *runs[i], layout.attended(first, kSegmentTokens, length));
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kCorruption) throw;
      damage = error.what();
      return first;
    }
  }
  return length;
}

Agent AgentManager::make_agent(const std::string& id, const std::string& salt) {
  Agent agent;
  agent.id = id;
  agent.ticket = ++tickets_;
  agent.identity = options_.identity;
  agent.lineage.ranges = {{0, options_.numerics}};
  agent.lineage.salt = salt;
  agent.conversation = options_.conversation;
  agent.last_used = ++group_->clock;
  return agent;
}

AgentHold AgentManager::wake(const std::string& id, const std::string& salt) {
  settle();
  if (const auto found = awake_.find(id); found != awake_.end()) {
    found->second.last_used = ++group_->clock;
    AgentHold hold(*this, found->second, false);
    std::optional<std::string> damage;
    if (const int64_t intact = hold->holds == 1 ? intact_tokens(*hold, damage) : hold->cache->length(); damage) {
      truncate(*hold, int(intact));
      hold->damage = std::move(damage);
    }
    return hold;
  }
  check_agent_id(id);
  // The agent enters the map whole or not at all: a failed wake leaves it asleep and intact.
  prefetcher_.set_awake(id, true);  // from here on a prefetch would only take the lock from us
  try {
    return AgentHold(*this, awake_.emplace(id, load_or_make(id, salt)).first->second, true);
  } catch (const std::bad_alloc&) {
    prefetcher_.set_awake(id, false);
    throw Error(ErrorCode::kResourceExhausted, "Out of memory while waking agent '" + id + "'; let other agents sleep first.");
  } catch (...) {
    prefetcher_.set_awake(id, false);
    throw;
  }
}

Agent AgentManager::load_or_make(const std::string& id, const std::string& salt) {
  Agent agent = make_agent(id, salt);
  if (std::optional<Prefetcher::Ready> ready = prefetcher_.take(id)) {
    ready->shares.clear();  // they count again once the agent is adopted
    const KvLedger::Room room = make_room(bytes_to_wake(id));
    agent.lock = std::move(ready->lock);
    adopt(agent, std::move(ready->loaded));
  } else {
    agent.lock = store_.lock_agent(id);
    if (store_.contains(id)) {
      const KvLedger::Room room = make_room(bytes_to_wake(id));
      adopt(agent, load(id));
    } else {
      own(agent, KvCache::create(options_.layout, format_, options_.backend, options_.state_layout));
    }
  }
  return agent;
}

void AgentManager::require(const std::string& id) const {
  if (is_awake(id) || store_.contains(id)) return;
  throw Error(ErrorCode::kNotFound, "There is no agent '" + id + "' in '" + store_.root().string() + "'.");
}

AgentHold AgentManager::stateless(const std::string& salt) {
  nameless_.push_back(make_agent("", salt));
  AgentHold hold(*this, nameless_.back(), true);
  own(*hold, KvCache::create(options_.layout, format_, options_.backend, options_.state_layout));
  return hold;
}

bool AgentManager::prefetch(const std::string& id) {
  check_agent_id(id);
  return store_.contains(id) && prefetcher_.begin(id);
}

AgentManager::Prefix AgentManager::longest_prefix(const Agent& agent, std::span<const int32_t> tokens, int64_t least,
                                                  std::span<const int64_t> positions) {
  const KvLayout& layout = agent.cache->layout();
  Prefix prefix;
  prefix.lineage = agent.lineage;
  const bool has_states = !options_.state_layout.empty();
  const auto nothing = [&] {
    prefix.cache = KvCache::create(layout, agent.cache->format(), options_.backend, options_.state_layout);
  };
  if (tokens.size() < 2) return nothing(), std::move(prefix);
  const std::span<const int32_t> wanted = tokens.first(tokens.size() - 1);
  AgentHold best;
  int64_t in_memory = least;
  const auto consider = [&](Agent& other) {
    int64_t common = common_prefix(wanted, other.cache->tokens());
    if (&other == &agent || common <= in_memory || !may_share(other, agent)) return;
    std::optional<std::string> damage;
    common = std::min(common, intact_tokens(other, damage));
    prefix.known = std::max(prefix.known, common);
    common = last_state(other, common);
    const bool can_cut = other.cache->can_truncate(int(common)) || (has_states && !layout.has_windows());
    if (common <= in_memory || !can_cut) return;
    best = AgentHold(*this, other, false);  // it may not go while room is made for its copy
    in_memory = common;
  };
  for (auto& [id, other] : awake_) consider(other);
  for (Agent& other : nameless_) consider(other);
  for (Kept& other : kept_) {
    const bool longer = may_share(other.agent, agent) && common_prefix(wanted, other.tokens()) > in_memory;
    if (longer && bring_kept_back(other)) consider(other.agent);
  }
  Lineage names = agent.lineage;
  if (has_checkpoints()) {
    prefix.known = std::max(prefix.known, store_.find_prefix(agent.identity, agent.lineage, layout, wanted));
  }
  const StatesSought sought{options_.state_layout, {positions.begin(), positions.end()}};
  const StatesSought* const states = has_checkpoints() ? &sought : nullptr;
  int64_t on_disk = store_.find_prefix(agent.identity, names, layout, wanted, states);
  if (agent.cache->length() == 0 && names.salt.empty() && !has_checkpoints()) {
    // Under the names of versions 1 and 2, which did not say on what f32 was computed.
    const Lineage old{.ranges = {{0, options_.numerics.substr(0, options_.numerics.find('/'))}}, .old_names = options_.conversation};
    if (const int64_t found = store_.find_prefix(agent.identity, old, layout, wanted); found > on_disk) {
      on_disk = found;
      names = old;
    }
  }
  // Runs that the other one has saved are not read again, but shared.
  Shared shared;
  if (best && options_.backend == Backend::kKernels) {
    shared = {std::min<int64_t>(ssize(best->segments), in_memory / kSegmentTokens), best->cache->length()};
  }
  const size_t room_needed = bytes_of_runs(layout, on_disk, shared) + options_.state_layout.bytes();
  const auto room = on_disk > in_memory ? try_room(room_needed) : std::nullopt;
  if (room) {
    LoadOptions options;
    options.allocate = mlx_buffer;
    options.map_rows = options_.map_rows;
    options.window_rows_only = options_.map_rows;
    options.states = states;
    options.tail_in_run = options_.backend == Backend::kKernels;
    LoadedPrefix loaded = store_.load_prefix(agent.identity, names, layout, wanted, options);
    if (int64_t(loaded.snapshot.tokens.size()) > in_memory) {
      prefix.cache = KvCache::restore(loaded.snapshot, options_.backend);
      prefix.lineage = names;
      prefix.segments = std::move(loaded.segments);
      prefix.states = std::move(loaded.windows);
      for (const auto& state : loaded.snapshot.states) prefix.states.push_back({state->position(), state->file()});
      prefix.bytes_read = loaded.bytes_read;
      return prefix;
    }
  }
  if (!best) return nothing(), std::move(prefix);
  const int64_t known = prefix.known;
  prefix = cut_of(*best, int(in_memory));
  prefix.known = known;
  return prefix;
}

bool AgentManager::may_share(const Agent& from, const Agent& to) const {
  // What a turn computes otherwise than the rows before it is in the lineage once it is committed.
  return from.identity == to.identity && from.lineage.salt == to.lineage.salt &&
         (!from.in_turn || from.lineage.numerics() == options_.numerics);
}

AgentManager::Prefix AgentManager::cut_of(const Agent& agent, int n_tokens) {
  Prefix prefix;
  prefix.cache = agent.cache->clone();
  n_tokens = hold_state(agent, *prefix.cache, n_tokens);
  // A cut inside a sealed run copies it. Where there is no room for that, the whole runs before it are had for nothing.
  const auto room_to_cut = try_room(prefix.cache->cut_cost(n_tokens));
  while (!room_to_cut && n_tokens % kSegmentTokens != 0) {
    n_tokens = prefix.cache->resumable(n_tokens / kSegmentTokens * kSegmentTokens);
  }
  prefix.cache->truncate(n_tokens);
  prefix.lineage = agent.lineage;  // its rows keep the names that they have
  prefix.segments.assign(agent.segments.begin(),
                         agent.segments.begin() + std::min<ptrdiff_t>(ssize(agent.segments), n_tokens / kSegmentTokens));
  std::ranges::copy_if(agent.states, std::back_inserter(prefix.states),
                       [&](const StateRef& state) { return state.position <= n_tokens; });
  return prefix;
}

void AgentManager::give(Agent& agent, Prefix prefix) {
  own(agent, std::move(prefix.cache));
  agent.lineage = std::move(prefix.lineage);
  agent.lineage.cut(agent.cache->length());
  agent.segments = std::move(prefix.segments);
  agent.states = std::move(prefix.states);
  agent.bytes_read += prefix.bytes_read;
}

int AgentManager::reuse_prefix(Agent& agent, std::span<const int32_t> tokens, std::span<const int64_t> positions,
                               int64_t* known) {
  const int held = agent.cache->length();
  Prefix prefix = longest_prefix(agent, tokens, held, positions);
  if (known != nullptr) *known = std::max(*known, prefix.known);
  if (prefix.cache->length() <= held) return 0;
  give(agent, std::move(prefix));
  return agent.cache->length();
}

bool AgentManager::share_rows(Agent& agent, const Agent& other, int n_tokens) {
  if (!may_share(other, agent)) return false;
  n_tokens = int(last_state(other, n_tokens));
  const bool has_states = !options_.state_layout.empty() && !other.cache->layout().has_windows();
  if (n_tokens <= agent.cache->length() || (!other.cache->can_truncate(n_tokens) && !has_states)) return false;
  Prefix prefix = cut_of(other, n_tokens);
  if (prefix.cache->length() <= agent.cache->length()) return false;
  give(agent, std::move(prefix));
  return true;
}

// ---- rows kept for a retry

void AgentManager::keep_for_retry(const Agent& agent, std::shared_ptr<const RowsAside> aside, int reused, bool on_disk,
                                  int n_tokens) noexcept {
  constexpr size_t kMost = 32;  // as many as turns may be at work, so that no client that is cut among others loses its rows
  try {
    Kept kept{make_agent(""), std::chrono::steady_clock::now(), std::move(aside)};
    kept.agent.identity = agent.identity;
    kept.agent.lineage = agent.lineage;
    kept.agent.lineage.go_on_with(options_.numerics, reused);
    kept.agent.segments = agent.segments;
    kept.agent.states = agent.states;
    kept.agent.checkpoints = agent.checkpoints;
    own(kept.agent, agent.cache->clone());
    // What is a part of the new rows goes, unless a sliding window keeps them from being cut to it.
    kept_.remove_if([&](const Kept& other) {
      const int length = int(other.tokens().size());
      return other.agent.holds == 0 && kept.aside == nullptr && may_share(other.agent, kept.agent) &&
             kept.agent.cache->can_truncate(length) && common_prefix(other.tokens(), kept.tokens()) == length;
    });
    if (kept_.size() >= kMost) let_kept_go(true);
    kept_.push_back(std::move(kept));
    if (on_disk) submit_prefix(kept_.back().agent, n_tokens);
  } catch (...) {
    // They are computed again.
  }
}

bool AgentManager::bring_kept_back(Kept& kept) {
  if (kept.aside == nullptr) return true;
  const AgentHold hold(*this, kept.agent, false);  // it may not go while room is made for it
  try {
    bring_back(kept.agent, *kept.aside);
  } catch (const Error&) {
    return false;
  }
  kept.aside.reset();
  return true;
}

bool AgentManager::let_kept_go(bool one) {
  constexpr auto kPatience = std::chrono::minutes(1);
  const auto now = std::chrono::steady_clock::now();
  const size_t before = kept_.size();
  kept_.remove_if([&](const Kept& kept) {
    const bool goes = kept.agent.holds == 0 && (one || now - kept.since > kPatience);
    if (goes) one = false;
    return goes;
  });
  return kept_.size() < before;
}

std::vector<std::string> AgentManager::adapt(Agent& agent, int n_tokens) {
  std::vector<std::string> notices;
  const ConversationIdentity& now = options_.conversation;
  if (agent.conversation.tokenizer != now.tokenizer) {
    notices.push_back("The tokenizer is another than at this agent's last turn; the tokens that it holds stay as they are.");
  }
  if (agent.conversation.chat_template != now.chat_template) {
    notices.push_back("The chat template is another than at this agent's last turn; the tokens that it holds stay as they are.");
  }
  agent.conversation = now;
  const std::string before = agent.lineage.numerics();
  if (agent.lineage.go_on_with(options_.numerics, n_tokens)) {
    notices.push_back("This agent's rows were computed as '" + before + "'; new ones are computed as '" + options_.numerics +
                      "', and nobody takes the one for the other.");
  }
  return notices;
}

// ---- sleeping

void AgentManager::sleep(const std::string& id) {
  if (const AgentHold hold = hold_alone(id)) save(*hold);
  drop(id);
}

void AgentManager::drop(const std::string& id) {
  prefetcher_.drop(id);
  AgentHold hold = hold_alone(id);
  if (!hold) return;
  finish_writes(*hold);  // the lock outlives the write
  if (hold->save_error) remember(*hold->save_error);
  hold->releasable = false;
  hold.release();
  awake_.erase(id);
  prefetcher_.set_awake(id, false);
}

}  // namespace torpor
