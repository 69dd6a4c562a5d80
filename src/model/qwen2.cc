#include "model/architectures.h"
#include "model/modules.h"

namespace torpor::model {
namespace {

struct Layer {
  Ops::Weight attention_norm, qkv, output;
  Ops::Weight mlp_norm, gate_up, down;
};

/// Llama's layer with biases on q, k and v.
class Qwen2 final : public Decoder {
 public:
  explicit Qwen2(const Checkpoint& checkpoint) : Decoder(checkpoint) {
    const ModelConfig& c = config_;
    const Modules modules(checkpoint, *ops_);
    embedding_ = modules.embedding();
    for (int i = 0; i < c.n_layers; ++i) {
      const std::string layer = layer_name(i);
      layers_.push_back({
          .attention_norm = modules.norm(layer + ".input_layernorm", c.hidden_size),
          .qkv = modules.qkv(layer + ".self_attn", /*bias=*/true),
          .output = modules.attention_output(layer + ".self_attn"),
          .mlp_norm = modules.norm(layer + ".post_attention_layernorm", c.hidden_size),
          .gate_up = modules.gate_up(layer + ".mlp"),
          .down = modules.down(layer + ".mlp"),
      });
    }
    final_norm_ = modules.norm("model.norm", c.hidden_size);
    head_ = modules.head(embedding_);
  }

 private:
  mx::array layers(const Batch& batch) override {
    mx::array x = ops_->embedding(batch.tokens, embedding_);
    for (int i = 0; i < config_.n_layers; ++i) {
      const Layer& layer = layers_[size_t(i)];
      const mx::array attended = ops_->attention(ops_->rms_norm(x, layer.attention_norm), layer.qkv, i, batch);
      x = ops_->linear_add(attended, layer.output, x);
      const mx::array gated = ops_->gated(ops_->rms_norm(x, layer.mlp_norm), layer.gate_up);
      x = ops_->linear_add(gated, layer.down, x);
    }
    return x;
  }

  mx::array logits(const mx::array& hidden) override { return ops_->head(ops_->rms_norm(hidden, final_norm_), head_); }

  Ops::Weight embedding_, final_norm_, head_;
  std::vector<Layer> layers_;
};

}  // namespace

std::unique_ptr<Model> make_qwen2(const Checkpoint& checkpoint) { return std::make_unique<Qwen2>(checkpoint); }

}  // namespace torpor::model
