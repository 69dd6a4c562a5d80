#pragma once
/// Where the memory of an engine is.

#include <cstdint>
#include <string>
#include <vector>

namespace torpor {

struct AgentMemory {
  std::string agent;
  int64_t tokens = 0;
  int64_t bytes = 0;         ///< buffers it holds, shared ones included; of mapped segments what can still be attended
  int64_t shared_bytes = 0;  ///< of those, held by another agent too
  bool pinned = false, unsaved = false;
};

/// All in bytes, but for evictions. Each buffer counts once, however many agents hold it.
struct MemoryUsage {
  int64_t model_bytes = 0;
  std::vector<AgentMemory> agents;
  int64_t kv_bytes = 0;      ///< what the budget bounds
  int64_t mapped_bytes = 0;  ///< of those, pages of segment files; the rest is MLX's memory
  int64_t queued_bytes = 0;  ///< waiting to be written; EngineOptions::write_queue_bytes bounds them
  int64_t budget = 0;        ///< 0 = no bound
  int64_t evictions = 0;     ///< agents that went to sleep to make room, since the engine began
};

}  // namespace torpor
