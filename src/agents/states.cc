/// Which states of recurrent layers an agent holds, in memory and on disk.

#include <algorithm>
#include <iterator>
#include <set>

#include "agents/checkpoints.h"
#include "agents/manager.h"
#include "torpor/log.h"

namespace torpor {

int64_t AgentManager::last_state(const Agent& agent, int64_t n_tokens) const {
  if (options_.state_layout.empty()) return n_tokens;
  int64_t last = agent.cache->resumable(int(n_tokens));
  for (const StateRef& state : agent.states) {
    if (state.position <= n_tokens) last = std::max(last, state.position);
  }
  return last;
}

int AgentManager::hold_state(const Agent& agent, KvCache& cache, int n_tokens) {
  for (auto ref = agent.states.rbegin(); ref != agent.states.rend(); ++ref) {
    if (ref->position > n_tokens) continue;
    if (ref->position <= cache.resumable(n_tokens)) break;
    if (ref->position / kSegmentTokens > ssize(agent.segments)) continue;
    const auto room = try_room(options_.state_layout.bytes());
    if (!room) break;
    try {
      const KvSnapshot conversation{.identity = agent.identity, .lineage = agent.lineage, .layout = cache.layout(),
                                    .tokens = cache.tokens(), .state_layout = options_.state_layout};
      cache.add_state(store_.load_state(conversation, agent.segments, *ref, mlx_buffer));
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kCorruption && error.code() != ErrorCode::kNotFound) throw;
      log(LogLevel::kWarning, "Tokens of agent '" + agent.id + "' are computed again: " + error.what());
    }
  }
  return cache.resumable(n_tokens);
}

void AgentManager::let_saved_states_go(Agent& agent) {
  std::vector<int64_t> saved;
  for (const auto& state : agent.cache->states()) {
    if (state->position() < agent.cache->length() &&
        std::ranges::find(agent.states, state->position(), &StateRef::position) != agent.states.end()) {
      saved.push_back(state->position());
    }
  }
  for (const int64_t position : saved) agent.cache->drop_state(position);
}

int64_t AgentManager::stride_of(const Agent& agent) const {
  const KvLayout& layout = agent.cache->layout();
  if (!layout.has_apart()) return checkpoint_stride(options_.state_layout, layout);
  // What the windows see from a checkpoint is its state; the rows are those of the segments.
  const auto together = layout.tensors.begin() + ptrdiff_t(layout.n_together());
  StateLayout seen;
  for (auto tensor = together; tensor != layout.tensors.end(); ++tensor) {
    seen.tensors.push_back({tensor->name, tensor->dtype, {tensor->n_kv_heads, tensor->window, tensor->dim}});
  }
  return checkpoint_stride(seen, {{layout.tensors.begin(), together}});
}

std::vector<int64_t> AgentManager::surplus_states(const Agent& agent, int64_t history) const {
  std::set<int64_t> positions(agent.checkpoints.begin(), agent.checkpoints.end());
  for (const auto& state : agent.cache->states()) positions.insert(state->position());
  for (const StateRef& state : agent.states) {
    if (has_states()) positions.insert(state.position);
  }
  std::vector<int64_t> turn_ends = {history};
  for (const HeldMessage& message : agent.messages) {
    if (message.role == "assistant") turn_ends.push_back(message.end);
  }
  std::ranges::sort(turn_ends);
  const std::vector<int64_t> all(positions.begin(), positions.end());
  const auto kept = thin_checkpoints(all, turn_ends, agent.cache->length(), stride_of(agent));
  std::vector<int64_t> surplus;
  std::ranges::set_difference(all, kept, std::back_inserter(surplus));
  return surplus;
}

std::vector<StateRef> AgentManager::add_windows(const Agent& agent, KvSnapshot& snapshot) {
  const KvLayout& layout = snapshot.layout;
  if (!layout.has_apart()) return agent.states;
  snapshot.state_layout = window_rows(layout);
  std::vector<StateRef> files;
  for (size_t i = 0; i < snapshot.sealed.size(); ++i) {
    const int64_t end = int64_t(i + 1) * kSegmentTokens, length = ssize(snapshot.tokens);
    // Also from the segment's end before, for there a prompt of nobody's finds it.
    const auto seen = [&](int64_t position) {
      return position <= length && (sees_window_rows(layout, int64_t(i), position) ||
                                    sees_window_rows(layout, int64_t(i), position / kSegmentTokens * kSegmentTokens));
    };
    if (!seen(length) && std::ranges::none_of(agent.checkpoints, seen)) continue;
    const auto file = std::ranges::find(agent.states, end, &StateRef::position);
    if (file != agent.states.end()) {
      files.push_back(*file);
    } else if (snapshot.has_window_rows(i)) {
      snapshot.states.push_back(snapshot.window_rows_of(i));
    }
  }
  return files;
}

void AgentManager::thin_states(Agent& agent, int64_t history, std::span<const int64_t> wanted) {
  if (!has_checkpoints()) return;
  if (!has_states()) {
    const int64_t length = agent.cache->length();
    std::set<int64_t> all(agent.checkpoints.begin(), agent.checkpoints.end());
    all.insert(wanted.begin(), wanted.end());
    all.insert(length);
    const int64_t last = agent.checkpoints.empty() ? 0 : agent.checkpoints.back();
    const std::vector<int64_t> stops = checkpoint_stops(last, length, stride_of(agent), {});
    all.insert(stops.begin(), stops.end());
    std::erase_if(all, [&](int64_t position) { return position <= 0 || position > length; });
    agent.checkpoints.assign(all.begin(), all.end());
    const std::vector<int64_t> surplus = surplus_states(agent, history);
    std::erase_if(agent.checkpoints, [&](int64_t position) { return std::ranges::binary_search(surplus, position); });
    return;
  }
  if (agent.unsaved_state != history) agent.cache->drop_state(agent.unsaved_state);
  const std::vector<int64_t> surplus = surplus_states(agent, history);
  for (const int64_t position : surplus) agent.cache->drop_state(position);
  std::erase_if(agent.states, [&](const StateRef& ref) { return std::ranges::binary_search(surplus, ref.position); });
  let_saved_states_go(agent);
  agent.cache->drop_spare();
  // From there another answer to the same messages goes on. Behind a long prompt the state is no larger than the rows.
  const bool is_far = history - last_state(agent, history - 1) >= stride_of(agent);
  const bool is_saved = std::ranges::find(agent.states, history, &StateRef::position) != agent.states.end();
  agent.unsaved_state = is_far || is_saved ? 0 : history;
}

void AgentManager::thin_states_of_turn(Agent& agent, int64_t reused, std::span<const int64_t> wanted) {
  for (const int64_t position : surplus_states(agent, agent.cache->length())) {
    if (position > reused && std::ranges::find(wanted, position) == wanted.end()) agent.cache->drop_state(position);
  }
}

}  // namespace torpor
