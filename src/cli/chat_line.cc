#include "cli/chat_line.h"

#include <algorithm>
#include <charconv>
#include <iterator>
#include <sstream>
#include <string_view>

#include "torpor/error.h"

namespace torpor::cli {
namespace {

struct Command {
  std::string_view name;
  size_t least, most;          // arguments
  const char* takes;
  size_t count_at = 0;         // which of them is a number; 0: none
  const char* counts = "";
};

constexpr Command kCommands[] = {
    {"/agent", 1, 1, "the name of an agent"},
    {"/agents", 0, 0, "nothing"},
    {"/exit", 0, 0, "nothing"},
    {"/fork", 1, 2, "a new agent's name, and maybe a number of tokens", 2, "tokens"},
    {"/help", 0, 0, "nothing"},
    {"/memory", 0, 0, "nothing"},
    {"/pin", 0, 0, "nothing"},
    {"/quit", 0, 0, "nothing"},
    {"/rename", 1, 1, "a new name"},
    {"/rewind", 1, 1, "a number of tokens; /undo counts exchanges", 1, "tokens"},
    {"/sleep", 0, 0, "nothing"},
    {"/system", 1, SIZE_MAX, "the text of a system prompt"},
    {"/turns", 0, 0, "nothing"},
    {"/undo", 0, 1, "a number of exchanges, or nothing", 1, "exchanges"},
    {"/unpin", 0, 0, "nothing"},
};

int64_t parse_count(const std::string& text, const char* of_what) {
  int64_t n = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), n);
  if (error != std::errc() || end != text.data() + text.size() || n < 0) {
    throw Error(ErrorCode::kInvalidArgument, "'" + text + "' is not a number of " + of_what);
  }
  return n;
}

/// "/undo" of "/undo 2"; empty when the line is a message.
std::string command_name(const std::string& line) {
  if (!line.starts_with('/') || line.starts_with("//")) return "";
  const std::string name = line.substr(0, line.find_first_of(" \t"));
  const auto letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '-' || c == '_'; };
  return std::all_of(name.begin() + 1, name.end(), letter) ? name : "";
}

}  // namespace

ChatLine parse_chat_line(const std::string& line) {
  const std::string name = command_name(line);
  if (name.empty()) return {.text = line.starts_with("//") ? line.substr(1) : line};
  const auto command = std::ranges::find(kCommands, name, &Command::name);
  if (command == std::end(kCommands)) {
    // It would be a message that is saved for good.
    throw Error(ErrorCode::kInvalidArgument, "there is no command " + name + "; /help lists them, and /" + name + " is a message");
  }
  std::istringstream rest(line.substr(name.size()));
  const std::vector<std::string> arguments{std::istream_iterator<std::string>(rest), {}};
  if (arguments.size() < command->least || arguments.size() > command->most) {
    throw Error(ErrorCode::kInvalidArgument,
                name + " takes " + command->takes + "; /help lists the commands, //... is a message");
  }
  ChatLine parsed{.command = name};
  if (!arguments.empty()) {
    parsed.argument = arguments[0];
    parsed.text = line.substr(line.find(arguments[0], name.size()));
  }
  if (command->count_at > 0 && arguments.size() >= command->count_at) {
    parsed.count = parse_count(arguments[command->count_at - 1], command->counts);
  }
  return parsed;
}

std::vector<std::string> complete_chat_line(const std::string& before,
                                            const std::function<std::vector<std::string>()>& agents) {
  std::vector<std::string> words;
  const size_t blank = before.find_last_of(" \t\n");
  const std::string word = before.substr(blank + 1);  // npos + 1 is 0
  if (blank == before.npos) {
    for (const Command& command : kCommands) {
      // A blank ends the name, where more has to follow.
      if (command.name.starts_with(word)) words.push_back(std::string(command.name) + (command.least > 0 ? " " : ""));
    }
    if (!word.starts_with('/')) words.clear();
  } else if (before.substr(0, before.find_last_not_of(" \t", blank) + 1) == "/agent") {
    for (const std::string& agent : agents()) {
      if (agent.starts_with(word)) words.push_back(agent);
    }
  }
  return words;
}

}  // namespace torpor::cli
