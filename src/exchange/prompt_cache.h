#pragma once
/// The headers of mlx-lm's prompt-cache files, and rows as these hold them. The dialects are mlx-lm 0.32's and that up
/// to 0.31. A file is safetensors whose tensors and metadata are a list of cache objects, flattened (docs/format.md).

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/safetensors.h"
#include "torpor/exchange.h"

namespace torpor {

/// Of either dialect, as far as the metadata says.
bool is_prompt_cache(const SafetensorsHeader& header);

/// `n` consecutive tokens, whose rows are consecutive in each head of a file's tensor.
struct FileRows {
  int64_t token = 0;  ///< the first
  int64_t row = 0;    ///< where its row is
  int64_t n = 0;
};

struct PromptCacheLayer {
  int n_kv_heads = 0;
  int64_t key_dim = 0, value_dim = 0;  ///< of each head; latents have keys and values of different sizes
  int64_t capacity = 0;  ///< rows of each of its tensors, unused ones included
  std::vector<uint64_t> data;  ///< where its tensors begin in the file, in a KvLayout's order
  std::vector<FileRows> rows;  ///< in the order of the tokens; a RotatingKVCache may have forgotten the first ones
};

/// A layer that keeps a state in place of rows: mlx-lm's ArraysCache.
struct PromptCacheState {
  struct Array {
    KvDtype dtype = KvDtype::kF32;  ///< a float
    std::vector<int64_t> shape;     ///< without the batch of one
    uint64_t data = 0;              ///< where it begins in the file
  };
  int layer = 0;  ///< among all of the file's
  std::vector<Array> arrays;
};

struct PromptCacheFile {
  KvFormat format;
  int64_t n_tokens = 0;  ///< at least 1
  std::vector<PromptCacheLayer> layers;  ///< those with rows
  std::vector<PromptCacheState> states;  ///< those without, ascending
};

/// The value of an I32 tensor of the shape [].
using ReadScalar = std::function<int32_t(const SafetensorsTensor&)>;

/// kCorruption when the file contradicts itself, kIncompatible when it is a cache that the engine has no use for.
PromptCacheFile parse_prompt_cache(const SafetensorsHeader& header, const ReadScalar& read_scalar,
                                   const std::string& file_name);

/// What stands before and after the rows of a file to be written.
struct PromptCacheFrame {
  std::string header;
  std::vector<int32_t> scalars;
};

/// Whether some layers keep a state in place of rows.
inline bool recurs(const KvSnapshot& snapshot) {
  return !snapshot.state_layout.empty() && !snapshot.layout.has_apart();
}

/// Whether mlx-lm keeps a tensor in a RotatingKVCache. It does so if it rotates such a model's windows at all, the
/// tensor has a window and the layout is not quantized. Else it holds all rows.
bool rotates(const KvTensorSpec& tensor, const KvLayout& layout, bool rotates_windows);

/// Of an agent of `n_tokens`, whose rows follow in the layout's order, [head][token][dim]: of each tensor those of the
/// tokens from first_kept on. Then its last state's tensors, matrices as [head][value dim][key dim]; then the scalars.
PromptCacheFrame frame_prompt_cache(const KvSnapshot& snapshot, const std::string& model, bool rotates_windows,
                                    PromptCacheDialect dialect);
int64_t first_kept(const KvTensorSpec& tensor, const KvSnapshot& snapshot, bool rotates_windows);

/// An agent's quantized rows as floats of the dtype of their scales: turned back where `format` rotates them, keys
/// restored where `restore` is set. The layout must be the engine's for `format`.
KvSnapshot float_rows(const KvSnapshot& snapshot, const KvFormat& format, const RestoreAgentKeys& restore);

/// A layout's tensors in the order of the model's layers, none of them kept apart: as a prompt cache has them.
KvLayout by_layers(KvLayout layout);
/// Of "layer_7_keys" or "layer_7_conv" 7: the place among mlx-lm's caches, which layers without rows or a state have
/// none of.
int layer_of(const std::string& tensor);

/// A float of a file.
float load_float(const std::byte* from, KvDtype dtype);

}  // namespace torpor
