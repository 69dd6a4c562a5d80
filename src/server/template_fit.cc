#include "server/template_fit.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <map>
#include <optional>

#include "base/gguf.h"
#include "torpor/error.h"

namespace torpor::server {
namespace {

const char* role_name(Role role) {
  switch (role) {
    case Role::kSystem: return "system";
    case Role::kAssistant: return "assistant";
    case Role::kTool: return "tool";
    case Role::kUser: break;
  }
  return "user";
}

Json tool_json(const Tool& tool) {
  Json function{{"name", tool.name}, {"description", tool.description}, {"parameters", tool.parameters}};
  return {{"type", "function"}, {"function", function}};
}

std::string tools_json(const std::vector<Tool>& tools) {
  if (tools.empty()) return {};
  Json list = Json::array();
  for (const Tool& tool : tools) list.push_back(tool_json(tool));
  return to_text(list);
}

/// What tells a model of its tools when the template has no place for them.
std::string tools_section(const std::vector<Tool>& tools) {
  std::string section = "You can call these functions. Each line is one, as JSON:\n";
  for (const Tool& tool : tools) section += to_text(tool_json(tool)["function"]) + "\n";
  return section +
         "To call one, write a line with <tool_call>, a line with {\"name\": NAME, \"arguments\": OBJECT}, and a line "
         "with </tool_call>. Its result comes back between <tool_response> and </tool_response>.";
}

std::string calls_text(const std::vector<ToolCall>& calls) {
  std::string text;
  for (const ToolCall& call : calls) {
    const Json json{{"name", call.name}, {"arguments", parse_json<Json>(call.arguments, nullptr, false)}};
    text += "<tool_call>\n" + to_text(json) + "\n</tool_call>";
  }
  return text;
}

Json said(const char* role, const char* content) { return {{"role", role}, {"content", content}}; }

std::optional<std::string> read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return std::nullopt;
  return std::string(std::istreambuf_iterator<char>(file), {});
}

}  // namespace

std::string template_source(const std::filesystem::path& dir) {
  if (is_gguf(dir)) {
    const GgufModel model = GgufModel::open(dir);
    return std::string(model.metadata().text("tokenizer.chat_template").value_or(""));
  }
  if (auto jinja = read_file(dir / "chat_template.jinja")) return *jinja;
  const auto config = read_file(dir / "tokenizer_config.json");
  const Json json = config ? parse_json<Json>(*config, nullptr, false) : Json();
  if (!json.is_object() || !json.contains("chat_template")) return {};
  const Json& templates = json["chat_template"];
  if (templates.is_string()) return templates;
  for (const Json& entry : templates) {
    if (entry.value("name", "") == "default") return entry.value("template", "");
  }
  return {};
}

TemplateFit::TemplateFit(std::shared_ptr<const ChatTemplate> chat_template, const std::string& source)
    : chat_template_(std::move(chat_template)), format_(answer_format(source)) {
  const Json user = said("user", "u"), assistant = said("assistant", "a");
  system_ = renders(Json::array({said("system", "sys1"), user}), Json::object(), "sys1");
  mid_system_ = renders(Json::array({said("system", "sys1"), user, assistant, said("system", "sys2"), user}),
                        Json::object(), "sys2");
  repeats_ = renders(Json::array({user, said("user", "again")}), Json::object(), "again");
  const Json tools = parse_json<Json>(tools_json({{"probe_tool", "Probes.", Json::object(), false}}));
  const Json call{{"id", "callprobe"}, {"type", "function"},
                  {"function", {{"name", "probe_tool"}, {"arguments", Json::object()}}}};
  const Json calling{{"role", "assistant"}, {"content", ""}, {"tool_calls", Json::array({call})}};
  const Json result{{"role", "tool"}, {"name", "probe_tool"}, {"tool_call_id", "callprobe"}, {"content", "the_result"}};
  const Json variables{{"tools", tools}};
  tools_ = renders(Json::array({user}), variables, "probe_tool") &&
           renders(Json::array({user, calling, result}), variables, "the_result");
  if (tools_) {
    Json both = calling;
    both["tool_calls"].push_back(call);
    parallel_calls_ = renders(Json::array({user, both, result, result}), variables, "the_result");
  }
  if (!tools_) format_.calls = CallFormat::kTagged;  // as tools_section says
}

