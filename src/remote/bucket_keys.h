#pragma once
/// Which keys a bucket is sealed with, if it is.

#include <string>
#include <vector>

#include "remote/cloud_store.h"
#include "remote/object_store.h"

namespace torpor::remote {

/// What the command of the user's shell prints: a key on each line, the newest first. Its input is empty. It is in no
/// error, nor is what it prints. kInvalidArgument: it failed, or printed something else.
std::vector<std::string> run_key_command(const std::string& command);

/// Those that `key_command` prints ($TORPOR_KEY_COMMAND where it is empty) for the bucket at `url`; none: it is not
/// sealed. `plain` is its client without keys. An empty prefix is sealed here, once and for all. kInvalidArgument: it
/// is sealed and no key, or another one, was given; or it was begun without one. Also what requests throw.
BucketKeys keys_of_bucket(ObjectStore& plain, const std::string& url, const std::string& key_command);

}  // namespace torpor::remote
