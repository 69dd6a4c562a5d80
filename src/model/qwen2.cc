#include "model/architectures.h"
#include "model/pre_norm.h"

namespace torpor::model {
namespace {

/// Llama's layer with biases on q, k and v.
class Qwen2 final : public PreNormDecoder {
 public:
  explicit Qwen2(const Checkpoint& checkpoint) : PreNormDecoder(checkpoint) {
    load(checkpoint, [](const Modules& modules, const std::string& layer) {
      return Parts{.qkv = modules.qkv(layer + ".self_attn", /*bias=*/true),
                   .output = modules.attention_output(layer + ".self_attn"),
                   .gate_up = modules.gate_up(layer + ".mlp"),
                   .down = modules.down(layer + ".mlp")};
    });
  }
};

}  // namespace

std::unique_ptr<Model> make_qwen2(const Checkpoint& checkpoint) { return std::make_unique<Qwen2>(checkpoint); }

}  // namespace torpor::model
