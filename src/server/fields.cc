#include "server/fields.h"

#include <cmath>

namespace torpor::server {
namespace {

constexpr int kDeepest = 100;  // dump and compare recurse: a deeper body could exhaust the stack

}  // namespace

Json parse_body(const HttpRequest& request) {
  bool too_deep = false;
  try {
    Json body = parse_json<Json>(request.body, [&](int depth, Json::parse_event_t, Json&) {
      if (depth > kDeepest) too_deep = true;
      return !too_deep;
    });
    if (too_deep) {
      throw Failure(Failure::Kind::kInvalid, "The body is nested deeper than " + std::to_string(kDeepest) + " levels.");
    }
    if (!body.is_object()) throw Failure(Failure::Kind::kInvalid, "The body must be a JSON object.");
    return body;
  } catch (const nlohmann::json::exception& error) {
    // What comes before "] " names the library's own kind of error.
    const std::string said = error.what();
    const size_t begin = said.find("] ");
    throw Failure(Failure::Kind::kInvalid,
                  "The body is no valid JSON: " + (begin == std::string::npos ? said : said.substr(begin + 2)) + ".");
  }
}

Field Field::operator[](std::string_view key) const {
  std::string path = path_.empty() ? std::string(key) : path_ + "." + std::string(key);
  if (!value_) return Field(nullptr, std::move(path));
  if (!value_->is_object()) throw wrong("an object");
  const auto found = value_->find(std::string(key));
  if (found == value_->end() || found->is_null()) return Field(nullptr, std::move(path));
  return Field(&*found, std::move(path));
}

std::vector<Field> Field::items() const {
  std::vector<Field> items;
  if (!value_) return items;
  if (!value_->is_array()) throw wrong("an array");
  for (size_t i = 0; i < value_->size(); ++i) {
    const Json& item = (*value_)[i];
    items.push_back(Field(item.is_null() ? nullptr : &item, path_ + "[" + std::to_string(i) + "]"));
  }
  return items;
}

std::optional<std::string> Field::string() const {
  if (!value_) return std::nullopt;
  if (!value_->is_string()) throw wrong("a string");
  return value_->get<std::string>();
}

std::string Field::required_string() const {
  if (!value_) throw wrong("a string");
  return *string();
}

std::optional<bool> Field::boolean() const {
  if (!value_) return std::nullopt;
  if (!value_->is_boolean()) throw wrong("true or false");
  return value_->get<bool>();
}

std::optional<double> Field::number(double least, double most) const {
  if (!value_) return std::nullopt;
  if (!value_->is_number()) throw wrong("a number");
  const double number = value_->get<double>();
  if (!std::isfinite(number) || number < least || number > most) {
    std::string bounds = "a number";
    if (least != std::numeric_limits<double>::lowest()) bounds += " of at least " + dump_json(Json(least));
    if (most != std::numeric_limits<double>::max()) bounds += " and at most " + dump_json(Json(most));
    throw wrong(bounds);
  }
  return number;
}

std::optional<int> Field::integer(int least, int most) const {
  const auto number = this->number();
  if (!number) return std::nullopt;
  if (*number != std::floor(*number)) throw wrong("a whole number");
  if (*number < least || *number > most) {
    std::string bounds = "a whole number";
    if (least != std::numeric_limits<int>::min()) bounds += " of at least " + std::to_string(least);
    bounds += " and at most " + std::to_string(most);
    throw wrong(bounds);
  }
  return int(*number);
}

std::optional<Json> Field::object() const {
  if (!value_) return std::nullopt;
  if (!value_->is_object()) throw wrong("an object");
  return *value_;
}

Failure Field::wrong(const std::string& what) const {
  return Failure(Failure::Kind::kInvalid, "'" + path_ + "' must be " + what + ".", path_);
}

Failure Field::unserved(const std::string& advice) const {
  return Failure(Failure::Kind::kInvalid, "'" + path_ + "' is not served here; " + advice + ".", path_);
}

}  // namespace torpor::server
