#include "model/known_digests.h"

#include <algorithm>
#include <chrono>
#include <optional>

#include "base/env.h"
#include "base/environment.h"
#include "base/hash.h"
#include "base/json.h"
#include "torpor/error.h"
#include "torpor/log.h"

namespace torpor::model {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

/// Younger files may be written again without a change of their times.
constexpr std::chrono::seconds kSettled{3};
constexpr uint64_t kMaxBytes = 1 << 20;

/// What the files are now; nullopt where one can't be asked, or is too young to be told from its next version.
std::optional<json> stamps_of(std::span<const fs::path> files) {
  json stamps = json::array();
  const std::chrono::nanoseconds now = Env::posix().now().time_since_epoch();
  for (const fs::path& file : files) {
    std::error_code error;
    const fs::path path = fs::canonical(file, error);
    const auto stat = error ? std::nullopt : Env::posix().stat(path);
    if (!stat || std::chrono::nanoseconds(std::max(stat->mtime_ns, stat->ctime_ns)) > now - kSettled)
      return std::nullopt;
    stamps.push_back({path.string(), stat->size, stat->mtime_ns, stat->ctime_ns, stat->inode, stat->device});
  }
  return stamps;
}

void remember(const fs::path& note, const json& stamps, const std::string& digest) {
  Env& env = Env::posix();
  try {
    std::error_code ignored;
    fs::create_directories(note.parent_path(), ignored);
    const fs::path temporary = note.string() + "." + env.random_id();
    const std::string text = dump_json(json{{"files", stamps}, {"digest", digest}});
    File file = env.open(temporary, OpenMode::kCreateNew);
    file.write_all({std::as_bytes(std::span(text))});
    file.close();
    env.rename(temporary, note);
  } catch (const Error& error) {
    log(LogLevel::kDebug, std::string("The digest of a model is not remembered: ") + error.what());
  }
}

fs::path digests_directory() { return fs::path(cache_directory()) / "digests"; }

fs::path note_of(const json& stamps) {
  Hasher name;
  for (const json& stamp : stamps) name.update_field(stamp[0].get_ref<const std::string&>());
  return digests_directory() / (name.hex() + ".json");
}

/// Empty when it is not known.
std::string read_note(const fs::path& note, const json& stamps) {
  try {
    const json known = parse_json<json>(Env::posix().read_file(note, kMaxBytes), nullptr, false);
    if (known.is_object() && known.value("files", json()) == stamps) return known.at("digest").get<std::string>();
  } catch (const std::exception&) {
    // There is none, or none of ours.
  }
  return "";
}

}  // namespace

std::string digest_of_files(std::span<const fs::path> files, const std::function<std::string()>& compute) {
  const auto stamps = cache_directory().empty() ? std::nullopt : stamps_of(files);
  if (!stamps) return compute();
  const fs::path note = note_of(*stamps);
  if (std::string known = read_note(note, *stamps); !known.empty()) return known;
  const std::string digest = compute();
  if (stamps_of(files) == stamps) remember(note, *stamps, digest);
  return digest;
}

std::string known_digest(std::span<const fs::path> files, fs::path& note) {
  const auto stamps = cache_directory().empty() ? std::nullopt : stamps_of(files);
  if (!stamps) return "";
  note = note_of(*stamps);
  return read_note(note, *stamps);
}

void forget_digests_of_gone_files() {
  Env& env = Env::posix();
  for (const std::string& name : env.list_own(digests_directory())) {
    const fs::path note = digests_directory() / name;
    try {
      const json known = parse_json<json>(env.read_file(note, kMaxBytes), nullptr, false);
      const json files = known.is_object() ? known.value("files", json::array()) : json::array();
      const bool gone =
          std::ranges::any_of(files, [&](const json& file) { return !env.is_file(file.at(0).get<std::string>()); });
      if (gone) env.remove(note);
    } catch (const std::exception&) {
      // It is nobody's, and small.
    }
  }
}

}  // namespace torpor::model
