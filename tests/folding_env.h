#pragma once
/// An Env whose file names are the same in upper and lower case, as on macOS: a name keeps the case that it was made with.

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <string>

#include "counting_env.h"

namespace torpor::testing {

class FoldingEnv : public CountingEnv {
 public:
  int raw_open(const char* path, OpenMode mode) override { return CountingEnv::raw_open(found(path).c_str(), mode); }
  int raw_stat(const char* path, FileStat& out) override { return CountingEnv::raw_stat(found(path).c_str(), out); }
  int raw_stat_link(const char* path, FileStat& out) override { return CountingEnv::raw_stat_link(found(path).c_str(), out); }
  int raw_rename(const char* from, const char* to) override { return CountingEnv::raw_rename(found(from).c_str(), found(to).c_str()); }
  int raw_link(const char* from, const char* to) override { return CountingEnv::raw_link(found(from).c_str(), found(to).c_str()); }
  int raw_rename_new(const char* from, const char* to) override {
    return CountingEnv::raw_rename_new(found(from).c_str(), found(to).c_str());
  }
  int raw_remove(const char* path) override { return CountingEnv::raw_remove(found(path).c_str()); }

 private:
  /// The name that is there, when one is that differs in case alone.
  static std::filesystem::path found(const std::filesystem::path& path) {
    std::error_code ignored;
    if (std::filesystem::symlink_status(path, ignored).type() != std::filesystem::file_type::not_found) return path;
    const std::string wanted = path.filename().string();
    for (const auto& entry : std::filesystem::directory_iterator(path.parent_path(), ignored)) {
      const std::string name = entry.path().filename().string();
      if (std::equal(name.begin(), name.end(), wanted.begin(), wanted.end(),
                     [](unsigned char a, unsigned char b) { return std::tolower(a) == std::tolower(b); })) {
        return entry.path();
      }
    }
    return path;
  }
};

}  // namespace torpor::testing
