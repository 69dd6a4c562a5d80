/// The modules of layers that keep a state.

#include "model/modules.h"
#include "torpor/error.h"

namespace torpor::model {
namespace {

using kernels::Recurrence;

/// [taps, channels] of a depthwise convolution, which mlx-lm keeps as [channels, taps, 1] and others as
/// [channels, 1, taps].
std::vector<float> find_taps(const Weights& weights, const std::string& name, int channels, int taps) {
  const TensorView* found = weights.find(name);
  const bool published = found != nullptr && found->shape == std::vector<int64_t>{channels, 1, taps};
  const std::vector<float> values =
      to_floats(weights.get(name, published ? found->shape : std::vector<int64_t>{channels, taps, 1}));
  std::vector<float> transposed(values.size());
  for (int c = 0; c < channels; ++c) {
    for (int t = 0; t < taps; ++t) transposed[size_t(t) * channels + c] = values[size_t(c) * taps + t];
  }
  return transposed;
}

}  // namespace

Ops::Weight Modules::recurrent(int index) const {
  const ModelConfig& c = checkpoint_.config;
  const Recurrent& spec = *c.layers[size_t(index)].recurrent;
  const kernels::RecurrentShape& shape = spec.shape;
  const std::string name = layer_name(index) + "." + c.names.recurrent;
  const auto floats = [&](const std::string& part, int n) {
    return to_floats(checkpoint_.weights.get(c.weight_prefix + name + part, {n}));
  };
  const std::string conv = name + ".conv";
  kernels::Recurrent cell{.shape = shape};
  cell.conv = find_taps(checkpoint_.weights, c.weight_prefix + conv + ".weight", shape.channels(), shape.taps);
  if (spec.conv_bias) cell.conv_bias = floats(".conv.bias", shape.channels());
  return ops_.pack_recurrent(std::move(cell), {projection(name + ".in_proj", shape.given(), c.hidden_size, spec.bias)});
}

}  // namespace torpor::model
