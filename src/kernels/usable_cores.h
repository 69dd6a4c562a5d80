#pragma once
/// How many threads are worth starting: cores that this process may use, as the system's files tell it.

#include <filesystem>
#include <vector>

namespace torpor::kernels {

/// Physical cores of the CPUs `allowed`, bounded by the quota of the process's control group (v1 and v2). On a CPU with cores of two
/// kinds only the fast ones count: each kernel waits for its slowest thread. At least 1. `root` is where /sys and /proc are.
int usable_cores(const std::vector<int>& allowed, const std::filesystem::path& root = "/");
/// CPUs that the quota of the process's control group, or of one above, lets it use at once; infinity without a quota.
double cpu_quota(const std::filesystem::path& root = "/");

}  // namespace torpor::kernels
