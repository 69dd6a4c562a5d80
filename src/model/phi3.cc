#include "model/architectures.h"
#include "model/pre_norm.h"

namespace torpor::model {
namespace {

/// Llama's layer, whose q, k and v are one projection in the checkpoint, as are gate and up.
class Phi3 final : public PreNormDecoder {
 public:
  explicit Phi3(const Checkpoint& checkpoint) : PreNormDecoder(checkpoint) {
    const ModelConfig& c = config_;
    const int q_size = c.n_heads * c.head_dim, kv_size = c.n_kv_heads * c.head_dim, inner = c.intermediate_size;
    load(checkpoint, [&](const Modules& modules, const std::string& layer) {
      const Projection qkv = modules.projection(layer + ".self_attn.qkv_proj", q_size + 2 * kv_size, c.hidden_size);
      const Projection gate_up = modules.projection(layer + ".mlp.gate_up_proj", 2 * inner, c.hidden_size);
      return Parts{.qkv = ops_->pack_qkv(rows_of(qkv, 0, q_size), rows_of(qkv, q_size, kv_size),
                                         rows_of(qkv, q_size + kv_size, kv_size)),
                   .output = modules.attention_output(layer + ".self_attn"),
                   .gate_up = ops_->pack_gated(rows_of(gate_up, 0, inner), rows_of(gate_up, inner, inner)),
                   .down = modules.down(layer + ".mlp")};
    });
  }
};

}  // namespace

std::unique_ptr<Model> make_phi3(const Checkpoint& checkpoint) { return std::make_unique<Phi3>(checkpoint); }

}  // namespace torpor::model
