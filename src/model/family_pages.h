#pragma once
/// The pages of family.cc's table, and what they share. A page makes of plain pre-norm layers its family's.

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "model/family.h"
#include "torpor/error.h"

namespace torpor::model {

// family_dense.cc
void llama(ModelConfig& model, FamilyFields& fields);
void qwen2(ModelConfig& model, FamilyFields& fields);
void qwen3(ModelConfig& model, FamilyFields& fields);
void phi3(ModelConfig& model, FamilyFields& fields);
void gemma2(ModelConfig& model, FamilyFields& fields);
void gemma3(ModelConfig& model, FamilyFields& fields);
void gemma4(ModelConfig& model, FamilyFields& fields);
void cohere2(ModelConfig& model, FamilyFields& fields);
void granite(ModelConfig& model, FamilyFields& fields);
void ministral3(ModelConfig& model, FamilyFields& fields);
void olmo3(ModelConfig& model, FamilyFields& fields);
void seed_oss(ModelConfig& model, FamilyFields& fields);
void smollm3(ModelConfig& model, FamilyFields& fields);

// family_experts.cc
void qwen3_moe(ModelConfig& model, FamilyFields& fields);
void mixtral(ModelConfig& model, FamilyFields& fields);
void olmoe(ModelConfig& model, FamilyFields& fields);
void granitemoe(ModelConfig& model, FamilyFields& fields);
void glm4_moe(ModelConfig& model, FamilyFields& fields);
void minimax(ModelConfig& model, FamilyFields& fields);
void gpt_oss(ModelConfig& model, FamilyFields& fields);
/// The experts of Granite's page, in every layer.
void granite_experts(ModelConfig& model, FamilyFields& fields, Experts experts);
/// What Gemma 4's 26B-A4B has beside its MLPs; nothing where the config has no experts.
void gemma4_experts(ModelConfig& model, FamilyFields& fields);

// family_hybrid.cc
void lfm2(ModelConfig& model, FamilyFields& fields);
void qwen3_5(ModelConfig& model, FamilyFields& fields);
void qwen3_next(ModelConfig& model, FamilyFields& fields);
void nemotron_h(ModelConfig& model, FamilyFields& fields);
void lfm2_moe(ModelConfig& model, FamilyFields& fields);
void granitemoehybrid(ModelConfig& model, FamilyFields& fields);

// family_latent.cc
void deepseek(ModelConfig& model, FamilyFields& fields);
void glm4_moe_lite(ModelConfig& model, FamilyFields& fields);
void mistral4(ModelConfig& model, FamilyFields& fields);

/// Sliding layers have a RoPE of their own.
void rotate_sliding_layers(ModelConfig& model, Rope rope);
/// All layers have this RoPE.
void rotate_all_layers(ModelConfig& model, Rope rope);

/// A count that the config must have, and the identity keeps.
int count_of(FamilyFields& fields, const char* key);
/// Experts in the layers that `has` them. kInvalidArgument for numbers that can't be.
void check_experts(const Experts& experts);
template <typename Has>
void mix(ModelConfig& model, Experts experts, Has has) {
  check_experts(experts);
  const bool gelu = model.layers.front().mlp.activation == Activation::kGeluTanh;
  if (gelu && experts.activation == kernels::ExpertActivation::kSilu) {
    experts.activation = kernels::ExpertActivation::kGeluTanh;
  }
  for (size_t i = 0; i < model.layers.size(); ++i) {
    if (has(int(i))) model.layers[i].experts = experts;
  }
}

/// DeepSeek's mixture, as GLM and others have it too: a sigmoid or softmax over all experts, groups of experts, a bias
/// for the choice, shared experts, the first layers dense.
void deepseek_experts(ModelConfig& model, FamilyFields& fields);

}  // namespace torpor::model
