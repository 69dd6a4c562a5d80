#include "agents/conversation.h"

#include <algorithm>

#include "base/env.h"
#include "base/json.h"
#include "torpor/error.h"

namespace torpor {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kArguments = "TurnRequest::template_arguments";

/// As templates take messages: calls as OpenAI has them, arguments as objects.
std::string rendered_json(std::span<const Message> messages) {
  Json array = Json::array();
  for (const Message& message : messages) {
    Json json = parse_json<Json>(message_to_json(message));
    if (const auto calls = json.find("tool_calls"); calls != json.end()) {
      for (Json& call : *calls) {
        Json as_template{{"type", "function"},
                         {"function", Json{{"name", call["name"]}, {"arguments", call["arguments"]}}}};
        if (call.contains("id")) as_template["id"] = call["id"];
        call = std::move(as_template);
      }
    }
    array.push_back(std::move(json));
  }
  return dump_json(array);
}

// Stands for an answer whose tokens are held already. It is drawn anew for every turn and is in none of the messages:
// whoever could write it could cut off the beginning of a turn. Free of white space that a template could trim.
std::string draw_placeholder(const std::string& messages, const std::string& variables) {
  while (true) {
    const std::string number = std::to_string(random_bits());
    const std::string drawn = "\xEE\x80\x80torpor-" + number + "\xEE\x80\x81";
    if (messages.find(drawn) == std::string::npos && variables.find(drawn) == std::string::npos) return drawn;
  }
}

// How many of the first tokens of `added` the answer had already: the end of a turn is sampled by the model and rendered by the
// template, which may put white space before it.
size_t repeated(const Tokenizer& tokenizer, int32_t last, const std::vector<int32_t>& added) {
  for (size_t i = 0; i < added.size(); ++i) {
    if (added[i] == last) return i + 1;
    if (tokenizer.decode({added[i]}).find_first_not_of(" \t\r\n") != std::string::npos) break;
  }
  return 0;
}

/// The last of `messages`, an answer, as the template writes it after what lies before it.
std::optional<RenderedText> render_answer(const Phrasing& phrasing, std::vector<Message> messages) {
  RenderedText rendered = phrasing.render(rendered_json(messages));
  Message& answer = messages.back();
  answer.tool_calls.clear();  // they stand behind the content
  answer.content = draw_placeholder(rendered_json(messages), phrasing.variables);
  const std::string around = phrasing.render(rendered_json(messages)).text;
  const size_t at = around.rfind(answer.content);
  if (at == std::string::npos) return std::nullopt;
  const std::string_view behind = std::string_view(around).substr(at + answer.content.size());
  const std::string_view whole = rendered.text;
  const bool same =
      whole.size() >= at + behind.size() && whole.starts_with(around.substr(0, at)) && whole.ends_with(behind);
  if (!same) return std::nullopt;
  rendered.text = std::string(whole.substr(at, whole.size() - at - behind.size()));
  return rendered;
}

}  // namespace

std::string template_variables(const std::string& tools, const std::string& arguments) {
  const auto parse = [](const std::string& text, Json::value_t kind, const char* field, const char* sentence) {
    const auto too_deep = [](int depth, Json::parse_event_t, Json&) {
      if (depth > 200) throw Error(ErrorCode::kInvalidArgument, "Tools or template arguments are nested too deeply.");
      return true;
    };
    Json json = parse_json<Json>(text, too_deep, false);
    if (kind == json.type()) return json;
    throw Error(ErrorCode::kInvalidArgument, sentence).with_field(field);
  };
  Json variables = Json::object();
  if (!arguments.empty()) {
    variables = parse(arguments, Json::value_t::object, kArguments, "The template arguments are not a JSON object.");
  }
  if (variables.contains("messages") || variables.contains("add_generation_prompt")) {
    throw Error(ErrorCode::kInvalidArgument,
                "The template arguments hold messages or add_generation_prompt, which a turn itself "
                "gives; leave them out.")
        .with_field(kArguments);
  }
  if (!tools.empty()) {
    Json listed = parse(tools, Json::value_t::array, "TurnRequest::tools", "The tools are not a JSON array.");
    if (!listed.empty()) variables["tools"] = std::move(listed);
  }
  return variables.empty() ? std::string() : dump_json(variables);
}

bool same_variables(const std::string& a, const std::string& b) {
  return a == b || (!a.empty() && !b.empty() && parse_json<nlohmann::json>(a) == parse_json<nlohmann::json>(b));
}

size_t count_equal(std::span<const HeldMessage> held, std::span<const Message> given) {
  return size_t(std::ranges::mismatch(held, given, says_the_same).in1 - held.begin());
}

size_t last_answer(std::span<const HeldMessage> held, size_t equal) {
  for (size_t n = equal; n > 0; --n) {
    // One that was given, not generated, ends with the question that follows it as far as is known.
    const bool known = n == held.size() || held[n - 1].end < held[n].end;
    if (held[n - 1].role == "assistant" && known) return n;
  }
  return 0;
}

std::vector<int32_t> encode_conversation(const Phrasing& phrasing, std::span<const Message> messages) {
  // The template writes BOS itself where the model wants one.
  return phrasing.tokenizer.encode(phrasing.render(rendered_json(messages)), std::nullopt);
}

