#include "server/answer_shelf.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "base/hash.h"
#include "server/chat.h"
#include "store/records.h"
#include "torpor/error.h"
#include "torpor/log.h"

namespace torpor::server {
namespace {

int64_t now() {
  return std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
}

/// Digits of a record's name that are its tenant's. Two tenants that have the same share their limits.
constexpr size_t kOwnerDigits = 8;

/// What stands before a text. Names are hashes, which somebody may make equal on purpose.
std::string head_of(const std::string& tenant, const std::string& key) {
  return to_text(Json::array({tenant, key})) + "\n";
}

}  // namespace

AnswerShelf::AnswerShelf(std::string kind, Limits limits, AnswerFiles files)
    : kind_(std::move(kind)), limits_(limits), files_(files) {
  if (files_.store != nullptr) {
    std::vector<Entry> dropped;
    {
      const MutexLock lock(mutex_);
      for (Record& record : files_.store->records()) {
        if (!record.name.starts_with(kind_ + "-")) continue;
        // Of two of one name, which a crash leaves between them, the newer counts.
        if (auto before = take(record.name)) dropped.push_back(*std::move(before));
        add({std::move(record), {}});
      }
      drop_old(dropped);
    }
    remove_files(dropped);
  }
  sweeper_ = std::thread([this] { sweep(); });
}

AnswerShelf::~AnswerShelf() {
  {
    const MutexLock lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_one();
  sweeper_.join();
}

std::chrono::seconds AnswerShelf::pause() const {
  // What is put meanwhile lives its whole time. The system's clock may be set.
  std::chrono::seconds pause = std::min<std::chrono::seconds>(limits_.lifetime, std::chrono::minutes(1));
  const int64_t time = now();
  for (const auto& [name, own] : owners_)
    pause = std::min(pause, std::chrono::seconds(own.entries.front().record.expires - time));
  return std::max(pause, std::chrono::seconds(1));
}

void AnswerShelf::sweep() {
  MutexLock lock(mutex_);
  while (!stopping_) {
    std::vector<Entry> dropped;
    drop_old(dropped);
    {
      const MutexUnlock unlocked(mutex_);
      remove_files(dropped);
    }
    if (!stopping_) wake_.wait_for(lock, pause());
  }
}

std::array<std::string, 2> AnswerShelf::names_of(const std::string& tenant, const std::string& key) const {
  const std::string digits = hash_hex(head_of(tenant, key));
  return {kind_ + "-" + hash_hex(tenant).substr(0, kOwnerDigits) + digits.substr(kOwnerDigits), kind_ + "-" + digits};
}

std::string AnswerShelf::owner_of(const std::string& name) const {
  return name.substr(kind_.size() + 1, kOwnerDigits);
}

AnswerShelf::Entry AnswerShelf::Owned::take(std::deque<Entry>::iterator entry) {
  Entry taken = std::move(*entry);
  entries.erase(entry);
  bytes -= size_t(taken.record.bytes);
  return taken;
}

double AnswerShelf::Owned::part_of(const Limits& limits) const {
  return std::max(double(entries.size()) / double(limits.count), double(bytes) / double(limits.bytes));
}

const AnswerShelf::Entry* AnswerShelf::locate(const std::string& name) {
  const auto owner = owners_.find(owner_of(name));
  if (owner == owners_.end()) return nullptr;
  const auto& entries = owner->second.entries;
  const auto found = std::ranges::find(entries, name, [](const Entry& entry) { return entry.record.name; });
  return found == entries.end() ? nullptr : &*found;
}

std::optional<AnswerShelf::Entry> AnswerShelf::take(const std::string& name) {
  const Entry* found = locate(name);
  if (found == nullptr) return std::nullopt;
  const auto owner = owners_.find(owner_of(name));
  Owned& own = owner->second;
  const auto is_found = [&](const Entry& entry) { return &entry == found; };
  Entry taken = own.take(std::ranges::find_if(own.entries, is_found));
  if (own.entries.empty()) owners_.erase(owner);
  return taken;
}

void AnswerShelf::add(Entry entry) {
  Owned& own = owners_[owner_of(entry.record.name)];
  own.bytes += size_t(entry.record.bytes);
  own.entries.push_back(std::move(entry));
}

void AnswerShelf::drop_old(std::vector<Entry>& dropped) {
  const int64_t time = now();
  double parts = 0;
  for (auto owner = owners_.begin(); owner != owners_.end();) {
    Owned& own = owner->second;
    // All lives are of one length, but for those of another version.
    while (!own.entries.empty() && (own.entries.front().record.expires <= time || own.part_of(limits_) > 1))
      dropped.push_back(own.take(own.entries.begin()));
    parts += own.part_of(limits_);
    owner = own.entries.empty() ? owners_.erase(owner) : std::next(owner);
  }
  while (parts > double(kMostTenants)) {
    const auto most = std::ranges::max_element(
        owners_, {}, [&](const auto& owner) { return owner.second.part_of(limits_); });
    Owned& own = most->second;
    parts -= own.part_of(limits_);
    dropped.push_back(own.take(own.entries.begin()));
    parts += own.part_of(limits_);
    if (own.entries.empty()) owners_.erase(most);
  }
}

void AnswerShelf::remove_files(const std::vector<Entry>& entries) {
  if (files_.store == nullptr) return;
  for (const Entry& entry : entries) {
    try {
      files_.store->drop_record(entry.record, Durability::kNone);
    } catch (const Error& error) {
      log(LogLevel::kInfo,
          std::string("An answer that has had its time is left to garbage collection: ") + error.what());
    }
  }
}

void AnswerShelf::put(const std::string& tenant, const std::string& key, const std::string& text) {
  std::string whole = head_of(tenant, key) + text;
  const int64_t bytes = int64_t(whole.size()) + Records::kHeader;
  if (size_t(bytes) > limits_.bytes) {
    throw Error(ErrorCode::kResourceExhausted, "An answer of " + std::to_string(bytes) +
                                                   " bytes can't be kept; all of a tenant's together have " +
                                                   std::to_string(limits_.bytes) + ".");
  }
  const auto names = names_of(tenant, key);
  Entry entry{{names.front(), now() + limits_.lifetime.count(), bytes}, {}};
  if (files_.store != nullptr) {
    files_.store->keep_record(entry.record, whole, files_.durability);
  } else {
    entry.text = std::move(whole);
  }
  std::vector<Entry> dropped;
  {
    const MutexLock lock(mutex_);
    for (const std::string& name : names) {
      auto before = take(name);
      const bool same_file = before && name == entry.record.name && before->record.expires == entry.record.expires;
      if (before && !same_file) dropped.push_back(*std::move(before));
    }
    add(std::move(entry));
    drop_old(dropped);
  }
  remove_files(dropped);
}

std::optional<std::string> AnswerShelf::find(const std::string& tenant, const std::string& key) {
  std::optional<Entry> found;
  {
    const MutexLock lock(mutex_);
    for (const std::string& name : names_of(tenant, key)) {
      const Entry* entry = locate(name);
      if (entry != nullptr && !found && entry->record.expires > now()) found = *entry;
    }
  }
  if (!found) return std::nullopt;
  std::string whole = std::move(found->text);
  if (files_.store != nullptr) {
    try {
      whole = files_.store->read_record(found->record);
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kNotFound)
        log(LogLevel::kWarning, std::string("An answer is lost: ") + error.what());
      return std::nullopt;
    }
  }
  const std::string head = head_of(tenant, key);
  if (!whole.starts_with(head)) return std::nullopt;
  return whole.substr(head.size());
}

bool AnswerShelf::remove(const std::string& tenant, const std::string& key) {
  bool removed = false;
  for (const std::string& name : names_of(tenant, key)) {
    std::optional<Record> found;
    {
      const MutexLock lock(mutex_);
      if (const Entry* entry = locate(name)) found = entry->record;
    }
    if (!found) continue;
    if (files_.store != nullptr) files_.store->drop_record(*found, files_.durability);
    const MutexLock lock(mutex_);
    if (const Entry* entry = locate(name); entry != nullptr && entry->record.expires == found->expires) take(name);
    removed = true;
  }
  return removed;
}

}  // namespace torpor::server
