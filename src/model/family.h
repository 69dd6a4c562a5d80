#pragma once
/// The model types that are known: what their configs leave unsaid, and a page that composes their layers of parts.

#include <set>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "model/config.h"

namespace torpor::model {

/// What a page reads of the text model's config.json beyond what all families have. What it says shapes the
/// computation, so it goes
/// into the identity.
class FamilyFields {
 public:
  explicit FamilyFields(const nlohmann::json& config) : config_(config) {}

  const nlohmann::json& config() const { return config_; }
  /// A positive number.
  float number(const char* key, double absent);
  /// A number of things; absent: none.
  int count(const char* key);
  /// Indices of layers; absent: none.
  std::vector<int> indices(const char* key);
  /// Kinds of layers, one each; absent: none.
  std::vector<std::string> kinds(const char* key);
  bool flag(const char* key, bool absent);
  std::string text(const char* key, const std::string& absent);
  /// Two numbers, the lower one first; the last one may be infinite, which JSON writes as null.
  std::pair<float, float> limits(const char* key, std::pair<float, float> absent);
  /// The family computes what the field says; another part of the identity says it, too.
  void accept(const char* key) { read_.insert(key); }
  /// What a page has read by itself, for the identity.
  void says(const char* key, const std::string& value) { values_.emplace_back(key, value); }

  bool was_read(const char* key) const { return read_.contains(key); }
  /// ModelConfig::family_fields.
  const std::vector<std::pair<std::string, std::string>>& values() const { return values_; }

 private:
  const nlohmann::json& config_;
  std::set<std::string> read_;
  std::vector<std::pair<std::string, std::string>> values_;
};

struct Family {
  const char* model_type;
  const char* architecture;   ///< of the identity
  const char* weight_prefix;  ///< ModelConfig::weight_prefix; not empty: a vision-language checkpoint, the text model is inside
  const char* defaults;       ///< JSON: what mlx-lm takes absent fields for, where not every family does so (Gemma 3's context: transformers)
  /// Makes of plain pre-norm layers, as the common fields have them, this family's.
  void (*page)(ModelConfig& model, FamilyFields& fields);
  bool slides_everywhere = false;  ///< a sliding_window counts for every layer, where no field says for which
  bool mlx_lm_rotates = false;     ///< mlx_lm_rotates_windows
  bool hybrid = false;             ///< the page says what kinds of layers there are, and how large their MLPs
};

struct TextModel {
  const Family* family;       ///< of the text model
  const char* weight_prefix;  ///< of the checkpoint
  nlohmann::json config;      ///< of the text model, with its family's defaults filled in
};

/// mlx_lm_rotates_windows.
bool rotates_windows_in_mlx_lm(const std::string& architecture);

/// The text model of a config.json. A vision-language config has it inside. kInvalidArgument ("unsupported
/// architecture X,
/// supported: ...") for a type that is not known.
TextModel text_model_of(const nlohmann::json& config);

}  // namespace torpor::model
