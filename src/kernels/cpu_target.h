#pragma once
/// Which instruction set the kernels run on: the best one the CPU has, or the one that ComputeOptions::cpu_target names.

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

/// What the target in use multiplies quantized weights with fastest: 16-bit integers where it has instructions for their
/// products (x86's VNNI).
Activations fastest_activations();

/// What rounding depends on in the target in use: f32 lanes of its vectors, and whether it multiplies and adds in one
/// ("l8-fma", "l4").
std::string lane_class();

/// Has the line at `p` brought into a core's second-level cache. Not the first: its few buffers for lines under way
/// would fill up, and loads would wait for the memory as if nothing had been fetched. (Inlined always: GCC drops calls
/// of a function that does nothing else.)
[[gnu::always_inline]] inline void fetch(const void* p) { __builtin_prefetch(p, /*write=*/0, /*locality=*/2); }

}  // namespace torpor::kernels
