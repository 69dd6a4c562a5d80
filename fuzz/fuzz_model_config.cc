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
    require(config.n_layers > 0 && config.windows.size() == size_t(config.n_layers));
    require(config.hidden_size > 0 && config.vocab_size > 0 && config.head_dim > 0);
    require(config.n_heads > 0 && config.n_kv_heads > 0 && config.n_heads % config.n_kv_heads == 0);
    for (const int window : config.windows) require(window >= 0);
    require(!config.digest().empty() && !config.rope_description().empty());
  } catch (const torpor::Error& error) {
    require(error.code() == torpor::ErrorCode::kCorruption || error.code() == torpor::ErrorCode::kInvalidArgument ||
            error.code() == torpor::ErrorCode::kNotFound);  // a Git LFS pointer
  }
  return 0;
}
