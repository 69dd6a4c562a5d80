#pragma once
/// The weights of one linear layer as they stand in the checkpoint, looked up and checked against the config.

#include <optional>
#include <string>

#include "model/config.h"
#include "model/weights.h"

namespace torpor::model {

struct Projection {
  int n = 0, k = 0;  ///< [N, K]: from K features to N
  const TensorView* weight = nullptr;
  std::optional<Quantization> quantization;  ///< then weight is packed u32, with scales and biases
  const TensorView* scales = nullptr;
  const TensorView* biases = nullptr;
  const TensorView* bias = nullptr;          ///< optional additive bias [N]
};

/// The module `name` ("model.layers.0.mlp.up_proj"); kCorruption when a tensor is missing or misshapen,
/// kInvalidArgument for a quantization that is not supported.
Projection find_projection(const Weights& weights, const ModelConfig& config, const std::string& name, int n, int k,
                           bool with_bias);

/// The weight of the norm `name`, [K], in a float dtype.
const TensorView& find_norm(const Weights& weights, const std::string& name, int k);

/// The dtype of the checkpoint's activations: what an embedding of `projection` comes out as.
const std::string& activation_dtype(const Projection& embedding);

}  // namespace torpor::model
