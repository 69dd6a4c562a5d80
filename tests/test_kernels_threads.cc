// The thread pool, and the choice of the CPU target.

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <gtest/gtest.h>

#include "kernels/compute.h"
#include "kernels/cpu_target.h"
#include "kernels/reading_order.h"
#include "kernels/thread_pool.h"
#include "kernels/usable_cores.h"
#include "torpor/error.h"

namespace torpor::kernels {
namespace {

TEST(KernelsThreadPool, EveryTaskOnce) {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.size(), threads);
    for (int round = 0; round < 2000; ++round) {
      const size_t n = size_t(round % 37);
      std::vector<std::atomic<int>> counts(n);
      pool.parallel_for(n, [&](size_t task, int worker) {
        EXPECT_TRUE(worker >= 0 && worker < threads);
        ++counts[task];
      });
      for (const auto& count : counts) ASSERT_EQ(count.load(), 1);
    }
  }
  EXPECT_THROW(ThreadPool(0), Error);
}

TEST(KernelsThreadPool, EveryTaskOnceFromBothEnds) {
  for (const int threads : {1, 2, 3, 5}) {
    ThreadPool pool(threads);
    for (int n = 0; n < 70; ++n) {
      std::vector<std::atomic<int>> counts(static_cast<size_t>(n));
      pool.parallel_ends(n, [&](int task, int next) {
        EXPECT_TRUE(next >= 0 && next < n && std::abs(next - task) <= 1);
        ++counts[size_t(task)];
      });
      for (const auto& count : counts) ASSERT_EQ(count.load(), 1) << threads << " threads, " << n << " tasks";
    }
  }
  ThreadPool pool(3);
  EXPECT_THROW(pool.parallel_ends(50, [](int task, int) {
    if (task == 20) throw std::runtime_error("twenty");
  }), std::runtime_error);
}

TEST(KernelsThreadPool, AThreadWhoseStretchIsDoneHelpsWithTheOthers) {
  // Both threads of the first stretch stay in its first and its last task until all other tasks are done.
  constexpr int kTasks = 40;
  for (const int threads : {4, 7}) {
    ThreadPool pool(threads);
    const int last = kTasks / ((threads + 1) / 2) - 1;
    std::atomic<int> done{0};
    alarm(60);  // without help they stay for ever
    pool.parallel_ends(kTasks, [&](int task, int) {
      while ((task == 0 || task == last) && done < kTasks - 2) std::this_thread::yield();
      ++done;
    });
    alarm(0);
    EXPECT_EQ(done.load(), kTasks);
  }
}

TEST(KernelsThreadPool, MemoryAheadIsNeverRead) {
  constexpr size_t kSize = size_t{3} << 20;
  void* const none = mmap(nullptr, kSize, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(none, MAP_FAILED);
  const std::span all(static_cast<const std::byte*>(none), kSize);
  alarm(60);
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (size_t round = 0; round < 200; ++round) {
      std::vector<std::atomic<int>> counts(7);
      std::atomic<int> met{0};
      const auto ahead = round % 3 == 0 ? all.subspan(64 * round, round) : all.subspan(64 * round);
      pool.parallel_ends(7, [&](int task, int) {
        ++counts[size_t(task)];
        if (threads == 1 || (task != 0 && task != 6)) return;
        for (++met; met < 2;) std::this_thread::yield();  // so that two threads come, and wait for each other
      }, ahead);
      for (const auto& count : counts) ASSERT_EQ(count.load(), 1);
    }
  }
  alarm(0);
  munmap(none, kSize);
}

TEST(KernelsReadingOrder, WhatWasReadNextIsKnownTheSecondTime) {
  const std::vector<std::byte> weights(64 * 5);
  const auto layer = [&](size_t i) { return std::span(weights).subspan(64 * i, 64); };
  const auto expect_next = [](std::span<const std::byte> found, std::span<const std::byte> wanted) {
    EXPECT_EQ(found.data(), wanted.data());
    EXPECT_EQ(found.size(), wanted.size());
  };
  ReadingOrder order;
  for (size_t i = 0; i < 4; ++i) EXPECT_TRUE(order.next(layer(i)).empty());
  for (size_t i = 0; i < 4; ++i) expect_next(order.next(layer(i)), layer((i + 1) % 4));
  // Another order counts from when it was seen.
  expect_next(order.next(layer(0)), layer(1));
  EXPECT_TRUE(order.next(layer(4)).empty());
  expect_next(order.next(layer(1)), layer(2));
  expect_next(order.next(layer(0)), layer(4));
}

