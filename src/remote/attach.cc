#include "torpor/remote.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "remote/probe.h"
#include "remote/worker.h"
#include "torpor/error.h"
#include "torpor/log.h"

#ifdef TORPOR_REMOTE
#include "remote/bucket_keys.h"
#include "remote/cloud_store.h"
#endif

namespace torpor {
#ifdef TORPOR_REMOTE
namespace {

constexpr int kPatience = 3;  ///< leases

/// `make()`, again and again while the bucket gives no answer: one that is busy, or starts, is no reason to end.
template <typename Make>
auto patiently(remote::Instant patience, const Make& make) {
  const remote::Instant begun = remote::clock_now();
  for (bool told = false;; told = true) {
    try {
      return make();
    } catch (const remote::LostAnswer& error) {
      if (remote::clock_now() - begun >= patience) throw;
      if (!told) log(LogLevel::kWarning, std::string("the bucket is asked again, it gave no answer: ") + error.what());
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
}

}  // namespace
#endif

std::shared_ptr<RemoteTier> attach_remote(const RemoteOptions& options) {
#ifdef TORPOR_REMOTE
  if (options.ttl < std::chrono::seconds(1)) {
    throw Error(ErrorCode::kInvalidArgument, "A lease lasts a second at least.").with_field("RemoteOptions::ttl");
  }
  // A request for a lease that is answered after its TTL is of no use. Nor is whoever begins so patient.
  remote::CloudOptions usual, hasty;
  hasty.request_timeout = hasty.connect_timeout = hasty.retry_timeout = options.ttl / 3;
  const std::vector<std::string> keys = remote::run_key_command(options.key_command);
  return patiently(options.ttl * kPatience, [&] {
    remote::CloudStore plain(options.url, hasty);
    remote::require_conditions(plain, options.url);
    usual.seal = hasty.seal = remote::keys_of_bucket(plain, options.url, keys);
    auto leases = std::make_shared<remote::CloudStore>(options.url, hasty);
    auto bucket = std::make_shared<remote::CloudStore>(options.url, usual);
    RemoteOptions mine = options;
    // Nothing that is under way can be committed then, so nobody waits for its answers.
    mine.on_end = [bucket, on_end = options.on_end] {
      bucket->cancel();
      if (on_end) on_end();
    };
    return std::make_shared<remote::Worker>(std::move(bucket), std::move(leases), mine);
  });
#else
  throw Error(ErrorCode::kInvalidArgument, "This build of Torpor has no client of object stores for '" + options.url +
                                               "'; build it with TORPOR_REMOTE.")
      .with_field("RemoteOptions::url");
#endif
}

}  // namespace torpor
