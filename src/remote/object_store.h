#pragma once
/// An object store as Torpor needs it: whole objects under keys, replaced by compare-and-swap. Amazon's S3, Google's
/// and Azure's stores, and servers that speak S3 are such; a directory is not.
///
/// A key is a UTF-8 path without a leading slash. A tag is what the store says of one version of an object (an ETag, a
/// generation). It is opaque. Two versions with equal bytes may have equal tags. A listing's tags compare with those of
/// other listings alone (Google's are others than those of its answers).
///
/// A `put` or a `get` is atomic: no reader sees half an object. What was put is what every later call sees, listings
/// included.
///
/// Thread-safe. Every call blocks. Errors:
/// - LostAnswer: no answer came, or one that leaves open what happened (a timeout, a cut connection, a status of 5xx).
///   The call may have been applied, may not have been, and may still be applied later.
/// - kCancelled: it was given up. What a put or a removal did is as unknown.
/// - any other Error: the store refused, and nothing was changed. kNotFound: no such bucket. kInvalidArgument: a key or
///   a setting that can't be. kIo: the rest, credentials that are refused among it.

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "torpor/error.h"

namespace torpor::remote {

/// Whether a call was applied is not known. Who needs to know reads the object, and compares what it wrote.
class LostAnswer : public Error {
 public:
  explicit LostAnswer(const std::string& message) : Error(ErrorCode::kIo, message) {}
};

struct ObjectInfo {
  std::string key;
  std::uint64_t bytes = 0;
  std::string tag;
  std::int64_t modified_ms = 0;  ///< since 1970, by the store's clock
};

/// The caller's own keys and values that travel with an object. Keys are lower-case ASCII letters and '-'.
using ObjectMetadata = std::map<std::string, std::string>;

struct Object {
  ObjectInfo info;
  ObjectMetadata metadata;
  std::vector<std::byte> bytes;
};

/// When a `put` counts.
struct Condition {
  enum class Kind {
    kNone,    ///< always
    kAbsent,  ///< there is no such object
    kTag,     ///< the object is of this tag
  };
  Kind kind = Kind::kNone;
  std::string tag;  ///< of kTag

  static Condition none() { return {}; }
  static Condition absent() { return {Kind::kAbsent, {}}; }
  static Condition of_tag(std::string tag) { return {Kind::kTag, std::move(tag)}; }
  bool operator==(const Condition&) const = default;
};

enum class PutStatus {
  kDone,
  /// The condition did not hold. This may follow one's own success: a client that got no answer may have sent the
  /// request again. The caller reads the object, and compares.
  kPrecondition,
};

struct PutResult {
  PutStatus status = PutStatus::kDone;
  std::string tag;  ///< of the new version; empty with kPrecondition
};

class ObjectStore {
 public:
  virtual ~ObjectStore() = default;
  /// Writes a whole object.
  virtual PutResult put(const std::string& key, std::span<const std::byte> bytes, const Condition& condition,
                        const ObjectMetadata& metadata = {}) = 0;
  /// nullopt: no such object. kCorruption: it has more than `most_bytes`; nothing is allocated for them.
  virtual std::optional<Object> get(const std::string& key, std::uint64_t most_bytes) = 0;
  virtual std::optional<ObjectInfo> head(const std::string& key) = 0;
  /// Fills `out` from `offset`. kNotFound: no such object; kCorruption: it ends before.
  virtual void read(const std::string& key, std::uint64_t offset, std::span<std::byte> out) = 0;
  /// All objects whose keys begin with `prefix`, by key. A prefix that is not empty ends with '/'.
  virtual std::vector<ObjectInfo> list(const std::string& prefix) = 0;
  /// No error where there is none.
  virtual void remove(const std::string& key) = 0;
};

}  // namespace torpor::remote