TEST(KernelsReadingOrder, OfTooManyWeightsSomeAreForgottenAndNoneIsTakenForAnother) {
  constexpr size_t kMany = 5000;
  const std::vector<std::byte> weights(kMany);
  const auto layer = [&](size_t i) { return std::span(weights).subspan(i % kMany, 1); };
  ReadingOrder order;
  size_t known = 0;
  for (size_t i = 0; i < 2 * kMany; ++i) {
    const auto found = order.next(layer(i));
    if (found.empty()) continue;
    ++known;
    ASSERT_EQ(found.data(), layer(i + 1).data());
  }
  EXPECT_LT(known, kMany);
  for (size_t i = 0; i < 2; ++i) order.next(layer(i));
  EXPECT_EQ(order.next(layer(0)).data(), layer(1).data());
}

TEST(KernelsThreadPool, ExceptionsReachTheCaller) {
  ThreadPool pool(3);
  for (int round = 0; round < 100; ++round) {
    EXPECT_THROW(pool.parallel_for(50, [](size_t task, int) {
      if (task == 20) throw std::runtime_error("twenty");
    }), std::runtime_error);
    std::atomic<int> done{0};
    pool.parallel_for(50, [&](size_t, int) { ++done; });
    EXPECT_EQ(done.load(), 50);
  }
}

TEST(KernelsThreadPool, AForkedProcessIsToldThatItHasNoThreads) {
  ThreadPool pool(3);
  pool.parallel_for(30, [](size_t, int) {});
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // one that waits for workers waits for ever
    try {
      pool.parallel_for(30, [](size_t, int) {});
      _exit(1);
    } catch (const Error& error) {
      pool.~ThreadPool();
      _exit(error.code() == ErrorCode::kInvalidArgument ? 0 : 2);
    }
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  std::atomic<int> done{0};
  pool.parallel_for(30, [&](size_t, int) { ++done; });
  EXPECT_EQ(done.load(), 30);
}

TEST(KernelsTargetDeathTest, TheForcedTargetIsUsedOrRefused) {
  testing::GTEST_FLAG(death_test_style) = "threadsafe";
  auto result_of = [](const char* name) {
    setenv("TORPOR_CPU_TARGET", name, 1);
    try {
      ensure_cpu_target();
    } catch (const Error& error) {
      std::exit(error.code() == ErrorCode::kInvalidArgument ? 10 : 11);
    }
    const std::string target = cpu_target_name();
    std::exit(target == "EMU128" || target == "SCALAR" ? 20 : 21);
  };
  EXPECT_EXIT(result_of("portable"), testing::ExitedWithCode(20), "");
  EXPECT_EXIT(result_of("mmx"), testing::ExitedWithCode(10), "");
#if defined(__x86_64__)
  EXPECT_EXIT(result_of("neon"), testing::ExitedWithCode(10), "");
#else
  EXPECT_EXIT(result_of("avx2"), testing::ExitedWithCode(10), "");
#endif
}

TEST(KernelsTargetDeathTest, AskingForTheTargetsNameLeavesItInUse) {
  testing::GTEST_FLAG(death_test_style) = "threadsafe";
  const auto normed = [] {
    constexpr int kWidth = 577;  // sums of so many differ where a target multiplies and adds in one
    std::vector<float> x(kWidth), weight(kWidth, 1.0f), y(kWidth);
    for (int i = 0; i < kWidth; ++i) x[size_t(i)] = 1.0f / float(i + 1);
    rms_norm(x.data(), 1, kWidth, weight.data(), 1e-5f, y.data());
    return y;
  };
  const auto run = [&] {
    setenv("TORPOR_CPU_TARGET", "portable", 1);
    const std::vector<float> before = normed();
    const std::string name = cpu_target_name();
    std::exit((name == "EMU128" || name == "SCALAR") && normed() == before ? 20 : 21);
  };
  EXPECT_EXIT(run(), testing::ExitedWithCode(20), "");
}

