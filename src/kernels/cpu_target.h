#pragma once
/// Which instruction set the kernels run on: the best one the CPU has, or the one that ComputeOptions::cpu_target names.

#include <algorithm>
#include <cstddef>
#include <string>

#include "torpor/compute_options.h"

namespace torpor::kernels {

/// Settles it for the process, unless it is settled already: then another one is kInvalidArgument. An empty name takes what there
/// is. kInvalidArgument when the name is unknown or the CPU can't run it.
void settle_cpu_target(const std::string& name);
/// Settles it by TORPOR_CPU_TARGET if nobody has. Every public kernel calls this before its first dynamic dispatch.
void ensure_cpu_target();

/// Name of the target in use, as Highway spells it ("AVX2"; the portable one is "EMU128" or, on compilers that break it, "SCALAR");
/// or "AMX".
const char* cpu_target_name();

/// Whether the target in use multiplies many rows as bytes: "amx", which is AVX-512 with VNNI and AMX's tiles, or "neon"
/// on a CPU that has its dot products of bytes (dotprod). Once a kernel has been called.
bool byte_tiles_in_use();
/// Whether it does so by products of matrices: "neon" on a CPU that has those of bytes (i8mm).
bool matrix_products_in_use();

/// What the target in use multiplies quantized weights with fastest: 16-bit integers where it has instructions for their
/// products (x86's VNNI).
Activations fastest_activations();

/// What rounding depends on in the target in use: the lanes in which floats are added up, kSumLanes, and whether it
/// multiplies and adds in one ("l16-fma", "l16"). Targets of one class compute the same bits.
std::string lane_class();

/// Where floats are added up, in a norm or a softmax, each of so many lanes has its own sum, however many of them a
/// target's vectors hold.
inline constexpr size_t kSumLanes = 16;
/// The sum of the lanes: halves are added until one is left, as AVX-512 does.
inline float sum_of_lanes(const float* lanes) {
  float sums[kSumLanes];
  std::copy(lanes, lanes + kSumLanes, sums);
  for (size_t n = kSumLanes / 2; n > 0; n /= 2) {
    for (size_t i = 0; i < n; ++i) sums[i] += sums[i + n];
  }
  return sums[0];
}

/// Has the line at `p` brought into a core's second-level cache. Not the first: its few buffers for lines under way
/// would fill up, and loads would wait for the memory as if nothing had been fetched. (Inlined always: GCC drops calls
/// of a function that does nothing else.)
[[gnu::always_inline]] inline void fetch(const void* p) { __builtin_prefetch(p, /*write=*/0, /*locality=*/2); }

}  // namespace torpor::kernels
