#include <cmath>

#include "model/architectures.h"
#include "model/modules.h"

namespace torpor::model {
namespace {

struct Layer {
  Ops::Weight attention_norm, qkv, output, attention_post_norm;
  Ops::Weight mlp_norm, gate_up, down, mlp_post_norm;
};

/// Norms before and after each part, a scaled embedding, soft caps on scores and logits; layers with a window and without
/// take turns. (mlx-lm leaves the window out.)
class Gemma2 final : public Decoder {
 public:
  explicit Gemma2(const Checkpoint& checkpoint) : Decoder(checkpoint) {
    const ModelConfig& c = config_;
    const Modules modules(checkpoint, *ops_);
    // Rows are multiplied by one more than a norm's weight.
    const auto norm = [&](const std::string& name, int k) { return modules.norm(name, k, 1); };

    embedding_ = modules.embedding();
    for (int i = 0; i < c.n_layers; ++i) {
      const std::string layer = layer_name(i);
      layers_.push_back({
          .attention_norm = norm(layer + ".input_layernorm", c.hidden_size),
          .qkv = modules.qkv(layer + ".self_attn", /*bias=*/false),
          .output = modules.attention_output(layer + ".self_attn"),
          .attention_post_norm = norm(layer + ".post_attention_layernorm", c.hidden_size),
          .mlp_norm = norm(layer + ".pre_feedforward_layernorm", c.hidden_size),
          .gate_up = modules.gate_up(layer + ".mlp"),
          .down = modules.down(layer + ".mlp"),
          .mlp_post_norm = norm(layer + ".post_feedforward_layernorm", c.hidden_size),
      });
    }
    final_norm_ = norm("model.norm", c.hidden_size);
    head_ = modules.head(embedding_);
  }

 private:
  mx::array layers(const Batch& batch) override {
    mx::array x = ops_->scale(ops_->embedding(batch.tokens, embedding_), std::sqrt(float(config_.hidden_size)));
    for (int i = 0; i < config_.n_layers; ++i) {
      const Layer& layer = layers_[size_t(i)];
      const mx::array attended = ops_->attention(ops_->rms_norm(x, layer.attention_norm), layer.qkv, i, batch);
      x = ops_->add(x, ops_->rms_norm(ops_->linear(attended, layer.output), layer.attention_post_norm));
      const mx::array gated = ops_->gated(ops_->rms_norm(x, layer.mlp_norm), layer.gate_up);
      x = ops_->add(x, ops_->rms_norm(ops_->linear(gated, layer.down), layer.mlp_post_norm));
    }
    return x;
  }

  mx::array logits(const mx::array& hidden) override {
    return ops_->soft_cap(ops_->head(ops_->rms_norm(hidden, final_norm_), head_), config_.logit_softcap);
  }

  Ops::Weight embedding_, final_norm_, head_;
  std::vector<Layer> layers_;
};

}  // namespace

std::unique_ptr<Model> make_gemma2(const Checkpoint& checkpoint) { return std::make_unique<Gemma2>(checkpoint); }

}  // namespace torpor::model
