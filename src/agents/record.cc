#include "agents/record.h"

#include <algorithm>
#include <charconv>
#include <limits>

#include "base/json.h"
#include "torpor/error.h"

namespace torpor {
namespace {

constexpr const char* kHistory = "history_tokens";    // written only when it differs from the rows held
constexpr const char* kShortestCut = "shortest_cut";  // written only when there is one
constexpr const char* kPinned = "pinned";             // written only when it is "true"
constexpr const char* kCheckpoints = "checkpoints";   // written only when there are any
constexpr const char* kVariables = "template_variables";  // of the first message

size_t parse_count(std::string_view text, size_t limit) {
  size_t count = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), count);
  if (error != std::errc() || end != text.data() + text.size() || count > limit) {
    throw Error(ErrorCode::kCorruption, "The agent's count of tokens, '" + std::string(text) +
                                            "', is not readable; delete the agent and start again.");
  }
  return count;
}

/// With the variables of the first message.
HeldMessage read_message(const std::string& json, std::string* variables) {
  try {
    if (variables != nullptr && json.find(kVariables) != std::string::npos) {
      const auto parsed = parse_json<nlohmann::ordered_json>(json);
      if (const auto found = parsed.find(kVariables); found != parsed.end() && found->is_object())
        *variables = found->dump();
    }
    return {message_from_json(json)};
  } catch (const std::exception&) {
    throw Error(ErrorCode::kCorruption, "A message of the agent is not readable; delete the agent and start again.");
  }
}

}  // namespace

void AgentRecord::cut(size_t n_tokens) {
  if (n_tokens > 0 && n_tokens < shortest_cut) {
    throw Error(ErrorCode::kInvalidArgument, "The agent can't be cut to " + std::to_string(n_tokens) +
                                                 " tokens, only to " + std::to_string(shortest_cut) +
                                                 " or more: the file it was imported from had "
                                                 "forgotten the rows that its sliding windows would need.");
  }
  if (n_tokens == 0) shortest_cut = 0;
  const auto cut_through = [&](const HeldMessage& message) { return size_t(message.end) > n_tokens; };
  messages.erase(std::find_if(messages.begin(), messages.end(), cut_through), messages.end());
  if (messages.empty()) variables.clear();
  history = std::min(history, n_tokens);
  std::erase_if(checkpoints, [&](int64_t position) { return position > int64_t(n_tokens); });
}

AgentNotes encode_record(const AgentRecord& record, size_t n_tokens) {
  AgentNotes notes;
  int64_t begin = 0;
  for (const HeldMessage& message : record.messages) {
    begin = std::min<int64_t>(begin, message.end);
    std::string json = message_to_json(message);
    if (notes.messages.empty() && !record.variables.empty()) {
      json.pop_back();
      json.append(",\"").append(kVariables).append("\":").append(record.variables).append("}");
    }
    notes.messages.push_back({std::move(json), begin, message.end});
    begin = message.end;
  }
  if (record.history != n_tokens) notes.record.emplace_back(kHistory, std::to_string(record.history));
  if (record.shortest_cut != 0) notes.record.emplace_back(kShortestCut, std::to_string(record.shortest_cut));
  if (record.pinned) notes.record.emplace_back(kPinned, "true");
  std::string checkpoints;
  for (const int64_t position : record.checkpoints) {
    checkpoints.append(checkpoints.empty() ? "" : ",").append(std::to_string(position));
  }
  if (!checkpoints.empty()) notes.record.emplace_back(kCheckpoints, checkpoints);
  return notes;
}

AgentRecord decode_record(const AgentNotes& notes, size_t n_tokens) {
  AgentRecord record;
  record.history = n_tokens;
  for (const auto& [key, value] : notes.record) {
    if (key == kHistory) {
      record.history = parse_count(value, n_tokens);
    } else if (key == kShortestCut) {
      record.shortest_cut = parse_count(value, n_tokens);
    } else if (key == kPinned) {
      record.pinned = value == "true";
    } else if (key == kCheckpoints) {
      for (std::string_view rest = value;; rest.remove_prefix(rest.find(',') + 1)) {
        record.checkpoints.push_back(int64_t(parse_count(rest.substr(0, rest.find(',')), n_tokens)));
        if (rest.find(',') == std::string_view::npos) break;
      }
      std::ranges::sort(record.checkpoints);
    }
  }
  for (const StoredMessage& message : notes.messages) {
    record.messages.emplace_back(read_message(message.json, record.messages.empty() ? &record.variables : nullptr));
    record.messages.back().end = int(std::min<int64_t>(message.end, std::numeric_limits<int>::max()));
  }
  return record;
}

}  // namespace torpor
