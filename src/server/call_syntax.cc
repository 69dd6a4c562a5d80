#include "server/call_syntax.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <optional>
#include <set>

#include "server/text_scanner.h"

namespace torpor::server {
namespace {

using State = CallReading::State;

const CallReading kMore;
CallReading text_of(size_t length) { return {State::kText, length, {}}; }

/// A call as a JSON object: {"name": ..., "arguments" or "parameters": {...}}, also inside "function". nullopt when it
/// is none.
std::optional<ReadCall> call_of(const Json& object, const Tools& tools) {
  if (!object.is_object()) return std::nullopt;
  const auto function = object.find("function");
  if (function != object.end() && function->is_object()) return call_of(*function, tools);
  auto name = object.find("name");
  if (name == object.end()) name = function;
  if (name == object.end() || !name->is_string()) return std::nullopt;
  const Tool* tool = find_tool(tools, name->get_ref<const std::string&>());
  if (!tool) return std::nullopt;
  ReadCall call{tool->name, Json::object()};
  auto arguments = object.find("arguments");
  if (arguments == object.end()) arguments = object.find("parameters");
  if (arguments == object.end() || arguments->is_null()) return call;
  call.arguments = *arguments;
  if (call.arguments.is_string()) call.arguments = parse_json<Json>(call.arguments.get<std::string>(), nullptr, false);
  if (!call.arguments.is_object()) return std::nullopt;
  call.arguments = conform(std::move(call.arguments), tool->parameters);
  return call;
}

/// `<function=NAME>` with its parameters, after `<tool_call>` or without it.
CallReading read_xml_function(Scanner& scan, const Tools& tools, bool last, size_t opening) {
  std::string name;
  if (!scan.until(">", name)) return last ? text_of(opening) : kMore;
  const Tool* tool = find_tool(tools, name);
  if (!tool) return text_of(opening);
  ReadCall call{tool->name, Json::object()};
  for (;;) {
    scan.skip_space();
    if (scan.take("</function>")) {
      call.arguments = conform(std::move(call.arguments), tool->parameters);
      return {State::kCalls, scan.position(), {call}};
    }
    if (!scan.take("<parameter=")) {
      return scan.may_become({"</function>", "<parameter="}) && !last ? kMore : text_of(opening);
    }
    std::string key, value;
    if (!scan.until(">", key)) return last ? text_of(opening) : kMore;
    // A value may hold what looks like its own end; the true one is followed by the next parameter or the function's
    // end.
    for (;;) {
      std::string piece;
      if (!scan.until("</parameter>", piece)) return last ? text_of(opening) : kMore;
      value += piece;
      Scanner ahead = scan;
      ahead.skip_space();
      if (ahead.take("<parameter=") || ahead.take("</function>")) break;
      if (ahead.may_become({"<parameter=", "</function>"})) return last ? text_of(opening) : kMore;
      value += "</parameter>";
    }
    if (value.starts_with('\n')) value.erase(0, 1);
    if (value.ends_with('\n')) value.pop_back();
    call.arguments[key] = value;
  }
}

/// The declared tool with the longest name that stands here; nullptr: none. `more`: a longer one may still be coming.
const Tool* take_name(Scanner& scan, const Tools& tools, bool& more) {
  const Tool* tool = nullptr;
  std::vector<std::string> names;
  for (const Tool& known : tools) {
    names.push_back(known.name);
    Scanner ahead = scan;
    if (ahead.take(known.name) && (!tool || known.name.size() > tool->name.size())) tool = &known;
  }
  more = scan.may_become(names);
  if (tool) scan.take(tool->name);
  return tool;
}

/// A name, then keys and values between tags, after `<tool_call>`.
CallReading read_glm_call(Scanner& scan, const Tools& tools, bool last, size_t opening) {
  bool more = false;
  const Tool* tool = take_name(scan, tools, more);
  if (more && !last) return kMore;
  if (!tool) return text_of(opening);
  ReadCall call{tool->name, Json::object()};
  for (;;) {
    scan.skip_space();
    if (scan.take("</tool_call>")) break;
    if (last && scan.at_end() && !call.arguments.empty()) break;  // the closing tag was forgotten
    if (!scan.take("<arg_key>"))
      return scan.may_become({"</tool_call>", "<arg_key>"}) && !last ? kMore : text_of(opening);
    std::string key, value;
    if (!scan.until("</arg_key>", key)) return last ? text_of(opening) : kMore;
    scan.skip_space();
    if (!scan.take("<arg_value>")) return scan.may_become({"<arg_value>"}) && !last ? kMore : text_of(opening);
    for (bool ended = false; !ended;) {
      std::string part;
      if (!scan.until("</arg_value>", part)) return last ? text_of(opening) : kMore;
      value += part;
      Scanner after = scan;
      after.skip_space();
      if (!last && after.may_become({"</tool_call>", "<arg_key>"})) return kMore;
      ended = after.take("<arg_key>") || after.take("</tool_call>") || after.at_end();
      if (!ended) value += "</arg_value>";  // of the value's own
    }
    call.arguments[key] = value;
  }
  call.arguments = conform(std::move(call.arguments), tool->parameters);
  return {State::kCalls, scan.position(), {call}};
}

}  // namespace

const Tool* find_tool(const Tools& tools, std::string_view name) {
  const auto found = std::find_if(tools.begin(), tools.end(), [&](const Tool& tool) { return tool.name == name; });
  return found == tools.end() ? nullptr : &*found;
}

namespace {

constexpr int kMostNested = 16;

/// `seen`: what references led to. They may form circles, and many may lead to one schema.
void find_bare_strings(const Json& schema, const Json& root, int depth, std::set<const Json*>& seen,
                       BareStrings& found) {
  if (!schema.is_object() || depth > kMostNested) {
    found.any = true;
    return;
  }
  const auto each = [&](const char* keyword) {
    const auto parts = schema.find(keyword);
    if (parts == schema.end() || !parts->is_array() || parts->empty()) return false;
    for (const Json& part : *parts) find_bare_strings(part, root, depth + 1, seen, found);
    return true;
  };
  const auto add = [&](const Json& value) {
    if (value.is_string()) found.texts.push_back(value);
    else found.others = true;
  };
  if (const auto only = schema.find("const"); only != schema.end()) return add(*only);
  if (const auto values = schema.find("enum"); values != schema.end() && values->is_array()) {
    for (const Json& value : *values) add(value);
    return;
  }
  if (schema.contains("$ref")) {
    const Json* target = referred(schema, root);
    if (target == nullptr) found.any = true;
    else if (seen.insert(target).second) find_bare_strings(*target, root, depth + 1, seen, found);
    return;
  }
  if (each("anyOf") || each("oneOf") || each("allOf")) return;
  const auto type = schema.find("type");
  if (type == schema.end()) {
    found.any |= !schema.contains("properties") && !schema.contains("items");
  } else {
    const auto is_string = [](const Json& name) { return name == "string"; };
    found.any |= is_string(*type) || (type->is_array() && std::any_of(type->begin(), type->end(), is_string));
  }
  found.others |= !found.any;
}

Json conform_value(Json value, const Json& schema, const Json& root) {
  const auto type = schema.is_object() ? schema.find("type") : schema.end();
  const auto has_type = schema.is_object() && type != schema.end();
  if (!value.is_string()) {
    const bool is_plain = value.is_number() || value.is_boolean();
    return is_plain && has_type && *type == "string" ? Json(to_text(value)) : value;
  }
  const std::string& word = value.get_ref<const std::string&>();
  const BareStrings strings = bare_strings(schema, root);
  if (strings.any || std::find(strings.texts.begin(), strings.texts.end(), word) != strings.texts.end()) return value;
  Json parsed = parse_json<Json>(word, nullptr, false);
  if (parsed.is_discarded()) {  // Python's spelling
    if (word == "True") parsed = true;
    if (word == "False") parsed = false;
    if (word == "None") parsed = nullptr;
  }
  const auto allows = [&](const char* name) {
    if (!has_type || type->is_string()) return !has_type || *type == name;
    return type->is_array() && std::find(type->begin(), type->end(), Json(name)) != type->end();
  };
  const bool fits = (parsed.is_number_integer() && (allows("integer") || allows("number"))) ||
                    (parsed.is_number_float() && allows("number")) || (parsed.is_boolean() && allows("boolean")) ||
                    (parsed.is_null() && allows("null")) || (parsed.is_array() && allows("array")) ||
                    (parsed.is_object() && allows("object")) || (parsed.is_string() && allows("string"));
  return fits ? parsed : value;
}

}  // namespace

const Json* referred(const Json& schema, const Json& root) {
  const auto to = schema.find("$ref");
  if (to == schema.end() || !to->is_string() || !to->get_ref<const std::string&>().starts_with('#')) return nullptr;
  try {
    return &root.at(Json::json_pointer(to->get_ref<const std::string&>().substr(1)));
  } catch (const Json::exception&) {
    return nullptr;
  }
}

BareStrings bare_strings(const Json& schema, const Json& root) {
  BareStrings found;
  std::set<const Json*> seen;
  find_bare_strings(schema, root, 0, seen, found);
  found.any |= found.texts.empty() && !found.others;  // a circle, or nothing at all, says nothing
  return found;
}

Json conform(Json arguments, const Json& schema) {
  const auto properties = schema.is_object() ? schema.find("properties") : schema.end();
  if (!schema.is_object() || properties == schema.end() || !properties->is_object()) return arguments;
  for (auto& [key, value] : arguments.items()) {
    const auto property = properties->find(key);
    if (property != properties->end()) value = conform_value(std::move(value), *property, schema);
  }
  return arguments;
}

CallReading read_tagged_call(std::string_view text, const Tools& tools, bool last) {
  Scanner scan(text);
  if (scan.take("<function=")) return read_xml_function(scan, tools, last, std::string_view("<function=").size());
  if (!scan.take("<tool_call>")) return scan.may_become({"<function=", "<tool_call>"}) && !last ? kMore : text_of(1);
  const size_t opening = scan.position();
  scan.skip_space();
  if (scan.take("<function=")) {
    CallReading reading = read_xml_function(scan, tools, last, opening);
    if (reading.state != State::kCalls) return reading;
    scan.skip_space();
    if (!scan.take("</tool_call>") && scan.may_become({"</tool_call>"}) && !last) return kMore;
    reading.length = scan.position();
    return reading;
  }
  if (!scan.at_end() && scan.peek() != '{' && !scan.may_become({"<function="}))
    return read_glm_call(scan, tools, last, opening);
  CallReading reading{State::kCalls, 0, {}};
  // One object, as a rule; some models put several between the tags.
  for (;;) {
    std::string_view object;
    if (scan.at_end()) return last ? text_of(opening) : kMore;
    if (scan.may_become({"<function="}) && !last) return kMore;
    if (scan.peek() != '{') return text_of(opening);
    if (!scan.json(object)) return last ? text_of(opening) : kMore;
    const auto call = call_of(parse_json<Json>(object, nullptr, false), tools);
    if (!call) return text_of(opening);
    reading.calls.push_back(*call);
    reading.length = scan.position();
    scan.skip_space();
    if (scan.take("</tool_call>")) {
      reading.length = scan.position();
      return reading;
    }
    if (scan.may_become({"</tool_call>"})) {
      if (!last) return kMore;
      return reading;
    }
    if (scan.peek() != '{') return reading;  // the closing tag was forgotten
  }
}

CallReading read_llama_call(std::string_view text, const Tools& tools, bool last) {
  Scanner scan(text);
  if (!scan.take("<|python_tag|>") && scan.may_become({"<|python_tag|>"})) return last ? text_of(1) : kMore;
  scan.skip_space();
  const size_t opening = std::max<size_t>(scan.position(), 1);
  if (scan.at_end()) return last ? text_of(opening) : kMore;
  if (scan.peek() == '[') return read_python_calls(scan, tools, last);
  CallReading reading{State::kCalls, 0, {}};
  for (;;) {
    std::string_view object;
    if (scan.peek() != '{') return reading.calls.empty() ? text_of(opening) : reading;
    // Most objects are no calls: an answer in JSON need not wait for its end.
    Scanner ahead = scan;
    ahead.take("{");
    ahead.skip_space();
    if (!ahead.starts_with({"\"name\"", "\"type\"", "\"function\""}) &&
        (last || !ahead.may_become({"\"name\"", "\"type\"", "\"function\""}))) {
      return reading.calls.empty() ? text_of(opening) : reading;
    }
    if (!scan.json(object)) return last ? (reading.calls.empty() ? text_of(opening) : reading) : kMore;
    const auto call = call_of(parse_json<Json>(object, nullptr, false), tools);
    if (!call) return reading.calls.empty() ? text_of(opening) : reading;
    reading.calls.push_back(*call);
    reading.length = scan.position();
    scan.skip_space();
    scan.take(";");
    scan.skip_space();
    if (scan.at_end()) {
      // Another call may follow. Those read so far wait for it.
      if (!last) return kMore;
      reading.length = text.size();
      return reading;
    }
  }
}

CallReading read_mistral_call(std::string_view text, const Tools& tools, bool last) {
  Scanner scan(text);
  const bool marked = scan.take("[TOOL_CALLS]");
  if (!marked && scan.may_become({"[TOOL_CALLS]"}) && !last) return kMore;
  const size_t opening = marked ? scan.position() : 1;
  scan.skip_space();
  if (scan.at_end()) return last ? text_of(text.size()) : kMore;
  CallReading reading{State::kCalls, 0, {}};
  if (scan.peek() == '[') {
    std::string_view array;
    Scanner ahead = scan;
    ahead.take("[");
    ahead.skip_space();
    if (!ahead.at_end() && ahead.peek() != '{') return text_of(opening);
    if (!scan.json(array)) return last ? text_of(opening) : kMore;
    const Json calls = parse_json<Json>(array, nullptr, false);
    if (!calls.is_array() || calls.empty()) return text_of(opening);
    for (const Json& object : calls) {
      const auto call = call_of(object, tools);
      if (!call) return text_of(opening);
      reading.calls.push_back(*call);
    }
    reading.length = scan.position();
    return reading;
  }
  bool more = false;
  const Tool* tool = take_name(scan, tools, more);
  if (more && !last) return kMore;
  if (!tool) return text_of(opening);
  scan.skip_space();
  if (scan.take("[CALL_ID]")) {
    std::string id;
    if (!scan.until("[ARGS]", id)) return last ? text_of(opening) : kMore;
  } else if (!scan.take("[ARGS]") && scan.may_become({"[ARGS]", "[CALL_ID]"}) && !last) {
    return kMore;
  }
  scan.skip_space();
  if (scan.at_end()) return last ? text_of(opening) : kMore;
  std::string_view object;
  if (scan.peek() != '{') return text_of(opening);
  if (!scan.json(object)) return last ? text_of(opening) : kMore;
  Json arguments = parse_json<Json>(object, nullptr, false);
  if (!arguments.is_object()) return text_of(opening);
  reading.calls.push_back({tool->name, conform(std::move(arguments), tool->parameters)});
  reading.length = scan.position();
  return reading;
}

CallReading read_gemma_call(std::string_view text, const Tools& tools, bool last) {
  struct Marks {
    const char *open, *close, *quote;
  };
  static constexpr Marks kMarks[] = {{"<|tool_call>", "<tool_call|>", "<|\"|>"},
                                     {"<start_function_call>", "<end_function_call>", "<escape>"}};
  Scanner scan(text);
  if (scan.take("```tool_code")) {
    const size_t opening = scan.position();
    scan.skip_space();
    CallReading reading = read_python_calls(scan, tools, last);
    if (reading.state == State::kText) return text_of(opening);
    if (reading.state == State::kMore) return reading;
    scan.skip_space();
    if (!scan.take("```") && scan.may_become({"```"}) && !last) return kMore;
    reading.length = scan.position();
    return reading;
  }
  for (const Marks& marks : kMarks) {
    if (!scan.take(marks.open)) continue;
    const size_t opening = scan.position();
    std::string name;
    if (!scan.take("call:")) return scan.may_become({"call:"}) && !last ? kMore : text_of(opening);
    if (!scan.until("{", name)) return last ? text_of(opening) : kMore;
    const Tool* tool = find_tool(tools, name);
    if (!tool) return text_of(opening);
    scan.back(1);
    Json arguments;
    switch (scan.gemma_value(marks.quote, arguments)) {
      case Scanner::Read::kMore: return last ? text_of(opening) : kMore;
      case Scanner::Read::kNo: return text_of(opening);
      case Scanner::Read::kYes: break;
    }
    if (!scan.take(marks.close) && scan.may_become({marks.close}) && !last) return kMore;
    return {State::kCalls, scan.position(), {{tool->name, conform(std::move(arguments), tool->parameters)}}};
  }
  const bool may = scan.may_become({"```tool_code", kMarks[0].open, kMarks[1].open});
  return may && !last ? kMore : text_of(1);
}

}  // namespace torpor::server
