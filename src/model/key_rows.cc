#include "model/key_rows.h"

#include <cmath>

#include "model/block_arrays.h"
#include "model/modules.h"

namespace torpor::model {
namespace {

/// What a layer's keys need.
struct LayerKeys {
  std::vector<float> factors;  // pair_factors; empty without norms of heads
  std::vector<float> bias;     // [n_kv_heads * dim], not rotated; empty without one
  std::shared_ptr<const Rope> rope;
  size_t dim = 0;  // of a head
};

void add_rotated(const Rope& rope, int64_t position, std::span<const float> bias, std::span<float> head) {
  const size_t half = size_t(rope.dims / 2);
  for (size_t i = 0; i < half; ++i) {
    const size_t low = rope.traditional ? 2 * i : i, high = rope.traditional ? 2 * i + 1 : i + half;
    const double angle = double(position) * double(rope.inv_freq[i]), x = bias[low], y = bias[high];
    head[low] += float(rope.magnitude * (x * std::cos(angle) - y * std::sin(angle)));
    head[high] += float(rope.magnitude * (y * std::cos(angle) + x * std::sin(angle)));
  }
  for (size_t i = 2 * half; i < head.size(); ++i) head[i] += bias[i];
}

}  // namespace

std::vector<float> pair_factors(const Rope& rope, std::span<const float> q_norm, std::span<const float> k_norm) {
  // A dim that a norm silences keeps a bounded factor.
  constexpr double kLeast = 1.0 / 16;
  std::vector<float> factors(k_norm.size());
  const auto set = [&](size_t a, size_t b) {
    const double k = std::hypot(double(k_norm[a]), double(k_norm[b]));
    const double q = std::hypot(double(q_norm[a]), double(q_norm[b]));
    factors[a] = factors[b] = float(std::exp2(std::round(0.5 * std::log2((k + kLeast) / (q + kLeast)))));
  };
  const size_t half = size_t(rope.dims / 2);
  for (size_t i = 0; i < half; ++i) rope.traditional ? set(2 * i, 2 * i + 1) : set(i, i + half);
  for (size_t i = 2 * half; i < factors.size(); ++i) set(i, i);
  return factors;
}

std::vector<float> key_bias_of(const TensorView& bias, int neighbour_heads) {
  const std::vector<float> values = to_floats(bias);
  if (neighbour_heads == 0) return values;
  std::vector<float> rows;
  for (const int32_t row : rows_of_halves(int(values.size()), neighbour_heads)) rows.push_back(values[size_t(row)]);
  return rows;
}

RestoreKeys restore_keys_of(const Checkpoint& checkpoint) {
  const ModelConfig& c = checkpoint.config;
  std::vector<LayerKeys> layers;
  for (size_t i = 0; i < c.layers.size(); ++i) {
    const Attention& attention = c.layers[i].attention;
    if (attention.reads_rows_of || c.layers[i].recurrent || !c.layers[i].mixes) continue;
    const std::string name = c.weight_prefix + layer_name(int(i)) + "." + c.names.attention + ".";
    LayerKeys& layer = layers.emplace_back();
    layer.rope = attention.rope;
    layer.dim = size_t(attention.key_dim);
    if (attention.key_bias()) {
      const TensorView& bias = checkpoint.weights.get(name + "k_proj.bias", {attention.keys_size()});
      layer.bias = key_bias_of(bias, c.names.neighbours ? attention.n_kv_heads : 0);
    }
    if (!attention.evens_keys()) continue;
    const auto norm = [&](const std::string& part) {
      std::vector<float> values = to_floats(find_norm(checkpoint.weights, name + part, attention.key_dim));
      for (float& value : values) value += c.norm_plus;
      return values;
    };
    layer.factors = pair_factors(*attention.rope, norm(c.names.q_norm), norm(c.names.k_norm));
  }
  return [layers = std::move(layers)](const KvFormat& format, int layer, int64_t position, std::span<float> keys) {
    const LayerKeys& own = layers[size_t(layer)];
    for (size_t at = 0; at < keys.size(); at += own.dim) {
      const std::span<float> head = keys.subspan(at, own.dim);
      for (size_t i = 0; format.rotates_keys() && i < own.factors.size(); ++i) head[i] *= own.factors[i];
      if (format.bias_free && !own.bias.empty()) {
        add_rotated(*own.rope, position, std::span(own.bias).subspan(at, own.dim), head);
      }
    }
  };
}

}  // namespace torpor::model
