#pragma once
/// The tensors of GGUF files by their names in Hugging Face's files.

#include <optional>
#include <string>

#include "base/gguf.h"

namespace torpor::model {

/// The name in Hugging Face's files, or mlx-lm's of stacked experts, of the tensor `name` of a GGUF file; nullopt for
/// one that the config says, or nobody knows.
std::optional<std::string> gguf_tensor_name(const GgufFile& metadata, const std::string& name);

}  // namespace torpor::model
