#include "model/modules.h"

namespace torpor::model {

Projection Modules::projection(const std::string& name, int n, int k, bool bias) const {
  return find_projection(checkpoint_.weights, checkpoint_.config, checkpoint_.config.weight_prefix + name, n, k, bias);
}

Ops::Weight Modules::linear(const std::string& name, int n, int k, bool bias) const {
  return ops_.pack_linear(projection(name, n, k, bias));
}

Ops::Weight Modules::norm(const std::string& name, int k, float plus) const {
  return ops_.pack_norm(find_norm(checkpoint_.weights, checkpoint_.config.weight_prefix + name, k), plus);
}

Ops::Weight Modules::embedding() const { return ops_.pack_linear(find_embedding(checkpoint_)); }

Ops::Weight Modules::head(const Ops::Weight& embedding) const {
  const ModelConfig& c = checkpoint_.config;
  return *c.tied_head ? embedding : linear("lm_head", c.vocab_size, c.hidden_size);
}

Ops::Weight Modules::qkv(const std::string& name, bool bias, Ops::Weight q_norm, Ops::Weight k_norm) const {
  const ModelConfig& c = checkpoint_.config;
  const int q_size = c.n_heads * c.head_dim, kv_size = c.n_kv_heads * c.head_dim;
  return ops_.pack_qkv(projection(name + ".q_proj", q_size, c.hidden_size, bias),
                       projection(name + ".k_proj", kv_size, c.hidden_size, bias),
                       projection(name + ".v_proj", kv_size, c.hidden_size, bias), std::move(q_norm),
                       std::move(k_norm));
}

Ops::Weight Modules::attention_output(const std::string& name, bool bias) const {
  const ModelConfig& c = checkpoint_.config;
  return linear(name + ".o_proj", c.hidden_size, c.n_heads * c.head_dim, bias);
}

Ops::Weight Modules::gate_up(const std::string& name, bool bias) const {
  const ModelConfig& c = checkpoint_.config;
  return ops_.pack_gated(projection(name + ".gate_proj", c.intermediate_size, c.hidden_size, bias),
                         projection(name + ".up_proj", c.intermediate_size, c.hidden_size, bias));
}

Ops::Weight Modules::down(const std::string& name, bool bias) const {
  const ModelConfig& c = checkpoint_.config;
  return linear(name + ".down_proj", c.hidden_size, c.intermediate_size, bias);
}

std::string layer_name(int layer) { return "model.layers." + std::to_string(layer); }

}  // namespace torpor::model
