#include "remote/bucket_keys.h"

#include <sys/wait.h>

#include <algorithm>
#include <cstdio>
#include <optional>
#include <span>
#include <utility>

#include "base/environment.h"
#include "remote/records.h"
#include "torpor/error.h"

namespace torpor::remote {
namespace {

constexpr size_t kMostPrinted = 4096;

Error refused(const std::string& sentence) {
  return Error(ErrorCode::kInvalidArgument, sentence).with_field("RemoteOptions::key_command");
}

std::optional<SealRecord> read_seal(ObjectStore& plain) {
  const std::optional<Object> found = plain.get(kSealKey, kMostRecordBytes);
  if (!found) return std::nullopt;
  return decode_seal({reinterpret_cast<const char*>(found->bytes.data()), found->bytes.size()}, kSealKey);
}

/// Whoever comes first with a key.
std::optional<SealRecord> seal_empty(ObjectStore& plain, const std::string& url, const std::string& names) {
  for (const ObjectInfo& object : plain.list("")) {
    if (object.key == kSealKey || object.key.starts_with("probe/")) continue;
    throw refused("'" + url + "' was begun without a key, and can't be sealed now; use another prefix, or no key.");
  }
  const std::string text = encode(SealRecord{names});
  try {
    plain.put(kSealKey, std::as_bytes(std::span(text)), Condition::absent());
  } catch (const LostAnswer&) {
    // It is read again in any case: another one's may be there.
  }
  return read_seal(plain);
}

}  // namespace

std::vector<std::string> run_key_command(const std::string& given) {
  const std::string command = given.empty() ? environment("TORPOR_KEY_COMMAND") : given;
  if (command.empty()) return {};
  // What is typed to this program is not the command's.
  std::FILE* const output = ::popen(("exec </dev/null\n" + command).c_str(), "r");
  if (output == nullptr) throw refused("The key command could not be started; try again.");
  std::string printed(kMostPrinted + 1, '\0');
  printed.resize(std::fread(printed.data(), 1, printed.size(), output));
  const int status = ::pclose(output);
  if (printed.size() > kMostPrinted) throw refused("The key command prints more than keys; let it print nothing else.");
  if (status != 0) {
    const bool exited = status != -1 && WIFEXITED(status);
    throw refused("The key command failed" +
                  (exited ? " (exit status " + std::to_string(WEXITSTATUS(status)) + ")" : std::string()) +
                  "; run it by hand, it prints a key on each line.");
  }
  std::vector<std::string> keys;
  size_t line = 0;
  for (size_t at = 0; at < printed.size(); ++line) {
    const size_t end = std::min(printed.find('\n', at), printed.size());
    std::string key = printed.substr(at, end - at);
    at = end + 1;
    while (!key.empty() && (key.back() == '\r' || key.back() == ' ')) key.pop_back();
    if (key.empty()) continue;
    try {
      key_id(key);
    } catch (const Error&) {
      throw refused("Line " + std::to_string(line + 1) +
                    " of what the key command prints is no key: a key is 64 hex digits, or 32 bytes in base64.");
    }
    keys.push_back(std::move(key));
  }
  if (keys.empty()) throw refused("The key command printed no key; run it by hand, it prints a key on each line.");
  return keys;
}

BucketKeys keys_of_bucket(ObjectStore& plain, const std::string& url, std::vector<std::string> keys) {
  BucketKeys sealed{std::move(keys), {}};
  std::optional<SealRecord> seal = read_seal(plain);
  if (sealed.keys.empty()) {
    if (!seal) return {};
    throw refused("'" + url + "' is sealed; say which command prints its key.");
  }
  if (!seal) seal = seal_empty(plain, url, key_id(sealed.keys.front()));
  if (!seal) {
    throw Error(ErrorCode::kIo, "The object '" + std::string(kSealKey) + "' could not be written to '" + url +
                                    "'; try again.");
  }
  sealed.names = seal->names;
  const auto is_names = [&](const std::string& key) { return key_id(key) == sealed.names; };
  if (std::none_of(sealed.keys.begin(), sealed.keys.end(), is_names)) {
    throw refused("'" + url + "' is sealed with another key: the key command does not print the one of the id " +
                  sealed.names + ".");
  }
  return sealed;
}

}  // namespace torpor::remote
