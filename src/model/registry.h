#pragma once
/// Where the architectures are listed.

#include "model/decoder.h"

namespace torpor::model {

using ModelFactory = std::unique_ptr<Model> (*)(const Checkpoint&);

/// The forward pass of `architecture` ("llama"); nullptr when there is none.
ModelFactory find_architecture(const std::string& architecture);

}  // namespace torpor::model
