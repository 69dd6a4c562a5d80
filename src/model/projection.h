#pragma once
/// The weights of one linear layer as they stand in the checkpoint, looked up and checked against the config.

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/gguf.h"
#include "model/config.h"
#include "model/weights.h"

namespace torpor::model {

struct Projection {
  int n = 0, k = 0;  ///< [N, K]: from K features to N
  TensorView weight;
  std::optional<Quantization> quantization;  ///< then weight is packed u32, with scales and, if affine, biases
  std::optional<TensorView> scales, biases;
  std::optional<TensorView> bias;            ///< additive [N]
  std::optional<GgmlType> blocks;            ///< weight is rows of GGUF's blocks
  int neighbour_heads = 0;                   ///< as kernels::WeightSource has it
  std::shared_ptr<const std::byte> memory;   ///< keeps tensors that are not where the checkpoint has them; or nullptr
};

/// The module `name` ("model.layers.0.mlp.up_proj"); kCorruption when a tensor is missing or misshapen,
/// kInvalidArgument for a quantization that is not supported.
Projection find_projection(const Weights& weights, const ModelConfig& config, const std::string& name, int n, int k,
                           bool with_bias);

/// `count` modules [n, k] that a checkpoint keeps in one tensor [count, n, k]; biases [count, n].
std::vector<Projection> find_stacked(const Weights& weights, const ModelConfig& config, const std::string& name, int count,
                                     int n, int k, bool with_bias);

/// Rows [first, first + n) of a projection: one part of several that the checkpoint keeps as one.
Projection rows_of(const Projection& p, int first, int n);

/// A copy of some of its rows, in the order that is asked for: where the rows of several parts take turns.
struct RowRange {
  int first = 0, n = 0;
};
Projection gathered_rows_of(const Projection& p, std::span<const RowRange> ranges);

/// The elements of a float tensor.
std::vector<float> to_floats(const TensorView& tensor);

/// kInvalidArgument for a tensor that is neither F32, F16 nor BF16: its bytes can't be read as floats.
void require_float(const TensorView& tensor);

/// The weight of the norm `name`, [K], in a float dtype.
const TensorView& find_norm(const Weights& weights, const std::string& name, int k);

/// The dtype of the checkpoint's activations: what an embedding of `projection` comes out as.
const std::string& activation_dtype(const Projection& embedding);

}  // namespace torpor::model
