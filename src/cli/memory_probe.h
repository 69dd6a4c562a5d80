#pragma once
/// What this machine's memory does for a model, measured.

namespace torpor::cli {

/// Bytes a second that all threads together read, the best of a few passes over 256 MiB, or over a quarter of what is available.
/// 0 where too little is. It takes a tenth of a second.
double probe_memory();

}  // namespace torpor::cli
