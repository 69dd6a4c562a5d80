#pragma once
/// Which instruction set the kernels run on: the best one the CPU has, or the one `TORPOR_CPU_TARGET` names.

namespace torpor::kernels {

/// Applies `TORPOR_CPU_TARGET` (portable, sse4, avx2, avx512, neon) once per process. Every public kernel calls this before
/// its first dynamic dispatch. Throws kInvalidArgument when the name is unknown or the CPU can't run it.
void ensure_cpu_target();

/// Name of the target in use, as Highway spells it ("AVX2"; the portable one is "EMU128" or, on compilers that break it, "SCALAR").
const char* cpu_target_name();

}  // namespace torpor::kernels
