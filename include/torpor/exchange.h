#pragma once
/// mlx-lm's prompt-cache files (`mlx_lm.cache_prompt`, `mlx_lm.generate --prompt-cache-file`), written and read.
/// Torpor's own exports are Store::export_agent's. Any thread. No header of MLX's is needed.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
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

/// Makes a token's keys of a layer what the model computed, in place: RestoreKeys (torpor/model_info.h) of an agent's
/// format.
using RestoreAgentKeys = std::function<void(int layer, int64_t position, std::span<float> keys)>;
/// That of an agent's model; agent_keys (torpor/engine.h) is one.
using RestoreKeysOf = std::function<RestoreAgentKeys(const AgentInfo& agent)>;

/// A model as whoever reads a file needs it that does not say whose it is.
struct CacheModel {
  std::string name;     ///< AgentInfo::model
  Identity identity;    ///< `kv` is the file's
  ConversationIdentity conversation;
  int max_context = 0;  ///< tokens; 0 = no bound
  /// As Model::kv_layout.
  std::function<KvLayout(const KvFormat&)> kv_layout;
  bool rotates_windows = false;  ///< RotatesWindows of its architecture
  StateLayout state_layout;      ///< as Model::state_layout
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

/// Reads a file of either dialect; import_prompt_cache (torpor/agents.h) makes an agent of it. The file has no
/// checksum: rows that were damaged are not found out. `env` as for Store.
///
/// kIncompatible, naming what differs, when the file is not of such a model or the model could not go on from it.
/// kCorruption when it contradicts itself. kInvalidArgument when it is no prompt cache. kNotFound, kIo.
PromptCache read_prompt_cache(const std::filesystem::path& path, const CacheModel& model, Env* env = nullptr);

/// Writes a file that mlx-lm continues from, and renames it into place. Rows are mapped, not read, where that can be
/// had. Quantized rows that mlx-lm does not know (rotated, without their bias, of two numbers of bits, latents, beside
/// sinks) become floats of their scales' dtype, in memory.
///
/// kInvalidArgument when the agent holds no tokens, the file would be in the store, or there are such keys and no
/// `restore_of`. kIncompatible when the agent was not made by the engine, or keeps what mlx-lm's cache, or that
/// dialect's, has no place for. Else as Store::load_agent_cache, and what `restore_of` throws.
void export_prompt_cache(const Store& store, const std::string& agent_id, const std::filesystem::path& path,
                         const RotatesWindows& rotates_windows, PromptCacheDialect dialect = PromptCacheDialect::kNew,
                         const RestoreKeysOf& restore_of = nullptr);

}  // namespace torpor
