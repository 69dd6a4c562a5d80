#include "torpor/remote.h"

#include <algorithm>

#include "remote/probe.h"
#include "remote/worker.h"
#include "torpor/error.h"

#ifdef TORPOR_REMOTE
#include "remote/cloud_store.h"
#endif

namespace torpor {

std::shared_ptr<RemoteTier> attach_remote(const RemoteOptions& options) {
#ifdef TORPOR_REMOTE
  if (options.ttl < std::chrono::seconds(1)) {
    throw Error(ErrorCode::kInvalidArgument, "A lease lasts a second at least.").with_field("RemoteOptions::ttl");
  }
  // A request for a lease that is answered after its TTL is of no use. Nor is whoever begins so patient.
  remote::CloudOptions hasty;
  hasty.request_timeout = hasty.connect_timeout = hasty.retry_timeout = options.ttl / 3;
  auto leases = std::make_shared<remote::CloudStore>(options.url, hasty);
  remote::require_conditions(*leases, options.url);
  auto bucket = std::make_shared<remote::CloudStore>(options.url);
  return std::make_shared<remote::Worker>(std::move(bucket), std::move(leases), options);
#else
  throw Error(ErrorCode::kInvalidArgument, "This build of Torpor has no client of object stores for '" + options.url +
                                               "'; build it with TORPOR_REMOTE.")
      .with_field("RemoteOptions::url");
#endif
}

}  // namespace torpor
