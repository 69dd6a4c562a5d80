/// The memory budget: what counts, what is reserved, and who goes to sleep for it.

#include <algorithm>
#include <set>

#include "agents/manager.h"

namespace torpor {
namespace {

class Lru final : public EvictionPolicy {
 public:
  size_t choose(std::span<const Evictable> candidates) const override {
    const auto older = [](const Evictable& a, const Evictable& b) { return a.last_used < b.last_used; };
    return size_t(std::min_element(candidates.begin(), candidates.end(), older) - candidates.begin());
  }
};

constexpr const char* kBudget = "EngineOptions::memory_budget";

}  // namespace

bool is_lack_of_room(const Error& error) {
  return error.code() == ErrorCode::kResourceExhausted && error.field() == kBudget;
}

std::unique_ptr<EvictionPolicy> make_lru() { return std::make_unique<Lru>(); }

void AgentManager::reserve(std::span<const Growth> growths, bool at_once) {
  size_t bytes = 0;
  for (const Growth& growth : growths) bytes += growth.cache->growth(growth.rows);
  if (bytes == 0) return;
  const auto room = at_once ? try_room(bytes) : std::optional(make_room(bytes));
  for (const Growth& growth : growths) growth.cache->grow(growth.rows);
}

KvLedger::Room AgentManager::make_room(size_t bytes) {
  std::set<std::string> refused;
  std::string why;
  while (true) {
    if (auto room = ledger_->take_room(bytes)) return std::move(*room);
    const auto any = [&](auto gives) { return std::any_of(group_->members.begin(), group_->members.end(), gives); };
    if (any([](AgentManager* member) { return member->let_kept_go(true); })) continue;
    std::vector<Evictable> candidates;
    std::vector<AgentManager*> owners;
    for (AgentManager* member : group_->members) {
      for (const auto& [id, agent] : member->awake_) {
        if (agent.pinned || agent.holds > 0 || refused.count(id) != 0) continue;
        candidates.push_back({id, agent.last_used, agent.cache->nbytes(), agent.dirty()});
        owners.push_back(member);
      }
    }
    if (candidates.empty()) {
      if (any([](AgentManager* member) { return member->prefetcher_.let_one_go(); })) continue;
      throw Error(ErrorCode::kResourceExhausted,
                  std::to_string(bytes) + " bytes more of KV cache do not fit the memory budget of " +
                      std::to_string(ledger_->budget()) + " bytes: " + holders() +
                      (why.empty() ? "; raise the budget, unpin an agent or shorten the prompt." : "; " + why))
          .with_field(kBudget, std::to_string(ledger_->budget()), std::to_string(ledger_->bytes() + bytes));
    }
    const size_t chosen = policy_->choose(candidates);
    const std::string victim = candidates[chosen].id;
    try {
      owners[chosen]->sleep(victim);
      ++owners[chosen]->evictions_;
    } catch (const Error& error) {
      // It stays awake, and keeps what could not be saved.
      refused.insert(victim);
      if (why.empty()) why = "agent '" + victim + "' could not be saved: " + error.what();
    }
  }
}

std::optional<KvLedger::Room> AgentManager::try_room(size_t bytes) {
  try {
    return make_room(bytes);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kResourceExhausted) throw;
    return std::nullopt;
  }
}

std::unique_ptr<RowsAside> AgentManager::put_aside(const KvCache& cache) {
  return std::make_unique<RowsAside>(store_.env(), store_.root(), cache);
}

std::unique_ptr<RowsAside> AgentManager::put_aside(Agent& agent) {
  auto aside = put_aside(*agent.cache);
  own(agent, KvCache::create(agent.cache->layout(), agent.cache->format(), options_.backend, options_.state_layout));
  agent.aside = aside->length();
  return aside;
}

void AgentManager::bring_back(Agent& agent, const RowsAside& aside, bool at_once) {
  const size_t bytes = aside.bytes(*ledger_, options_.backend);
  const auto room = at_once ? try_room(bytes) : std::optional(make_room(bytes));
  own(agent, aside.restore(options_.backend));
  agent.aside = 0;
}

size_t AgentManager::bytes_of_runs(const KvLayout& layout, int64_t n_tokens, const Shared& shared) const {
  size_t bytes = 0;
  for (int64_t run = 0, first = 0; first < n_tokens; ++run, first += kSegmentTokens) {
    for (const KvTensorSpec& tensor : layout.tensors) {
      // Of a run that somebody has, what they can no longer attend does not count yet.
      const bool counted = run < shared.runs && KvLayout::attended(tensor, first, kSegmentTokens, shared.length);
      const bool held = !options_.map_rows || KvLayout::attended(tensor, first, kSegmentTokens, n_tokens);
      if (!counted && held) bytes += tensor.bytes_per_token() * kSegmentTokens;
    }
  }
  return bytes;
}

size_t AgentManager::bytes_to_wake(const std::string& id) const {
  if (ledger_->budget() == 0) return 0;
  const AgentInfo info = store_.agent_info(id);
  // Segments that an awake agent has are not loaded again. Agents share prefixes: the first run that differs ends them.
  Shared shared;
  for (const auto& [other_id, other] : awake_) {
    if (options_.backend != Backend::kKernels) break;  // each has arrays of its own
    if (other.aside > 0) continue;
    const auto [end, ignored] =
        std::mismatch(info.segments.begin(), info.segments.end(), other.segments.begin(), other.segments.end());
    if (end - info.segments.begin() > shared.runs) shared = {end - info.segments.begin(), other.cache->length()};
  }
  return bytes_of_runs(layout_of(expected(info.identity)), info.cache_size, shared) + options_.state_layout.bytes();
}

MemoryUsage AgentManager::memory_usage() {
  settle();
  MemoryUsage usage;
  std::map<const void*, int> holders;
  for (const auto& [id, agent] : awake_) {
    for (const KvCache::HeldBuffer& buffer : agent.cache->buffers()) ++holders[buffer.data];
  }
  for (const auto& [id, agent] : awake_) {
    AgentMemory memory{
        .agent = id, .tokens = agent.cache->length() + agent.aside, .pinned = agent.pinned, .unsaved = agent.dirty()};
    for (const KvCache::HeldBuffer& buffer : agent.cache->buffers()) {
      memory.bytes += int64_t(buffer.bytes);
      if (holders[buffer.data] > 1) memory.shared_bytes += int64_t(buffer.bytes);
    }
    usage.agents.push_back(std::move(memory));
  }
  usage.kv_bytes = int64_t(ledger_->bytes());
  usage.mapped_bytes = int64_t(ledger_->mapped_bytes());
  usage.queued_bytes = int64_t(writer_.queued_bytes());
  usage.budget = int64_t(ledger_->budget());
  usage.evictions = evictions_;
  return usage;
}

std::string AgentManager::holders() {
  std::string text;
  for (AgentManager* member : group_->members) {
    for (const AgentMemory& memory : member->memory_usage().agents) {
      if (!text.empty()) text += ", ";
      text += "agent '" + memory.agent + "' holds " + std::to_string(memory.bytes);
      text += memory.pinned ? " (pinned)" : member->awake_.at(memory.agent).holds > 0 ? " (in its turn)" : "";
    }
  }
  return text.empty() ? "no agent can go to sleep" : text;
}

}  // namespace torpor
