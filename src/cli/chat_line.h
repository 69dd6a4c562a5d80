#pragma once
/// A line that is typed to `torpor chat`: a message, or a command to the program.

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace torpor::cli {

struct ChatLine {
  std::string command{};            ///< "/undo"; empty: the line is a message
  std::string text{};               ///< the message; of a command: all that follows its name, without the space before
  std::string argument{};           ///< the command's first one; empty without one
  std::optional<int64_t> count{};   ///< the command's number of tokens or exchanges, not negative; nullopt without one
};

/// What begins with no slash is a message, as is a path. Two slashes begin a message with one. kInvalidArgument for a command
/// that there is not, and for one with other arguments than it takes.
ChatLine parse_chat_line(const std::string& line);

/// What the last word of a line's beginning may become: a command, or an agent where a command takes one. `agents` is asked for
/// them then.
std::vector<std::string> complete_chat_line(const std::string& before,
                                            const std::function<std::vector<std::string>()>& agents);

}  // namespace torpor::cli
