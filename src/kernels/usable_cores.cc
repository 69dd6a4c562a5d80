#include "kernels/usable_cores.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <map>
#include <set>
#include <sstream>
#include <string>

namespace torpor::kernels {
namespace {

namespace fs = std::filesystem;

constexpr double kNoQuota = std::numeric_limits<double>::infinity();

/// "0-3,8" as numbers.
std::set<int> read_list(const fs::path& path) {
  std::set<int> numbers;
  std::ifstream in(path);
  for (std::string range; std::getline(in, range, ',');) {
    int first = 0, last = 0;
    const int n = std::sscanf(range.c_str(), "%d-%d", &first, &last);
    for (int i = first; n >= 1 && i <= (n == 2 ? last : first); ++i) numbers.insert(i);
  }
  return numbers;
}

/// CPUs that a group may use at once: what `cpu.max` (v2) or `cpu.cfs_quota_us` (v1) says.
double quota_of(const fs::path& group) {
  double quota = 0, period = 0;
  if (std::ifstream(group / "cpu.max") >> quota >> period && quota > 0 && period > 0) return quota / period;
  if (std::ifstream(group / "cpu.cfs_quota_us") >> quota && std::ifstream(group / "cpu.cfs_period_us") >> period && quota > 0 &&
      period > 0) {
    return quota / period;
  }
  return kNoQuota;
}

/// Of CPUs of two kinds the fast ones: Intel names them, Arm gives each CPU's capacity.
std::vector<int> fast_cpus(const std::vector<int>& allowed, const fs::path& root) {
  std::vector<int> fast;
  const std::set<int> named = read_list(root / "sys/devices/cpu_core/cpus");
  std::ranges::copy_if(allowed, std::back_inserter(fast), [&](int cpu) { return named.contains(cpu); });
  if (!fast.empty()) return fast;
  std::map<int, int> capacities;
  int most = 0;
  for (const int cpu : allowed) {
    int capacity = 0;
    std::ifstream(root / "sys/devices/system/cpu" / ("cpu" + std::to_string(cpu)) / "cpu_capacity") >> capacity;
    capacities[cpu] = capacity;
    most = std::max(most, capacity);
  }
  std::ranges::copy_if(allowed, std::back_inserter(fast), [&](int cpu) { return 2 * capacities[cpu] >= most; });
  return fast;
}

}  // namespace

// In a container the path may be the host's, which is not mounted here; the group at the mount's root is then the
// container's own.
double cpu_quota(const fs::path& root) {
  double quota = kNoQuota;
  const fs::path mounted = root / "sys/fs/cgroup";
  std::ifstream groups(root / "proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == line.npos || second == line.npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::vector<fs::path> mounts;
    if (controllers.empty()) {
      mounts = {mounted, mounted / "unified"};
    } else if (("," + controllers + ",").find(",cpu,") != std::string::npos) {
      mounts = {mounted / controllers, mounted / "cpu"};
    }
    for (const fs::path& mount : mounts) {
      fs::path path = fs::path(line.substr(second + 1)).relative_path();
      for (quota = std::min(quota, quota_of(mount)); !path.empty(); path = path.parent_path()) {
        quota = std::min(quota, quota_of(mount / path));
      }
    }
  }
  return quota;
}

int usable_cores(const std::vector<int>& allowed, const fs::path& root) {
  // Distinct (package, core) pairs; an unreadable topology counts every CPU.
  std::set<std::pair<int, int>> cores;
  for (const int cpu : fast_cpus(allowed, root)) {
    const fs::path dir = root / "sys/devices/system/cpu" / ("cpu" + std::to_string(cpu)) / "topology";
    std::pair<int, int> core{-1, cpu};
    int package = 0, id = 0;
    if (std::ifstream(dir / "physical_package_id") >> package && std::ifstream(dir / "core_id") >> id) core = {package, id};
    cores.insert(core);
  }
  return int(std::max(1.0, std::min(double(cores.size()), std::ceil(cpu_quota(root)))));
}

}  // namespace torpor::kernels
