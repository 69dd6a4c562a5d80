/// The modules of layers that keep a state.

#include <cmath>

#include "model/modules.h"
#include "torpor/error.h"

namespace torpor::model {
namespace {

using kernels::Recurrence;
using kernels::RecurrentShape;

/// Where a checkpoint has channel `c` of a convolution. Those of values are tiled with their heads.
int channel_of(const RecurrentShape& shape, int c) {
  const int values = c - (shape.channels() - shape.output()), size = shape.value_dim;
  return !shape.tiled || values < 0 ? c : c - values + shape.place(values / size) * size + values % size;
}

/// [taps, channels] of a depthwise convolution, which mlx-lm keeps as [channels, taps, 1], others as
/// [channels, 1, taps], and llama.cpp as [channels, taps].
std::vector<float> find_taps(const Weights& weights, const std::string& name, const RecurrentShape& shape) {
  using Dims = std::vector<int64_t>;
  const int channels = shape.channels(), taps = shape.taps;
  const TensorView* found = weights.find(name);
  const bool published = found != nullptr && found->shape == Dims{channels, 1, taps};
  const bool flat = found != nullptr && found->shape == Dims{channels, taps};
  const std::vector<float> values =
      to_floats(weights.get(name, published || flat ? found->shape : Dims{channels, taps, 1}));
  std::vector<float> transposed(values.size());
  for (int c = 0; c < channels; ++c) {
    const float* const from = values.data() + size_t(channel_of(shape, c)) * taps;
    for (int t = 0; t < taps; ++t) transposed[size_t(t) * channels + c] = from[t];
  }
  return transposed;
}

const char* convolution(const RecurrentShape& shape) {
  return shape.kind == Recurrence::kShortConv ? ".conv" : ".conv1d";
}

}  // namespace

bool has_published_convolutions(const ModelConfig& config, const Weights& weights) {
  for (size_t i = 0; i < config.layers.size(); ++i) {
    if (!config.layers[i].recurrent) continue;
    const std::string name = config.weight_prefix + layer_name(int(i)) + "." + config.names.recurrent;
    const TensorView* conv = weights.find(name + convolution(config.layers[i].recurrent->shape) + ".weight");
    return conv != nullptr && conv->shape.size() == 3 && conv->shape.back() != 1;
  }
  return false;
}

std::vector<Projection> Modules::given(const std::string& name, const Recurrent& spec) const {
  const RecurrentShape& shape = spec.shape;
  const auto part = [&](const char* part, int n) {
    return projection(name + part, n, checkpoint_.config.hidden_size, spec.bias);
  };
  if (shape.kind != Recurrence::kGatedDelta) return {part(".in_proj", shape.given())};
  const int heads = shape.n_heads, output = shape.output();
  if (shape.tiled) {
    // z stays as it is: the columns that read what it multiplies are in that order, and may share a block.
    const int first = shape.channels() - output;
    std::vector<RowRange> rows{{0, first}}, scalars;
    for (int h = 0; h < heads; ++h) {
      rows.push_back({first + shape.place(h) * shape.value_dim, shape.value_dim});
      scalars.push_back({shape.place(h), 1});
    }
    return {gathered_rows_of(part(".in_proj_qkv", shape.channels()), rows), part(".in_proj_z", output),
            gathered_rows_of(part(".in_proj_b", heads), scalars), gathered_rows_of(part(".in_proj_a", heads), scalars)};
  }
  if (!spec.interleaved) {
    return {part(".in_proj_qkv", shape.channels()), part(".in_proj_z", output), part(".in_proj_b", heads),
            part(".in_proj_a", heads)};
  }
  // Each head of keys has its queries, keys, values and gates side by side, and so b and a.
  const int groups = shape.n_groups, keys = shape.key_dim, values = output / groups;
  const auto gathered = [&](const Projection& p, std::initializer_list<std::pair<int, int>> parts) {
    std::vector<RowRange> ranges;
    for (const auto& [first, n] : parts) {
      for (int g = 0; g < groups; ++g) ranges.push_back({g * (p.n / groups) + first, n});
    }
    return gathered_rows_of(p, ranges);
  };
  const int of_group = heads / groups;
  const Projection scalars =
      gathered(part(".in_proj_ba", 2 * heads), {{0, of_group}, {of_group, of_group}});
  if (checkpoint_.weights.find(checkpoint_.config.weight_prefix + name + ".in_proj_qkv.weight") != nullptr) {
    return {part(".in_proj_qkv", shape.channels()), part(".in_proj_z", output), scalars};  // as llama.cpp's newer files
  }
  return {gathered(part(".in_proj_qkvz", shape.channels() + output),
                   {{0, keys}, {keys, keys}, {2 * keys, values}, {2 * keys + values, values}}),
          scalars};
}

Ops::Weight Modules::recurrent(int index) const {
  const ModelConfig& c = checkpoint_.config;
  const Recurrent& spec = *c.layers[size_t(index)].recurrent;
  const RecurrentShape& shape = spec.shape;
  const std::string name = layer_name(index) + "." + c.names.recurrent, own = c.weight_prefix + name;
  const auto floats = [&](const std::string& part, int n) {
    return to_floats(checkpoint_.weights.get(own + part, {n}));
  };
  const auto of_heads = [&](const char* part) {
    const std::vector<float> given = floats(part, shape.n_heads);
    std::vector<float> values;
    for (int h = 0; h < shape.n_heads; ++h) values.push_back(given[size_t(shape.place(h))]);
    return values;
  };
  kernels::Recurrent cell{.shape = shape};
  const std::string conv = convolution(shape);
  cell.conv = find_taps(checkpoint_.weights, own + conv + ".weight", shape);
  if (spec.conv_bias) cell.conv_bias = floats(conv + ".bias", shape.channels());
  if (shape.n_heads > 0) {
    cell.log_decay = of_heads(".A_log");
    cell.step_bias = of_heads(".dt_bias");
    if (shape.kind == Recurrence::kMamba2) cell.skip = floats(".D", shape.n_heads);
    cell.norm = floats(".norm.weight", shape.kind == Recurrence::kMamba2 ? shape.output() : shape.value_dim);
  }
  if (spec.decay_is_made) {
    for (float& decay : cell.log_decay) {
      if (!(decay < 0)) throw Error(ErrorCode::kCorruption, "The weights have a decay in " + name + " that grows.");
      decay = std::log(-decay);
    }
  }
  return ops_.pack_recurrent(std::move(cell), given(name, spec));
}

}  // namespace torpor::model
