#include "server/keys.h"

#include <sys/random.h>  // getentropy on macOS
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <span>

#include "base/env.h"
#include "base/environment.h"
#include "server/chat.h"
#include "torpor/error.h"
#include "torpor/store.h"
#include "torpor_http_shim.h"

namespace torpor::server {
namespace {

using Hash = std::array<uint8_t, 32>;

Hash sha256(std::string_view text) {
  Hash hash{};
  torpor_http_sha256(text.data(), text.size(), hash.data());
  return hash;
}

std::string hex(std::span<const uint8_t> bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const uint8_t byte : bytes) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

std::optional<Hash> from_hex(std::string_view text) {
  Hash hash{};
  if (text.size() != 2 * hash.size()) return std::nullopt;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                             : -1;
    if (digit < 0) return std::nullopt;
    hash[i / 2] = static_cast<uint8_t>(hash[i / 2] << 4 | digit);
  }
  return hash;
}

bool is_tenant(std::string_view name) {
  return !name.empty() && name.size() <= 32 &&
         std::all_of(name.begin(), name.end(), [](unsigned char c) { return std::isalnum(c) || c == '-' || c == '_'; });
}

/// Of other tenants' agents: "t.TENANT.NAME". A tenant has no '.', so two never meet.
constexpr std::string_view kForeign = "t.";
constexpr uint64_t kMostBytes = 16 << 20;  // of a key file

void write_new(const std::filesystem::path& path, std::string_view text) {
  File file = Env::posix().open(path, OpenMode::kCreateNew);
  file.write_all({std::as_bytes(std::span(text))});
  file.close();
}

}  // namespace

std::string agent_id_of(const std::string& tenant, const std::string& name) {
  const bool local = tenant == kLocalTenant;
  std::string id = local ? name : std::string(kForeign) + tenant + "." + name;
  try {
    if (!local) check_agent_id(name);
    check_agent_id(id);
  } catch (const Error& e) {
    throw Failure(Failure::Kind::kInvalid, e.what(), "agent");
  }
  if (local && id.starts_with(kForeign)) {
    throw Failure(Failure::Kind::kInvalid, "An agent's name does not begin with 't.'; choose another.", "agent");
  }
  return id;
}

std::optional<std::string> agent_name_of(const std::string& tenant, const std::string& id) {
  if (tenant == kLocalTenant) return id.starts_with(kForeign) ? std::nullopt : std::optional(id);
  const std::string prefix = std::string(kForeign) + tenant + ".";
  return id.starts_with(prefix) ? std::optional(id.substr(prefix.size())) : std::nullopt;
}

std::string salt_of(const std::string& tenant) { return tenant == kLocalTenant ? std::string() : tenant; }

ApiKeys ApiKeys::read(const std::filesystem::path& path) {
  const std::string text = Env::posix().read_file(path, kMostBytes);
  ApiKeys keys;
  int number = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = std::string_view(text).substr(begin, end - begin);
    begin = end + 1;
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos || line.starts_with('#')) continue;
    const size_t first = std::min(line.find(':'), line.size());
    const size_t second = std::min(line.find(':', first + 1), line.size());
    std::string_view digits = line.substr(std::min(second + 1, line.size()));
    while (!digits.empty() && (digits.back() == '\r' || digits.back() == ' ')) digits.remove_suffix(1);
    const auto hash = from_hex(digits);
    if (!is_tenant(line.substr(0, first)) || !hash) {
      throw Error(ErrorCode::kInvalidArgument,
                  "line " + std::to_string(number) + " of " + path.string() +
                      " is no key; write tenant:name:hash, the hash as sha256sum prints it")
          .with_path(path.string());
    }
    keys.entries_.push_back(
        {{std::string(line.substr(0, first)), std::string(line.substr(first + 1, second - first - 1))}, *hash});
  }
  if (keys.entries_.empty()) {
    throw Error(ErrorCode::kInvalidArgument, path.string() + " holds no key; add a line tenant:name:hash")
        .with_path(path.string());
  }
  return keys;
}

std::optional<KeyOwner> ApiKeys::owner_of(std::string_view key) const {
  const Hash hash = sha256(key);
  const Entry* found = nullptr;
  for (const Entry& entry : entries_) {
    uint8_t different = 0;
    for (size_t i = 0; i < hash.size(); ++i) different |= hash[i] ^ entry.hash[i];
    if (different == 0) found = &entry;
  }
  return found ? std::optional(found->owner) : std::nullopt;
}

std::filesystem::path default_key_file() {
  const std::string config = environment("XDG_CONFIG_HOME");
  const std::filesystem::path directory =
      !config.empty() ? std::filesystem::path(config) : std::filesystem::path(home_directory()) / ".config";
  return directory / "torpor" / "api-keys";
}

std::filesystem::path local_key_file(const std::filesystem::path& key_file) { return key_file.string() + ".local"; }

std::string local_key(const std::filesystem::path& key_file) {
  std::string key;
  try {
    key = Env::posix().read_file(local_key_file(key_file), kMostBytes);
  } catch (const Error&) {
    return {};
  }
  key.erase(key.find_last_not_of(" \t\r\n") + 1);
  return key;
}

std::string make_key_file(const std::filesystem::path& key_file) {
  std::array<uint8_t, 32> bytes{};
  if (getentropy(bytes.data(), bytes.size()) != 0) throw Error(ErrorCode::kIo, "the system gives no random bytes");
  const std::string key = "sk-torpor-" + hex(bytes);
  Env& env = Env::posix();
  std::vector<std::filesystem::path> missing;
  for (auto at = key_file.parent_path(); !at.empty() && !env.exists(at); at = at.parent_path()) missing.push_back(at);
  for (auto at = missing.rbegin(); at != missing.rend(); ++at) env.make_directory(*at);
  // The key first: a crash between the two leaves a key that opens nothing, not a lock without a key.
  if (env.exists(key_file))
    throw Error(ErrorCode::kInvalidArgument, key_file.string() + " exists already; remove it for a new key");
  env.remove(local_key_file(key_file));
  write_new(local_key_file(key_file), key + "\n");
  write_new(key_file, std::string(kLocalTenant) + ":first:" + hex(sha256(key)) + "\n");
  return key;
}

}  // namespace torpor::server
