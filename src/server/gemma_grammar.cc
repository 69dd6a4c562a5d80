#include "server/gemma_grammar.h"

#include <algorithm>
#include <cctype>
#include <utility>
#include <vector>

namespace torpor::server {
namespace {

std::string lark_string(const std::string& text) { return to_text(Json(text)); }

std::string alternatives(const std::vector<std::string>& all) {
  std::string text;
  for (const std::string& one : all) text += (text.empty() ? "(" : " | ") + one;
  return text + ")";
}

/// `item` from `least` to `most` times with commas between; `most` -1: any number.
std::string comma_list(const std::string& item, int64_t least, int64_t most) {
  if (most == 0) return "";
  const std::string more = most < 0 ? std::to_string(std::max<int64_t>(least - 1, 0)) + "," :
                                      std::to_string(std::max<int64_t>(least - 1, 0)) + "," + std::to_string(most - 1);
  const std::string some = "(" + item + " (\",\" " + item + "){" + more + "})";
  return least > 0 ? some : some + "?";
}

/// Keywords that say something of a value, and are held to.
constexpr const char* kHeld[] = {"$ref", "const", "enum", "anyOf", "allOf", "type", "properties", "required",
                                 "additionalProperties", "items", "minItems", "maxItems", "minimum", "maximum",
                                 "exclusiveMinimum", "exclusiveMaximum", "multipleOf"};
/// Keywords that do, and are not.
constexpr const char* kUnheld[] = {"not", "if", "then", "else", "oneOf", "dependencies", "dependentRequired",
                                   "dependentSchemas", "pattern", "minLength", "maxLength", "format", "prefixItems",
                                   "additionalItems", "unevaluatedItems", "contains", "minContains", "maxContains",
                                   "uniqueItems", "patternProperties", "propertyNames", "minProperties",
                                   "maxProperties", "unevaluatedProperties", "$dynamicRef", "$recursiveRef"};

}  // namespace

GemmaValues::GemmaValues(Json schema, bool strict, std::string prefix, std::string quote, std::string string)
    : root_(std::move(schema)), strict_(strict), prefix_(std::move(prefix)), quote_(std::move(quote)), string_(std::move(string)),
      value_(object(root_.is_object() ? root_ : Json::object())) {}

void GemmaValues::refuse(const std::string& keyword) const {
  if (!strict_) return;
  throw Failure(Failure::Kind::kInvalid,
                "No answer of this model can be held to the tools: nothing holds to the keyword '" + keyword + "'.",
                "tools");
}

void GemmaValues::refuse_unheld(const Json& schema) const {
  for (const char* keyword : kUnheld) {
    if (schema.contains(keyword)) refuse(keyword);
  }
  // One that says what the whole value is stands alone: what stands beside it would not be held to.
  for (const char* whole : {"$ref", "anyOf", "allOf"}) {
    if (!schema.contains(whole)) continue;
    for (const char* keyword : kHeld) {
      if (std::string_view(keyword) != whole && schema.contains(keyword)) refuse(keyword);
    }
  }
}

std::string GemmaValues::add_rule(const std::string& right) {
  const std::string name = prefix_ + "_" + std::to_string(count_++);
  rules_ += name + ": " + right + "\n";
  return name;
}

std::string GemmaValues::key(const std::string& name) const {
  const bool bare = !name.empty() && !std::isdigit(static_cast<unsigned char>(name[0])) &&
                    std::all_of(name.begin(), name.end(), [](unsigned char c) { return std::isalnum(c) || c == '_'; });
  return bare ? lark_string(name) : quote_ + " " + lark_string(name) + " " + quote_;
}

std::string GemmaValues::literal(const Json& value) const {
  if (value.is_string()) return quote_ + " " + lark_string(value.get<std::string>()) + " " + quote_;
  if (!value.is_structured()) return lark_string(to_text(value));
  std::string text;
  for (const auto& [name, item] : value.items()) {
    text += (text.empty() ? "" : " \",\" ") + (value.is_object() ? key(name) + " \":\" " : "") + literal(item);
  }
  return value.is_object() ? "\"{\" " + text + " \"}\"" : "\"[\" " + text + " \"]\"";
}

std::string GemmaValues::any() {
  if (!any_.empty()) return any_;
  any_ = prefix_ + "_any";
  const std::string pair = "/[A-Za-z_][A-Za-z0-9_]*/ \":\" " + any_;
  rules_ += any_ + ": " + quote_ + " " + string_ + R"( | %json {"type": ["number", "boolean", "null"]})" + " | \"[\" " +
            comma_list(any_, 0, -1) + " \"]\" | \"{\" " + comma_list("(" + pair + ")", 0, -1) + " \"}\"\n";
  return any_;
}

std::string GemmaValues::reference(const std::string& pointer) {
  if (const auto known = references_.find(pointer); known != references_.end()) return known->second;
  const Json* target = nullptr;
  try {
    if (pointer.starts_with('#')) target = &root_.at(Json::json_pointer(pointer.substr(1)));
  } catch (const Json::exception&) {
  }
  if (target == nullptr) {
    refuse("$ref");
    return any();
  }
  const std::string name = prefix_ + "_ref" + std::to_string(references_.size());
  references_[pointer] = name;  // first: it may refer to itself
  const std::string right = of(*target);
  rules_ += name + ": " + right + "\n";
  return name;
}

std::string GemmaValues::of(const Json& schema) {
  if (!schema.is_object()) return any();
  refuse_unheld(schema);
  if (const auto to = schema.find("$ref"); to != schema.end() && to->is_string()) return reference(*to);
  if (const auto only = schema.find("const"); only != schema.end()) return literal(*only);
  std::vector<std::string> all;
  if (const auto values = schema.find("enum"); values != schema.end() && values->is_array() && !values->empty()) {
    for (const Json& value : *values) all.push_back(literal(value));
    return alternatives(all);
  }
  for (const char* keyword : {"anyOf", "oneOf"}) {
    const auto choices = schema.find(keyword);
    if (choices == schema.end() || !choices->is_array() || choices->empty()) continue;
    for (const Json& choice : *choices) all.push_back(of(choice));
    return alternatives(all);
  }
  if (const auto parts = schema.find("allOf"); parts != schema.end() && parts->is_array()) {
    if (parts->size() == 1) return of(parts->front());
    refuse("allOf");
    return any();
  }
  const auto type = schema.find("type");
  if (type == schema.end()) return schema.contains("properties") ? object(schema) : any();
  if (type->is_string()) return of_type(schema, *type);
  if (!type->is_array() || type->empty()) return any();
  for (const Json& one : *type) all.push_back(one.is_string() ? of_type(schema, one) : any());
  return alternatives(all);
}

std::string GemmaValues::of_type(const Json& schema, const std::string& type) {
  if (type == "string") return quote_ + " " + string_;
  if (type == "boolean") return "(\"true\" | \"false\")";
  if (type == "null") return "\"null\"";
  if (type == "object") return object(schema);
  if (type == "array") return array(schema);
  if (type != "integer" && type != "number") return any();
  Json number{{"type", type}};
  for (const char* keyword : {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}) {
    if (schema.contains(keyword)) number[keyword] = schema[keyword];
  }
  if (!strict_) number["x-guidance"] = {{"lenient", true}};
  return add_rule("%json " + to_text(number));  // a number is JSON's
}

std::string GemmaValues::array(const Json& schema) {
  const std::string item = schema.contains("items") ? add_rule(of(schema["items"])) : any();
  const auto bound = [&](const char* keyword, int64_t otherwise) {
    const auto found = schema.find(keyword);
    return found != schema.end() && found->is_number_integer() ? found->get<int64_t>() : otherwise;
  };
  return "\"[\" " + comma_list(item, bound("minItems", 0), bound("maxItems", -1)) + " \"]\"";
}

std::string GemmaValues::object(const Json& schema) {
  const Json properties = schema.value("properties", Json::object()), required = schema.value("required", Json::array());
  for (const Json& name : required) {
    if (!name.is_string() || !properties.contains(name.get<std::string>())) refuse("required");
  }
  if (!properties.is_object() || properties.empty()) {
    const Json other = schema.value("additionalProperties", Json(true));
    if (other == Json(false)) return "\"{\" \"}\"";
    const std::string value = other.is_object() ? of(other) : any();
    return "\"{\" " + comma_list("(/[A-Za-z_][A-Za-z0-9_]*/ \":\" " + value + ")", 0, -1) + " \"}\"";
  }
  // Each property in its order, from the last on: what may follow where one was written already, and where none was.
  std::string rest, first;
  std::vector<std::pair<std::string, bool>> pairs;
  for (const auto& [name, value] : properties.items()) {
    const bool must = std::find(required.begin(), required.end(), Json(name)) != required.end();
    pairs.emplace_back(key(name) + " \":\" " + of(value), must);
  }
  for (auto pair = pairs.rbegin(); pair != pairs.rend(); ++pair) {
    const std::string one = add_rule(pair->first);
    const std::string after = rest.empty() ? "" : " " + rest;
    const std::string begins = one + after;
    const std::string follows = "\",\" " + one;
    first = pair->second ? add_rule(begins) : add_rule(first.empty() ? "(" + begins + ")?" : begins + " | " + first);
    rest = add_rule((pair->second ? follows : "(" + follows + ")?") + after);
  }
  return "\"{\" " + first + " \"}\"";
}

}  // namespace torpor::server
