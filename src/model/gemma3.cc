#include <cmath>

#include "model/architectures.h"
#include "model/sandwich_norm.h"

namespace torpor::model {
namespace {

/// A norm on every head of q and k; five layers with a window and a RoPE of their own to one without.
class Gemma3 final : public SandwichNormDecoder {
 public:
  explicit Gemma3(const Checkpoint& checkpoint) : SandwichNormDecoder(checkpoint) {
    // The scale was rounded to bf16 in training.
    const float scale = float(mx::bfloat16_t(std::sqrt(float(config_.hidden_size))));
    load(checkpoint, scale, [&](const Modules& modules, const std::string& attention) {
      const auto norm = [&](const char* part) {
        return modules.norm(attention + part, config_.head_dim, kGemmaNormPlus);
      };
      return modules.qkv(attention, /*bias=*/false, norm(".q_norm"), norm(".k_norm"));
    });
  }
};

}  // namespace

std::unique_ptr<Model> make_gemma3(const Checkpoint& checkpoint) { return std::make_unique<Gemma3>(checkpoint); }

}  // namespace torpor::model
