#include "store/temporary_file.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <utility>

#include <unistd.h>

#include "torpor/error.h"

namespace torpor {
namespace {

constexpr std::string_view kTemporaryPrefix = ".torpor-tmp-";
constexpr std::string_view kReserves = "-reserves-";
constexpr std::string_view kOldPrefix = ".tmp-";  // followed by two numbers

}  // namespace

std::string temporary_name() {
  // Process ids repeat (in containers they do at once), and a crash leaves its temporary files behind.
  return std::string(kTemporaryPrefix) + std::to_string(::getpid()) + "-" + std::to_string(random_bits());
}

bool is_temporary_name(std::string_view name) {
  if (name.starts_with(kTemporaryPrefix)) return true;
  if (!name.starts_with(kOldPrefix)) return false;
  const std::string_view numbers = name.substr(kOldPrefix.size());
  const size_t dash = numbers.find('-');
  return dash != std::string_view::npos && dash > 0 && dash + 1 < numbers.size() &&
         numbers.find_first_not_of("0123456789-") == std::string_view::npos && numbers.rfind('-') == dash;
}

void remove_abandoned(Env& env, const std::filesystem::path& directory) noexcept {
  try {
    const auto day_ago = (env.now() - std::chrono::hours(24)).time_since_epoch();
    for (const auto& name : env.list(directory)) {
      // Only of today's names: others may be somebody else's here.
      const auto stat = name.starts_with(kTemporaryPrefix) ? env.stat(directory / name) : std::nullopt;
      if (stat && stat->is_file && std::chrono::nanoseconds(stat->mtime_ns) < day_ago) env.remove(directory / name);
    }
  } catch (const std::exception&) {
    // No reason not to write there.
  }
}

Reservation::Reservation(Env& env, const std::filesystem::path& root, int64_t bytes)
    : env_(env), path_(root / (temporary_name() + std::string(kReserves) + std::to_string(bytes))) {
  env.open(path_, OpenMode::kCreateNew).close();
}

Reservation::~Reservation() {
  try {
    env_.remove(path_);
  } catch (const std::exception&) {
    // The next who looks for room removes it.
  }
}

int64_t reserved_bytes(std::string_view name) {
  const size_t at = name.find(kReserves);
  if (!name.starts_with(kTemporaryPrefix) || at == std::string_view::npos) return 0;
  const std::string_view digits = name.substr(at + kReserves.size());
  int64_t bytes = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), bytes);
  return error == std::errc() && end == digits.data() + digits.size() ? std::max<int64_t>(bytes, 0) : 0;
}

TemporaryFile::TemporaryFile(Env& env, const std::filesystem::path& directory,
                             const std::vector<std::span<const std::byte>>& pieces, bool sync)
    : env_(env) {
  const auto path = directory / temporary_name();
  File file = env.open(path, OpenMode::kCreateNew);
  path_ = path;  // from here on it is this object's to remove, and not before: a name that is taken is somebody else's
  try {
    uint64_t size = 0;
    for (const auto& piece : pieces) size += piece.size();
    file.expect_size(size);
    file.write_all(pieces);
    if (sync) file.sync();
    stat_ = file.stat();
    file.close();
  } catch (...) {
    remove();
    throw;
  }
}

TemporaryFile::TemporaryFile(TemporaryFile&& other) noexcept
    : env_(other.env_), path_(std::exchange(other.path_, {})), stat_(other.stat_) {}

TemporaryFile::~TemporaryFile() { remove(); }

void TemporaryFile::remove() noexcept {
  if (path_.empty()) return;
  try {
    env_.remove(path_);
  } catch (const std::exception&) {
    // gc finds it.
  }
  path_.clear();
}

void TemporaryFile::replace(const std::filesystem::path& path) {
  env_.rename(path_, path);
  path_.clear();
}

bool TemporaryFile::put_new(const std::filesystem::path& path) {
  if (!env_.put_new(path_, path)) return false;
  path_.clear();
  return true;
}

FileStat write_file(Env& env, const std::filesystem::path& path,
                    const std::vector<std::span<const std::byte>>& pieces, bool sync) {
  TemporaryFile file(env, path.parent_path(), pieces, sync);
  file.replace(path);
  return file.stat();
}

}  // namespace torpor
