#pragma once
/// What a model is, without its weights: no header of MLX's is needed. Plain data; any thread.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "torpor/compute_options.h"
#include "torpor/kv_snapshot.h"

namespace torpor {

/// Who computes unless asked otherwise (ComputeOptions::backend).
Backend default_backend();

/// The field of the error that says that a prompt does not fit the model's context; `expected` are the context's tokens, `found` the
/// prompt's.
inline constexpr const char* kContextFull = "ModelInfo::max_context";

struct ModelInfo {
  std::string name;          ///< as given: directory or repo id
  std::filesystem::path dir;  ///< or the GGUF file
  std::string architecture;  ///< "llama"
  int n_layers = 0, n_heads = 0, n_kv_heads = 0, head_dim = 0, vocab_size = 0;
  int max_context = 0;       ///< max_position_embeddings
  int64_t weight_bytes = 0;
  std::vector<int32_t> eos_token_ids;  ///< config.json's, generation_config.json's and the tokenizer's, together
};

/// A directory or a GGUF file as it is, else the snapshot of a repo id in the local Hugging Face cache (`HF_HUB_CACHE`,
/// `HF_HOME`, `~/.cache/huggingface`), or with ORG/NAME:FILE a GGUF file in it. kNotFound names the `hf download` command.
std::filesystem::path resolve_model(const std::string& name);

/// Whether mlx-lm keeps the layers with a window of this architecture ("gemma3") in a RotatingKVCache, which forgets
/// rows. Of the other architectures it keeps all rows.
bool mlx_lm_rotates_windows(const std::string& architecture);

/// Makes a token's keys of a layer what the model computed, in place: f32 [n_kv_heads * head_dim]. They come as a
/// format keeps them, but dequantized and times H. What it left out of them is multiplied and added.
using RestoreKeys = std::function<void(const KvFormat& format, int layer, int64_t position, std::span<float> keys)>;

/// What is known of a model without its weights in memory.
struct ModelOutline {
  ModelInfo info;
  Identity identity;                                   ///< as Model::identity
  std::function<KvLayout(const KvFormat&)> kv_layout;  ///< as Model::kv_layout
  RestoreKeys restore_keys;
  StateLayout state_layout;  ///< Model::state_layout
};
/// Reads every weight byte, for their digest, and keeps none. Errors are those of Model::load; any thread.
ModelOutline outline_model(const std::string& name, const ComputeOptions& compute = {});

/// A model that another program has fetched, by its files' headers.
struct LocalModel {
  std::string name;            ///< what Model::load takes: a repo id, ORG/NAME:FILE, or a path
  std::string place;           ///< "Hugging Face", "LM Studio", "Ollama NAME:TAG"
  std::filesystem::path path;  ///< a directory, or a GGUF file
  int64_t bytes = 0;           ///< on disk
  std::string problem;         ///< why Torpor does not run it, a sentence; empty: it does, and what follows is known
  ModelInfo info;
  KvFormat kv_format;                                  ///< Model::default_kv_format
  std::function<KvLayout(const KvFormat&)> kv_layout;  ///< Model::kv_layout
  int64_t state_bytes = 0;                             ///< of recurrent layers
};
/// What lies in the caches of Hugging Face, LM Studio and Ollama. Reads headers alone. Any thread.
std::vector<LocalModel> find_local_models();

/// The packed weights that are kept for the next start (ComputeOptions::pack_cache), of all models together.
struct ModelCacheUsage {
  int64_t files = 0, bytes = 0;              ///< with the stale ones
  int64_t stale_files = 0, stale_bytes = 0;  ///< of models that are not where they were, or left by a killed process
};
/// What they take of the disk; with `remove` the stale ones are gone when it returns. kIo. Any thread.
ModelCacheUsage clean_model_cache(bool remove = false);

struct ModelReport {
  bool weights_known = false;  ///< a digest of the weights was kept from when they were last read
  bool packed = false;         ///< there are packed weights
  std::vector<std::string> problems;  ///< a sentence for each thing that is not as it was
};
/// Reads a model's weights and what is kept of them for the next start, and compares what there is. Errors are those of
/// Model::load. Any thread.
ModelReport verify_model(const std::string& name);

}  // namespace torpor
