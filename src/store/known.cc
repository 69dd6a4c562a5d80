#include "store/known.h"

#include <algorithm>

namespace torpor {
namespace {

constexpr size_t kMaxFiles = 1 << 16;  // beyond it everything is forgotten, which costs one reading of what comes next

}  // namespace

void KnownSegments::add_file(const std::string& name, const File& file) {
  const MutexLock lock(mutex_);
  if (files_.size() >= kMaxFiles) files_.clear();
  File& known = files_[name];
  const bool was_whole = known.whole && known.stat == file.stat;
  known = file;
  known.whole |= was_whole;
}

std::optional<KnownSegments::File> KnownSegments::file(const std::string& name) const {
  const MutexLock lock(mutex_);
  const auto found = files_.find(name);
  if (found == files_.end()) return std::nullopt;
  return found->second;
}

void KnownSegments::forget(const std::string& name) {
  const MutexLock lock(mutex_);
  files_.erase(name);
  runs_.erase(name);
}

void KnownSegments::add_run(const std::shared_ptr<const SealedRun>& run) {
  const auto segment = run->segment();
  const MutexLock lock(mutex_);
  if (runs_.size() >= next_sweep_) {
    std::erase_if(runs_, [](const auto& entry) { return entry.second.expired(); });
    next_sweep_ = std::max<size_t>(1024, 2 * runs_.size());
  }
  std::weak_ptr<const SealedRun>& best = runs_[segment->name];
  if (const auto other = best.lock()) {
    const auto of_other = other->segment();
    // Of two runs the one with more rows serves more readers; of equal ones the newer, which may be the other's successor.
    if (of_other->name == segment->name && of_other->content == segment->content &&
        covers(other->checked(), run->checked()) && !covers(run->checked(), other->checked())) {
      return;
    }
  }
  best = run;
}

std::shared_ptr<const SealedRun> KnownSegments::run(const std::string& name) const {
  const MutexLock lock(mutex_);
  const auto found = runs_.find(name);
  const auto run = found == runs_.end() ? nullptr : found->second.lock();
  // Another store may have given it another name since.
  return run != nullptr && run->segment()->name == name ? run : nullptr;
}

size_t KnownSegments::n_runs() const {
  const MutexLock lock(mutex_);
  return runs_.size();
}

void DurableFiles::add(const std::string& name, const FileStat& stat) {
  const MutexLock lock(mutex_);
  if (files_.size() >= kMaxFiles) files_.clear();
  files_[name] = stat;
}

bool DurableFiles::contains(const std::string& name, const FileStat& stat) const {
  const MutexLock lock(mutex_);
  const auto found = files_.find(name);
  return found != files_.end() && found->second == stat;
}

}  // namespace torpor
