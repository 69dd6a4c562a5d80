#include "model/architectures.h"
#include "model/modules.h"

namespace torpor::model {
namespace {

struct Layer {
  Ops::Weight attention_norm, qkv, output;
  Ops::Weight mlp_norm, gate_up, down;
};

/// Llama's layer, whose q, k and v are one projection in the checkpoint, as are gate and up.
class Phi3 final : public Decoder {
 public:
  explicit Phi3(const Checkpoint& checkpoint) : Decoder(checkpoint) {
    const ModelConfig& c = config_;
    const Modules modules(checkpoint, *ops_);
    embedding_ = modules.embedding();
    for (int i = 0; i < c.n_layers; ++i) {
      const std::string layer = layer_name(i);
      const int q_size = c.n_heads * c.head_dim, kv_size = c.n_kv_heads * c.head_dim, inner = c.intermediate_size;
      const Projection qkv = modules.projection(layer + ".self_attn.qkv_proj", q_size + 2 * kv_size, c.hidden_size);
      const Projection gate_up = modules.projection(layer + ".mlp.gate_up_proj", 2 * inner, c.hidden_size);
      layers_.push_back({
          .attention_norm = modules.norm(layer + ".input_layernorm", c.hidden_size),
          .qkv = ops_->pack_qkv(rows_of(qkv, 0, q_size), rows_of(qkv, q_size, kv_size), rows_of(qkv, q_size + kv_size, kv_size)),
          .output = modules.attention_output(layer + ".self_attn"),
          .mlp_norm = modules.norm(layer + ".post_attention_layernorm", c.hidden_size),
          .gate_up = ops_->pack_gated(rows_of(gate_up, 0, inner), rows_of(gate_up, inner, inner)),
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

std::unique_ptr<Model> make_phi3(const Checkpoint& checkpoint) { return std::make_unique<Phi3>(checkpoint); }

}  // namespace torpor::model