bool TemplateFit::renders(const Json& messages, const Json& variables, std::string_view expected) const {
  try {
    const std::string rendered = chat_template_->render(to_text(messages), true, to_text(variables));
    return rendered.find(expected) != std::string::npos;
  } catch (const Error&) {
    return false;  // the template's own refusal
  }
}

bool TemplateFit::opens_thinking(const Json& template_arguments) const {
  try {
    const Json messages = Json::array({said("user", "u")});
    const std::string prompt = chat_template_->render(to_text(messages), true, to_text(template_arguments));
    return server::opens_thinking(format_, prompt);
  } catch (const Error&) {
    return false;  // the turn will say what is wrong
  }
}

torpor::Message TemplateFit::fit_answer(const Message& answer) const {
  torpor::Message fitted{"assistant", answer.text};
  fitted.thinking = answer.thinking;
  if (!tools_) {
    if (!answer.tool_calls.empty() && !fitted.content.empty()) fitted.content += "\n";
    fitted.content += calls_text(answer.tool_calls);
    return fitted;
  }
  for (const ToolCall& call : answer.tool_calls) {
    // Some templates write ids, and want nine letters and digits (Mistral's). Those of clients differ from turn to
    // turn.
    fitted.tool_calls.push_back({call.name, call.arguments, {}});
  }
  return fitted;
}

FittedConversation TemplateFit::fit(const std::vector<Message>& messages, std::vector<Tool> tools) const {
  FittedConversation fitted;
  std::stable_sort(tools.begin(), tools.end(), [](const Tool& a, const Tool& b) { return a.name < b.name; });
  const bool in_text = !tools_ && !tools.empty();
  if (!in_text) fitted.tools = tools_json(tools);
  int calls = 0;  // so far, for their ids
  const auto call_id = [](int n) {
    std::string id = std::to_string(n);
    return std::string(9 - std::min<size_t>(9, id.size()), '0') + id;
  };
  std::map<std::string, std::string> ids;  // the client's, ours
  const auto add = [&](torpor::Message message) {
    const bool joins = !repeats_ && !fitted.messages.empty() && message.role == "user" &&
                       fitted.messages.back().role == "user";
    if (joins) fitted.messages.back().content += "\n\n" + message.content;
    else fitted.messages.push_back(std::move(message));
  };
  std::string section = in_text ? tools_section(tools) : std::string();
  if (!section.empty() && (messages.empty() || messages.front().role != Role::kSystem)) {
    add({system_ ? "system" : "user", std::move(section)});
    section.clear();
  }
  for (size_t i = 0; i < messages.size(); ++i) {
    const Message& message = messages[i];
    if (message.role == Role::kAssistant) {
      torpor::Message answer = fit_answer(message);
      for (size_t c = 0; c < answer.tool_calls.size(); ++c) {
        answer.tool_calls[c].id = call_id(calls++);
        ids[message.tool_calls[c].id] = answer.tool_calls[c].id;
      }
      add(std::move(answer));
    } else if (message.role == Role::kTool) {
      if (!tools_) {
        add({"user", "<tool_response>\n" + message.text + "\n</tool_response>"});
        continue;
      }
      torpor::Message result{"tool", message.text, message.tool_name};
      if (const auto id = ids.find(message.tool_call_id); id != ids.end()) result.tool_call_id = id->second;
      add(std::move(result));
    } else {
      std::string text = message.text;
      if (!section.empty()) {
        text += "\n\n" + section;
        section.clear();
      }
      const bool refused = message.role == Role::kSystem && !(i == 0 ? system_ : mid_system_);
      add({refused ? "user" : role_name(message.role), std::move(text)});
    }
  }
  return fitted;
}

}  // namespace torpor::server
