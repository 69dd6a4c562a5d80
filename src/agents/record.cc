#include "agents/record.h"

#include <algorithm>
#include <charconv>
#include <limits>

#include "torpor/error.h"

namespace torpor {
namespace {

constexpr const char* kMessages = "messages";
constexpr const char* kMessageEnds = "message_ends";  // tokens up to each message's end: "12,40"
constexpr const char* kHistory = "history_tokens";    // written only when it differs from the rows held
constexpr const char* kShortestCut = "shortest_cut";  // written only when there is one
constexpr const char* kPinned = "pinned";             // written only when it is "true"

size_t parse_count(std::string_view text, size_t limit) {
  size_t count = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), count);
  if (error != std::errc() || end != text.data() + text.size() || count > limit) {
    throw Error(ErrorCode::kCorruption, "The agent's count of tokens, '" + std::string(text) +
                                            "', is not readable; delete the agent and start again.");
  }
  return count;
}

}  // namespace

void AgentRecord::cut(size_t n_tokens) {
  if (n_tokens > 0 && n_tokens < shortest_cut) {
    throw Error(ErrorCode::kInvalidArgument, "The agent can't be cut to " + std::to_string(n_tokens) + " tokens, only to " +
                                                 std::to_string(shortest_cut) + " or more: the file it was imported from had "
                                                 "forgotten the rows that its sliding windows would need.");
  }
  if (n_tokens == 0) shortest_cut = 0;
  const auto cut_through = [&](const Message& message) { return size_t(message.end) > n_tokens; };
  messages.erase(std::find_if(messages.begin(), messages.end(), cut_through), messages.end());
  history = std::min(history, n_tokens);
}

RecordMetadata encode_record(const AgentRecord& record, size_t n_tokens) {
  std::string ends;
  for (const Message& message : record.messages) {
    if (!ends.empty()) ends += ',';
    ends += std::to_string(message.end);
  }
  RecordMetadata keys;
  if (record.conversation) keys = {{kMessages, messages_to_json(record.messages)}, {kMessageEnds, ends}};
  if (record.history != n_tokens) keys.emplace_back(kHistory, std::to_string(record.history));
  if (record.shortest_cut != 0) keys.emplace_back(kShortestCut, std::to_string(record.shortest_cut));
  if (record.pinned) keys.emplace_back(kPinned, "true");
  return keys;
}

AgentRecord decode_record(const AgentInfo& info, size_t n_tokens) {
  AgentRecord record;
  record.history = n_tokens;
  record.conversation = false;
  std::string ends;
  for (const auto& [key, value] : info.record) {
    if (key == kMessages) {
      record.conversation = true;
      record.messages = messages_from_json(value);
    } else if (key == kMessageEnds) {
      ends = value;
    } else if (key == kHistory) {
      record.history = parse_count(value, n_tokens);
    } else if (key == kShortestCut) {
      record.shortest_cut = parse_count(value, n_tokens);
    } else if (key == kPinned) {
      record.pinned = value == "true";
    }
  }
  std::string_view rest = ends;
  for (Message& message : record.messages) {
    // An agent that something else wrote may not say where its messages end: then only the whole of it is certain.
    const std::string_view end = rest.substr(0, rest.find(','));
    message.end = end.empty() ? int(n_tokens) : int(parse_count(end, size_t(std::numeric_limits<int>::max())));
    rest.remove_prefix(std::min(rest.size(), end.size() + 1));
  }
  return record;
}

}  // namespace torpor
