#include "server/answer_shelf.h"

#include <algorithm>
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
  if (files_.store == nullptr) return;
  std::vector<Entry> dropped;
  {
    const MutexLock lock(mutex_);
    for (Record& record : files_.store->records()) {
      if (!record.name.starts_with(kind_ + "-")) continue;
      // Of two of one name, which a crash leaves between them, the newer counts.
      const auto before = locate(record.name);
      if (before != entries_.end()) erase(before, dropped);
      add({std::move(record), {}});
    }
    drop_old(dropped);
  }
  remove_files(dropped);
}

std::string AnswerShelf::name_of(const std::string& tenant, const std::string& key) const {
  const std::string digits = hash_hex(head_of(tenant, key));
  return kind_ + "-" + hash_hex(tenant).substr(0, kOwnerDigits) + digits.substr(kOwnerDigits);
}

std::string AnswerShelf::owner_of(const Record& record) const {
  return record.name.substr(kind_.size() + 1, kOwnerDigits);
}

std::deque<AnswerShelf::Entry>::iterator AnswerShelf::locate(const std::string& name) {
  return std::ranges::find(entries_, name, [](const Entry& entry) { return entry.record.name; });
}

void AnswerShelf::add(Entry entry) {
  Used& used = used_[owner_of(entry.record)];
  ++used.count;
  used.bytes += size_t(entry.record.bytes);
  entries_.push_back(std::move(entry));
}

void AnswerShelf::erase(std::deque<Entry>::iterator entry, std::vector<Entry>& dropped) {
  const auto used = used_.find(owner_of(entry->record));
  used->second.bytes -= size_t(entry->record.bytes);
  if (--used->second.count == 0) used_.erase(used);
  dropped.push_back(std::move(*entry));
  entries_.erase(entry);
}

void AnswerShelf::drop_old(std::vector<Entry>& dropped) {
  // All lives are of one length, but for those of another version.
  for (size_t i = 0; i < entries_.size();) {
    const auto used = used_.find(owner_of(entries_[i].record));
    const bool too_much = used->second.count > limits_.count || used->second.bytes > limits_.bytes;
    if (too_much || entries_[i].record.expires <= now())
      erase(entries_.begin() + ptrdiff_t(i), dropped);
    else
      ++i;
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
  if (whole.size() > limits_.bytes) {
    throw Error(ErrorCode::kResourceExhausted, "An answer of " + std::to_string(whole.size()) +
                                                   " bytes can't be kept; all of a tenant's together have " +
                                                   std::to_string(limits_.bytes) + ".");
  }
  const int64_t bytes = int64_t(whole.size()) + Records::kHeader;
  Entry entry{{name_of(tenant, key), now() + limits_.lifetime.count(), bytes}, {}};
  if (files_.store != nullptr) {
    files_.store->keep_record(entry.record, whole, files_.durability);
  } else {
    entry.text = std::move(whole);
  }
  std::vector<Entry> dropped;
  {
    const MutexLock lock(mutex_);
    if (const auto before = locate(entry.record.name); before != entries_.end()) {
      erase(before, dropped);
      if (dropped.back().record.expires == entry.record.expires) dropped.clear();  // the same file
    }
    add(std::move(entry));
    drop_old(dropped);
  }
  remove_files(dropped);
}

std::optional<std::string> AnswerShelf::find(const std::string& tenant, const std::string& key) {
  std::vector<Entry> dropped;
  std::optional<Entry> found;
  {
    const MutexLock lock(mutex_);
    drop_old(dropped);
    if (const auto entry = locate(name_of(tenant, key)); entry != entries_.end()) found = *entry;
  }
  remove_files(dropped);
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
  std::optional<Record> found;
  {
    const MutexLock lock(mutex_);
    if (const auto entry = locate(name_of(tenant, key)); entry != entries_.end()) found = entry->record;
  }
  if (!found) return false;
  if (files_.store != nullptr) files_.store->drop_record(*found, files_.durability);
  const MutexLock lock(mutex_);
  std::vector<Entry> removed;
  const auto entry = locate(found->name);
  if (entry != entries_.end() && entry->record.expires == found->expires)
    erase(entry, removed);
  return true;
}

}  // namespace torpor::server
