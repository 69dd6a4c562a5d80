#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu_target.cc"
#include <hwy/foreach_target.h>  // must come before highway.h

#include "kernels/cpu_target.h"

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <string>

#include <hwy/highway.h>

#include "torpor/error.h"

HWY_BEFORE_NAMESPACE();
namespace torpor::kernels {
namespace HWY_NAMESPACE {

const char* ThisTarget() { return hwy::TargetName(HWY_TARGET); }

}  // namespace HWY_NAMESPACE
}  // namespace torpor::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace torpor::kernels {

HWY_EXPORT(ThisTarget);

namespace {

constexpr int64_t kPortable = HWY_EMU128 | HWY_SCALAR;

void apply(const std::string& name) {
  int64_t wanted = 0;
  if (name == "portable") {
    wanted = kPortable;
#if HWY_ARCH_X86
  } else if (name == "sse4") {
    wanted = HWY_SSE4;
  } else if (name == "avx2") {
    wanted = HWY_AVX2;
  } else if (name == "avx512") {
    wanted = HWY_AVX3 | HWY_AVX3_DL;
#elif HWY_ARCH_ARM
  } else if (name == "neon") {
    wanted = HWY_NEON;
#endif
  } else if (name == "sse4" || name == "avx2" || name == "avx512" || name == "neon") {
    throw Error(ErrorCode::kInvalidArgument,
                "TORPOR_CPU_TARGET=" + name + " belongs to another architecture; unset it, or use 'portable'.");
  } else {
    throw Error(ErrorCode::kInvalidArgument, "TORPOR_CPU_TARGET must be portable, sse4, avx2, avx512 or neon, not '" +
                                                 name + "'.");
  }
  // The portable target is always among the supported ones when it was compiled at all.
  const int64_t available = (hwy::SupportedTargets() | kPortable) & HWY_TARGETS;
  if ((wanted & available) == 0) {
    throw Error(ErrorCode::kInvalidArgument,
                "TORPOR_CPU_TARGET=" + name + " is not available on this CPU; unset it to use the best one.");
  }
  // Highway falls back to the portable target when all others are disabled.
  hwy::DisableTargets(~(wanted | kPortable));
}

}  // namespace

void ensure_cpu_target() {
  static std::once_flag once;
  std::call_once(once, [] {
    const char* name = std::getenv("TORPOR_CPU_TARGET");
    if (name != nullptr && *name != '\0') apply(name);
  });
}

const char* cpu_target_name() {
  ensure_cpu_target();
  // Asked of the dispatch itself: hwy::SupportedTargets() makes Highway choose anew, from the disabled targets too.
  return HWY_DYNAMIC_DISPATCH(ThisTarget)();
}

}  // namespace torpor::kernels
#endif  // HWY_ONCE
