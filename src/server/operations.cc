#include "server/operations.h"

#include <algorithm>
#include <cctype>

#include "server/fields.h"
#include "server/openapi.h"
#include "torpor/error.h"
#include "torpor/version.h"

namespace torpor::server {
namespace {

Json reference(const std::string& schema) { return Json{{"$ref", "#/components/schemas/" + schema}}; }

Json content(Json schema) { return Json{{"application/json", Json{{"schema", std::move(schema)}}}}; }

bool has_member(const Operation& operation, std::string_view name) {
  return std::any_of(operation.members.begin(), operation.members.end(),
                     [&](const Member& member) { return name == member.name; });
}

bool has_type(const Json& value, std::string_view type) {
  if (type == "integer")
    return value.is_number_integer() && (!value.is_number_unsigned() || value.get<uint64_t>() <= INT64_MAX);
  if (type == "number") return value.is_number();
  if (type == "objects" || type == "strings") {
    return value.is_array() && std::all_of(value.begin(), value.end(), [&](const Json& item) {
      return type == "objects" ? item.is_object() : item.is_string();
    });
  }
  if (type == "object") return value.is_object();
  return type == "string" ? value.is_string() : value.is_boolean();
}

}  // namespace

std::vector<Member> sampling_members(std::vector<Member> first, const char* events) {
  first.insert(first.end(), {{"max_tokens", "integer", false, "The longest answer; 256 unless given."},
                             {"temperature", "number", false, "Randomness; 0, the default: the likeliest token."},
                             {"top_p", "number", false, "Samples from the smallest set with this much probability."},
                             {"top_k", "integer", false, "Samples from so many of the likeliest tokens; 0: all."},
                             {"min_p", "number", false,
                              "Samples from tokens with this part of the likeliest one's probability."},
                             {"repetition_penalty", "number", false,
                              "Makes the last `penalty_context` tokens less likely; 1: none."},
                             {"penalty_context", "integer", false,
                              "How many tokens that counts, the prompt's too; 64 unless given, 0: all."},
                             {"presence_penalty", "number", false,
                              "Taken from the logits of tokens that the answer has."},
                             {"frequency_penalty", "number", false, "The same, for each time that it has them."},
                             {"logit_bias", "object", false, "Added to logits: numbers from -100 to 100 by token id."},
                             {"stop", "strings", false, "The answer ends before one of these."},
                             {"seed", "integer", false, "Of the random numbers; another one each turn unless given."},
                             {"stream", "boolean", false, events}});
  return first;
}

std::vector<Member> turn_members(std::vector<Member> first) {
  first.insert(first.end(), {{"prompt", "string", true, "The user's message."},
                             {"system", "string", false, "The system message of a new agent."}});
  return sampling_members(std::move(first),
                          "Server-sent events: `prefill` (done, total), `text` (text), then `result` or `error`.");
}

bool fits(const Operation& operation, const std::vector<std::string>& path) {
  HttpRequest form;
  form.path = operation.path;
  const std::vector<std::string> parts = form.path_parts();
  return parts.size() == path.size() &&
         std::equal(parts.begin(), parts.end(), path.begin(),
                    [](const auto& part, const auto& given) { return part.starts_with('{') || part == given; });
}

Json body_of(const Operation& operation, const HttpRequest& request) {
  const auto refuse = [](const std::string& what, const std::string& field) {
    throw Error(ErrorCode::kInvalidArgument, what).with_field(field);
  };
  if (operation.members.empty()) return Json::object();
  Json body = parse_body(request);
  for (const auto& [name, value] : body.items()) {
    const auto member = std::find_if(operation.members.begin(), operation.members.end(),
                                     [&name = name](const Member& m) { return name == m.name; });
    if (member == operation.members.end()) refuse("'" + name + "' is no member of this request", name);
    if (!has_type(value, member->type)) refuse("'" + name + "' must be of type " + member->type, name);
  }
  for (const Member& member : operation.members) {
    if (member.required && !body.contains(member.name))
      refuse(std::string("the request lacks '") + member.name + "'", member.name);
  }
  return body;
}

Json describe_operations() {
  Json description = described_routes();
  description["info"]["version"] = TORPOR_VERSION;
  Json& paths = description["paths"];
  std::vector<const Operation*> all;
  for (const auto* table : {&agent_operations(), &team_operations()}) {
    for (const Operation& operation : *table) all.push_back(&operation);
  }
  for (const Operation* of : all) {
    const Operation& operation = *of;
    Json success{{"description", operation.help}};
    if (operation.answer == kFile) {
      success["content"] = Json{{kFile, Json::object()}};
    } else if (operation.answer) {
      success["content"] = content(reference(operation.answer));
    }
    Json described{{"operationId", operation.id}, {"summary", operation.help}, {"tags", Json::array({"torpor"})}};
    for (const std::string name : {"agent", "team"}) {
      if (std::string_view(operation.path).find("{" + name + "}") == std::string_view::npos) continue;
      described["parameters"] =
          Json::array({Json{{"name", name},
                            {"in", "path"},
                            {"required", true},
                            {"schema", Json{{"type", "string"}, {"pattern", "^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$"}}}}});
    }
    if (!operation.members.empty()) {
      Json properties = Json::object(), required = Json::array();
      for (const Member& member : operation.members) {
        const std::string_view type = member.type;
        Json& property = properties[member.name] = Json{{"type", type}, {"description", member.help}};
        if (type == "integer") property["minimum"] = 0;
        if (type == "objects" || type == "strings") {
          property["type"] = "array";
          property["items"] = Json{{"type", type == "objects" ? "object" : "string"}};
        }
        if (type == "object") property["additionalProperties"] = Json{{"type", "number"}};
        if (member.required) required.push_back(member.name);
      }
      described["requestBody"] = Json{{"required", true},
                                      {"content", content(Json{{"type", "object"},
                                                               {"properties", std::move(properties)},
                                                               {"required", std::move(required)},
                                                               {"additionalProperties", false}})}};
    }
    described["responses"] = Json{{std::to_string(operation.status), std::move(success)},
                                  {"default", Json{{"$ref", "#/components/responses/AgentsError"}}}};
    if (has_member(operation, "stream")) {
      Json& streamed = described["responses"]["200"];
      if (streamed.is_null()) streamed["description"] = "The turn's events.";
      streamed["content"]["text/event-stream"] = Json::object();
    }
    std::string method = operation.method;
    std::transform(method.begin(), method.end(), method.begin(), [](unsigned char c) { return std::tolower(c); });
    paths[std::string("/torpor/v1") + operation.path][method] = std::move(described);
  }
  return description;
}

}  // namespace torpor::server
