#pragma once
/// The one place where environment variables are read.

#include <cstdlib>
#include <string>

namespace torpor {

/// Empty when it is not set.
inline std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

}  // namespace torpor
