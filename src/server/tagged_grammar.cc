#include "server/tagged_grammar.h"

#include <algorithm>
#include <utility>

#include "server/call_syntax.h"

namespace torpor::server {
namespace {

std::string lark_string(const std::string& text) { return to_text(Json(text)); }

/// Keywords that say something of all arguments together, and are not held to.
constexpr const char* kUnheldOfAll[] = {"$ref", "const", "enum", "anyOf", "oneOf", "allOf", "not", "if", "then", "else",
                                        "dependencies", "dependentRequired", "dependentSchemas", "patternProperties",
                                        "propertyNames", "minProperties", "maxProperties", "unevaluatedProperties"};
/// Keywords that say something of a text, and are not held to.
constexpr const char* kUnheldOfTexts[] = {"pattern", "format", "minLength", "maxLength", "not", "if", "then", "else",
                                          "$ref", "anyOf", "oneOf", "allOf"};

/// Bytes of rules. Each value with references has a copy of the whole schema.
constexpr size_t kMostRules = size_t(4) << 20;

/// Where the root stands in the document of one value.
constexpr const char* kRoot = "root";

/// Makes references to the root's parts such to the document's.
void refer(Json& json) {
  if (json.is_object()) {
    const auto to = json.find("$ref");
    if (to != json.end() && to->is_string() && to->get_ref<const std::string&>().starts_with('#'))
      *to = "#/$defs/" + std::string(kRoot) + to->get_ref<const std::string&>().substr(1);
  }
  for (auto& [key, value] : json.items()) {
    if (value.is_structured()) refer(value);
  }
}

}  // namespace

TaggedArguments::TaggedArguments(Json schema, bool strict, std::string prefix, ArgumentTags tags)
    : root_(schema.is_object() ? std::move(schema) : Json::object()), strict_(strict), prefix_(std::move(prefix)),
      tags_(std::move(tags)), value_(all()) {}

void TaggedArguments::refuse(const std::string& keyword) const {
  if (!strict_) return;
  throw Failure(Failure::Kind::kInvalid,
                "No answer of this model can be held to the tools: nothing holds to the keyword '" + keyword + "'.",
                "tools");
}

std::string TaggedArguments::add_rule(const std::string& right) {
  if (rules_.size() + right.size() > kMostRules) {
    throw Failure(Failure::Kind::kInvalid,
                  "No answer of this model can be held to the tools: a schema is too large, with references in too "
                  "many properties; make several tools of it.",
                  "tools");
  }
  const std::string name = prefix_ + "_" + std::to_string(count_++);
  rules_ += name + ": " + right + "\n";
  return name;
}

std::string TaggedArguments::json(const Json& schema) const {
  Json document = schema;
  if (to_text(schema).find("\"$ref\"") != std::string::npos) {
    // References point into the root, which is a part of the document then.
    Json root = root_;
    refer(document);
    refer(root);
    document["$defs"] = Json{{kRoot, std::move(root)}};
  }
  if (!strict_) document["x-guidance"] = {{"lenient", true}};
  return "%json " + to_text(document);
}

std::string TaggedArguments::closed(const Json& schema) {
  const BareStrings strings = bare_strings(schema, root_);
  if (strings.any) {
    for (const char* keyword : kUnheldOfTexts) {
      if (schema.is_object() && schema.contains(keyword)) refuse(keyword);
    }
    return tags_.text;
  }
  std::string values;
  for (const std::string& text : strings.texts) values += (values.empty() ? "" : " | ") + lark_string(text);
  if (strings.others) values += (values.empty() ? "" : " | ") + add_rule(json(schema));
  return tags_.space + " (" + values + ") " + tags_.space + " " + tags_.close;
}

std::string TaggedArguments::all() {
  for (const char* keyword : kUnheldOfAll) {
    if (root_.contains(keyword)) refuse(keyword);
  }
  const Json properties = root_.value("properties", Json::object()), required = root_.value("required", Json::array());
  const auto argument = [&](const std::string& name, const Json& schema) {
    return tags_.open + " " + name + " " + tags_.key + " " + closed(schema) + " " + tags_.space;
  };
  for (const Json& name : required) {
    if (!name.is_string() || !properties.contains(name.get<std::string>())) refuse("required");
  }
  if (!properties.is_object() || properties.empty()) {
    const Json other = root_.value("additionalProperties", Json(true));
    return other == Json(false) ? "" : add_rule(argument(tags_.keys, other)) + "*";
  }
  std::string arguments;
  for (const auto& [name, schema] : properties.items()) {
    const bool must = std::find(required.begin(), required.end(), Json(name)) != required.end();
    arguments += add_rule(argument(lark_string(name), schema)) + (must ? " " : "? ");
  }
  return arguments;
}

}  // namespace torpor::server
