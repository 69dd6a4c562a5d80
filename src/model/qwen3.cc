#include "model/architectures.h"
#include "model/pre_norm.h"

namespace torpor::model {
namespace {

/// Llama's layer with a norm on every head of q and k.
class Qwen3 final : public PreNormDecoder {
 public:
  explicit Qwen3(const Checkpoint& checkpoint) : PreNormDecoder(checkpoint) {
    const ModelConfig& c = config_;
    load(checkpoint, [&](const Modules& modules, const std::string& layer) {
      const std::string attention = layer + ".self_attn";
      return Parts{.qkv = modules.qkv(attention, c.attention_bias, modules.norm(attention + ".q_norm", c.head_dim),
                                      modules.norm(attention + ".k_norm", c.head_dim)),
                   .output = modules.attention_output(attention, c.attention_bias),
                   .gate_up = modules.gate_up(layer + ".mlp"),
                   .down = modules.down(layer + ".mlp")};
    });
  }
};

}  // namespace

std::unique_ptr<Model> make_qwen3(const Checkpoint& checkpoint) { return std::make_unique<Qwen3>(checkpoint); }

}  // namespace torpor::model