TEST(KernelsTargetDeathTest, TheFirstToSettleItSettlesItForTheProcess) {
  testing::GTEST_FLAG(death_test_style) = "threadsafe";
  auto result_of = [](const char* first, const char* second) {
    settle_cpu_target(first);
    try {
      settle_cpu_target(second);
    } catch (const Error& error) {
      if (std::string name = cpu_target_name(); name != "EMU128" && name != "SCALAR") std::exit(12);
      std::exit(error.code() == ErrorCode::kInvalidArgument && error.found() == second ? 10 : 11);
    }
    std::exit(20);
  };
  EXPECT_EXIT(result_of("portable", "portable"), testing::ExitedWithCode(20), "");
  EXPECT_EXIT(result_of("portable", ""), testing::ExitedWithCode(20), "");
  EXPECT_EXIT(result_of("portable", "mmx"), testing::ExitedWithCode(10), "");
#if defined(__x86_64__)
  EXPECT_EXIT(result_of("portable", "sse4"), testing::ExitedWithCode(10), "");
#endif
}

TEST(KernelsThreadPoolDeathTest, TheFirstToSettleItSettlesItForTheProcess) {
  testing::GTEST_FLAG(death_test_style) = "threadsafe";
  auto result_of = [](int second) {
    ThreadPool::settle_shared(3);
    if (ThreadPool::shared().size() != 3) std::exit(12);
    try {
      ThreadPool::settle_shared(second);
    } catch (const Error& error) {
      std::exit(error.code() == ErrorCode::kInvalidArgument && error.expected() == "3" ? 10 : 11);
    }
    std::exit(20);
  };
  EXPECT_EXIT(result_of(3), testing::ExitedWithCode(20), "");
  EXPECT_EXIT(result_of(2), testing::ExitedWithCode(10), "");
}

/// A machine's files as Linux shows them: 8 CPUs on 4 cores.
class UsableCores : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "torpor-cores-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    root_ = pattern;
    for (int cpu = 0; cpu < 8; ++cpu) {
      const std::string dir = "sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
      write(dir + "physical_package_id", "0");
      write(dir + "core_id", std::to_string(cpu / 2));
    }
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  void write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text << "\n";
  }
  int count(std::vector<int> allowed = {0, 1, 2, 3, 4, 5, 6, 7}) { return usable_cores(allowed, root_); }

  std::filesystem::path root_;
};

TEST_F(UsableCores, AreTheCoresOfTheCpusThatAreAllowed) {
  EXPECT_EQ(count(), 4);
  EXPECT_EQ(count({0, 1, 6}), 2);
  EXPECT_EQ(count({}), 1);
  EXPECT_EQ(count({100, 101}), 2) << "without a topology every CPU counts";
}

TEST_F(UsableCores, AreNoMoreThanTheQuotaOfAnyGroupAbove) {
  write("proc/self/cgroup", "0::/pod/job");
  write("sys/fs/cgroup/pod/job/cpu.max", "max 100000");
  EXPECT_EQ(count(), 4);
  write("sys/fs/cgroup/pod/cpu.max", "150000 100000");
  EXPECT_EQ(count(), 2);
  write("sys/fs/cgroup/pod/job/cpu.max", "10000 100000");
  EXPECT_EQ(count(), 1);
}

TEST_F(UsableCores, CountAContainersQuotaWhoseGroupIsMountedAtTheRoot) {
  write("proc/self/cgroup", "0::/../../docker/abc");
  write("sys/fs/cgroup/cpu.max", "200000 100000");
  EXPECT_EQ(count(), 2);
}

TEST_F(UsableCores, CountTheQuotaOfOlderGroupsToo) {
  write("proc/self/cgroup", "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/");
  write("sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us", "-1");
  write("sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us", "100000");
  EXPECT_EQ(count(), 4);
  write("sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us", "250000");
  EXPECT_EQ(count(), 3);
  write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "100000");
  write("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000");
  EXPECT_EQ(count(), 1);
}

TEST_F(UsableCores, AreTheFastOnesWhereThereAreTwoKinds) {
  write("sys/devices/cpu_core/cpus", "0-3");
  write("sys/devices/cpu_atom/cpus", "4-7");
  EXPECT_EQ(count(), 2);
  EXPECT_EQ(count({4, 5, 6}), 2) << "slow ones are better than none";
}

TEST_F(UsableCores, AreTheFastOnesByCapacityToo) {
  for (int cpu = 0; cpu < 8; ++cpu) {
    write("sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/cpu_capacity", cpu < 6 ? "380" : "1024");
  }
  EXPECT_EQ(count(), 1);
  EXPECT_EQ(count({0, 1, 2, 3}), 2);
}

}  // namespace
}  // namespace torpor::kernels
