/// Pages of families with latent attention, all of them with DeepSeek's mixture of experts.

#include <cmath>
#include <utility>

#include "model/config_field.h"
#include "model/family_pages.h"

namespace torpor::model {

using nlohmann::json;

/// What all of them have. `norm_eps` is that of the norms within attention.
static void share_latents(ModelConfig& model, FamilyFields& fields, float norm_eps) {
  const int rank = count_of(fields, "kv_lora_rank"), rotating = count_of(fields, "qk_rope_head_dim");
  Latent latent{.query_rank = fields.count("q_lora_rank"), .plain_dim = count_of(fields, "qk_nope_head_dim"),
                .output_dim = count_of(fields, "v_head_dim"), .norm_eps = norm_eps, .bias = model.attention_bias};
  constexpr int kMost = 1 << 14;
  for (const auto& [key, value] : {std::pair{"kv_lora_rank", rank}, {"qk_rope_head_dim", rotating},
                                   {"q_lora_rank", latent.query_rank}, {"qk_nope_head_dim", latent.plain_dim},
                                   {"v_head_dim", latent.output_dim}}) {
    if (value > kMost) bad_field(key, "at most 2^14");
  }
  if (rotating % 2 != 0) bad_field("qk_rope_head_dim", "even");
  if (rank % 16 != 0 || rank < rotating) bad_field("kv_lora_rank", "a multiple of 16, and at least qk_rope_head_dim");
  json config = fields.config();
  config.erase("partial_rotary_factor");
  config["rope_traditional"] = bool_field(config, "rope_interleave", true);
  rotate_all_layers(model, parse_rope(config, rotating));
  // What yarn multiplies keys and queries by, it divides by mscale_all_dim's part: scores have that.
  const json rope = rope_fields(config);
  const double all = number_field(rope, "mscale_all_dim", 0), factor = number_field(rope, "factor", 1);
  const double magnitude = all != 0 && factor > 1 ? 0.1 * all * std::log(factor) + 1 : 1;
  for (LayerSpec& layer : model.layers) {
    Attention& attention = layer.attention;
    attention.latent = latent;
    attention.n_kv_heads = 1;
    attention.key_dim = rank;
    attention.value_dim = rotating;
    attention.scale = float(magnitude * magnitude / std::sqrt(double(latent.plain_dim) + rotating));
    attention.output_bias = model.attention_bias;
  }
}

/// DeepSeek V2 and V3: norms within attention have an epsilon of their own.
void deepseek(ModelConfig& model, FamilyFields& fields) {
  share_latents(model, fields, 1e-6f);
  deepseek_experts(model, fields);
}

/// GLM 4.7 Flash.
void glm4_moe_lite(ModelConfig& model, FamilyFields& fields) {
  share_latents(model, fields, model.norm_eps);
  deepseek_experts(model, fields);
}

/// Mistral Small 4: queries are scaled by their position, too.
void mistral4(ModelConfig& model, FamilyFields& fields) {
  deepseek(model, fields);
  ministral3(model, fields);
}

}  // namespace torpor::model
