#include "model/gguf_names.h"

#include <map>
#include <string_view>

namespace torpor::model {
namespace {

/// A tensor's name within its layer, with what is behind the last dot or without.
using Names = std::map<std::string, std::string, std::less<>>;

const Names kModel = {{"token_embd", "embed_tokens"}, {"output_norm", "norm"}, {"token_embd_norm", "embedding_norm"},
                      {"per_layer_token_embd", "embed_tokens_per_layer"},
                      {"per_layer_model_proj", "per_layer_model_projection"},
                      {"per_layer_proj_norm", "per_layer_projection_norm"}};
const Names kLayer = {{"attn_norm", "input_layernorm"}, {"attn_q", "self_attn.q_proj"}, {"attn_k", "self_attn.k_proj"},
                      {"attn_v", "self_attn.v_proj"}, {"attn_qkv", "self_attn.qkv_proj"},
                      {"attn_q_norm", "self_attn.q_norm"}, {"attn_k_norm", "self_attn.k_norm"},
                      {"attn_output", "self_attn.o_proj"}, {"ffn_norm", "post_attention_layernorm"},
                      {"ffn_gate", "mlp.gate_proj"}, {"ffn_up", "mlp.up_proj"}, {"ffn_down", "mlp.down_proj"},
                      {"ffn_gate_inp", "mlp.gate"}, {"ffn_gate_exps", "mlp.switch_mlp.gate_proj"},
                      {"ffn_up_exps", "mlp.switch_mlp.up_proj"}, {"ffn_down_exps", "mlp.switch_mlp.down_proj"},
                      {"ffn_gate_up_exps", "mlp.switch_mlp.gate_up_proj"}};
const Names kMixtral = {{"ffn_gate_inp", "block_sparse_moe.gate"},
                        {"ffn_gate_exps", "block_sparse_moe.switch_mlp.gate_proj"},
                        {"ffn_up_exps", "block_sparse_moe.switch_mlp.up_proj"},
                        {"ffn_down_exps", "block_sparse_moe.switch_mlp.down_proj"},
                        {"ffn_gate_up_exps", "block_sparse_moe.switch_mlp.gate_up_proj"}};
const Names kGemma = {{"post_attention_norm", "post_attention_layernorm"},
                      {"ffn_norm", "pre_feedforward_layernorm"},
                      {"post_ffw_norm", "post_feedforward_layernorm"}};
const Names kGemma4 = {{"post_attention_norm", "post_attention_layernorm"},
                       {"ffn_norm", "pre_feedforward_layernorm"},
                       {"post_ffw_norm", "post_feedforward_layernorm"},
                       {"inp_gate", "per_layer_input_gate"},
                       {"proj", "per_layer_projection"},
                       {"post_norm", "post_per_layer_input_norm"},
                       {"layer_output_scale.weight", "layer_scalar"},
                       {"post_ffw_norm_1", "post_feedforward_layernorm_1"},
                       {"pre_ffw_norm_2", "pre_feedforward_layernorm_2"},
                       {"post_ffw_norm_2", "post_feedforward_layernorm_2"},
                       {"ffn_gate_inp", "router.proj"},
                       {"ffn_gate_inp.scale", "router.scale"},
                       {"ffn_down_exps.scale", "router.per_expert_scale"},
                       {"ffn_gate_exps", "experts.switch_glu.gate_proj"},
                       {"ffn_up_exps", "experts.switch_glu.up_proj"},
                       {"ffn_down_exps", "experts.switch_glu.down_proj"},
                       {"ffn_gate_up_exps", "experts.switch_glu.gate_up_proj"}};
const Names kGptOss = {{"post_attention_norm", "post_attention_layernorm"},
                       {"attn_sinks.weight", "self_attn.sinks"},
                       {"ffn_gate_inp", "mlp.router"},
                       {"ffn_gate_exps", "mlp.experts.gate_proj"},
                       {"ffn_up_exps", "mlp.experts.up_proj"},
                       {"ffn_down_exps", "mlp.experts.down_proj"}};
const Names kLfm2 = {{"attn_norm", "operator_norm"}, {"ffn_norm", "ffn_norm"},
                     {"attn_q_norm", "self_attn.q_layernorm"}, {"attn_k_norm", "self_attn.k_layernorm"},
                     {"attn_output", "self_attn.out_proj"}, {"ffn_gate", "feed_forward.w1"},
                     {"ffn_up", "feed_forward.w3"}, {"ffn_down", "feed_forward.w2"},
                     {"shortconv.conv", "conv.conv"}, {"shortconv.in_proj", "conv.in_proj"},
                     {"shortconv.out_proj", "conv.out_proj"}, {"ffn_gate_inp", "feed_forward.gate"},
                     {"exp_probs_b.bias", "feed_forward.expert_bias"},
                     {"ffn_gate_exps", "feed_forward.switch_mlp.gate_proj"},
                     {"ffn_up_exps", "feed_forward.switch_mlp.up_proj"},
                     {"ffn_down_exps", "feed_forward.switch_mlp.down_proj"},
                     {"ffn_gate_up_exps", "feed_forward.switch_mlp.gate_up_proj"}};
const Names kPhi3 = {{"ffn_up", "mlp.gate_up_proj"}};
const Names kQwen35 = {{"post_attention_norm", "post_attention_layernorm"}, {"attn_qkv", "linear_attn.in_proj_qkv"},
                       {"attn_gate", "linear_attn.in_proj_z"}, {"ssm_beta", "linear_attn.in_proj_b"},
                       {"ssm_alpha", "linear_attn.in_proj_a"}, {"ssm_conv1d", "linear_attn.conv1d"},
                       {"ssm_dt.bias", "linear_attn.dt_bias"}, {"ssm_a", "linear_attn.A_log"},
                       {"ssm_ba", "linear_attn.in_proj_ba"}, {"ssm_in", "linear_attn.in_proj_qkvz"},
                       {"ssm_norm", "linear_attn.norm"}, {"ssm_out", "linear_attn.out_proj"},
                       {"ffn_gate_inp_shexp", "mlp.shared_expert_gate"},
                       {"ffn_gate_shexp", "mlp.shared_expert.gate_proj"},
                       {"ffn_up_shexp", "mlp.shared_expert.up_proj"},
                       {"ffn_down_shexp", "mlp.shared_expert.down_proj"}};
const Names kNone;

const Names& names_of(std::string_view architecture) {
  static const std::map<std::string_view, const Names*> all = {
      {"gemma2", &kGemma}, {"gemma3", &kGemma}, {"gemma4", &kGemma4}, {"gpt-oss", &kGptOss}, {"lfm2", &kLfm2},
      {"lfm2moe", &kLfm2}, {"llama", &kMixtral}, {"phi3", &kPhi3}, {"qwen35", &kQwen35}, {"qwen35moe", &kQwen35},
      {"qwen3next", &kQwen35}};
  const auto known = all.find(architecture);
  return known == all.end() ? kNone : *known->second;
}

}  // namespace

std::optional<std::string> gguf_tensor_name(const GgufFile& metadata, const std::string& name) {
  const auto split = [](const std::string& text) {
    const size_t dot = text.rfind('.');
    return std::pair(text.substr(0, dot), dot);
  };
  if (name == "output.weight") return "lm_head.weight";
  const auto [stem, dot] = split(name);
  if (dot == std::string::npos) return std::nullopt;
  if (const auto known = kModel.find(stem); known != kModel.end()) return "model." + known->second + name.substr(dot);
  const size_t end = name.find('.', 4);
  if (!name.starts_with("blk.") || end == std::string::npos) return std::nullopt;
  const std::string layer = "model.layers." + name.substr(4, end - 4) + ".", whole = name.substr(end + 1);
  const auto [part, kind] = split(whole);
  for (const Names* names : {&names_of(metadata.text("general.architecture").value_or("")), &kLayer}) {
    if (const auto known = names->find(whole); known != names->end()) return layer + known->second;
    if (kind == std::string::npos) continue;
    if (const auto known = names->find(part); known != names->end()) return layer + known->second + whole.substr(kind);
  }
  return std::nullopt;
}

}  // namespace torpor::model
