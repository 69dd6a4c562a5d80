#include "remote/probe.h"

#include <algorithm>
#include <functional>
#include <optional>

#include "base/env.h"
#include "base/hash.h"
#include "base/parallel.h"
#include "torpor/error.h"

namespace torpor::remote {
namespace {

constexpr size_t kLarge = 8 << 20, kPart = 2 << 20;
constexpr char kDirectory[] = "probe/";

std::vector<std::byte> bytes_of(std::string_view text) {
  const auto* begin = reinterpret_cast<const std::byte*>(text.data());
  return {begin, begin + text.size()};
}

/// Nobody else draws it.
std::string probe_key() {
  return kDirectory + hash_hex(std::to_string(random_bits()) + "-" + std::to_string(random_bits()));
}

/// "" when the object holds `text`; else what is found in its place.
std::string differs(ObjectStore& store, const std::string& key, std::string_view text) {
  const std::optional<Object> object = store.get(key, kLarge);
  if (!object) return "the object is not there";
  return object->bytes == bytes_of(text) ? "" : "the object has other bytes";
}

class Probe {
 public:
  explicit Probe(ObjectStore& store) : store_(store) {}

  ProbeReport run(bool large) {
    conditions();
    reading();
    if (large) of_size();
    removal();
    return std::move(report_);
  }

 private:
  /// `attempt` returns "" when it holds. Only the first one's errors are the caller's.
  void check(const char* name, const char* meaning, const std::function<std::string()>& attempt) {
    ProbeCheck check{name, meaning, false, {}};
    try {
      check.found = attempt();
    } catch (const LostAnswer&) {
      throw;  // which says nothing of the store's conditions
    } catch (const Error& error) {
      if (report_.checks.empty() || error.code() == ErrorCode::kCancelled) throw;
      check.found = error.what();
    }
    check.holds = check.found.empty();
    report_.checks.push_back(std::move(check));
  }

  /// False: the condition did not hold. What a client sent again after a lost answer may find its own success.
  bool put_to(std::string& tag, std::string_view text, const Condition& condition) {
    const PutResult put = store_.put(key_, bytes_of(text), condition);
    tag = put.tag;
    if (put.status == PutStatus::kDone) return true;
    const std::optional<Object> found = store_.get(key_, kLarge);
    if (!found || found->bytes != bytes_of(text)) return false;
    tag = found->info.tag;
    return true;
  }

  void conditions() {
    check("create", "an object that is not there can be created, if it is not there", [&] {
      if (!put_to(first_, "first", Condition::absent())) return std::string("refused, as if it were there");
      return std::string(first_.empty() ? "the store names no version (ETag)" : "");
    });
    check("create-again", "an object that is there is not created again", [&] {
      if (store_.put(key_, bytes_of("again"), Condition::absent()).status == PutStatus::kDone) {
        return std::string("it was replaced");
      }
      return differs(store_, key_, "first");
    });
    check("update", "an object can be replaced, if it has the tag that its writer got", [&] {
      if (!put_to(second_, "second", Condition::of_tag(first_))) {
        return std::string("refused, as if the tag were another");
      }
      return std::string(second_ == first_ ? "the tag is the one before" : "");
    });
    check("update-stale", "an object is not replaced, if its tag is another", [&] {
      if (store_.put(key_, bytes_of("stale"), Condition::of_tag(first_)).status == PutStatus::kDone) {
        return std::string("it was replaced");
      }
      return differs(store_, key_, "second");
    });
    check("update-absent", "an object that is not there is not made by an update", [&] {
      const std::string none = key_ + "-none";
      const PutResult put = store_.put(none, bytes_of("none"), Condition::of_tag(first_));
      return std::string(put.status == PutStatus::kDone || store_.head(none) ? "it was made" : "");
    });
  }

