#pragma once
/// The one place where environment variables are read, and paths are expanded as a shell or Python expands them.

#include <cstdlib>
#include <string>

namespace torpor {

/// Empty when it is not set.
inline std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

/// $HOME, else the user's entry in the system's list of users; empty when there is neither.
std::string home_directory();
/// `~` and `~NAME` at the beginning become home directories, as Python's os.path.expanduser has it. Others stay.
std::string expand_home(const std::string& path);
/// Where Torpor keeps what it can make again: `TORPOR_CACHE`, else `torpor` in the system's directory for such files
/// (`XDG_CACHE_HOME`, `~/.cache`; on a Mac `~/Library/Caches`). Empty when there is no home directory.
std::string cache_directory();
/// $NAME and ${NAME} become the variables' values, as os.path.expandvars makes them; what is not set stays.
std::string expand_variables(const std::string& text);

}  // namespace torpor
