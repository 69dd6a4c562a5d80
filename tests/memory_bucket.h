#pragma once
/// A bucket in memory, for many threads: what is asked of it is counted, and may fail.

#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <string>

#include "base/hash.h"
#include "remote/object_store.h"

namespace torpor::testing {

class MemoryBucket final : public remote::ObjectStore {
 public:
  struct Counts {
    int64_t puts = 0, gets = 0, lists = 0, removals = 0, bytes_in = 0, bytes_out = 0;
  };
  using Failure = std::function<void(const char* verb, const std::string& key)>;

  /// Called before a request is applied, and after it was. What one throws is the request's error.
  Failure before, after;

  remote::PutResult put(const std::string& key, std::span<const std::byte> bytes, const remote::Condition& condition,
                        const remote::ObjectMetadata& = {}) override {
    fail(before, "put", key);
    remote::PutResult result;
    {
      const std::lock_guard lock(mutex_);
      ++counts_.puts;
      counts_.bytes_in += int64_t(bytes.size());
      const auto found = objects_.find(key);
      const bool is_there = found != objects_.end();
      using Kind = remote::Condition::Kind;
      const bool holds = condition.kind == Kind::kNone || (condition.kind == Kind::kAbsent && !is_there) ||
                         (condition.kind == Kind::kTag && is_there && found->second.tag == condition.tag);
      if (!holds) return {remote::PutStatus::kPrecondition, {}};
      result.tag = std::to_string(++versions_);
      objects_[key] = {std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()), result.tag};
    }
    fail(after, "put", key);
    return result;
  }

  std::optional<remote::Object> get(const std::string& key, std::uint64_t most_bytes) override {
    fail(before, "get", key);
    const std::lock_guard lock(mutex_);
    ++counts_.gets;
    const auto found = objects_.find(key);
    if (found == objects_.end()) return std::nullopt;
    if (found->second.text.size() > most_bytes) throw Error(ErrorCode::kCorruption, "'" + key + "' is too long.");
    counts_.bytes_out += int64_t(found->second.text.size());
    const auto bytes = std::as_bytes(std::span(found->second.text));
    return remote::Object{info(*found), {}, {bytes.begin(), bytes.end()}};
  }

  std::optional<remote::ObjectInfo> head(const std::string& key) override {
    const std::lock_guard lock(mutex_);
    const auto found = objects_.find(key);
    return found == objects_.end() ? std::nullopt : std::optional(info(*found));
  }

  void read(const std::string& key, std::uint64_t offset, std::span<std::byte> out) override {
    fail(before, "read", key);
    const std::lock_guard lock(mutex_);
    ++counts_.gets;
    const auto found = objects_.find(key);
    if (found == objects_.end()) throw Error(ErrorCode::kNotFound, "There is no object '" + key + "'.");
    const auto bytes = std::as_bytes(std::span(found->second.text));
    if (offset > bytes.size() || out.size() > bytes.size() - offset) {
      throw Error(ErrorCode::kCorruption, "The object '" + key + "' is shorter.");
    }
    counts_.bytes_out += int64_t(out.size());
    std::copy_n(bytes.begin() + std::ptrdiff_t(offset), out.size(), out.begin());
  }

  std::vector<remote::ObjectInfo> list(const std::string& prefix) override {
    fail(before, "list", prefix);
    const std::lock_guard lock(mutex_);
    ++counts_.lists;
    std::vector<remote::ObjectInfo> found;
    for (auto one = objects_.lower_bound(prefix); one != objects_.end() && one->first.starts_with(prefix); ++one) {
      found.push_back(info(*one));
    }
    return found;
  }

  void remove(const std::string& key) override {
    fail(before, "remove", key);
    const std::lock_guard lock(mutex_);
    ++counts_.removals;
    objects_.erase(key);
  }

  Counts counts() const {
    const std::lock_guard lock(mutex_);
    return counts_;
  }
  /// The bytes of an object, to look at or to damage while nobody asks.
  std::string& text(const std::string& key) { return objects_.at(key).text; }
  std::vector<std::string> keys(const std::string& prefix = {}) const {
    const std::lock_guard lock(mutex_);
    std::vector<std::string> keys;
    for (const auto& [key, object] : objects_) {
      if (key.starts_with(prefix)) keys.push_back(key);
    }
    return keys;
  }

 private:
  struct Stored {
    std::string text, tag;
  };
  static remote::ObjectInfo info(const std::pair<const std::string, Stored>& one) {
    return {one.first, one.second.text.size(), one.second.tag, 0};
  }
  static void fail(const Failure& failure, const char* verb, const std::string& key) {
    if (failure) failure(verb, key);
  }

  mutable std::mutex mutex_;
  std::map<std::string, Stored> objects_;
  Counts counts_;
  int64_t versions_ = 0;
};

}  // namespace torpor::testing
