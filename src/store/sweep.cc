#include "store/sweep.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "base/checked.h"
#include "torpor/error.h"

namespace torpor {
namespace {

constexpr size_t kUnlinksPerHold = 64;
constexpr size_t kClaimSize = 33;  // a name and a newline

}  // namespace

std::optional<Sweep> Sweep::begin(Env& env, StoreLocks& locks,
                                  std::function<std::vector<std::filesystem::path>()> temporary_files,
                                  std::chrono::milliseconds timeout) {
  auto lock = locks.sweeping(timeout);
  if (!lock) return std::nullopt;
  Sweep sweep(env, locks, std::move(*lock));
  env.remove(locks.claims_path());  // of a sweep that was killed
  // Listed before the saves that made them end, so that what is still there then is nobody's.
  auto found = temporary_files();
  if (!locks.wait_for_saves(timeout)) return std::nullopt;
  sweep.temporary_files_ = std::move(found);
  return sweep;
}

Sweep::Sweep(Sweep&& other) noexcept
    : env_(other.env_),
      locks_(other.locks_),
      lock_(std::exchange(other.lock_, std::nullopt)),  // only one of the two ends the sweep
      temporary_files_(std::move(other.temporary_files_)),
      claims_(std::move(other.claims_)),
      claims_read_(other.claims_read_) {}

Sweep::~Sweep() {
  if (!lock_) return;
  try {
    env_->remove(locks_->claims_path());
  } catch (const std::exception&) {
    // The next one removes it.
  }
}

void Sweep::read_claims() {
  const auto stat = env_->stat(locks_->claims_path());
  if (!stat || stat->size <= claims_read_) return;
  const File file = env_->open(locks_->claims_path(), OpenMode::kRead);
  std::string text(size_t(stat->size - claims_read_), '\0');
  file.read_at(std::as_writable_bytes(std::span(text.data(), text.size())), claims_read_);
  claims_read_ = stat->size;
  for (size_t at = 0; at + kClaimSize <= text.size(); at += kClaimSize) claims_.insert(text.substr(at, kClaimSize - 1));
}

bool Sweep::is_own(const std::filesystem::path& path) const {
  for (auto directory = path.parent_path(); directory != locks_->root(); directory = directory.parent_path()) {
    if (!env_->is_own_directory(directory)) return false;
  }
  return true;
}

Sweep::Removed Sweep::remove(const std::vector<Removable>& files, int64_t bytes) {
  Removed removed;
  for (size_t next = 0; next < files.size() && removed.bytes < bytes;) {
    const auto begun = std::chrono::steady_clock::now();
    {
      const auto hold = locks_->removing(std::chrono::seconds(10));
      if (!hold)
        throw Error(ErrorCode::kBusy, "Saves keep the store's lock '" + locks_->claims_path().parent_path().string() +
                                          "'; try again later.");
      read_claims();
      for (size_t unlinks = 0; unlinks < kUnlinksPerHold && next < files.size() && removed.bytes < bytes; ++next) {
        const Removable& file = files[next];
        if (!file.segment.empty() && claims_.contains(file.segment)) continue;
        if (env_->stat(file.path) != file.stat || !is_own(file.path)) continue;
        ++unlinks;
        if (!env_->remove(file.path)) continue;
        ++removed.files;
        removed.bytes = saturating_add(removed.bytes, int64_t(file.stat.size));
      }
    }
    // As long for others as for us: whoever waits looks every few milliseconds.
    if (next < files.size() && removed.bytes < bytes) {
      std::this_thread::sleep_for(std::max<std::chrono::steady_clock::duration>(
          std::chrono::steady_clock::now() - begun, std::chrono::milliseconds(2)));
    }
  }
  return removed;
}

}  // namespace torpor
