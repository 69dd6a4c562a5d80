#pragma once
/// Changes to agents that are asleep: no model is loaded, no sealed row is read. (Engine does the same to awake ones.)
/// Any thread. kBusy if the agent is awake elsewhere. A fork's source may be awake: its last save is forked.

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>

#include "torpor/exchange.h"
#include "torpor/store.h"

namespace torpor {

/// When the changes of an agent that is awake go to disk.
enum class SaveMode {
  kNo,      ///< not now; `sleep`, `save_all` or an eviction do it later
  kWait,    ///< before the call returns
  kBehind,  ///< by a writer thread; `sleep`, `save_all` and the engine's destructor wait for it
};

/// Agent `dst`, which must be new, begins with the first `at_token` tokens of `src` (all of them unless given) and
/// shares their segments. kNotFound, kInvalidArgument.
SaveResult fork_agent(Store& store, const std::string& src, const std::string& dst,
                      std::optional<int64_t> at_token = std::nullopt, Durability durability = Durability::kFull);

/// The agent forgets everything after its first `n_tokens` tokens. kInvalidArgument beyond what it holds.
SaveResult rewind_agent(Store& store, const std::string& id, int64_t n_tokens, Durability durability = Durability::kFull);

/// A pinned agent stays in memory when others must make room. kNotFound.
void pin_agent(Store& store, const std::string& id, bool pinned, Durability durability = Durability::kFull);
bool is_pinned(const AgentInfo& info);

/// Agent `id`, which must be new, of a prompt-cache file of mlx-lm's (read_prompt_cache, whose errors it gives). It has
/// no messages, and its ids are not known. A turn can go on from it, and it can be cut. Without ids it is compared with
/// no prompt, and damaged rows can't be computed again.
SaveResult import_prompt_cache(Store& store, const std::filesystem::path& path, const std::string& id, const CacheModel& model,
                               Durability durability = Durability::kFull);

/// Where a prompt and an agent part ways, as tokens.
struct Divergence {
  int64_t common = 0;    ///< tokens that are equal, from the first on
  int64_t prompt = 0;    ///< tokens of the prompt
  int64_t held = 0;      ///< tokens of the agent
};
Divergence find_divergence(std::span<const int32_t> prompt, std::span<const int32_t> held);

}  // namespace torpor
