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
  const std::lock_guard lock(mutex_);
  const auto found = buffers_.try_emplace(buffer).first;
  Entry& entry = found->second;
  bytes_ -= entry.bytes();
  if (entry.mapped) mapped_bytes_ -= entry.bytes();
  const auto same = std::find_if(entry.holders.begin(), entry.holders.end(), [&](const auto& held) { return held.first == bytes; });
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

size_t KvLedger::bytes() const {
  const std::lock_guard lock(mutex_);
  return bytes_;
}

size_t KvLedger::mapped_bytes() const {
  const std::lock_guard lock(mutex_);
  return mapped_bytes_;
}

}  // namespace torpor
