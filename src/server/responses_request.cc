#include "server/responses_request.h"

#include "server/opaque.h"
#include "server/request.h"

namespace torpor::server {
namespace {

using Namespaces = std::map<std::string, std::pair<std::string, std::string>>;

/// The one name that a tool of a namespace has for the model.
std::string flat_name(const std::string& space, const std::string& name) {
  return space + (space.ends_with("__") ? "" : "__") + name;
}

Tool read_function(Field tool, const std::string& name) {
  return {name, tool["description"].string().value_or(""), tool["parameters"].object().value_or(Json::object()),
          tool["strict"].boolean().value_or(false)};
}

void read_tools(Field tools, ChatRequest& chat, Namespaces& namespaces) {
  for (const Field& tool : tools.items()) {
    const std::string type = tool["type"].required_string();
    if (type == "function") {
      chat.tools.push_back(read_function(tool, tool["name"].required_string()));
    } else if (type == "namespace") {
      const std::string space = tool["name"].required_string();
      for (const Field& inner : tool["tools"].items()) {
        if (inner["type"].string() != "function") continue;
        const std::string name = inner["name"].required_string();
        namespaces[flat_name(space, name)] = {space, name};
        chat.tools.push_back(read_function(inner, flat_name(space, name)));
      }
    }
    // Others (web_search, image_generation) run in OpenAI's own server. Clients declare them to all servers alike.
  }
}

Message& assistant(std::vector<Message>& messages) {
  if (messages.empty() || messages.back().role != Role::kAssistant) messages.push_back({Role::kAssistant});
  return messages.back();
}

std::string reasoning_text(Field item) {
  std::string text;
  for (const Field& part : item["content"].items()) text += part["text"].required_string();
  if (text.empty()) text = from_opaque(item["encrypted_content"].string().value_or("")).value_or("");
  return text;
}

/// The output of a call: a string, or parts.
std::string output_text(Field output) {
  if (output.is_object()) return to_text(output.json());
  return text_content(output);
}

/// Items of the assistant's that follow each other are one message: what it thought, said and called.
void read_item(Field item, std::vector<Message>& messages) {
  const std::string type = item["type"].string().value_or("message");
  if (type == "message") {
    const std::string role = item["role"].required_string();
    const Field content = item["content"];
    if (role == "assistant") {
      Message& message = assistant(messages);
      if (message.text.empty() && message.tool_calls.empty()) message.text = text_content(content, "");
      else messages.push_back({Role::kAssistant, text_content(content, "")});
    } else if (role == "user") {
      messages.push_back({Role::kUser, text_content(content)});
    } else if (role == "system" || role == "developer") {
      messages.push_back({Role::kSystem, text_content(content)});
    } else {
      throw item["role"].wrong("system, developer, user or assistant");
    }
  } else if (type == "function_call") {
    std::string name = item["name"].required_string();
    if (const auto space = item["namespace"].string()) name = flat_name(*space, name);
    assistant(messages).tool_calls.push_back(
        {item["call_id"].required_string(), name, call_arguments(item["arguments"])});
  } else if (type == "function_call_output") {
    Message result{Role::kTool, output_text(item["output"])};
    result.tool_call_id = item["call_id"].required_string();
    messages.push_back(std::move(result));
  } else if (type == "reasoning") {
    const std::string thinking = reasoning_text(item);
    if (thinking.empty()) return;  // another server's, and unreadable
    Message& message = assistant(messages);
    if (message.text.empty() && message.tool_calls.empty()) message.thinking += thinking;
    else messages.push_back({Role::kAssistant, {}, thinking});
  } else if (type != "web_search_call") {  // another server's search; what it found is in the text
    throw item["type"].unserved("send messages, reasoning, function calls and their outputs");
  }
}

void refuse_what_is_not_served(Field body) {
  if (body["background"].boolean().value_or(false)) throw body["background"].unserved("stream the answer");
  if (body["conversation"]) throw body["conversation"].unserved("use 'previous_response_id'");
  if (body["prompt"]) throw body["prompt"].unserved("write 'instructions' and 'input'");
}

}  // namespace

StoredResponse stored_response(const std::string& tenant, const std::string& id, ResponseStore& store,
                               const std::string& param) {
  auto stored = store.find(tenant, id);
  if (!stored) {
    throw Failure(Failure::Kind::kNotFound,
                  "Response '" + id + "' is not kept here, or not any more; send the whole conversation as 'input'.",
                  param);
  }
  return std::move(*stored);
}

ResponseRequest read_response_request(const HttpRequest& http, Field body, ResponseStore& store) {
  refuse_what_is_not_served(body);
  ResponseRequest request;
  ChatRequest& chat = request.chat;
  read_identity(http, body, chat);
  if (const auto instructions = body["instructions"].string()) chat.messages.push_back({Role::kSystem, *instructions});
  if (const auto previous = body["previous_response_id"].string()) {
    request.items = stored_response(http.tenant, *previous, store, "previous_response_id").items;
    for (const Field& item : Field(request.items).items()) read_item(item, chat.messages);
  }
  const Field input = body["input"];
  if (input.is_string()) {
    request.input.push_back({{"type", "message"}, {"role", "user"}, {"content", *input.string()}});
    chat.messages.push_back({Role::kUser, *input.string()});
  } else {
    for (const Field& item : input.items()) {
      read_item(item, chat.messages);
      request.input.push_back(item.json());
    }
  }
  if (request.input.empty()) throw input.wrong("a string, or an array of at least one item");
  request.items.insert(request.items.end(), request.input.begin(), request.input.end());
  name_tool_results(chat.messages);
  read_tools(body["tools"], chat, request.namespaces);
  read_tool_choice(body["tool_choice"], chat);
  chat.parallel_tool_calls = body["parallel_tool_calls"].boolean().value_or(true);
  read_sampling(body, chat.sampling);
  chat.max_tokens = body["max_output_tokens"].integer(1);
  chat.response_format = read_response_format(body["text"]["format"]);
  read_effort(body["reasoning"]["effort"], chat);
  request.store = body["store"].boolean().value_or(true);
  for (const Field& wanted : body["include"].items()) {
    request.encrypted_content |= wanted.string() == "reasoning.encrypted_content";
    if (wanted.string() == "message.output_text.logprobs") chat.logprobs = 0;
  }
  const int top = body["top_logprobs"].integer(0, kMostLogprobs).value_or(0);
  if (chat.logprobs || top > 0) chat.logprobs = top;
  return request;
}

}  // namespace torpor::server
