#pragma once
/// A GGUF file's tokenizer and chat template, as the files of a model directory that they were made of.

#include <string>

#include "base/gguf.h"

namespace torpor::text {

/// tokenizer.json. kNotFound when the file has no tokenizer, kInvalidArgument for a kind that is not read, or for
/// metadata that don't fit each other.
std::string gguf_tokenizer(const GgufFile& metadata);

/// tokenizer_config.json: the named special tokens, and the chat template if there is one.
std::string gguf_tokenizer_config(const GgufFile& metadata);

}  // namespace torpor::text
