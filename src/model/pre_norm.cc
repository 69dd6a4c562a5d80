#include "model/pre_norm.h"

namespace torpor::model {

void PreNormDecoder::load(const Checkpoint& checkpoint, const LoadParts& parts) {
  const int hidden = config_.hidden_size;
  const Modules modules(checkpoint, *ops_);
  embedding_ = modules.embedding();
  for (int i = 0; i < config_.n_layers; ++i) {
    const std::string layer = layer_name(i);
    layers_.push_back({.attention_norm = modules.norm(layer + ".input_layernorm", hidden),
                       .mlp_norm = modules.norm(layer + ".post_attention_layernorm", hidden),
                       .parts = parts(modules, layer)});
  }
  final_norm_ = modules.norm("model.norm", hidden);
  head_ = modules.head(embedding_);
}

mx::array PreNormDecoder::layers(const Batch& batch) {
  mx::array x = ops_->embedding(batch.tokens, embedding_);
  for (int i = 0; i < config_.n_layers; ++i) {
    const Layer& layer = layers_[size_t(i)];
    const mx::array attended = ops_->attention(ops_->rms_norm(x, layer.attention_norm), layer.parts.qkv, i, batch);
    x = ops_->linear_add(attended, layer.parts.output, x);
    const mx::array gated = ops_->gated(ops_->rms_norm(x, layer.mlp_norm), layer.parts.gate_up);
    x = ops_->linear_add(gated, layer.parts.down, x);
  }
  return x;
}

mx::array PreNormDecoder::logits(const mx::array& hidden) {
  return ops_->head(ops_->rms_norm(hidden, final_norm_), head_);
}

}  // namespace torpor::model
