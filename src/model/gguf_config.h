#pragma once
/// What a GGUF file says of a model, as a model directory of Hugging Face's would say it: so a family's page, what is
/// refused and a config's digest are the same for both.

#include <cstdint>

#include <nlohmann/json_fwd.hpp>

#include "base/gguf.h"
#include "model/config.h"

namespace torpor::model {

/// The config.json of the model. kInvalidArgument ("unsupported architecture X, supported: ...") for an architecture
/// that is not known, and for one whose metadata lack what the config needs.
nlohmann::json gguf_config(const GgufModel& model);

/// What llama.cpp's tensors have otherwise than the directory's of that config, and how it scales embeddings.
void adopt_gguf(const GgufFile& metadata, ModelConfig& config);

}  // namespace torpor::model
