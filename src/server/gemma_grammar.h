#pragma once
/// Gemma's way of writing a call's arguments, as a grammar: JSON but for strings, which stand between marks, and
/// keys, which stand
/// bare. No engine knows it, so schemas are turned into rules here.

#include <map>
#include <string>

#include "server/chat.h"

namespace torpor::server {

/// Rules of llguidance's Lark for the values of one schema.
class GemmaValues {
 public:
  /// `quote`: the mark's rule; `string`: the rule of what follows it, the closing mark included. `prefix` begins the
  /// names of all
  /// rules. With `strict` a keyword that can't be held to is a Failure that names it; else it is left out.
  GemmaValues(Json schema, bool strict, std::string prefix, std::string quote, std::string string);

  /// The rule's right side.
  const std::string& value() const { return value_; }
  /// Those that it needs, each with its end of line.
  const std::string& rules() const { return rules_; }

 private:
  std::string of(const Json& schema);
  std::string of_type(const Json& schema, const std::string& type);
  std::string object(const Json& schema);
  std::string array(const Json& schema);
  std::string literal(const Json& value) const;
  std::string key(const std::string& name) const;
  /// Any value.
  std::string any();
  std::string reference(const std::string& pointer);
  std::string add_rule(const std::string& right);
  /// Failure, where the schema is a promise.
  void refuse(const std::string& keyword) const;
  void refuse_unheld(const Json& schema) const;

  const Json root_;
  const bool strict_;
  const std::string prefix_, quote_, string_;
  std::string rules_, any_;
  std::map<std::string, std::string> references_;  // their rules' names
  int count_ = 0;
  std::string value_;  // last: it is made of the others
};

}  // namespace torpor::server
