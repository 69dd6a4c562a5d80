#include "cli/exchanges.h"

#include "cli/text_input.h"
#include "torpor/error.h"

namespace torpor::cli {
namespace {

Json parse_message(const StoredMessage& message) {
  constexpr int kDeepest = 64;
  const auto shallow = [](int depth, Json::parse_event_t, Json&) { return depth <= kDeepest; };
  return parse_json<Json>(message.json, shallow, false);
}

}  // namespace

Json messages_of(const std::vector<StoredMessage>& messages) {
  Json all = Json::array();
  for (const StoredMessage& message : messages) {
    Json parsed = parse_message(message);
    if (parsed.is_object()) all.push_back(std::move(parsed));
  }
  return all;
}

Json messages_of(const Store& store, const std::string& id) { return messages_of(store.agent_messages(id)); }

std::string text_of(const Json& message, const char* key) {
  const auto it = message.is_object() ? message.find(key) : message.end();
  if (!message.is_object() || it == message.end()) return "";
  return it->is_string() ? it->get<std::string>() : it->dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::vector<Exchange> exchanges_of(const std::vector<StoredMessage>& messages) {
  std::vector<Exchange> exchanges;
  for (const StoredMessage& stored : messages) {
    const Json message = parse_message(stored);
    if (text_of(message, "role") == "user") {
      const int64_t begin = exchanges.empty() ? 0 : exchanges.back().end;
      exchanges.push_back({begin, stored.end, text_of(message, "content"), ""});
    } else if (!exchanges.empty()) {
      exchanges.back().end = stored.end;
      exchanges.back().answer = text_of(message, "content");
    }
  }
  return exchanges;
}

std::vector<Exchange> exchanges_of(const Store& store, const std::string& id) {
  return exchanges_of(store.agent_messages(id));
}

int64_t end_of_exchange(const std::vector<Exchange>& exchanges, const std::string& id, int64_t n) {
  if (n < 0 || n > ssize(exchanges)) {
    throw Error(ErrorCode::kInvalidArgument, "Agent '" + id + "' has " + std::to_string(exchanges.size()) + " exchanges, not " +
                                                 std::to_string(n) + (exchanges.empty() ? "; count tokens instead." : "."));
  }
  return n == 0 ? 0 : exchanges[size_t(n - 1)].end;
}

int64_t begin_of_last(const std::vector<Exchange>& exchanges, const std::string& id, int64_t n) {
  const int64_t total = ssize(exchanges);
  return end_of_exchange(exchanges, id, n > total ? n : total - n);
}

std::string first_line(const std::string& text, size_t width) {
  std::string line;
  size_t shown = 0;
  for (std::string_view rest = text; !rest.empty() && rest[0] != '\n';) {
    if (shown++ == width) return line + "...";
    char32_t code = 0;
    const size_t length = std::max<size_t>(decode_utf8(rest, code), 1);
    line += rest.substr(0, length);
    rest.remove_prefix(length);
  }
  return line.size() < text.size() ? line + "..." : line;
}

}  // namespace torpor::cli
