#include "model/architectures.h"
#include "model/pre_norm.h"

namespace torpor::model {
namespace {

/// The plain pre-norm layer; biases where the config says so.
class Llama final : public PreNormDecoder {
 public:
  explicit Llama(const Checkpoint& checkpoint) : PreNormDecoder(checkpoint) {
    const ModelConfig& c = config_;
    load(checkpoint, [&](const Modules& modules, const std::string& layer) {
      return Parts{.qkv = modules.qkv(layer + ".self_attn", c.attention_bias),
                   .output = modules.attention_output(layer + ".self_attn", c.attention_bias),
                   .gate_up = modules.gate_up(layer + ".mlp", c.mlp_bias),
                   .down = modules.down(layer + ".mlp", c.mlp_bias)};
    });
  }
};

}  // namespace

std::unique_ptr<Model> make_llama(const Checkpoint& checkpoint) { return std::make_unique<Llama>(checkpoint); }

}  // namespace torpor::model
