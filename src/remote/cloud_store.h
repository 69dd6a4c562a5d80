#pragma once
/// Objects in Amazon S3 and whatever speaks its protocol, in Google Cloud Storage and in Azure Blob Storage.
///
/// Credentials, endpoint and region come from the environment and the files that it names (docs/fleet.md). No error
/// holds credentials.

#include <chrono>
#include <string>
#include <vector>

#include "remote/object_store.h"

struct torpor_remote_store;

namespace torpor::remote {

/// What a bucket is sealed with (docs/format.md, "A sealed bucket").
struct BucketKeys {
  /// 64 hex digits or base64 of 32 bytes each. New objects are sealed with the first one.
  std::vector<std::string> keys;
  std::string names;  ///< key_id of the one that names are made with
};
/// 32 hex digits that tell which key it is, and nothing else of it. kInvalidArgument: it is no key.
std::string key_id(const std::string& key);

struct CloudOptions {
  /// Of one request with its answer; each MiB beyond the first has an eighth of it more.
  std::chrono::milliseconds request_timeout{30'000};
  std::chrono::milliseconds connect_timeout{5'000};
  int retries = 10;  ///< of a request that failed in a way that passes; a put that timed out is not retried
  std::chrono::milliseconds retry_timeout{60'000};  ///< no retry begins later
  /// No keys: nothing is sealed. With keys whatever is below PREFIX is, but for leases' names. An object that is not as
  /// it was sealed is kCorruption; one that is sealed with another key is kIncompatible.
  BucketKeys seal = {};
};

/// Thread-safe: calls run side by side, and each blocks. A store of the parent process is of no use in a forked one.
class CloudStore final : public ObjectStore {
 public:
  /// `url` is s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX. Sends no request. kInvalidArgument: the
  /// URL, the environment or one of the files can't be used.
  explicit CloudStore(const std::string& url, const CloudOptions& options = {});
  ~CloudStore() override;
  CloudStore(const CloudStore&) = delete;
  CloudStore& operator=(const CloudStore&) = delete;

  PutResult put(const std::string& key, std::span<const std::byte> bytes, const Condition& condition,
                const ObjectMetadata& metadata = {}) override;
  std::optional<Object> get(const std::string& key, std::uint64_t most_bytes) override;
  std::optional<ObjectInfo> head(const std::string& key) override;
  void read(const std::string& key, std::uint64_t offset, std::span<std::byte> out) override;
  /// Of Google Cloud Storage the tags are those of lists alone: compare them with another list's.
  std::vector<ObjectInfo> list(const std::string& prefix) override;
  void remove(const std::string& key) override;

  /// Calls under way, and later ones, throw kCancelled. Any thread.
  void cancel() noexcept;

 private:
  torpor_remote_store* const store_;
};

}  // namespace torpor::remote
