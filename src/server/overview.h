#pragma once
/// What /torpor/v1 tells of the server as a whole and of an agent's insides: the data behind the dashboard's views.
/// Turns and agents are the tenant's own; numbers of memory, disk and work are the server's.

#include <string>

#include "server/agents_turn.h"
#include "server/chat.h"
#include "server/metrics.h"
#include "server/model_pool.h"
#include "torpor/engine.h"

namespace torpor::server {

/// The models, the tenant's turns under way, and what was computed so far.
Json now_json(ModelPool& models, Metrics& metrics, const std::string& tenant);
/// The tenant's last turns, the newest first.
Json requests_json(Metrics& metrics, const std::string& tenant);
/// Memory and disk. Reads the sizes of all files of the store.
Json memory_json(ModelPool& models, const std::string& tenant);
/// An agent as it was last saved: its messages, its segments and who else of the tenant's begins with them. kNotFound.
Json map_json(Engine& engine, const AgentName& agent);

}  // namespace torpor::server
