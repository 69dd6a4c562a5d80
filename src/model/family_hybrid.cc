/// Families in which layers that keep a state take turns with attention.

#include <algorithm>
#include <array>

#include "model/config_field.h"
#include "model/family.h"
#include "torpor/error.h"

namespace torpor::model {
namespace {

using nlohmann::json;
using kernels::Recurrence;

constexpr int kLimit = 1 << 24;

/// A count that the identity keeps, from 1 to `most`.
int count_of(FamilyFields& fields, const char* key, int most) {
  if (count_field(fields.config(), key) > most) bad_field(key, ("at most " + std::to_string(most)).c_str());
  return fields.count(key);
}

int convolution_taps(FamilyFields& fields, const char* key) {
  const int taps = count_of(fields, key, 1024);
  if (taps < 2) bad_field(key, "at least 2");
  return taps;
}

/// Layers of which `attends` is false have `recurrent` in attention's place.
template <typename Attends>
void put_in_place(ModelConfig& model, const Recurrent& recurrent, Attends attends) {
  bool any = false;
  for (size_t i = 0; i < model.layers.size(); ++i) {
    if (attends(i)) {
      any = true;
    } else {
      model.layers[i].recurrent = recurrent;
    }
  }
  if (!any) throw Error(ErrorCode::kInvalidArgument, "config.json: no layer attends, which is not supported.");
}

/// Whether each layer is of the kind `name`, of the kinds that a list has.
std::vector<bool> of_kind(const ModelConfig& model, const std::vector<std::string>& kinds, const char* key,
                          std::initializer_list<const char*> known, const char* name) {
  if (kinds.size() != model.layers.size()) bad_field(key, "a list with one entry per layer");
  std::vector<bool> is;
  for (const std::string& kind : kinds) {
    if (std::ranges::find(known, kind) == known.end()) {
      throw Error(ErrorCode::kInvalidArgument, "config.json: " + std::string(key) + " has a layer of the kind '" + kind +
                                                   "', which is not supported.");
    }
    is.push_back(kind == name);
  }
  return is;
}

}  // namespace

/// Short convolutions; norms on heads of q and k; a last norm of another name.
void lfm2(ModelConfig& model, FamilyFields& fields) {
  const json& config = fields.config();
  model.norm_eps = fields.number("norm_eps", 1e-5);
  model.final_norm = "embedding_norm";
  model.names = {.attention_norm = "operator_norm", .mlp_norm = "ffn_norm", .recurrent = "conv", .output = "out_proj",
                 .q_norm = "q_layernorm", .k_norm = "k_layernorm", .mlp = "feed_forward", .mlp_parts = {"w1", "w3", "w2"}};

  int64_t size = optional_count(config, "block_ff_dim").value_or(model.layers.front().mlp.size);
  if (fields.flag("block_auto_adjust_ff_dim", true)) {
    const double factor = positive_field(config, "block_ffn_dim_multiplier", 1);
    const int multiple = optional_count(config, "block_multiple_of").value_or(256);
    size = int64_t(std::min(factor * double(2 * size / 3), double(kLimit)));
    size = (size + multiple - 1) / multiple * multiple;
  }
  if (size > kLimit) bad_field("block_ff_dim", "such that an MLP has at most 2^24 features");

  Recurrent conv{.shape = {.kind = Recurrence::kShortConv, .taps = convolution_taps(fields, "conv_L_cache"),
                           .value_dim = model.hidden_size}};
  conv.conv_bias = conv.bias = fields.flag("conv_bias", false);
  for (LayerSpec& layer : model.layers) {
    layer.mlp.size = int(size);
    layer.attention.qk_norm = QkNorm::kHeads;
  }
  const std::vector<int> attending = fields.indices("full_attn_idxs");
  const std::vector<std::string> kinds = fields.kinds("layer_types");
  if (!attending.empty()) {
    put_in_place(model, conv, [&](size_t i) { return std::ranges::find(attending, int(i)) != attending.end(); });
  } else {
    const std::vector<bool> attends = of_kind(model, kinds, "layer_types", {"conv", "full_attention"}, "full_attention");
    put_in_place(model, conv, [&](size_t i) { return attends[i]; });
  }
}

}  // namespace torpor::model
