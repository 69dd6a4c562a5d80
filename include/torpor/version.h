#pragma once
/// Which Torpor this is. CMake, the Python package and `find_package(torpor)` read the version here.

#define TORPOR_VERSION_MAJOR 0
#define TORPOR_VERSION_MINOR 1
#define TORPOR_VERSION_PATCH 0
#define TORPOR_VERSION "0.1.0"

namespace torpor {

/// Versions of the store's file format (docs/format.md). kOldestFormatRead to kNewestFormat are read; a newer one is
/// kIncompatible. The newest is written. Segments of an agent that goes on under old names are of the oldest.
inline constexpr int kOldestFormatRead = 1;
inline constexpr int kNewestFormat = 3;

}  // namespace torpor
