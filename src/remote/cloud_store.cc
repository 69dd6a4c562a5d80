#include "remote/cloud_store.h"

#include <algorithm>
#include <cstring>

#include "base/json.h"
#include "torpor_remote_shim.h"

namespace torpor::remote {
namespace {

torpor_remote_view view(std::string_view text) { return {text.data(), text.size()}; }

/// Text of the shim's.
struct Text {
  torpor_text_bytes bytes{};
  Text() = default;
  Text(const Text&) = delete;
  Text& operator=(const Text&) = delete;
  ~Text() { torpor_text_bytes_free(bytes); }
  std::string_view view() const { return bytes.data ? std::string_view(bytes.data, bytes.size) : std::string_view(); }
};

/// Throws what the status of a call stands for, but for those that the caller answers itself.
void check(torpor_text_status status, const Text& error) {
  const std::string sentence(error.view());
  switch (status) {
    case TORPOR_TEXT_OK: return;
    case TORPOR_TEXT_INVALID: throw Error(ErrorCode::kInvalidArgument, sentence);
    case TORPOR_REMOTE_NOT_FOUND:
    case TORPOR_REMOTE_NO_BUCKET: throw Error(ErrorCode::kNotFound, sentence);
    case TORPOR_REMOTE_SHORT:
    case TORPOR_REMOTE_LARGE:
    case TORPOR_REMOTE_DAMAGED: throw Error(ErrorCode::kCorruption, sentence);
    case TORPOR_REMOTE_INCOMPATIBLE: throw Error(ErrorCode::kIncompatible, sentence);
    case TORPOR_REMOTE_PRECONDITION:
    case TORPOR_REMOTE_REFUSED: throw Error(ErrorCode::kIo, sentence);
    case TORPOR_REMOTE_UNKNOWN: throw LostAnswer(sentence);
    case TORPOR_REMOTE_CANCELLED: throw Error(ErrorCode::kCancelled, sentence);
    default: throw Error(ErrorCode::kInternal, "the client of object stores failed: " + sentence);
  }
}

ObjectInfo info_of(const nlohmann::json& described) {
  return {described.at("key"), described.at("bytes"), described.at("tag"), described.at("modified_ms")};
}

std::string options_text(const CloudOptions& options) {
  const auto ms = [](std::chrono::milliseconds time) { return std::max<std::int64_t>(time.count(), 0); };
  nlohmann::json json{{"request_timeout_ms", ms(options.request_timeout)},
                      {"connect_timeout_ms", ms(options.connect_timeout)},
                      {"retries", std::max(options.retries, 0)},
                      {"retry_timeout_ms", ms(options.retry_timeout)}};
  const BucketKeys& seal = options.seal;
  if (!seal.keys.empty()) json["seal"] = nlohmann::json{{"keys", seal.keys}, {"names", seal.names}};
  return dump_json(json);
}

torpor_remote_store* open(const std::string& url, const CloudOptions& options) {
  const std::string text = options_text(options);
  torpor_remote_store* store = nullptr;
  Text error;
  check(torpor_remote_open(view(url), view(text), &store, &error.bytes), error);
  return store;
}

}  // namespace

std::string key_id(const std::string& key) {
  Text id, error;
  check(torpor_remote_key_id(view(key), &id.bytes, &error.bytes), error);
  return std::string(id.view());
}

CloudStore::CloudStore(const std::string& url, const CloudOptions& options) : store_(open(url, options)) {}
CloudStore::~CloudStore() { torpor_remote_close(store_); }
void CloudStore::cancel() noexcept { torpor_remote_cancel(store_); }

PutResult CloudStore::put(const std::string& key, std::span<const std::byte> bytes, const Condition& condition,
                          const ObjectMetadata& metadata) {
  constexpr torpor_remote_condition kKinds[] = {TORPOR_REMOTE_ALWAYS, TORPOR_REMOTE_IF_ABSENT, TORPOR_REMOTE_IF_TAG};
  std::vector<torpor_remote_pair> pairs;
  for (const auto& [name, value] : metadata) pairs.push_back({view(name), view(value)});
  Text tag, error;
  const auto status = torpor_remote_put(store_, view(key), reinterpret_cast<const std::uint8_t*>(bytes.data()),
                                        bytes.size(), kKinds[int(condition.kind)], view(condition.tag), pairs.data(),
                                        pairs.size(), &tag.bytes, &error.bytes);
  if (status == TORPOR_REMOTE_PRECONDITION) return {PutStatus::kPrecondition, {}};
  check(status, error);
  return {PutStatus::kDone, std::string(tag.view())};
}

std::optional<Object> CloudStore::get(const std::string& key, std::uint64_t most_bytes) {
  Text data, description, error;
  const auto status = torpor_remote_get(store_, view(key), most_bytes, &data.bytes, &description.bytes, &error.bytes);
  if (status == TORPOR_REMOTE_NOT_FOUND) return std::nullopt;
  check(status, error);
  const nlohmann::json described = parse_json<nlohmann::json>(description.view());
  const auto* begin = reinterpret_cast<const std::byte*>(data.bytes.data);
  return Object{info_of(described), described.at("metadata").get<ObjectMetadata>(), {begin, begin + data.bytes.size}};
}

std::optional<ObjectInfo> CloudStore::head(const std::string& key) {
  Text description, error;
  const auto status = torpor_remote_head(store_, view(key), &description.bytes, &error.bytes);
  if (status == TORPOR_REMOTE_NOT_FOUND) return std::nullopt;
  check(status, error);
  return info_of(parse_json<nlohmann::json>(description.view()));
}

void CloudStore::read(const std::string& key, std::uint64_t offset, std::span<std::byte> out) {
  Text error;
  auto* begin = reinterpret_cast<std::uint8_t*>(out.data());
  check(torpor_remote_read(store_, view(key), offset, begin, out.size(), &error.bytes), error);
}

std::vector<ObjectInfo> CloudStore::list(const std::string& prefix) {
  Text descriptions, error;
  check(torpor_remote_list(store_, view(prefix), &descriptions.bytes, &error.bytes), error);
  std::vector<ObjectInfo> objects;
  for (const nlohmann::json& described : parse_json<nlohmann::json>(descriptions.view())) {
    objects.push_back(info_of(described));
  }
  std::sort(objects.begin(), objects.end(), [](const ObjectInfo& a, const ObjectInfo& b) { return a.key < b.key; });
  return objects;
}

void CloudStore::remove(const std::string& key) {
  Text error;
  check(torpor_remote_remove(store_, view(key), &error.bytes), error);
}

}  // namespace torpor::remote
