#pragma once
/// The marker, `torpor.json`: it says that a directory is a store, and which limits that store keeps (docs/format.md, "Files").

#include <optional>
#include <string>

#include "torpor/store.h"

namespace torpor {

inline constexpr const char* kMarkerName = "torpor.json";
inline constexpr uint64_t kMaxMarker = 4096;  ///< bytes

struct Marker {
  DiskLimits limits;
  std::string text;  ///< as it was read, for what else it says; empty when a power cut emptied the file
};

/// JSON of this version. What `before` says beside is kept.
std::string encode_marker(const DiskLimits& limits, const Marker& before = {});

/// nullopt: no marker but the sidecar of an agent `torpor`, from before there were markers. One that a power cut emptied has no text.
/// kCorruption; kIncompatible: a newer version than this Torpor knows.
std::optional<Marker> decode_marker(const std::string& text, const std::string& file_name);

}  // namespace torpor
