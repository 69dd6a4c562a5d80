#include "model/modules.h"

namespace torpor::model {

Projection Modules::projection(const std::string& name, int n, int k, bool bias) const {
  return find_projection(checkpoint_.weights, checkpoint_.config, checkpoint_.config.weight_prefix + name, n, k, bias);
}

Ops::Weight Modules::norm(const std::string& name, int k) const {
  const ModelConfig& c = checkpoint_.config;
  return ops_.pack_norm(find_norm(checkpoint_.weights, c.weight_prefix + name, k), c.norm_plus, c.centred_norms);
}

Ops::Weight Modules::embedding() const { return ops_.pack_linear(find_embedding(checkpoint_)); }

Ops::Weight Modules::head(const Ops::Weight& embedding) const {
  const ModelConfig& c = checkpoint_.config;
  return *c.tied_head ? embedding : ops_.pack_linear(projection("lm_head", c.vocab_size, c.hidden_size));
}

Projection Modules::queries(const std::string& attention, const Attention& spec, bool gates) const {
  const int n = spec.query_size(), hidden = checkpoint_.config.hidden_size;
  const Projection all = projection(attention + ".q_proj", spec.gated ? 2 * n : n, hidden, spec.qkv_bias);
  if (!spec.gated) return all;
  std::vector<RowRange> heads;
  for (int h = 0; h < spec.n_heads; ++h) heads.push_back({(2 * h + (gates ? 1 : 0)) * spec.key_dim, spec.key_dim});
  return gathered_rows_of(all, heads);
}

Ops::Weight Modules::attention(int index) const {
  const ModelConfig& c = checkpoint_.config;
  const Attention& spec = c.layers[size_t(index)].attention;
  if (spec.latent) return latent_attention(index);
  const std::string name = layer_name(index) + "." + c.names.attention;
  const int q = spec.query_size(), k = spec.keys_size(), v = spec.values_size();
  Ops::Weight q_norm, k_norm;
  if (spec.qk_norm != QkNorm::kNone) {
    const bool whole = spec.qk_norm == QkNorm::kWhole;
    q_norm = norm(name + "." + c.names.q_norm, whole ? q : spec.key_dim);
    // Of the layer that has the rows.
    const std::string owner = layer_name(spec.reads_rows_of.value_or(index)) + "." + c.names.attention + ".";
    k_norm = norm(owner + c.names.k_norm, whole ? k : spec.key_dim);
  }
  const std::vector<float> sinks = spec.sinks ? numbers(name + ".sinks", spec.n_heads) : std::vector<float>();
  const auto packed = [&](const Projection& queries, const Projection& keys, const Projection& values) {
    return ops_.pack_attention(spec, queries, &keys, &values, q_norm, k_norm, sinks);
  };
  if (c.names.fused) {
    const Projection qkv = projection(name + ".qkv_proj", q + k + v, c.hidden_size, spec.qkv_bias);
    return packed(rows_of(qkv, 0, q), rows_of(qkv, q, k), rows_of(qkv, q + k, v));
  }
  const auto part = [&](const char* part, int n) { return projection(name + part, n, c.hidden_size, spec.qkv_bias); };
  const auto rotated = [&](Projection p) {
    if (c.names.neighbours) p.neighbour_heads = p.n / spec.key_dim;
    return p;
  };
  const Projection query = rotated(queries(name, spec, /*gates=*/false));
  if (spec.reads_rows_of) return ops_.pack_attention(spec, query, nullptr, nullptr, q_norm, k_norm, sinks);
  if (spec.keys_are_values) {
    const Projection keys = rotated(part(".k_proj", k));
    return ops_.pack_attention(spec, query, &keys, nullptr, q_norm, k_norm, sinks);
  }
  return packed(query, rotated(part(".k_proj", k)), part(".v_proj", v));
}

bool Modules::has(const std::string& module) const {
  return checkpoint_.weights.find(checkpoint_.config.weight_prefix + module + ".weight") != nullptr;
}

std::string Modules::mlp_part(const std::string& name, int i) const {
  const std::string own = name + "." + checkpoint_.config.names.mlp_parts[i];
  return has(own) ? own : name + "." + LayerNames().mlp_parts[i];
}

Ops::Weight Modules::gated(const std::string& name, const Mlp& spec) const {
  const ModelConfig& c = checkpoint_.config;
  if (c.names.fused) {
    const Projection both = projection(name + ".gate_up_proj", 2 * spec.size, c.hidden_size, spec.bias);
    return ops_.pack_gated(rows_of(both, 0, spec.size), rows_of(both, spec.size, spec.size), spec.activation);
  }
  const auto part = [&](int i) { return projection(mlp_part(name, i), spec.size, c.hidden_size, spec.bias); };
  return ops_.pack_gated(part(0), part(1), spec.activation);
}

std::vector<float> Modules::numbers(const std::string& name, int n) const {
  return to_floats(checkpoint_.weights.get(checkpoint_.config.weight_prefix + name, {n}));
}

LayerInputWeights Modules::inputs(const std::string& layer) const {
  const int hidden = checkpoint_.config.hidden_size, size = checkpoint_.config.layer_inputs->size;
  return {.gate = ops_.pack_linear(projection(layer + ".per_layer_input_gate", size, hidden)),
          .projection = ops_.pack_linear(projection(layer + ".per_layer_projection", hidden, size)),
          .norm = norm(layer + ".post_per_layer_input_norm", hidden)};
}

SharedInputWeights Modules::shared_inputs() const {
  const ModelConfig& c = checkpoint_.config;
  const int all = int(c.layers.size()) * c.layer_inputs->size;
  return {.table = MappedRows(checkpoint_.weights, projection("model.embed_tokens_per_layer", c.layer_inputs->vocab_size, all)),
          .projection = ops_.pack_linear(projection("model.per_layer_model_projection", all, c.hidden_size)),
          .norm = norm("model.per_layer_projection_norm", c.layer_inputs->size)};
}

DecoderLayer Modules::layer(int index) const {
  const ModelConfig& c = checkpoint_.config;
  const auto& [mixes, feeds, attention_spec, recurrent_spec, mlp_spec, experts_spec] = c.layers[size_t(index)];
  const std::string layer = layer_name(index);
  const std::string attention_name = layer + "." + c.names.attention + ".";
  const auto norm_of = [&](const std::string& name) {
    return name.empty() ? nullptr : norm(layer + "." + name, c.hidden_size);
  };
  const auto back = [&](const std::string& name, int k, bool bias) {
    return ops_.pack_linear(projection(name, c.hidden_size, k, bias));
  };
  DecoderLayer parts{.attention_norm = mixes ? norm_of(c.names.attention_norm) : nullptr,
                     .attention_post_norm = norm_of(c.names.attention_post_norm),
                     .mlp_norm = feeds ? norm_of(c.names.mlp_norm) : nullptr,
                     .mlp_post_norm = norm_of(c.names.mlp_post_norm),
                     .inputs = c.layer_inputs ? std::optional(inputs(layer)) : std::nullopt,
                     .scalar = c.names.scalar.empty() ? 1 : numbers(layer + "." + c.names.scalar, 1).front()};
  if (!mixes) {
    // Nothing is in attention's place.
  } else if (recurrent_spec) {
    parts.recurrent = recurrent(index);
    const std::string output = layer + "." + c.names.recurrent + ".out_proj";
    parts.output = back(output, recurrent_spec->shape.output(), recurrent_spec->bias);
  } else {
    parts.attention = attention(index);
    if (attention_spec.gated) {
      parts.attention_gate = ops_.pack_linear(queries(layer + "." + c.names.attention, attention_spec, /*gates=*/true));
    }
    parts.output = back(attention_name + c.names.output, attention_spec.output_size(), attention_spec.output_bias);
  }
  if (!feeds) return parts;
  if (experts_spec) parts.experts = experts(layer, *experts_spec);
  if (experts_spec && experts_spec->beside_mlp) parts.beside = beside_mlp(layer);
  if (!experts_spec || experts_spec->beside_mlp) {
    add_mlp(layer, mlp_spec, parts);
  }
  return parts;
}

void Modules::add_mlp(const std::string& layer, const Mlp& spec, DecoderLayer& parts) const {
  const ModelConfig& c = checkpoint_.config;
  const std::string name = layer + "." + c.names.mlp, both = layer + "." + c.names.experts.shared_gate_up;
  const auto back = [&](const std::string& of) {
    return ops_.pack_linear(projection(of, c.hidden_size, spec.size, spec.bias));
  };
  if (!c.names.experts.shared_gate_up.empty() && has(both)) {
    const Projection gate_up = projection(both, 2 * spec.size, c.hidden_size, spec.bias);
    const Projection gate = rows_of(gate_up, 0, spec.size), up = rows_of(gate_up, spec.size, spec.size);
    parts.gate_up = ops_.pack_gated(gate, up, spec.activation);
    parts.down = back(layer + "." + c.names.experts.shared_down);
    return;
  }
  if (spec.activation == Activation::kRelu2) {
    parts.up = ops_.pack_linear(projection(mlp_part(name, 1), spec.size, c.hidden_size, spec.bias));
  } else {
    parts.gate_up = gated(name, spec);
  }
  parts.down = back(mlp_part(name, 2));
}

std::string layer_name(int layer) { return "model.layers." + std::to_string(layer); }

}  // namespace torpor::model
