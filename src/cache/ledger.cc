#include "cache/ledger.h"

#include <algorithm>

namespace torpor {

KvLedger::Share::Share(std::shared_ptr<KvLedger> ledger, const void* buffer, size_t bytes, bool mapped)
    : buffer_(buffer), bytes_(bytes), mapped_(mapped) {
  ledger->change(buffer, bytes, mapped, 1);
  ledger_ = std::move(ledger);
}

KvLedger::Share::~Share() {
  if (ledger_ != nullptr) ledger_->change(buffer_, bytes_, mapped_, -1);
}

size_t KvLedger::Entry::bytes() const {
  size_t most = 0;
  for (const auto& [bytes, n] : holders) most = std::max(most, bytes);
  return most;
}

void KvLedger::change(const void* buffer, size_t bytes, bool mapped, int n) {
  const MutexLock lock(mutex_);
  change_locked(buffer, bytes, mapped, n);
}

void KvLedger::change_locked(const void* buffer, size_t bytes, bool mapped, int n) {
  const auto found = buffers_.try_emplace(buffer).first;
  Entry& entry = found->second;
  bytes_ -= entry.bytes();
  if (entry.mapped) mapped_bytes_ -= entry.bytes();
  const auto same =
      std::find_if(entry.holders.begin(), entry.holders.end(), [&](const auto& held) { return held.first == bytes; });
  if (same == entry.holders.end()) {
    entry.holders.emplace_back(bytes, n);
  } else if ((same->second += n) == 0) {
    entry.holders.erase(same);
  }
  if (n > 0) entry.mapped = mapped;
  bytes_ += entry.bytes();
  if (entry.mapped) mapped_bytes_ += entry.bytes();
  if (entry.holders.empty()) buffers_.erase(found);
}

KvLedger::Room::~Room() {
  if (ledger_ == nullptr) return;
  const MutexLock lock(ledger_->mutex_);
  ledger_->room_ -= bytes_;
}

std::optional<KvLedger::Room> KvLedger::take_room(size_t bytes) {
  const MutexLock lock(mutex_);
  if (budget_ != 0 && bytes_ + room_ + bytes > budget_) return std::nullopt;
  Room room;
  room.ledger_ = shared_from_this();
  room.bytes_ = bytes;
  room_ += bytes;
  return room;
}

std::optional<std::vector<KvLedger::Share>> KvLedger::share_within_budget(std::span<const Buffer> buffers) {
  std::vector<Share> shares(buffers.size());  // which let go of what they hold after the mutex has been
  const MutexLock lock(mutex_);
  for (size_t i = 0; i < buffers.size(); ++i) {
    const auto& [data, bytes, mapped] = buffers[i];
    change_locked(data, bytes, mapped, 1);
    shares[i].buffer_ = data, shares[i].bytes_ = bytes, shares[i].mapped_ = mapped;
    shares[i].ledger_ = shared_from_this();
  }
  if (budget_ == 0 || bytes_ + room_ <= budget_) return shares;
  for (Share& share : shares) {
    change_locked(share.buffer_, share.bytes_, share.mapped_, -1);
    share.ledger_ = nullptr;
  }
  return std::nullopt;
}

int KvLedger::holders(const void* buffer) const {
  const MutexLock lock(mutex_);
  const auto found = buffers_.find(buffer);
  if (found == buffers_.end()) return 0;
  int holders = 0;
  for (const auto& [bytes, n] : found->second.holders) holders += n;
  return holders;
}

size_t KvLedger::bytes() const {
  const MutexLock lock(mutex_);
  return bytes_;
}

size_t KvLedger::mapped_bytes() const {
  const MutexLock lock(mutex_);
  return mapped_bytes_;
}

}  // namespace torpor
