#pragma once
/// An awake agent.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "agents/record.h"
#include "torpor/cache.h"
#include "torpor/error.h"
#include "torpor/store.h"

namespace torpor {

class AgentManager;

/// Owns its lock, so no other process can wake it, and its cache, so nobody else can change it. Engine thread only.
struct Agent {
  std::string id;                    ///< empty: a prompt without an agent, of which nothing but segments is kept
  uint64_t ticket = 0;               ///< unique in its manager: the outcome of a save names the agent by it
  int holds = 0;                     ///< AgentHold's count
  bool in_turn = false;              ///< a TurnTransaction is under way
  bool releasable = false;           ///< saved while it, or what shares its runs, was held: rows behind windows go with the last hold
  std::unique_ptr<AgentLock> lock;
  Identity identity;                 ///< the manager's, but for the KV format, which may be the agent's own
  Lineage lineage;                   ///< of its rows
  ConversationIdentity conversation; ///< of its last turn
  std::unique_ptr<KvCache> cache;
  int aside = 0;                     ///< tokens whose rows its turn has put aside, to wait for memory; `cache` is empty then
  std::vector<HeldMessage> messages;
  std::string variables;             ///< AgentRecord::variables
  std::vector<int32_t> history;      ///< ids up to the end of the last whole turn (AgentRecord::history)
  size_t shortest_cut = 0;           ///< AgentRecord::shortest_cut
  bool pinned = false;
  std::vector<int64_t> checkpoints;  ///< AgentRecord::checkpoints
  int64_t unsaved_state = 0;         ///< of how many tokens a state is held that no save writes; 0: none
  UserMetadata user;                 ///< somebody else's metadata; carried along
  uint64_t last_used = 0;

  // What the disk has of it.
  uint64_t version = 0;              ///< counts the changes; `changed()` after each
  uint64_t queued_version = 0;       ///< handed to the writer
  uint64_t saved_version = 0;        ///< on disk
  std::vector<std::string> segments; ///< on disk, of the first runs of the cache
  std::vector<StateRef> states;      ///< on disk, of its tokens; the cache need not hold them
  std::optional<Error> save_error;   ///< of a save behind the turn; said at the next occasion
  int64_t bytes_read = 0;            ///< by the wake
  std::optional<std::string> damage; ///< the store's file was damaged; this is its longest intact prefix

  void changed() { ++version; }
  bool dirty() const { return version != saved_version; }
  /// Until every row that a salvage lost is computed again, the damaged file is the better one: it has all the tokens.
  bool whole() const { return cache->tokens().size() >= history.size() && agrees(); }
  /// Whether its rows are those of its history, or of the history's beginning.
  bool agrees() const {
    const std::vector<int32_t>& held = cache->tokens();
    const auto end = history.begin() + std::min(ssize(history), ssize(held));
    return std::equal(history.begin(), end, held.begin());
  }
  /// It woke with the rows up to a state, and its file has all that it holds: what changes it changes the file.
  bool behind() const { return !whole() && !damage; }
  /// Only what the disk has of the first `n_tokens` tokens is the agent's any more.
  void cut_files(int64_t n_tokens) {
    segments.resize(std::min(segments.size(), size_t(n_tokens / kSegmentTokens)));
    std::erase_if(states, [&](const StateRef& state) { return state.position > n_tokens; });
    std::erase_if(checkpoints, [&](int64_t position) { return position > n_tokens; });
    if (unsaved_state >= n_tokens) unsaved_state = 0;
  }
  AgentRecord record() const { return {messages, variables, history.size(), shortest_cut, pinned, checkpoints}; }
};

/// A counted hold on an awake agent. While anyone holds it, an agent is not evicted, dropped, renamed, removed, forked or cut
/// by others, and its rows stay where they are. A nameless agent is gone with its last hold. Engine thread only; holds are
/// gone before their manager.
class AgentHold {
 public:
  AgentHold() = default;
  AgentHold(AgentHold&& other) noexcept { swap(other); }
  AgentHold& operator=(AgentHold&& other) noexcept {
    AgentHold(std::move(other)).swap(*this);
    return *this;
  }
  ~AgentHold() { release(); }

  /// Another hold on the same agent.
  AgentHold share() const { return agent_ == nullptr ? AgentHold() : AgentHold(*manager_, *agent_, false); }
  void release() noexcept;
  explicit operator bool() const noexcept { return agent_ != nullptr; }
  Agent& operator*() const noexcept { return *agent_; }
  Agent* operator->() const noexcept { return agent_; }
  /// Whether the wake that gave this hold had to load or make the agent.
  bool woke() const noexcept { return woke_; }

 private:
  friend class AgentManager;
  AgentHold(AgentManager& manager, Agent& agent, bool woke) : manager_(&manager), agent_(&agent), woke_(woke) { ++agent.holds; }
  void swap(AgentHold& other) noexcept {
    std::swap(manager_, other.manager_);
    std::swap(agent_, other.agent_);
    std::swap(woke_, other.woke_);
  }

  AgentManager* manager_ = nullptr;
  Agent* agent_ = nullptr;
  bool woke_ = false;
};

}  // namespace torpor
