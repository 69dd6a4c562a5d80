/// Fork, rewind and what else changes an agent as a whole. Those that are asleep are changed on disk (torpor/agents.h).

#include "agents/manager.h"
#include "torpor/agents.h"

namespace torpor {

void AgentManager::truncate(Agent& agent, int n_tokens) {
  finish_writes(agent);
  if (!agent.cache->can_truncate(n_tokens)) {
    const auto open = std::span(agent.cache->tokens()).first(size_t(n_tokens)).subspan(size_t(n_tokens / kSegmentTokens * kSegmentTokens));
    if (has_unknown_tokens(open)) {
      throw Error(ErrorCode::kInvalidArgument, "The agent '" + agent.id + "' was imported without its token ids, so what its sliding "
                                               "windows left behind can't be computed again; rewind it to " +
                                               std::to_string(n_tokens) + " tokens first.");
    }
    // A window left rows behind that are needed again. Those of whole segments are on disk, the rest is computed again.
    std::vector<int32_t> tokens(agent.cache->tokens().begin(), agent.cache->tokens().begin() + n_tokens);
    own(agent, KvCache::create(agent.cache->layout(), options_.backend));
    agent.segments.clear();
    tokens.push_back(0);  // stands for the one that reuse_prefix leaves to compute
    reuse_prefix(agent, tokens);
  } else {
    agent.cache->truncate(n_tokens);
    agent.segments.resize(std::min(agent.segments.size(), size_t(n_tokens / kSegmentTokens)));
  }
  agent.changed();
}

Agent* AgentManager::existing(const std::string& id) {
  settle();
  take_prefetched(id);
  require(id);
  const auto found = awake_.find(id);
  return found == awake_.end() ? nullptr : &found->second;
}

void AgentManager::require_free(const std::string& id) const {
  check_agent_id(id);
  if (is_awake(id) || store_.contains(id)) {
    throw Error(ErrorCode::kInvalidArgument, "There is an agent '" + id + "' already; choose another id.");
  }
}

void AgentManager::fork(const std::string& src, const std::string& dst, std::optional<int64_t> at_token) {
  Agent* const found = existing(src);
  if (found == nullptr || (at_token && !found->cache->can_truncate(int(*at_token)))) {
    if (found != nullptr) save(*found);
    fork_agent(store_, src, dst, at_token, options_.durability);
    return;
  }
  Agent& source = *found;
  const int64_t length = source.cache->length(), keep = at_token.value_or(length);
  if (keep < 0 || keep > length) {
    throw Error(ErrorCode::kInvalidArgument, "The agent '" + src + "' holds " + std::to_string(length) +
                                                 " tokens, so it can't be forked at " + std::to_string(keep) + ".");
  }
  require_free(dst);
  Agent agent;
  agent.id = dst;
  agent.identity = source.identity;
  agent.lock = store_.lock_agent(dst);
  agent.last_used = ++clock_;
  own(agent, source.cache->clone());
  agent.cache->truncate(int(keep));
  AgentRecord record = source.record();
  record.cut(size_t(keep));
  agent.messages = std::move(record.messages);
  agent.shortest_cut = record.shortest_cut;
  agent.history.assign(source.history.begin(), source.history.begin() + ptrdiff_t(record.history));
  agent.other = std::move(record.other);
  agent.segments.assign(source.segments.begin(),
                        source.segments.begin() + std::min<ptrdiff_t>(ssize(source.segments), keep / kSegmentTokens));
  agent.changed();
  save_behind(awake_.emplace(dst, std::move(agent)).first->second);
}

void AgentManager::rewind(const std::string& id, int64_t n_tokens) {
  Agent* const found = existing(id);
  if (found == nullptr) {
    rewind_agent(store_, id, n_tokens, options_.durability);
    return;
  }
  Agent& agent = *found;
  if (n_tokens < 0 || n_tokens > agent.cache->length()) {
    throw Error(ErrorCode::kInvalidArgument, "The agent '" + id + "' holds " + std::to_string(agent.cache->length()) +
                                                 " tokens, so it can't be rewound to " + std::to_string(n_tokens) + ".");
  }
  finish_writes(agent);  // one that ends may let go of rows behind a window
  if (!agent.cache->can_truncate(int(n_tokens))) {
    sleep(id);
    rewind_agent(store_, id, n_tokens, options_.durability);
    wake(id);
    return;
  }
  AgentRecord record = agent.record();
  record.cut(size_t(n_tokens));
  truncate(agent, int(n_tokens));
  agent.shortest_cut = record.shortest_cut;
  agent.messages = std::move(record.messages);
  agent.history.resize(record.history);
  save_behind(agent);
}

void AgentManager::pin(const std::string& id, bool pinned) {
  Agent* const agent = existing(id);
  if (agent == nullptr) {
    pin_agent(store_, id, pinned, options_.durability);
    return;
  }
  if (agent->pinned == pinned) return;
  agent->pinned = pinned;
  agent->changed();
  save_behind(*agent);
}

void AgentManager::rename(const std::string& id, const std::string& new_id) {
  require(id);
  require_free(new_id);
  const bool was_awake = is_awake(id);
  sleep(id);
  if (store_.contains(id)) store_.rename_agent_cache(id, new_id);
  if (was_awake) wake(new_id);
}

void AgentManager::remove(const std::string& id) {
  require(id);
  drop(id);
  if (store_.contains(id)) store_.delete_agent_cache(id);
}

}  // namespace torpor
