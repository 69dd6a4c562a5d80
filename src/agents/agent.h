#pragma once
/// An agent's life: wake (from the store, or new), turn, save, sleep. Engine thread only.

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "agents/conversation.h"
#include "torpor/cache.h"
#include "torpor/store.h"

namespace torpor {

/// An awake agent. Owns its lock, so no other process can wake it, and its cache, so nobody else can change it.
struct Agent {
  std::string id;
  std::unique_ptr<AgentLock> lock;
  std::unique_ptr<KvCache> cache;
  std::vector<Message> messages;
  /// Ids up to the end of the last whole turn. The cache holds more of them after a cancelled prefill (kept, so that the
  /// same prompt goes on from there) and fewer after a salvage (computed again from here).
  std::vector<int32_t> history;
  bool dirty = false;                 ///< differs from what the store has
  int64_t bytes_read = 0;             ///< by the wake
  std::optional<std::string> damage;  ///< the store's file was damaged; this is its longest intact prefix
};

class AgentManager {
 public:
  /// `store` outlives the manager. `identity` is complete: model, tokenizer, template and KV dtype.
  AgentManager(Store& store, std::string model_name, Identity identity, KvLayout layout, Backend backend,
               Durability durability);

  /// Memory, then disk, then a new agent. kBusy when it is awake in another process; kIncompatible when it belongs
  /// to another model. A damaged agent wakes with its longest intact prefix, said in Agent::damage.
  Agent& wake(const std::string& id);
  bool is_awake(const std::string& id) const { return awake_.count(id) != 0; }

  /// Writes what changed, once no row is missing that a salvage lost. The agent stays awake, and dirty when the store
  /// refuses.
  SaveResult save(Agent& agent);
  /// Lets go of memory and lock without saving.
  void drop(const std::string& id) { awake_.erase(id); }

  const Identity& identity() const noexcept { return identity_; }

 private:
  Store& store_;
  std::string model_name_;
  Identity identity_;
  KvLayout layout_;
  Backend backend_;
  Durability durability_;
  std::map<std::string, Agent> awake_;
};

}  // namespace torpor
