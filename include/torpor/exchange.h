#pragma once
/// mlx-lm's prompt-cache files (`mlx_lm.cache_prompt`, `mlx_lm.generate --prompt-cache-file`), written and read.
/// Torpor's own exports are Store::export_agent's. Any thread. No header of MLX's is needed.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>

#include "torpor/kv_snapshot.h"
#include "torpor/store.h"

namespace torpor {

/// The two dialects of mlx-lm's prompt-cache file.
enum class PromptCacheDialect {
  kNew,  ///< of mlx-lm 0.32
  kOld,  ///< up to 0.31
};

/// Whether mlx-lm keeps the layers with a window of this architecture in a RotatingKVCache, which forgets rows.
/// mlx_lm_rotates_windows (torpor/model_info.h) says it of the engine's architectures.
using RotatesWindows = std::function<bool(const std::string& architecture)>;

/// A model as whoever reads a file needs it that does not say whose it is.
struct CacheModel {
  std::string name;     ///< AgentInfo::model
  Identity identity;    ///< `kv` is the file's
  ConversationIdentity conversation;
  int max_context = 0;  ///< tokens; 0 = no bound
  /// As Model::kv_layout.
  std::function<KvLayout(const KvFormat&)> kv_layout;
  bool rotates_windows = false;  ///< RotatesWindows of its architecture
};

/// What a prompt-cache file holds. It has no token ids, so these are names (name_unknown_tokens).
struct PromptCache {
  KvSnapshot snapshot;
  /// A RotatingKVCache forgets rows; zeros stand for them. No model attends them as long as at least so many tokens are
  /// kept.
  int64_t shortest_cut = 0;
};

/// Whether the file is a prompt cache of mlx-lm, by its header. kNotFound, kIo; kCorruption when it is no safetensors
/// file.
bool is_prompt_cache(const std::filesystem::path& path);

/// Reads a file of either dialect; import_prompt_cache (torpor/agents.h) makes an agent of it. The file has no checksum:
/// rows that were damaged are not found out. `env` as for Store.
///
/// kIncompatible, naming what differs, when the file is not of such a model or the model could not go on from it.
/// kCorruption when it contradicts itself. kInvalidArgument when it is no prompt cache. kNotFound, kIo.
PromptCache read_prompt_cache(const std::filesystem::path& path, const CacheModel& model, Env* env = nullptr);

/// Writes a file that mlx-lm continues from, and renames it into place. Rows are mapped, not read, where that can be had.
///
/// kInvalidArgument when the agent holds no tokens, or the file would be in the store. kIncompatible when the agent was
/// not made by the engine. Else as Store::load_agent_cache.
void export_prompt_cache(const Store& store, const std::string& agent_id, const std::filesystem::path& path,
                         const RotatesWindows& rotates_windows, PromptCacheDialect dialect = PromptCacheDialect::kNew);

}  // namespace torpor
