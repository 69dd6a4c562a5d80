#pragma once
/// Which keys a bucket is sealed with, if it is.

#include <string>
#include <vector>

#include "remote/cloud_store.h"
#include "remote/object_store.h"

namespace torpor::remote {

/// What `command` of the user's shell ($TORPOR_KEY_COMMAND where it is empty) prints: a key on each line, the newest
/// first. Without a command there are none. Its input is empty. It is in no error, nor is what it prints.
/// kInvalidArgument: it failed, or printed something else.
std::vector<std::string> run_key_command(const std::string& command);

/// `keys` for the bucket at `url`. `plain` is its client without keys. With keys an empty prefix is sealed here, once
/// and for all. kInvalidArgument: it is sealed and there are no keys, or others; or it was begun without one. Also what
/// requests throw.
BucketKeys keys_of_bucket(ObjectStore& plain, const std::string& url, std::vector<std::string> keys);

}  // namespace torpor::remote