std::optional<std::vector<int32_t>> encode_after_answer(const Phrasing& phrasing, std::vector<Message> messages,
                                                        size_t answered, int32_t last, const std::string& began_with) {
  Message& answer = messages.at(answered - 1);
  answer = {.role = "assistant", .content = {}};
  answer.content = draw_placeholder(rendered_json(messages), phrasing.variables + began_with);
  const std::string json = rendered_json(messages);
  RenderedText rendered = phrasing.render(json);
  const size_t at = rendered.text.rfind(answer.content);
  if (at == std::string::npos) return std::nullopt;
  if (!same_variables(phrasing.variables, began_with)) {
    const std::string before = phrasing.render(json, began_with).text;
    if (before.compare(0, before.rfind(answer.content), rendered.text, 0, at) != 0) return std::nullopt;
  }
  rendered.text.erase(0, at + answer.content.size());
  std::vector<int32_t> added = phrasing.tokenizer.encode(rendered, last);
  added.erase(added.begin(), added.begin() + std::ptrdiff_t(repeated(phrasing.tokenizer, last, added)));
  return added;
}

size_t count_asking(const Phrasing& phrasing, std::span<const int32_t> tokens) {
  try {
    const std::string json = rendered_json(std::vector<Message>{{"user", "x"}});
    RenderedText asking = phrasing.render(json);
    const std::string before =
        phrasing.chat_template.render(json, false, phrasing.variables, phrasing.special ? nullptr : &phrasing.tokenizer)
            .text;
    if (!asking.text.starts_with(before) || asking.text.size() == before.size()) return 0;
    asking.text.erase(0, before.size());
    // What comes before may be one token with it, so that the ids are compared.
    const std::vector<int32_t> ids = phrasing.tokenizer.encode(asking, -1);
    const bool same = ids.size() < tokens.size() && std::equal(ids.begin(), ids.end(), tokens.end() - ssize(ids));
    return same ? ids.size() : 0;
  } catch (const Error&) {
    return 0;  // the template wants another conversation
  }
}

size_t count_system(const Phrasing& phrasing, std::span<const Message> messages, std::span<const int32_t> tokens) {
  std::vector<Message> some;
  for (const Message& message : messages) {
    if (message.role != "system" && message.role != "developer") break;
    some.push_back(message);
  }
  if (some.empty() && phrasing.variables.empty()) return 0;
  try {
    // Where two questions part is where the system's part is over.
    some.push_back({"user", draw_placeholder(rendered_json(some), phrasing.variables)});
    RenderedText system = phrasing.render(rendered_json(some));
    const size_t at = system.text.find(some.back().content);
    if (at == std::string::npos) return 0;
    system.text.erase(at);
    const std::vector<int32_t> ids = phrasing.tokenizer.encode(system, std::nullopt);
    return size_t(std::ranges::mismatch(ids, tokens).in1 - ids.begin());
  } catch (const Error&) {
    return 0;
  }
}

std::vector<int32_t> encode_history(const Phrasing& phrasing, std::span<HeldMessage> messages) {
  std::vector<int32_t> tokens;
  const auto last = [&] { return tokens.empty() ? -1 : tokens.back(); };
  const auto append = [&](const std::optional<std::vector<int32_t>>& added) {
    if (!added) {
      throw Error(ErrorCode::kInvalidArgument,
                  "The model's chat template changes answers of the conversation, so it can't be "
                  "written anew; start a new agent.");
    }
    tokens.insert(tokens.end(), added->begin(), added->end());
  };
  size_t answered = 0;  // messages up to the last answer
  for (size_t i = 0; i <= messages.size(); ++i) {
    const bool over = i == messages.size();
    if (over ? answered == i : messages[i].role != "assistant") continue;
    const std::vector<Message> asked(messages.begin(), messages.begin() + ptrdiff_t(i));
    append(answered == 0 ? encode_conversation(phrasing, asked)
                         : encode_after_answer(phrasing, asked, answered, last(), phrasing.variables));
    for (; answered < i; ++answered) messages[answered].end = int(tokens.size());
    if (over) break;
    const auto answer = render_answer(phrasing, {messages.begin(), messages.begin() + ptrdiff_t(i) + 1});
    append(answer ? std::optional(phrasing.tokenizer.encode(*answer, last())) : std::nullopt);
    messages[answered++].end = int(tokens.size());
  }
  return tokens;
}

std::vector<int32_t> encode_user_turn(const Phrasing& phrasing, std::vector<Message> history,
                                      std::span<const int32_t> held, const std::string& prompt,
                                      const std::string& began_with) {
  if (held.empty()) {
    history.push_back({"user", prompt});
    return encode_conversation(phrasing, history);
  }
  // Some templates want an answer to follow a question, whose text does not matter here.
  if (history.empty() || history.back().role == "system") history.push_back({"user", prompt});
  if (history.back().role != "assistant") history.push_back({"assistant", ""});
  const size_t answered = history.size();
  history.push_back({"user", prompt});
  auto added = encode_after_answer(phrasing, std::move(history), answered, held.back(), began_with);
  if (added) return *std::move(added);
  if (!same_variables(phrasing.variables, began_with)) {
    throw Error(ErrorCode::kInvalidArgument,
                "The agent began with other tools or template arguments; give none, or start a "
                "new agent.")
        .with_field(kArguments, began_with, phrasing.variables);
  }
  throw Error(
      ErrorCode::kInvalidArgument,
      "The model's chat template leaves out the previous answer, so a turn can't be appended; append plain text.")
      .with_field("TurnRequest::raw");
}

}  // namespace torpor
