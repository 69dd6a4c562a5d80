#include "store/messages.h"

#include <charconv>

#include "base/json.h"
#include "store/torpor_file.h"
#include "torpor/error.h"

namespace torpor {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view kIds = "\"ids\":[";
constexpr const char* kNoIds = "one of its messages does not say which ids are its own";

/// Bytes of the JSON object that `text` begins with; 0 when it is none, or none that ends.
size_t object_size(std::string_view text) {
  if (text.empty() || text.front() != '{') return 0;
  size_t depth = 0;
  bool quoted = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (quoted) {
      if (c == '\\') ++i;
      quoted = c != '"';
    } else if (c == '"') {
      quoted = true;
    } else if (c == '{' || c == '[') {
      ++depth;
    } else if ((c == '}' || c == ']') && --depth == 0) {
      return i + 1;
    }
  }
  return 0;
}

}  // namespace

std::string encode_messages(std::span<const StoredMessage> messages) {
  if (messages.empty()) return {};
  std::string json = "[";
  for (const StoredMessage& message : messages) {
    if (!message.json.starts_with('{') || !message.json.ends_with('}')) {
      throw Error(ErrorCode::kInvalidArgument, "A message to be stored is not a JSON object.");
    }
    if (json.size() > 1) json += ',';
    json.append(message.json, 0, message.json.size() - 1);
    if (message.json.size() > 2) json += ',';
    json += "\"ids\":[" + std::to_string(message.begin) + "," + std::to_string(message.end) + "]}";
  }
  return json + "]";
}

std::vector<StoredMessage> decode_messages(std::string_view text, const std::string& file_name) {
  // What is between the objects' braces is for whoever needs it to parse: here it is taken apart at memory speed.
  std::vector<StoredMessage> messages;
  if (text.empty()) return messages;
  if (text.size() < 2 || text.front() != '[' || text.back() != ']')
    corrupt(file_name, "its messages are not a JSON array");
  text = text.substr(1, text.size() - 2);
  while (true) {
    const size_t size = object_size(text);
    if (size == 0) corrupt(file_name, "one of its messages is not a JSON object");
    const std::string_view object = text.substr(0, size);
    StoredMessage& message = messages.emplace_back();
    const size_t ids = object.rfind(kIds);
    const char* const stop = object.data() + object.size();
    if (ids == std::string_view::npos) corrupt(file_name, kNoIds);
    const auto begin = std::from_chars(object.data() + ids + kIds.size(), stop, message.begin);
    if (begin.ec != std::errc() || begin.ptr == stop || *begin.ptr != ',') corrupt(file_name, kNoIds);
    const auto end = std::from_chars(begin.ptr + 1, stop, message.end);
    if (end.ec != std::errc() || std::string_view(end.ptr, stop) != "]}") corrupt(file_name, kNoIds);
    if (message.begin < 0 || message.begin > message.end)
      corrupt(file_name, "one of its messages ends before it begins");
    message.json.assign(object.substr(0, ids > 0 && object[ids - 1] == ',' ? ids - 1 : ids)).push_back('}');
    text.remove_prefix(size);
    if (text.empty()) return messages;
    if (text.front() != ',') corrupt(file_name, "its messages are not a JSON array");
    text.remove_prefix(1);
  }
}

bool decode_old_messages(std::string_view text, std::string_view ends, int64_t n_tokens,
                         std::vector<StoredMessage>& messages) {
  // Of any depth: objects that keep their order would copy what they hold as they grow, which recurses.
  const auto json = parse_json<nlohmann::json>(text, nullptr, false);
  if (!json.is_array()) return false;
  std::vector<StoredMessage> found;
  int64_t begin = 0;
  for (const auto& message : json) {
    if (!message.is_object() || message.size() != 2 || !message.contains("role") || !message["role"].is_string() ||
        !message.contains("content") || !message["content"].is_string()) {
      return false;
    }
    // Who wrote none may not say where its messages end: then only the whole of it is certain.
    int64_t end = n_tokens;
    const std::string_view digits = ends.substr(0, ends.find(','));
    if (!digits.empty()) {
      const auto [stop, error] = std::from_chars(digits.data(), digits.data() + digits.size(), end);
      if (error != std::errc() || stop != digits.data() + digits.size() || end < 0) return false;
    }
    ends.remove_prefix(std::min(ends.size(), digits.size() + 1));
    begin = std::min(begin, end);
    const Json canonical = {{"role", message["role"].get<std::string>()},
                            {"content", message["content"].get<std::string>()}};
    found.push_back({dump_json(canonical, -1, Json::error_handler_t::replace), begin, end});
    begin = end;
  }
  messages.insert(messages.end(), found.begin(), found.end());
  return true;
}

}  // namespace torpor
