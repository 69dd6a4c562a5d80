#pragma once
/// Fields of a config.json, with one sentence when one has the wrong type. A null counts as absent, as Hugging Face
/// writes it.

#include <charconv>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include <nlohmann/json.hpp>

#include "torpor/error.h"

namespace torpor::model {

[[noreturn]] inline void bad_field(const char* key, const char* expected) {
  throw Error(ErrorCode::kInvalidArgument, std::string("config.json: ") + key + " must be " + expected + ".");
}

inline const nlohmann::json* field(const nlohmann::json& object, const char* key) {
  const auto it = object.find(key);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

/// An integer from 1 to 2^31 - 1.
inline std::optional<int> optional_count(const nlohmann::json& object, const char* key) {
  const nlohmann::json* value = field(object, key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_number_integer() || *value < 1 || *value > std::numeric_limits<int>::max()) {
    bad_field(key, "a positive integer");
  }
  return value->get<int>();
}

inline int count_field(const nlohmann::json& object, const char* key) {
  const std::optional<int> value = optional_count(object, key);
  if (!value) throw Error(ErrorCode::kInvalidArgument, std::string("config.json has no ") + key + ".");
  return *value;
}

inline double number_field(const nlohmann::json& object, const char* key, double otherwise) {
  const nlohmann::json* value = field(object, key);
  if (value == nullptr) return otherwise;
  if (!value->is_number()) bad_field(key, "a number");
  return value->get<double>();
}

inline double positive_field(const nlohmann::json& object, const char* key, double otherwise = 0) {
  const double value = number_field(object, key, otherwise);
  if (!(value > 0)) bad_field(key, "a positive number");
  return value;
}

inline bool bool_field(const nlohmann::json& object, const char* key, bool otherwise) {
  const nlohmann::json* value = field(object, key);
  if (value == nullptr) return otherwise;
  if (!value->is_boolean()) bad_field(key, "true or false");
  return value->get<bool>();
}

inline std::string string_field(const nlohmann::json& object, const char* key, const std::string& otherwise) {
  const nlohmann::json* value = field(object, key);
  if (value == nullptr) return otherwise;
  if (!value->is_string()) bad_field(key, "a string");
  return value->get<std::string>();
}

/// Shortest text that reads back as the same number.
inline std::string number_text(double value) {
  char text[32];
  const auto result = std::to_chars(text, text + sizeof(text), value, std::chars_format::general);
  return {text, result.ptr};
}

}  // namespace torpor::model
