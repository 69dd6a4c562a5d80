#include "store/known.h"

#include <algorithm>

namespace torpor {
namespace {

constexpr size_t kMaxFiles = 1 << 16;  // beyond it everything is forgotten, which costs one reading of what comes next

bool same_owner(const std::weak_ptr<const void>& known, const std::shared_ptr<const void>& owner) {
  return owner != nullptr && !known.owner_before(owner) && !owner.owner_before(known);
}

}  // namespace

void KnownSegments::add_file(const std::string& name, const File& file) {
  const std::lock_guard lock(mutex_);
  if (files_.size() >= kMaxFiles) files_.clear();
  File& known = files_[name];
  const bool was_whole = known.whole && known.stat == file.stat;
  known = file;
  known.whole |= was_whole;
}

std::optional<KnownSegments::File> KnownSegments::file(const std::string& name) const {
  const std::lock_guard lock(mutex_);
  const auto found = files_.find(name);
  if (found == files_.end()) return std::nullopt;
  return found->second;
}

void KnownSegments::add_rows(const Rows& rows) {
  if (rows.run.owner == nullptr) return;
  const std::lock_guard guard(mutex_);
  forget_expired();
  HeldRows& held = rows_[rows.run.bytes.data()];
  held = {rows, rows.run.owner};
  held.rows.run.owner = nullptr;
  const std::byte*& best = rows_of_[rows.name];
  const auto other = best == nullptr ? rows_.end() : rows_.find(best);
  // Of two memories the one with more rows serves more readers; of equal ones the newer, which may be the other's successor.
  const bool keep = other != rows_.end() && &other->second != &held && !other->second.owner.expired() &&
                    other->second.rows.name == rows.name && other->second.rows.content == rows.content &&
                    covers(other->second.rows.checked, rows.checked) && !covers(rows.checked, other->second.rows.checked);
  if (!keep) best = rows.run.bytes.data();
}

std::optional<KnownSegments::Rows> KnownSegments::lock(const HeldRows& held) const {
  Rows rows = held.rows;
  rows.run.owner = held.owner.lock();
  if (rows.run.owner == nullptr) return std::nullopt;
  return rows;
}

std::optional<KnownSegments::Rows> KnownSegments::rows_in(const KvRun& run) const {
  const std::lock_guard guard(mutex_);
  const auto found = rows_.find(run.bytes.data());
  if (found == rows_.end() || !same_owner(found->second.owner, run.owner)) return std::nullopt;
  return lock(found->second);
}

std::optional<KnownSegments::Rows> KnownSegments::rows_of(const std::string& name) const {
  const std::lock_guard guard(mutex_);
  const auto address = rows_of_.find(name);
  if (address == rows_of_.end()) return std::nullopt;
  const auto found = rows_.find(address->second);
  if (found == rows_.end() || found->second.rows.name != name) return std::nullopt;
  return lock(found->second);
}

void KnownSegments::set_durable(const std::string& name, const FileStat& stat) {
  const std::lock_guard lock(mutex_);
  if (durable_.size() >= kMaxFiles) durable_.clear();
  durable_[name] = stat;
}

bool KnownSegments::is_durable(const std::string& name, const FileStat& stat) const {
  const std::lock_guard lock(mutex_);
  const auto found = durable_.find(name);
  return found != durable_.end() && found->second == stat;
}

void KnownSegments::forget_expired() {
  if (rows_.size() < next_sweep_) return;
  std::erase_if(rows_, [](const auto& entry) { return entry.second.owner.expired(); });
  std::erase_if(rows_of_, [&](const auto& entry) { return !rows_.contains(entry.second); });
  next_sweep_ = std::max<size_t>(1024, 2 * rows_.size());
}

}  // namespace torpor
