#include <cmath>

#include "model/architectures.h"
#include "model/sandwich_norm.h"

namespace torpor::model {
namespace {

/// Soft caps on scores and logits; layers with a window and without take turns. (mlx-lm leaves the window out.)
class Gemma2 final : public SandwichNormDecoder {
 public:
  explicit Gemma2(const Checkpoint& checkpoint) : SandwichNormDecoder(checkpoint) {
    load(checkpoint, std::sqrt(float(config_.hidden_size)), [](const Modules& modules, const std::string& attention) {
      return modules.qkv(attention, /*bias=*/false);
    });
  }
};

}  // namespace

std::unique_ptr<Model> make_gemma2(const Checkpoint& checkpoint) { return std::make_unique<Gemma2>(checkpoint); }

}  // namespace torpor::model