  void reading() {
    const std::string plain = key_ + "-plain";
    const ObjectMetadata metadata{{"torpor-content", "0123456789abcdef"}};
    check("read-after-write", "what was written is read at once, with its tag and metadata", [&] {
      const std::string tag = store_.put(plain, bytes_of("0123456789"), {}, metadata).tag;
      if (std::string found = differs(store_, plain, "0123456789"); !found.empty()) return found;
      const std::optional<Object> object = store_.get(plain, kLarge);
      const std::optional<ObjectInfo> info = store_.head(plain);
      if (!info || info->bytes != 10) return std::string("its head is another object's");
      if (object->info.tag != tag || info->tag != tag) return std::string("its tag is another than its writer got");
      return std::string(object->metadata == metadata ? "" : "its metadata is lost");
    });
    check("list-after-write", "what was written is listed at once", [&] {
      for (const ObjectInfo& info : store_.list(kDirectory)) {
        if (info.key == plain) return std::string(info.bytes == 10 ? "" : "its size is another");
      }
      return std::string("it is not in the list");
    });
    check("ranges", "a part of an object can be read", [&] {
      std::vector<std::byte> part(4);
      store_.read(plain, 3, part);
      return std::string(part == bytes_of("3456") ? "" : "the part has other bytes");
    });
    check("empty", "an object may have no bytes", [&] {
      store_.put(plain, {}, {});
      return differs(store_, plain, "");
    });
  }

  void of_size() {
    check("large", "an object of 8 MiB is read as it was written, in parts at a time", [&] {
      std::vector<std::byte> bytes(kLarge), read(kLarge);
      for (size_t i = 0; i < kLarge; ++i) bytes[i] = std::byte((i * 2654435761u) >> 24);
      const std::string key = key_ + "-large";
      store_.put(key, bytes, {});
      parallel_for(kLarge / kPart, 4, [&](size_t i) {
        store_.read(key, i * kPart, std::span(read).subspan(i * kPart, kPart));
      });
      return std::string(read == bytes ? "" : "the object has other bytes");
    });
  }

  void removal() {
    check("remove", "what was removed is gone at once, and may be removed again", [&] {
      std::string found;
      for (const char* end : {"", "-none", "-plain", "-large"}) store_.remove(key_ + end);
      store_.remove(key_);
      if (store_.get(key_, kLarge)) found = "it is still read";
      for (const ObjectInfo& info : store_.list(kDirectory)) {
        if (info.key.starts_with(key_)) found = "it is still listed";
      }
      return found;
    });
  }

  ObjectStore& store_;
  const std::string key_ = probe_key();
  std::string first_, second_;
  ProbeReport report_;
};

}  // namespace

bool ProbeReport::holds() const {
  return std::all_of(checks.begin(), checks.end(), [](const ProbeCheck& check) { return check.holds; });
}

ProbeReport probe(ObjectStore& store, bool large) { return Probe(store).run(large); }

void require_conditions(ObjectStore& store, const std::string& name) {
  for (const ProbeCheck& check : probe(store, false).checks) {
    if (check.holds) continue;
    throw Error(ErrorCode::kInvalidArgument, "the store " + name + " can't keep agents: " + check.meaning +
                                                 ", but here " + check.found +
                                                 "; use a store whose conditional writes hold");
  }
}

RaceReport race(ObjectStore& store, size_t writers, size_t rounds) {
  const std::string key = probe_key() + "-race";
  RaceReport report;
  // One step: all write at a time, each its own bytes, under the same condition. True when it has one winner.
  const auto step = [&](const std::string& name, const Condition& condition) {
    std::vector<std::string> texts(writers);
    std::vector<char> done(writers, 0), lost(writers, 0);
    parallel_for(writers, writers, [&](size_t i) {
      texts[i] = name + " by " + std::to_string(i);
      try {
        done[i] = store.put(key, bytes_of(texts[i]), condition).status == PutStatus::kDone;
      } catch (const Error& error) {
        if (error.code() == ErrorCode::kCancelled) throw;
        lost[i] = 1;  // the object tells who won
      }
    });
    const auto winners = std::count(done.begin(), done.end(), 1);
    report.lost += size_t(std::count(lost.begin(), lost.end(), 1));
    const std::optional<Object> object = store.get(key, kLarge);
    size_t owner = 0;
    while (owner < writers && !(object && object->bytes == bytes_of(texts[owner]))) ++owner;
    if (winners > 1) {
      ++report.with_several;
    } else if (owner == writers) {
      ++(winners == 0 ? report.without_winner : report.of_another);
    } else if (winners == 1 && !done[owner]) {
      ++report.of_another;
    } else {
      return true;
    }
    return false;
  };
  for (; report.rounds < rounds; ++report.rounds) {
    const std::string name = "round " + std::to_string(report.rounds);
    const bool created = step(name + " created", Condition::absent());
    const std::optional<ObjectInfo> info = created ? store.head(key) : std::nullopt;
    if (info) step(name + " updated", Condition::of_tag(info->tag));
    store.remove(key);
  }
  return report;
}

}  // namespace torpor::remote
