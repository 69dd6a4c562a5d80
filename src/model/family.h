#pragma once
/// The model types that are known, and what their configs leave unsaid.

#include <string>

#include <nlohmann/json_fwd.hpp>

namespace torpor::model {

struct Family {
  const char* model_type;
  const char* architecture;   ///< whose forward pass computes it
  const char* weight_prefix;  ///< ModelConfig::weight_prefix
  const char* defaults;       ///< JSON: what mlx-lm takes absent fields for, where not every family does so (Gemma 3's context: transformers)
};

/// kInvalidArgument ("unsupported architecture X, supported: ...") for a type that is not known.
const Family& find_family(const std::string& model_type);

/// The config.json of the text model with the family's defaults filled in. A vision-language config has it inside.
nlohmann::json complete(const nlohmann::json& config, const Family& family);

}  // namespace torpor::model
