#pragma once
/// Members of a JSON body, with the paths by which errors name them.

#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "server/chat.h"
#include "server/http.h"

namespace torpor::server {

/// The body as a JSON object. Failure kInvalid when it is none, is no UTF-8, or is nested deeper than 100 levels.
Json parse_body(const HttpRequest& request);

/// A value inside a body, or its absence; null is absence. A view: the body must outlive it. What has the wrong type,
/// or lies outside the bounds, throws Failure kInvalid with the path as `param`.
class Field {
 public:
  explicit Field(const Json& body) : value_(&body) {}

  bool present() const { return value_ != nullptr; }
  explicit operator bool() const { return present(); }
  /// "messages[2].content"; empty: the body itself.
  const std::string& path() const { return path_; }
  const Json& json() const { return *value_; }
  bool is_string() const { return value_ && value_->is_string(); }
  bool is_array() const { return value_ && value_->is_array(); }
  bool is_object() const { return value_ && value_->is_object(); }

  /// A member of this object. Absent when this is.
  Field operator[](std::string_view key) const;
  /// The elements of this array. None when absent.
  std::vector<Field> items() const;

  std::optional<std::string> string() const;
  std::optional<bool> boolean() const;
  std::optional<int> integer(int least = std::numeric_limits<int>::min(),
                             int most = std::numeric_limits<int>::max()) const;
  std::optional<double> number(double least = std::numeric_limits<double>::lowest(),
                               double most = std::numeric_limits<double>::max()) const;
  /// This object as JSON; nullopt when absent.
  std::optional<Json> object() const;
  std::string required_string() const;

  /// The Failure that says: `path` must be `what`.
  Failure wrong(const std::string& what) const;
  /// The Failure that says: this is not served, and what to do.
  Failure unserved(const std::string& advice) const;

 private:
  Field(const Json* value, std::string path) : value_(value), path_(std::move(path)) {}

  const Json* value_ = nullptr;
  std::string path_;
};

}  // namespace torpor::server
