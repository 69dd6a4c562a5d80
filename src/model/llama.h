#pragma once
/// Llama (2, 3.x), SmolLM2, Mistral.

#include <memory>

#include "model/decoder.h"

namespace torpor::model {

std::unique_ptr<Model> make_llama(const Checkpoint& checkpoint);

}  // namespace torpor::model
