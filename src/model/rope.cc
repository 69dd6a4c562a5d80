#include "model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include <nlohmann/json.hpp>

#include "base/hash.h"
#include "model/config_field.h"
#include "torpor/error.h"

namespace torpor::model {
namespace {

/// Wavelengths beyond the original context are stretched by `factor`, short ones stay, those between are blended.
double scale_llama3(double inv_freq, double factor, double low, double high, double original) {
  const double wavelength = 2 * std::numbers::pi / inv_freq;
  if (wavelength > original / low) return inv_freq / factor;
  if (wavelength <= original / high) return inv_freq;
  const double smooth = (original / wavelength - low) / (high - low);
  return inv_freq * ((1 - smooth) / factor + smooth);
}

/// One factor per rotated pair, or one for all.
std::vector<double> factors(const nlohmann::json& scaling, const char* key, size_t n) {
  const nlohmann::json* value = field(scaling, key);
  if (value != nullptr && value->is_number()) return std::vector<double>(n, value->get<double>());
  if (value == nullptr || !value->is_array() || value->size() != n ||
      !std::all_of(value->begin(), value->end(), [](const auto& f) { return f.is_number() && f > 0; })) {
    bad_field(key, "a list of positive numbers, one for each rotated pair of a head");
  }
  return value->get<std::vector<double>>();
}

/// Phi's: every frequency has a factor of its own. Those for long contexts serve all lengths, as in mlx-lm: a cache would not
/// survive a change of factors on the way.
void scale_longrope(const nlohmann::json& config, const nlohmann::json& scaling, std::vector<double>& inv_freq,
                    Rope& rope) {
  const std::vector<double> stretch = factors(scaling, "long_factor", inv_freq.size());
  for (size_t i = 0; i < inv_freq.size(); ++i) inv_freq[i] /= stretch[i];
  const double longest = positive_field(config, "max_position_embeddings", 131072);
  const double original = positive_field(scaling, "original_max_position_embeddings",
                                         positive_field(config, "original_max_position_embeddings", 4096));
  const double ratio = longest / original;
  const double magnitude = ratio > 1 ? std::sqrt(1 + std::log(ratio) / std::log(original)) : 1;
  rope.magnitude = float(positive_field(scaling, "attention_factor", magnitude));
  Hasher hasher;
  for (double factor : stretch) hasher.update_field(number_text(factor));
  rope.description += " factors " + hasher.hex() + " magnitude " + number_text(rope.magnitude);
}

/// [dims / 2]
std::vector<double> frequencies(double theta, int dims) {
  std::vector<double> inv_freq(size_t(dims / 2));
  for (size_t i = 0; i < inv_freq.size(); ++i) inv_freq[i] = std::pow(theta, -2.0 * double(i) / dims);
  return inv_freq;
}

/// transformers 5 writes one object, `rope_parameters`, for what used to be `rope_theta` and `rope_scaling`; or one for
/// each type of layer.
nlohmann::json scaling_of(const nlohmann::json& config, const char* layer_type) {
  nlohmann::json scaling = nlohmann::json::object();
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (const auto it = config.find(key); it != config.end() && it->is_object()) {
      const auto own = it->find(layer_type);
      scaling = own != it->end() && own->is_object() ? *own : *it;
    }
  }
  return scaling;
}

}  // namespace

Rope parse_rope(const nlohmann::json& config, int head_dim) {
  const nlohmann::json scaling = scaling_of(config, "full_attention");
  const double theta = number_field(scaling, "rope_theta", number_field(config, "rope_theta", 10000.0));
  std::string type = string_field(scaling, "rope_type", "default");
  type = string_field(scaling, "type", type);  // the older name, which mlx-lm prefers too
  if (!(theta > 0)) throw Error(ErrorCode::kInvalidArgument, "config.json: rope_theta must be positive.");

  const double partial =
      positive_field(scaling, "partial_rotary_factor", positive_field(config, "partial_rotary_factor", 1.0));
  Rope rope;
  rope.dims = int(head_dim * partial);
  if (partial > 1 || rope.dims < 2 || rope.dims % 2 != 0) {
    bad_field("partial_rotary_factor", "at most 1, and such that an even number of a head's dims rotates");
  }
  rope.traditional = bool_field(config, "rope_traditional", false);
  rope.description = type + " theta " + number_text(theta);
  if (rope.traditional) rope.description += " traditional";

  if (rope.dims != head_dim) rope.description += " dims " + std::to_string(rope.dims);

  std::vector<double> inv_freq = frequencies(theta, rope.dims);

  if (type == "linear") {
    const double factor = positive_field(scaling, "factor");
    for (double& f : inv_freq) f /= factor;
    rope.context_factor = factor;
    rope.description += " factor " + number_text(factor);
  } else if (type == "llama3") {
    const double factor = positive_field(scaling, "factor");
    const double low = positive_field(scaling, "low_freq_factor", 1.0);
    const double high = positive_field(scaling, "high_freq_factor", 4.0);
    const double original = positive_field(scaling, "original_max_position_embeddings", 8192);
    if (!(high > low)) {
      throw Error(ErrorCode::kInvalidArgument, "config.json: high_freq_factor must be greater than low_freq_factor.");
    }
    for (double& f : inv_freq) f = scale_llama3(f, factor, low, high, original);
    rope.description += " factor " + number_text(factor) + " low " + number_text(low) + " high " + number_text(high) +
                        " original " + number_text(original);
  } else if (type == "longrope" || type == "su") {
    scale_longrope(config, scaling, inv_freq, rope);
  } else if (type != "default") {
    throw Error(ErrorCode::kInvalidArgument,
                "config.json: unsupported RoPE type " + type + ", supported: default, linear, llama3, longrope.");
  }
  rope.inv_freq.assign(inv_freq.begin(), inv_freq.end());
  return rope;
}

Rope parse_local_rope(const nlohmann::json& config, int head_dim) {
  const nlohmann::json* parameters = field(config, "rope_parameters");
  const nlohmann::json* own = parameters == nullptr ? nullptr : field(*parameters, "sliding_attention");
  double theta = positive_field(config, "rope_local_base_freq", 10000);
  if (own != nullptr) theta = positive_field(*own, "rope_theta", theta);
  const std::vector<double> inv_freq = frequencies(theta, head_dim);
  return {.dims = head_dim, .inv_freq = {inv_freq.begin(), inv_freq.end()},
          .description = "default theta " + number_text(theta)};
}

}  // namespace torpor::model
