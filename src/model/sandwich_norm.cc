#include "model/sandwich_norm.h"

namespace torpor::model {

void SandwichNormDecoder::load(const Checkpoint& checkpoint, float scale, const LoadQkv& qkv) {
  const Modules modules(checkpoint, *ops_);
  const auto norm = [&](const std::string& name) { return modules.norm(name, config_.hidden_size, kGemmaNormPlus); };
  scale_ = scale;
  embedding_ = modules.embedding();
  for (int i = 0; i < config_.n_layers; ++i) {
    const std::string layer = layer_name(i);
    layers_.push_back({
        .attention_norm = norm(layer + ".input_layernorm"),
        .qkv = qkv(modules, layer + ".self_attn"),
        .output = modules.attention_output(layer + ".self_attn"),
        .attention_post_norm = norm(layer + ".post_attention_layernorm"),
        .mlp_norm = norm(layer + ".pre_feedforward_layernorm"),
        .gate_up = modules.gate_up(layer + ".mlp"),
        .down = modules.down(layer + ".mlp"),
        .mlp_post_norm = norm(layer + ".post_feedforward_layernorm"),
    });
  }
  final_norm_ = norm("model.norm");
  head_ = modules.head(embedding_);
}

mx::array SandwichNormDecoder::layers(const Batch& batch) {
  mx::array x = ops_->scale(ops_->embedding(batch.tokens, embedding_), scale_);
  for (int i = 0; i < config_.n_layers; ++i) {
    const Layer& layer = layers_[size_t(i)];
    const mx::array attended = ops_->attention(ops_->rms_norm(x, layer.attention_norm), layer.qkv, i, batch);
    x = ops_->add(x, ops_->rms_norm(ops_->linear(attended, layer.output), layer.attention_post_norm));
    const mx::array gated = ops_->gated(ops_->rms_norm(x, layer.mlp_norm), layer.gate_up);
    x = ops_->add(x, ops_->rms_norm(ops_->linear(gated, layer.down), layer.mlp_post_norm));
  }
  return x;
}

mx::array SandwichNormDecoder::logits(const mx::array& hidden) {
  return ops_->soft_cap(ops_->head(ops_->rms_norm(hidden, final_norm_), head_), config_.logit_softcap);
}

}  // namespace torpor::model
