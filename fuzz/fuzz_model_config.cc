/// config.json: any bytes give a config whose numbers agree with each other, or an error that says what is wrong.

#include <cstddef>
#include <cstdint>

#include "model/config.h"
#include "model_directory.h"
#include "require.h"
#include "torpor/error.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static ModelDirectory directory;
  directory.put("config.json", data, size);
  try {
    const torpor::model::ModelConfig config = torpor::model::read_config(directory.path());
    require(!config.layers.empty() && config.hidden_size > 0 && config.vocab_size > 0 && config.max_context > 0);
    for (const torpor::model::LayerSpec& layer : config.layers) {
      const torpor::model::Attention& attention = layer.attention;
      require(attention.n_heads > 0 && attention.n_kv_heads > 0 && attention.n_heads % attention.n_kv_heads == 0);
      require(attention.key_dim > 0 && attention.value_dim > 0 && attention.window >= 0);
      require((layer.mixes || layer.feeds) && (!layer.feeds || layer.experts || layer.mlp.size > 0));
      if (layer.recurrent) {
        const torpor::kernels::RecurrentShape& shape = layer.recurrent->shape;
        require(shape.taps > 1 && shape.output() > 0 && shape.channels() > 0 && shape.given() > 0);
        require(shape.n_heads == 0 || (shape.n_groups > 0 && shape.n_heads % shape.n_groups == 0 && shape.key_dim > 0));
        require(shape.n_heads == 0 || (shape.norm.size > 0 && shape.output() % shape.norm.size == 0));
      }
      require(attention.rope != nullptr && attention.rope->inv_freq.size() == size_t(attention.rope->dims / 2));
    }
    require(!config.digest().empty() && !config.rope_description.empty());
  } catch (const torpor::Error& error) {
    require(error.code() == torpor::ErrorCode::kCorruption || error.code() == torpor::ErrorCode::kInvalidArgument ||
            error.code() == torpor::ErrorCode::kNotFound);  // a Git LFS pointer
  }
  return 0;
}
