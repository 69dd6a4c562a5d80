#pragma once
/// The forward passes there are. Each is one file of the same name.

#include <memory>

#include "model/decoder.h"

namespace torpor::model {

std::unique_ptr<Model> make_gemma2(const Checkpoint& checkpoint);
std::unique_ptr<Model> make_gemma3(const Checkpoint& checkpoint);  ///< the text part of a vision-language checkpoint too
std::unique_ptr<Model> make_llama(const Checkpoint& checkpoint);   ///< Llama 2 and 3.x, SmolLM2, Mistral
std::unique_ptr<Model> make_phi3(const Checkpoint& checkpoint);    ///< Phi-3, 3.5, 4
std::unique_ptr<Model> make_qwen2(const Checkpoint& checkpoint);   ///< Qwen 2, 2.5
std::unique_ptr<Model> make_qwen3(const Checkpoint& checkpoint);

}  // namespace torpor::model
