#include "agents/conversation.h"

#include <algorithm>
#include <random>

#include <nlohmann/json.hpp>

#include "torpor/error.h"

namespace torpor {
namespace {

// Stands for an answer whose tokens are held already. It is drawn anew for every turn and is in none of the messages:
// whoever could write it could cut off the beginning of a turn. Free of white space that a template could trim.
std::string draw_placeholder(const std::vector<Message>& messages, const std::string& prompt) {
  std::random_device random;
  while (true) {
    const std::string number = std::to_string(random()) + "-" + std::to_string(random());
    const std::string drawn = "\xEE\x80\x80torpor-" + number + "\xEE\x80\x81";
    const auto is_in = [&](const Message& message) { return message.content.find(drawn) != std::string::npos; };
    if (!is_in({"user", prompt}) && std::none_of(messages.begin(), messages.end(), is_in)) return drawn;
  }
}

// How many of the first tokens of `added` the answer had already: the end of a turn is sampled by the model and rendered by the
// template, which may put white space before it.
size_t repeated(const Tokenizer& tokenizer, const std::vector<int32_t>& held, const std::vector<int32_t>& added) {
  for (size_t i = 0; i < added.size(); ++i) {
    if (added[i] == held.back()) return i + 1;
    if (tokenizer.decode({added[i]}).find_first_not_of(" \t\r\n") != std::string::npos) break;
  }
  return 0;
}

}  // namespace

std::string messages_to_json(const std::vector<Message>& messages) {
  std::string array = "[";
  for (const Message& message : messages) array.append(array.size() > 1 ? "," : "").append(message_to_json(message));
  return array + "]";
}

std::string message_to_json(const Message& message) {
  try {
    return nlohmann::ordered_json{{"role", message.role}, {"content", message.content}}.dump();
  } catch (const nlohmann::json::exception&) {
    // Answers come out of the detokenizer, which never gives invalid UTF-8: this is the prompt or the system prompt.
    throw Error(ErrorCode::kInvalidArgument, "The prompt is not valid UTF-8; convert it and try again.");
  }
}

Message message_from_json(const std::string& json) {
  try {
    const auto message = nlohmann::json::parse(json);
    return {message.at("role").get<std::string>(), message.at("content").get<std::string>()};
  } catch (const nlohmann::json::exception&) {
    throw Error(ErrorCode::kCorruption, "A message of the agent is not readable; delete the agent and start again.");
  }
}

std::vector<int32_t> encode_user_turn(const Tokenizer& tokenizer, const ChatTemplate& chat_template,
                                      const std::vector<Message>& history, const std::vector<int32_t>& held,
                                      const std::string& prompt) {
  std::vector<Message> messages = history;
  if (held.empty()) {
    messages.push_back({"user", prompt});
    // The template writes BOS itself where the model wants one.
    return tokenizer.encode(chat_template.render(messages_to_json(messages), true), false);
  }
  // Whatever the answer was (raw text may have followed it), the placeholder now ends what is held.
  // Some templates want an answer to follow a question, whose text does not matter here.
  if (messages.empty() || messages.back().role == "system") messages.push_back({"user", prompt});
  if (messages.back().role != "assistant") messages.push_back({"assistant", ""});
  const std::string placeholder = draw_placeholder(messages, prompt);
  messages.back().content = placeholder;
  messages.push_back({"user", prompt});
  const std::string rendered = chat_template.render(messages_to_json(messages), true);
  const size_t at = rendered.rfind(placeholder);
  if (at == std::string::npos) {
    throw Error(ErrorCode::kInvalidArgument,
                "The model's chat template leaves out the previous answer, so a turn can't be appended; append plain text.")
        .with_field("TurnRequest::raw");
  }
  std::vector<int32_t> added = tokenizer.encode(rendered.substr(at + placeholder.size()), false);
  added.erase(added.begin(), added.begin() + std::ptrdiff_t(repeated(tokenizer, held, added)));
  return added;
}

}  // namespace torpor
