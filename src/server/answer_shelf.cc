#include "server/answer_shelf.h"

#include <algorithm>
#include <utility>

#include "base/hash.h"
#include "torpor/error.h"
#include "torpor/log.h"

namespace torpor::server {
namespace {

int64_t now() {
  return std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
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
      const auto before = std::ranges::find(entries_, record.name, [](const Entry& entry) { return entry.record.name; });
      if (before != entries_.end()) erase(before, dropped);
      bytes_ += size_t(record.bytes);
      entries_.push_back({std::move(record), {}});
    }
    drop_old(dropped);
  }
  remove_files(dropped);
}

std::string AnswerShelf::name_of(const std::string& key) const { return kind_ + "-" + hash_hex(key); }

std::deque<AnswerShelf::Entry>::iterator AnswerShelf::locate(const std::string& key) {
  return std::ranges::find(entries_, name_of(key), [](const Entry& entry) { return entry.record.name; });
}

void AnswerShelf::erase(std::deque<Entry>::iterator entry, std::vector<Entry>& dropped) {
  bytes_ -= size_t(entry->record.bytes);
  dropped.push_back(std::move(*entry));
  entries_.erase(entry);
}

void AnswerShelf::drop_old(std::vector<Entry>& dropped) {
  // All lives are of one length, but for those of another version.
  for (size_t i = 0; i < entries_.size();) {
    if (entries_[i].record.expires <= now())
      erase(entries_.begin() + ptrdiff_t(i), dropped);
    else
      ++i;
  }
  while (!entries_.empty() && (entries_.size() > limits_.count || bytes_ > limits_.bytes))
    erase(entries_.begin(), dropped);
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

void AnswerShelf::put(const std::string& key, const std::string& text) {
  // Names are hashes, which somebody may make equal on purpose. So the key stands before the text.
  std::string whole = key + "\n" + text;
  if (whole.size() > limits_.bytes) {
    throw Error(ErrorCode::kResourceExhausted, "An answer of " + std::to_string(whole.size()) + " bytes can't be kept; all together have " +
                                                   std::to_string(limits_.bytes) + ".");
  }
  Entry entry{{name_of(key), now() + limits_.lifetime.count(), int64_t(whole.size())}, {}};
  if (files_.store != nullptr) {
    files_.store->keep_record(entry.record, whole, files_.durability);
  } else {
    entry.text = std::move(whole);
  }
  std::vector<Entry> dropped;
  {
    const MutexLock lock(mutex_);
    if (const auto before = locate(key); before != entries_.end()) {
      erase(before, dropped);
      if (dropped.back().record.expires == entry.record.expires) dropped.clear();  // the same file
    }
    bytes_ += size_t(entry.record.bytes);
    entries_.push_back(std::move(entry));
    drop_old(dropped);
  }
  remove_files(dropped);
}

std::optional<std::string> AnswerShelf::find(const std::string& key) {
  std::vector<Entry> dropped;
  std::optional<Entry> found;
  {
    const MutexLock lock(mutex_);
    drop_old(dropped);
    if (const auto entry = locate(key); entry != entries_.end()) found = *entry;
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
  if (!whole.starts_with(key + "\n")) return std::nullopt;
  return whole.substr(key.size() + 1);
}

bool AnswerShelf::remove(const std::string& key) {
  std::optional<Record> found;
  {
    const MutexLock lock(mutex_);
    if (const auto entry = locate(key); entry != entries_.end()) found = entry->record;
  }
  if (!found) return false;
  if (files_.store != nullptr) files_.store->drop_record(*found, files_.durability);
  const MutexLock lock(mutex_);
  std::vector<Entry> removed;
  if (const auto entry = locate(key); entry != entries_.end() && entry->record.expires == found->expires)
    erase(entry, removed);
  return true;
}

}  // namespace torpor::server
