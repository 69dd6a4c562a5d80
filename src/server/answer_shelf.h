#pragma once
/// Answers that clients may ask for again.

#include <array>
#include <chrono>
#include <deque>
#include <map>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "torpor/store.h"

namespace torpor::server {

/// Where a server's answers outlive its process.
struct AnswerFiles {
  Store* store = nullptr;  ///< must live longer; nullptr: answers are in memory alone
  Durability durability = Durability::kFull;
};

/// Texts of tenants under keys, until they are `lifetime` old, or until newer ones of the same tenant have used up its
/// `count` or `bytes`: the oldest goes first. When all tenants together have kMostTenants times as much, the oldest of
/// the tenant that has most goes. With a store each is a file, which is there before `put` returns, and a
/// new shelf of the same kind finds it. What has expired is removed within a minute, by a thread of the shelf's own.
/// Any thread may call.
class AnswerShelf {
 public:
  struct Limits {
    std::chrono::seconds lifetime;
    size_t count, bytes;  ///< of each tenant
  };
  static constexpr size_t kMostTenants = 16;
  /// `kind`: letters a to z, another one for each shelf of a store. Throws what the store says.
  AnswerShelf(std::string kind, Limits limits, AnswerFiles files);
  ~AnswerShelf();
  AnswerShelf(const AnswerShelf&) = delete;
  AnswerShelf& operator=(const AnswerShelf&) = delete;

  /// In place of what the key had. kResourceExhausted for what is larger than all of the tenant may be together; else
  /// throws what the store says, and then the key has the old answer or this one.
  void put(const std::string& tenant, const std::string& key, const std::string& text);
  /// nullopt when there is none, or what there was is damaged.
  std::optional<std::string> find(const std::string& tenant, const std::string& key);
  /// False when there is none. It is gone when this returns. Throws what the store says; then it may be gone or there.
  bool remove(const std::string& tenant, const std::string& key);

 private:
  struct Entry {
    Record record;
    std::string text;  ///< with its head; empty where it is in a file
  };
  /// What one owner has.
  struct Owned {
    std::deque<Entry> entries;  ///< the oldest first
    size_t bytes = 0;

    Entry take(std::deque<Entry>::iterator entry);
    /// How much it is of what one may have.
    double part_of(const Limits& limits) const;
  };
  /// Names that the record of a key may have: this version's, and that of stores from before it.
  std::array<std::string, 2> names_of(const std::string& tenant, const std::string& key) const;
  /// What a record's name says of its tenant, after any restart.
  std::string owner_of(const std::string& name) const;
  /// nullptr when there is none.
  const Entry* locate(const std::string& name) TORPOR_REQUIRES(mutex_);
  std::optional<Entry> take(const std::string& name) TORPOR_REQUIRES(mutex_);
  void add(Entry entry) TORPOR_REQUIRES(mutex_);
  /// Takes out what has expired, and the oldest of what is too much.
  void drop_old(std::vector<Entry>& dropped) TORPOR_REQUIRES(mutex_);
  void remove_files(const std::vector<Entry>& entries);
  /// What the thread does.
  void sweep();
  /// Until something expires.
  std::chrono::seconds pause() const TORPOR_REQUIRES(mutex_);

  const std::string kind_;
  const Limits limits_;
  const AnswerFiles files_;
  Mutex mutex_;
  std::map<std::string, Owned> owners_ TORPOR_GUARDED_BY(mutex_);  // those that have something
  CondVar wake_;  // the sweeper
  bool stopping_ TORPOR_GUARDED_BY(mutex_) = false;
  std::thread sweeper_;
};

}  // namespace torpor::server
