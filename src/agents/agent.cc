#include "agents/agent.h"

#include <charconv>

#include "torpor/error.h"

namespace torpor {
namespace {

constexpr const char* kMessagesKey = "messages";
constexpr const char* kHistoryKey = "history_tokens";  // written only when it differs from the rows held

/// A number of tokens, at most `limit`. kCorruption when `text` is none.
size_t parse_count(const std::string& text, size_t limit) {
  size_t count = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), count);
  if (error != std::errc() || end != text.data() + text.size() || count > limit) {
    throw Error(ErrorCode::kCorruption, "The agent's count of history tokens, '" + text +
                                            "', is not readable; delete the agent and start again.");
  }
  return count;
}

}  // namespace

AgentManager::AgentManager(Store& store, std::string model_name, Identity identity, KvLayout layout, Backend backend,
                           Durability durability)
    : store_(store),
      model_name_(std::move(model_name)),
      identity_(std::move(identity)),
      layout_(std::move(layout)),
      backend_(backend),
      durability_(durability) {}

Agent& AgentManager::wake(const std::string& id) {
  if (const auto found = awake_.find(id); found != awake_.end()) return found->second;
  check_agent_id(id);

  // The agent enters the map whole or not at all: a failed wake leaves it asleep and intact.
  Agent agent;
  agent.id = id;
  agent.lock = store_.lock_agent(id);
  if (store_.contains(id)) {
    LoadOptions options;
    options.expected = &identity_;
    options.salvage = true;
    options.allocate = mlx_buffer;
    options.map_rows = true;
    LoadedAgent loaded = store_.load_agent_cache(id, options);
    agent.cache = KvCache::restore(loaded.snapshot, backend_);
    if (const CacheValidation sound = validate_cache_structure(*agent.cache, &layout_); !sound) {
      throw Error(ErrorCode::kIncompatible, "The cache of agent '" + id + "' does not fit the model: " + sound.reason + ".");
    }
    agent.history = std::move(loaded.tokens);
    for (const auto& [key, value] : loaded.info.user) {
      if (key == kMessagesKey) agent.messages = messages_from_json(value);
      if (key == kHistoryKey) agent.history.resize(parse_count(value, agent.history.size()));
    }
    agent.bytes_read = loaded.bytes_read;
    agent.damage = std::move(loaded.damage);
    agent.dirty = agent.damage.has_value();
  } else {
    agent.cache = KvCache::create(layout_, backend_);
  }
  return awake_.emplace(id, std::move(agent)).first->second;
}

SaveResult AgentManager::save(Agent& agent) {
  // Until every row that a salvage lost is computed again, the damaged file is the better one: it has all the tokens.
  if (!agent.dirty || agent.cache->tokens().size() < agent.history.size()) return {};
  std::vector<std::pair<std::string, std::string>> user = {{kMessagesKey, messages_to_json(agent.messages)}};
  if (agent.history.size() != agent.cache->tokens().size()) {
    user.emplace_back(kHistoryKey, std::to_string(agent.history.size()));
  }
  const SaveResult result =
      store_.save_agent_cache(agent.id, agent.cache->snapshot(identity_), model_name_, user, durability_);
  agent.dirty = false;
  agent.damage.reset();
  return result;
}

}  // namespace torpor
