/// Fork, rewind and what else changes an agent as a whole. Those that are asleep are changed on disk (torpor/agents.h).

#include "agents/manager.h"
#include "torpor/agents.h"
#include "torpor/log.h"

namespace torpor {
namespace {

void require_length(const Agent& agent, int64_t n_tokens, const char* verb) {
  const int64_t length = agent.behind() ? ssize(agent.history) : agent.cache->length();
  if (n_tokens >= 0 && n_tokens <= length) return;
  throw Error(ErrorCode::kInvalidArgument, "The agent '" + agent.id + "' holds " + std::to_string(length) +
                                               " tokens, so it can't be " + verb + " " + std::to_string(n_tokens) +
                                               ".");
}

}  // namespace

void AgentManager::take_back(Agent& agent, int n_tokens) {
  finish_writes(agent);
  // The copy of a run that this makes is of the turn's own rows, and the run goes: less is held afterwards, whatever fits.
  const auto room = try_room(agent.cache->cut_cost(n_tokens));
  agent.cache->truncate(n_tokens);
  agent.cut_files(n_tokens);
}

void AgentManager::truncate(Agent& agent, int n_tokens) {
  finish_writes(agent);
  const KvLayout& layout = agent.cache->layout();
  if (!options_.state_layout.empty() && !layout.has_windows()) n_tokens = hold_state(agent, *agent.cache, n_tokens);
  if (!agent.cache->can_truncate(n_tokens)) {
    const auto open = std::span(agent.cache->tokens())
                          .first(size_t(n_tokens))
                          .subspan(size_t(n_tokens / kSegmentTokens * kSegmentTokens));
    if (has_unknown_tokens(open)) {
      throw Error(ErrorCode::kInvalidArgument, "The agent '" + agent.id +
                                                   "' was imported without its token ids, so what its sliding "
                                                   "windows left behind can't be computed again; rewind it to " +
                                                   std::to_string(n_tokens) + " tokens first.");
    }
    // A window left rows behind that are needed again. Those of whole segments are on disk, the rest is computed again.
    std::vector<int32_t> tokens(agent.cache->tokens().begin(), agent.cache->tokens().begin() + n_tokens);
    tokens.push_back(0);  // stands for the one that is left to compute
    Prefix prefix = longest_prefix(agent, tokens);
    own(agent, std::move(prefix.cache));
    agent.lineage = std::move(prefix.lineage);
    agent.segments = std::move(prefix.segments);
    agent.states = std::move(prefix.states);
    std::erase_if(agent.checkpoints, [&](int64_t position) { return position > agent.cache->length(); });
    agent.bytes_read += prefix.bytes_read;
  } else {
    const KvLedger::Room room = make_room(agent.cache->cut_cost(n_tokens));
    agent.cache->truncate(n_tokens);
    agent.cut_files(n_tokens);
  }
  agent.lineage.cut(agent.cache->length());
  agent.changed();
}

AgentHold AgentManager::existing(const std::string& id) {
  settle();
  prefetcher_.drop(id);
  require(id);
  return hold_alone(id);
}

void AgentManager::require_free(const std::string& id) const {
  check_agent_id(id);
  if (is_awake(id) || store_.contains(id)) {
    throw Error(ErrorCode::kInvalidArgument, "There is an agent '" + id + "' already; choose another id.")
        .with_agent(id)
        .with_field(kAgentTaken);
  }
}

void AgentManager::fork(const std::string& src, const std::string& dst, std::optional<int64_t> at_token) {
  const AgentHold source = existing(src);
  if (source) finish_writes(*source);  // a save under way may let go of states that the fork would name
  if (source) require_length(*source, at_token.value_or(0), "forked at");
  const int keep = source ? int(at_token.value_or(source->cache->length())) : 0;
  // A window may have left rows behind that are needed again, and a budget no room for the run that the cut copies: the files
  // have the rows, and a fork of those needs no memory. So have they the tokens that are behind the last state.
  const bool in_memory = source && !source->behind() && source->cache->can_truncate(keep);
  const auto room = in_memory ? try_room(source->cache->cut_cost(keep)) : std::nullopt;
  if (!room) {
    if (source) save(*source);
    fork_agent(store_, src, dst, at_token, options_.durability);
    return;
  }
  require_free(dst);
  Agent agent = make_agent(dst);
  agent.identity = source->identity;
  agent.lineage = source->lineage;
  agent.lineage.cut(keep);
  agent.conversation = source->conversation;
  agent.lock = store_.lock_agent(dst);
  require_free(dst);  // until the lock was held another process could make it
  own(agent, source->cache->clone());
  agent.cache->truncate(keep);
  AgentRecord record = source->record();
  record.cut(size_t(keep));
  agent.messages = std::move(record.messages);
  agent.variables = std::move(record.variables);
  agent.shortest_cut = record.shortest_cut;
  agent.history.assign(source->history.begin(), source->history.begin() + ptrdiff_t(record.history));
  agent.user = source->user;
  agent.segments = source->segments;
  agent.states = source->states;
  agent.checkpoints = source->checkpoints;
  agent.unsaved_state = source->unsaved_state;
  agent.cut_files(keep);
  agent.changed();
  prefetcher_.set_awake(dst, true);
  save_behind(awake_.emplace(dst, std::move(agent)).first->second);
}

void AgentManager::rewind(const std::string& id, int64_t n_tokens) {
  AgentHold hold = existing(id);
  if (!hold) {
    rewind_agent(store_, id, n_tokens, options_.durability);
    return;
  }
  Agent& agent = *hold;
  require_length(agent, n_tokens, "rewound to");
  finish_writes(agent);
  const bool fits = !agent.behind() && agent.cache->can_truncate(int(n_tokens)) &&
                    try_room(agent.cache->cut_cost(int(n_tokens)));
  if (!fits) {
    hold.release();
    sleep(id);
    rewind_agent(store_, id, n_tokens, options_.durability);
    wake_again(id);
    return;
  }
  AgentRecord record = agent.record();
  record.cut(size_t(n_tokens));
  truncate(agent, int(n_tokens));
  agent.shortest_cut = record.shortest_cut;
  agent.messages = std::move(record.messages);
  agent.variables = std::move(record.variables);
  agent.history.resize(record.history);
  save_behind(agent);
}

Remembered AgentManager::remembered(const std::string& id) const {
  if (const auto found = awake_.find(id); found != awake_.end()) {
    return {found->second.messages, found->second.variables, found->second.history};
  }
  std::vector<int32_t> tokens = store_.agent_tokens(id);
  AgentRecord record = decode_record({store_.agent_messages(id), store_.agent_info(id).record}, tokens.size());
  tokens.resize(record.history);
  return {std::move(record.messages), std::move(record.variables), std::move(tokens)};
}

AgentManager::Branch AgentManager::find_branch(const std::string& id, std::span<const Message> messages) const {
  Branch found{id, ""};
  size_t most = 0, longest = 0;
  std::string free = id;
  for (int n = 2; is_awake(free) || store_.contains(free); free = id + "." + std::to_string(n++)) {
    const Remembered held = remembered(free);
    const size_t equal = count_equal(held.messages, messages);
    const auto awake = awake_.find(free);
    const bool in_turn = awake != awake_.end() && awake->second.in_turn;
    if (equal > 0 && equal == held.messages.size() && equal > longest && !in_turn) {
      found.id = free;
      longest = equal;
    }
    if (equal > most || found.of.empty()) {
      found.of = free;
      most = equal;
    }
  }
  if (longest == 0) return {free, found.of};
  return {found.id, ""};
}

void AgentManager::wake_again(const std::string& id) noexcept {
  try {
    wake(id);
  } catch (const std::exception& error) {
    log(LogLevel::kInfo, "The agent '" + id + "' stays asleep after a change of its files: " + error.what());
  }
}

void AgentManager::pin(const std::string& id, bool pinned) {
  AgentHold agent = existing(id);
  if (!agent) {
    pin_agent(store_, id, pinned, options_.durability);
    return;
  }
  if (agent->pinned == pinned) return;
  if (agent->behind()) {  // it isn't saved before its rows are computed again
    agent.release();
    sleep(id);
    pin_agent(store_, id, pinned, options_.durability);
    return wake_again(id);
  }
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
  if (was_awake) wake_again(new_id);
}

void AgentManager::remove(const std::string& id) {
  require(id);
  if (const AgentHold hold = hold_alone(id)) {
    finish_writes(*hold);
    hold->save_error.reset();  // of something that is to be gone
  }
  drop(id);
  if (store_.contains(id)) store_.delete_agent_cache(id);
}

}  // namespace torpor
