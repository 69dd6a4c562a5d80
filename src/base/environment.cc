#include "base/environment.h"

#include <pwd.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <vector>

namespace torpor {
namespace {

/// The home directory in the system's list: of `user`, or of this process's when it is empty.
std::string listed_home(const std::string& user) {
  std::vector<char> memory(1 << 14);
  passwd entry{};
  passwd* found = nullptr;
  const int failed = user.empty() ? ::getpwuid_r(::getuid(), &entry, memory.data(), memory.size(), &found)
                                  : ::getpwnam_r(user.c_str(), &entry, memory.data(), memory.size(), &found);
  return failed == 0 && found != nullptr && found->pw_dir != nullptr ? found->pw_dir : "";
}

}  // namespace

std::string home_directory() {
  const std::string home = environment("HOME");
  return home.empty() ? listed_home("") : home;
}

std::string cache_directory() {
  if (const std::string given = environment("TORPOR_CACHE"); !given.empty()) return expand_home(given);
  const std::string home = home_directory();
#ifdef __APPLE__
  return home.empty() ? "" : home + "/Library/Caches/torpor";
#else
  if (const std::string caches = environment("XDG_CACHE_HOME"); !caches.empty()) return caches + "/torpor";
  return home.empty() ? "" : home + "/.cache/torpor";
#endif
}

std::string expand_home(const std::string& path) {
  if (!path.starts_with('~')) return path;
  const size_t end = std::min(path.find('/'), path.size());
  std::string home = end == 1 ? home_directory() : listed_home(path.substr(1, end - 1));
  if (home.empty()) return path;
  while (home.size() > 1 && home.ends_with('/')) home.pop_back();
  return home + path.substr(end);
}

std::string expand_variables(const std::string& text) {
  std::string out;
  for (size_t i = 0; i < text.size();) {
    const bool braces = text.compare(i, 2, "${") == 0;
    const size_t first = i + (braces ? 2 : 1);
    size_t last = first;
    const auto in_name = [&](char c) {
      return braces ? c != '}' : c == '_' || std::isalnum(static_cast<unsigned char>(c)) != 0;
    };
    while (last < text.size() && in_name(text[last])) ++last;
    const size_t end = braces ? last + 1 : last;
    const bool named = text[i] == '$' && last > first && end <= text.size();
    const char* value = named ? std::getenv(text.substr(first, last - first).c_str()) : nullptr;
    if (value != nullptr) {
      out += value;
      i = end;
    } else {
      out += text[i++];
    }
  }
  return out;
}

}  // namespace torpor
