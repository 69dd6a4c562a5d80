#include "model/llama.h"

namespace torpor::model {
namespace {

struct Layer {
  Ops::Weight attention_norm, qkv, output;
  Ops::Weight mlp_norm, gate_up, down;
};

Projection embedding_of(const Checkpoint& c) {
  return find_projection(c.weights, c.config, "model.embed_tokens", c.config.vocab_size, c.config.hidden_size, false);
}

class Llama final : public Decoder {
 public:
  explicit Llama(const Checkpoint& checkpoint) : Decoder(checkpoint, embedding_of(checkpoint)) {
    const ModelConfig& c = config_;
    const Weights& weights = checkpoint.weights;
    const auto norm = [&](const std::string& name) {
      return ops_->pack_norm(find_norm(weights, name, c.hidden_size));
    };

    embedding_ = ops_->pack_linear(embedding_of(checkpoint));
    for (int i = 0; i < c.n_layers; ++i) {
      const std::string prefix = "model.layers." + std::to_string(i) + ".";
      const auto attention = [&](const char* name, int n, int k) {
        return find_projection(weights, c, prefix + "self_attn." + name, n, k, c.attention_bias);
      };
      const auto mlp = [&](const char* name, int n, int k) {
        return find_projection(weights, c, prefix + "mlp." + name, n, k, c.mlp_bias);
      };
      const int q_size = c.n_heads * c.head_dim, kv_size = c.n_kv_heads * c.head_dim;
      layers_.push_back({
          .attention_norm = norm(prefix + "input_layernorm"),
          .qkv = ops_->pack_qkv(attention("q_proj", q_size, c.hidden_size), attention("k_proj", kv_size, c.hidden_size),
                                attention("v_proj", kv_size, c.hidden_size)),
          .output = ops_->pack_linear(attention("o_proj", c.hidden_size, q_size)),
          .mlp_norm = norm(prefix + "post_attention_layernorm"),
          .gate_up = ops_->pack_gated(mlp("gate_proj", c.intermediate_size, c.hidden_size),
                                      mlp("up_proj", c.intermediate_size, c.hidden_size)),
          .down = ops_->pack_linear(mlp("down_proj", c.hidden_size, c.intermediate_size)),
      });
    }
    final_norm_ = norm("model.norm");
    head_ = *c.tied_head ? embedding_
                         : ops_->pack_linear(find_projection(weights, c, "lm_head", c.vocab_size, c.hidden_size, false));
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

std::unique_ptr<Model> make_llama(const Checkpoint& checkpoint) { return std::make_unique<Llama>(checkpoint); }

}  // namespace torpor::model
