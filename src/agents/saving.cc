/// What the manager hands to the writer, and what comes back.

#include <algorithm>
#include <new>
#include <utility>

#include "agents/manager.h"

namespace torpor {
namespace {

// Errors kept for tell_errors, which whoever never calls it must not pile up.
constexpr size_t kMaxUntold = 64;

}  // namespace

void AgentManager::save_behind(Agent& agent) { hand_to_writer(agent, /*copy_tail=*/true); }

void AgentManager::hand_to_writer(Agent& agent, bool copy_tail) {
  settle();
  if (!agent.dirty() || !agent.whole() || agent.queued_version == agent.version) return;
  try {
    Writer::Job job{.agent = agent.id,
                    .ticket = agent.ticket,
                    .version = agent.version,
                    .snapshot = agent.cache->snapshot(agent.identity, copy_tail),
                    .model = options_.model_name,
                    .user = agent.user,
                    .notes = encode_record(agent.record(), agent.cache->tokens().size())};
    job.snapshot.lineage = agent.lineage;
    job.snapshot.conversation = agent.conversation;
    std::erase_if(job.snapshot.states, [&](const auto& state) { return state->position() == agent.unsaved_state; });
    job.notes.states = add_windows(agent, job.snapshot);
    const KvLayout& layout = job.snapshot.layout;
    job.new_bytes = layout.offset(layout.tensors.size(), job.snapshot.tail.n_tokens);
    for (const auto& run : job.snapshot.sealed) {
      if (run->segment() == nullptr) job.new_bytes += run->bytes().size();
    }
    for (const auto& state : job.snapshot.states) {
      if (state->file().empty()) job.new_bytes += state->bytes().size();
    }
    writer_.submit(std::move(job));
  } catch (const std::bad_alloc&) {
    throw Error(ErrorCode::kResourceExhausted,
                "Out of memory while saving agent '" + agent.id + "'; let other agents sleep first.");
  }
  agent.queued_version = agent.version;
}

void AgentManager::submit_prefix(const Agent& agent, int n_tokens) {
  Writer::Job job{.snapshot = agent.cache->snapshot(agent.identity)};
  KvSnapshot& snapshot = job.snapshot;
  snapshot.sealed.resize(std::min(snapshot.sealed.size(), size_t(n_tokens / kSegmentTokens)));
  snapshot.tokens.resize(snapshot.sealed.size() * kSegmentTokens);
  snapshot.tail = {};
  snapshot.lineage = agent.lineage;
  snapshot.conversation = agent.conversation;
  if (!has_states()) add_windows(agent, snapshot);
  for (const auto& run : snapshot.sealed) {
    if (run->segment() == nullptr) job.new_bytes += run->bytes().size();
  }
  for (const auto& state : snapshot.states) {
    if (state->file().empty()) job.new_bytes += state->bytes().size();
  }
  if (job.new_bytes == 0 || writer_.queued_bytes() + job.new_bytes > options_.write_queue_bytes) return;
  writer_.submit(std::move(job));
}

Writer::Saving AgentManager::begin_save(Agent& agent) {
  hand_to_writer(agent, /*copy_tail=*/false);
  return writer_.await(agent.ticket);
}

Writer::Saving AgentManager::begin_save(const std::string& id) {
  const auto found = awake_.find(id);
  if (found == awake_.end()) return {};
  save_behind(found->second);
  return writer_.await(found->second.ticket);
}

SaveResult AgentManager::save(Agent& agent) {
  const Writer::Saving saving = begin_save(agent);
  finish_writes(agent);
  return saving.get();
}

void AgentManager::tell_errors() {
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
  if (const auto found = awake_.find(id); found != awake_.end())
    return found->second.ticket == ticket ? &found->second : nullptr;
  for (Agent& agent : nameless_) {
    if (agent.ticket == ticket) return &agent;
  }
  return nullptr;
}

void AgentManager::settle() {
  prefetcher_.let_stale_go();
  let_kept_go();
  for (Writer::Outcome& outcome : writer_.collect()) {
    if (outcome.ticket == 0) continue;  // submit_prefix
    Agent* const agent = find(outcome.ticket, outcome.agent);
    if (agent == nullptr) {
      // Its agent is gone. What has another name, or none, is another one's.
      if (outcome.error && !outcome.awaited) remember(std::move(*outcome.error));
      continue;
    }
    if (outcome.error) {
      if (!outcome.awaited) agent->save_error = std::move(outcome.error);
      agent->queued_version = agent->saved_version;
      continue;
    }
    agent->saved_version = outcome.version;
    agent->segments = outcome.result.segments;
    agent->states = outcome.result.states;
    if (!agent->in_turn) let_saved_states_go(*agent);  // else it may have to take rows back
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

std::vector<Agent*> AgentManager::idle_holders(size_t run, const void* rows) {
  std::vector<Agent*> holders;
  const auto consider = [&](Agent& agent) {
    const auto runs = agent.cache->sealed_runs();
    if (agent.holds == 0 && run < runs.size() && runs[run]->bytes().data() == rows) holders.push_back(&agent);
  };
  for (auto& [id, agent] : awake_) consider(agent);
  for (Kept& kept : kept_) consider(kept.agent);
  return holders;
}

void AgentManager::release_behind_window(Agent& agent) {
  if (agent.cache == nullptr || !agent.cache->layout().has_windows() || !options_.map_rows) return;
  const std::vector<KvTensorSpec>& tensors = agent.cache->layout().tensors;
  const std::vector<KvCache::HeldBuffer> buffers = agent.cache->buffers();
  // With MLX's kernels shorter arrays take the place of these. Where another agent keeps these, they come on top.
  const auto is_shared = [&](const KvCache::HeldBuffer& held) { return ledger_->holders(held.data) > 1; };
  if (options_.backend == Backend::kMlx && std::any_of(buffers.begin(), buffers.end(), is_shared)) return;
  for (size_t i = 0; i < std::min(agent.segments.size(), buffers.size()); ++i) {
    const auto behind = [&](const KvTensorSpec& tensor) {
      return !KvLayout::attended(tensor, int64_t(i) * kSegmentTokens, kSegmentTokens, agent.cache->length());
    };
    if (buffers[i].mapped || std::none_of(tensors.begin(), tensors.end(), behind)) continue;
    std::vector<Agent*> holders{&agent};
    if (is_shared(buffers[i])) {
      // Mapped rows come on top of the run's for as long as anyone keeps the run: all of its agents let go of it, or none does.
      holders = idle_holders(i, buffers[i].data);
      if (ssize(holders) < ledger_->holders(buffers[i].data)) {
        agent.releasable = true;
        continue;
      }
    }
    const auto run = store_.map_segment(agent.segments[i]);
    if (run == nullptr) continue;
    for (Agent* const holder : holders) holder->cache->replace_run(int(i), run);
  }
}

}  // namespace torpor
