/// A model in a GGUF file: any metadata give a config, a tokenizer and a template that can be used, or a sentence.

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "model/config.h"
#include "model/weights.h"
#include "model_directory.h"
#include "require.h"
#include "torpor/error.h"
#include "torpor/text.h"

namespace {

template <typename Read>
void attempt(Read read) {
  try {
    read();
  } catch (const torpor::Error& error) {
    require(error.code() == torpor::ErrorCode::kCorruption || error.code() == torpor::ErrorCode::kInvalidArgument ||
            error.code() == torpor::ErrorCode::kNotFound);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static ModelDirectory directory;
  directory.put("model.gguf", data, size);
  const std::filesystem::path file = directory.path() / "model.gguf";
  attempt([&] {
    const torpor::model::ModelConfig config = torpor::model::read_config(file);
    require(!config.layers.empty() && config.hidden_size > 0 && config.vocab_size > 0 && config.max_context > 0);
    for (const torpor::model::LayerSpec& layer : config.layers) {
      require(layer.attention.n_heads > 0 && layer.attention.n_heads % layer.attention.n_kv_heads == 0);
      require(layer.attention.rope != nullptr && layer.mlp.size > 0);
    }
    require(!config.digest().empty());
  });
  attempt([&] {
    if (size >= 4 && std::equal(data, data + 4, "GGUF")) (void)torpor::model::Weights::open(file).has_blocks();
  });
  attempt([&] {
    const auto tokenizer = torpor::Tokenizer::load(file);
    (void)tokenizer->decode(tokenizer->encode("ab a\n 12", true));
  });
  attempt([&] { (void)torpor::ChatTemplate::load(file); });
  return 0;
}
