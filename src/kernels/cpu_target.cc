#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu_target.cc"
#include <hwy/foreach_target.h>  // must come before highway.h

#include "kernels/cpu_target.h"

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>

#include <hwy/highway.h>

#include "torpor/error.h"

HWY_BEFORE_NAMESPACE();
namespace torpor::kernels {
namespace HWY_NAMESPACE {

int64_t ThisTarget() { return HWY_TARGET; }
bool TargetFuses() { return HWY_NATIVE_FMA != 0; }

}  // namespace HWY_NAMESPACE
}  // namespace torpor::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#if HWY_ARCH_X86_64 && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif HWY_ARCH_ARM_A64 && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace torpor::kernels {

HWY_EXPORT(ThisTarget);
HWY_EXPORT(TargetFuses);

namespace {

constexpr int64_t kPortable = HWY_EMU128 | HWY_SCALAR;

[[noreturn]] void refuse(const std::string& name, const std::string& sentence) {
  throw Error(ErrorCode::kInvalidArgument, sentence).with_field("ComputeOptions::cpu_target", "", name);
}

/// What Highway calls the targets that `name` allows.
int64_t targets_of(const std::string& name) {
  int64_t wanted = 0;
  if (name == "portable") {
    wanted = kPortable;
#if HWY_ARCH_X86
  } else if (name == "sse4") {
    wanted = HWY_SSE4;
  } else if (name == "avx2") {
    wanted = HWY_AVX2;
  } else if (name == "avx512") {
    wanted = 2 * HWY_AVX3 - 1;  // newer ones have lower bits
  } else if (name == "amx") {
    wanted = 2 * HWY_AVX3_DL - 1;
#elif HWY_ARCH_ARM
  } else if (name == "neon") {
    wanted = HWY_TARGETS & ~kPortable;  // scalable vectors are left out of the build
#endif
  } else if (name == "sse4" || name == "avx2" || name == "avx512" || name == "amx" || name == "neon") {
    refuse(name, "The CPU target '" + name + "' belongs to another architecture; leave it unset, or use 'portable'.");
  } else {
    refuse(name, "The CPU target must be portable, sse4, avx2, avx512, amx or neon, not '" + name + "'.");
  }
  return wanted;
}

/// Asked of the dispatch itself: hwy::SupportedTargets() makes Highway choose anew, from the disabled targets too.
int64_t target_in_use() { return HWY_DYNAMIC_DISPATCH(ThisTarget)(); }

/// Whether this process may use AMX. Asks the kernel for it: tiles are 8 KiB of a thread's state, so it is off until then.
bool amx_permitted() {
#if HWY_ARCH_X86_64 && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kTiles = 1u << 24, kBytes = 1u << 25;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) == 0 || (d & kBytes) == 0) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

/// Whether this CPU has Arm's dot products of bytes.
bool has_dot_products() {
#if HWY_ARCH_ARM_A64 && defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif HWY_ARCH_ARM_A64 && defined(__APPLE__)
  return true;  // every Mac's
#else
  return false;
#endif
}

/// Whether it has their products of matrices of bytes.
bool has_matrix_products() {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  return true;
#elif HWY_ARCH_ARM_A64 && defined(__linux__) && defined(HWCAP2_I8MM)
  return (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0;
#else
  return false;
#endif
}

std::atomic<bool> settled{false}, amx{false}, byte_tiles{false}, matrix_products{false};

const char* name_in_use() { return amx ? "AMX" : hwy::TargetName(target_in_use()); }

}  // namespace

void settle_cpu_target(const std::string& name) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  const int64_t wanted = name.empty() ? 0 : targets_of(name);
  if (!settled.load()) {
    const bool tiles = (name.empty() || name == "amx") && amx_permitted();
    // The portable target is always among the supported ones when it was compiled at all.
    if ((wanted != 0 && (wanted & (hwy::SupportedTargets() | kPortable) & HWY_TARGETS) == 0) || (name == "amx" && !tiles)) {
      refuse(name, "The CPU target '" + name + "' is not available on this CPU; leave it unset to use the best one.");
    }
    // Highway falls back to the portable target when all others are disabled.
    if (wanted != 0) hwy::DisableTargets(~(wanted | kPortable));
    amx = tiles && target_in_use() <= HWY_AVX3_DL;
    byte_tiles = amx || (has_dot_products() && (target_in_use() & kPortable) == 0);
    matrix_products = byte_tiles && has_matrix_products();
    settled.store(true, std::memory_order_release);
  } else if (wanted != 0 && ((wanted & target_in_use()) == 0 || (amx ? name == "avx512" : name == "amx"))) {
    refuse(name, std::string("This process computes on the CPU target ") + name_in_use() + " already, not '" + name +
                     "'; give every model the same.");
  }
}

void ensure_cpu_target() {
  if (!settled.load(std::memory_order_acquire)) settle_cpu_target(with_environment({}).cpu_target);
}

const char* cpu_target_name() {
  ensure_cpu_target();
  return name_in_use();
}

bool byte_tiles_in_use() { return byte_tiles.load(std::memory_order_relaxed); }
bool matrix_products_in_use() { return matrix_products.load(std::memory_order_relaxed); }

Activations fastest_activations() {
  ensure_cpu_target();
  return HWY_ARCH_X86 && target_in_use() <= HWY_AVX3_DL ? Activations::kInt16 : Activations::kF32;
}

std::string lane_class() {
  ensure_cpu_target();
  return "l" + std::to_string(kSumLanes) + (HWY_DYNAMIC_DISPATCH(TargetFuses)() ? "-fma" : "");
}

}  // namespace torpor::kernels
#endif  // HWY_ONCE
