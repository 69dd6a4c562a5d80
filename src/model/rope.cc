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

/// YaRN: dims that turn `fast` times or more within the original context stay, those that turn `slow` times or less
/// are stretched by
/// `factor`, those between are blended. As transformers has it: mlx-lm rounds the bounds though `truncate` is false,
/// and takes
/// the magnitude of the factor where there is an `attention_factor`.
void scale_yarn(const nlohmann::json& config, const nlohmann::json& scaling, std::vector<double>& inv_freq, Rope& rope) {
  const double factor = positive_field(scaling, "factor");
  const double original = positive_field(scaling, "original_max_position_embeddings",
                                         positive_field(config, "original_max_position_embeddings", 4096));
  const double fast = positive_field(scaling, "beta_fast", 32), slow = positive_field(scaling, "beta_slow", 1);
  const bool truncate = bool_field(scaling, "truncate", true);
  if (!(rope.theta > 1)) bad_field("rope_theta", "greater than 1 for the RoPE type yarn");
  const double last = rope.dims - 1;
  const auto dim_that_turns = [&](double times) {
    return rope.dims * std::log(original / (times * 2 * std::numbers::pi)) / (2 * std::log(rope.theta));
  };
  double low = dim_that_turns(fast), high = dim_that_turns(slow);
  if (truncate) low = std::floor(low), high = std::ceil(high);
  low = std::max(low, 0.0);
  high = std::min(high, last);
  if (low == high) high += 0.001;
  for (size_t i = 0; i < inv_freq.size(); ++i) {
    const double stretched = std::clamp((double(i) - low) / (high - low), 0.0, 1.0);
    inv_freq[i] *= 1 - stretched + stretched / factor;
  }
  const auto magnitude = [&](double scale) { return factor <= 1 ? 1.0 : 0.1 * scale * std::log(factor) + 1; };
  const double all = number_field(scaling, "mscale_all_dim", 0), own = number_field(scaling, "mscale", 0);
  const double ratio = all != 0 && own != 0 ? magnitude(own) / magnitude(all) : magnitude(1);
  rope.magnitude = float(positive_field(scaling, "attention_factor", ratio));
  rope.context_factor = std::max(1.0, original * factor / positive_field(config, "max_position_embeddings", 2048));
  rope.description += " factor " + number_text(factor) + " original " + number_text(original) + " beta " + number_text(fast) +
                      " " + number_text(slow) + (truncate ? "" : " exact") + " magnitude " + number_text(rope.magnitude);
}

/// [dims / 2]
std::vector<double> frequencies(double theta, int dims) {
  std::vector<double> inv_freq(size_t(dims / 2));
  for (size_t i = 0; i < inv_freq.size(); ++i) inv_freq[i] = std::pow(theta, -2.0 * double(i) / dims);
  return inv_freq;
}

}  // namespace

nlohmann::json rope_fields(const nlohmann::json& config) {
  nlohmann::json fields = nlohmann::json::object();
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (const auto it = config.find(key); it != config.end() && it->is_object()) {
      const auto own = it->find("full_attention");
      fields = own != it->end() && own->is_object() ? *own : *it;
    }
  }
  return fields;
}

Rope parse_rope(const nlohmann::json& config, int head_dim) {
  const nlohmann::json scaling = rope_fields(config);
  const double theta = number_field(scaling, "rope_theta", number_field(config, "rope_theta", 10000.0));
  std::string type = string_field(scaling, "rope_type", "default");
  type = string_field(scaling, "type", type);  // the older name, which mlx-lm prefers too
  if (!(theta > 0)) throw Error(ErrorCode::kInvalidArgument, "config.json: rope_theta must be positive.");

  const double partial =
      positive_field(scaling, "partial_rotary_factor", positive_field(config, "partial_rotary_factor", 1.0));
  const int rotated = int(head_dim * partial);
  Rope rope;
  rope.theta = theta;
  rope.dims = type == "proportional" ? head_dim : rotated;  // pairs are of the whole head there
  if (partial > 1 || rotated < 2 || rotated % 2 != 0) {
    bad_field("partial_rotary_factor", "at most 1, and such that an even number of a head's dims rotates");
  }
  rope.traditional = bool_field(config, "rope_traditional", false);
  rope.description = type + " theta " + number_text(theta);
  if (rope.traditional) rope.description += " traditional";

  if (rotated != head_dim) rope.description += " dims " + std::to_string(rotated);

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
  } else if (type == "yarn") {
    scale_yarn(config, scaling, inv_freq, rope);
  } else if (type == "proportional") {
    const double factor = positive_field(scaling, "factor", 1);
    for (double& f : inv_freq) f /= factor;
    std::fill(inv_freq.begin() + rotated / 2, inv_freq.end(), 0.0);
    if (factor != 1) rope.description += " factor " + number_text(factor);
  } else if (type != "default" && type != "mrope") {  // three axes, which are one in a text
    throw Error(ErrorCode::kInvalidArgument, "config.json: unsupported RoPE type " + type +
                                                 ", supported: default, linear, llama3, longrope, yarn, proportional, "
                                                 "mrope.");
  }
  rope.inv_freq.assign(inv_freq.begin(), inv_freq.end());
  return rope;
}

Rope parse_local_rope(const nlohmann::json& config, int head_dim, double theta) {
  const nlohmann::json* parameters = field(config, "rope_parameters");
  const nlohmann::json* own = parameters == nullptr ? nullptr : field(*parameters, "sliding_attention");
  theta = positive_field(config, "rope_local_base_freq", theta);
  if (own != nullptr) {
    theta = positive_field(*own, "rope_theta", theta);
    const std::string type = string_field(*own, "rope_type", "default");
    if (type != "default" || positive_field(*own, "partial_rotary_factor", 1) != 1) {
      throw Error(ErrorCode::kInvalidArgument, "config.json: unsupported RoPE of sliding layers (type " + type +
                                                   "), supported: default, of whole heads.");
    }
  }
  const std::vector<double> inv_freq = frequencies(theta, head_dim);
  return {.dims = head_dim, .inv_freq = {inv_freq.begin(), inv_freq.end()}, .theta = theta,
          .description = "default theta " + number_text(theta)};
}

}  // namespace torpor::model
