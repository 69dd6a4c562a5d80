#include "cli/disk_probe.h"

#include <fcntl.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cerrno>
#include <chrono>
#include <vector>

#include "store/temporary_file.h"
#include "torpor/error.h"

namespace torpor::cli {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kMeasured = size_t(32) << 20;  // bytes: enough for a rate, little enough for a slow disk
constexpr int kFlushes = 5;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// Bytes that no file system makes smaller.
std::vector<std::byte> noise(size_t size) {
  std::vector<std::byte> bytes(size);
  uint64_t state = 0x9e3779b97f4a7c15;
  for (std::byte& byte : bytes) {
    state = state * 6364136223846793005 + 1442695040888963407;
    byte = std::byte(state >> 56);
  }
  return bytes;
}

/// Lets the system forget its copy of a file that is on the disk, so that reading it is the disk's work.
void forget_copy([[maybe_unused]] const File& file) {
#if defined(__APPLE__)
  ::fcntl(file.fd(), F_NOCACHE, 1);
#else
  ::posix_fadvise(file.fd(), 0, 0, POSIX_FADV_DONTNEED);
#endif
}

std::string in_capitals(std::string name) {
  std::ranges::transform(name, name.begin(), [](unsigned char c) { return std::toupper(c); });
  return name;
}

double median_flush_ms(File& file) {
  const std::vector<std::byte> page(4096);
  std::array<double, kFlushes> times{};
  for (double& time : times) {
    const auto start = Clock::now();
    file.write_all({std::span(page)});
    file.sync();
    time = seconds_since(start) * 1000;
  }
  std::ranges::sort(times);
  return times[kFlushes / 2];
}

}  // namespace

DiskProbe probe_disk(Env& env, const std::filesystem::path& directory) {
  DiskProbe probe;
  const std::filesystem::path path = directory / temporary_name();
  try {
    File file = env.open(path, OpenMode::kCreateNew);
    probe.writable = true;
    probe.remote = env.raw_is_remote(file.fd());
    probe.tells_case = !env.exists(directory / in_capitals(path.filename().string()));
    {
      const File other = env.open(path, OpenMode::kLockFile);
      probe.locks = env.raw_lock(file.fd(), LockMode::kExclusive) >= 0 &&
                    env.raw_lock(other.fd(), LockMode::kExclusive) == -EWOULDBLOCK;
    }
    if (env.free_space(directory) > 4 * kMeasured) {
      std::vector<std::byte> bytes = noise(kMeasured);
      auto start = Clock::now();
      file.write_all({std::span<const std::byte>(bytes)});
      file.sync();
      probe.write_bytes_per_s = double(kMeasured) / seconds_since(start);
      probe.flush_ms = median_flush_ms(file);
      const File again = env.open(path, OpenMode::kRead);
      forget_copy(again);
      start = Clock::now();
      again.read_at(bytes, 0);
      probe.read_bytes_per_s = double(kMeasured) / seconds_since(start);
      probe.measured = true;
    }
  } catch (const Error& error) {
    probe.problem = error.what();
  }
  try {
    env.remove(path);
  } catch (const Error&) {
    // It was not made, or a gc finds it.
  }
  return probe;
}

}  // namespace torpor::cli
