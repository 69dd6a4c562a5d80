#pragma once
/// Arguments of a call between tags, each key and value with its own (GLM, Qwen3-Coder), as a grammar. Strings stand
/// there without quotes, other values as JSON. No engine knows that, so schemas are turned into rules here.

#include <string>

#include "server/chat.h"

namespace torpor::server {

/// How a key and its value are written. All but `text` are right sides of rules.
struct ArgumentTags {
  std::string open;   ///< before a key
  std::string key;    ///< between a key and its value
  std::string space;  ///< what may stand around values that are no text, and between arguments
  std::string text;   ///< the name of a rule: any text, and the tag that closes a value
  std::string close;  ///< that tag
  std::string keys;   ///< a key that no schema names
};

/// Rules of llguidance's Lark for the arguments that one schema allows: those declared, in their order.
class TaggedArguments {
 public:
  /// `prefix` begins the names of all rules. With `strict` a keyword that can't be held to is a Failure that names it;
  /// else it is left out.
  TaggedArguments(Json schema, bool strict, std::string prefix, ArgumentTags tags);

  /// The rule's right side; may be empty.
  const std::string& value() const { return value_; }
  /// Those that it needs, each with its end of line.
  const std::string& rules() const { return rules_; }

 private:
  std::string all();
  /// A value with the tag that closes it, and what stands before it.
  std::string closed(const Json& schema);
  /// A value as JSON.
  std::string json(const Json& schema) const;
  std::string add_rule(const std::string& right);
  /// Failure, where the schema is a promise.
  void refuse(const std::string& keyword) const;

  const Json root_;
  const bool strict_;
  const std::string prefix_;
  const ArgumentTags tags_;
  std::string rules_;
  int count_ = 0;
  std::string value_;  // last: it is made of the others
};

}  // namespace torpor::server
