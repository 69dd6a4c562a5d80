#include "model/rope.h"

#include <cmath>
#include <numbers>

#include <nlohmann/json.hpp>

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

}  // namespace

Rope parse_rope(const nlohmann::json& config, int head_dim) {
  // transformers 5 writes one object, `rope_parameters`, for what used to be `rope_theta` and `rope_scaling`.
  nlohmann::json scaling = nlohmann::json::object();
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (auto it = config.find(key); it != config.end() && it->is_object()) scaling = *it;
  }
  const double theta = number_field(scaling, "rope_theta", number_field(config, "rope_theta", 10000.0));
  std::string type = string_field(scaling, "rope_type", "default");
  type = string_field(scaling, "type", type);  // the older name, which mlx-lm prefers too
  if (!(theta > 0)) throw Error(ErrorCode::kInvalidArgument, "config.json: rope_theta must be positive.");

  Rope rope;
  rope.dims = head_dim;
  rope.traditional = bool_field(config, "rope_traditional", false);
  rope.description = type + " theta " + number_text(theta);
  if (rope.traditional) rope.description += " traditional";

  std::vector<double> inv_freq(size_t(head_dim / 2));
  for (size_t i = 0; i < inv_freq.size(); ++i) inv_freq[i] = std::pow(theta, -2.0 * double(i) / head_dim);

  if (type == "linear") {
    const double factor = positive_field(scaling, "factor");
    for (double& f : inv_freq) f /= factor;
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
  } else if (type != "default") {
    throw Error(ErrorCode::kInvalidArgument,
                "config.json: unsupported RoPE type " + type + ", supported: default, linear, llama3.");
  }
  rope.inv_freq.assign(inv_freq.begin(), inv_freq.end());
  return rope;
}

}  // namespace torpor::model
