#pragma once
/// A directory of one file, for readers that take a directory.

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>

class ModelDirectory {
 public:
  ModelDirectory() : path_(std::filesystem::temp_directory_path() / ("torpor-fuzz-" + std::to_string(getpid()))) {
    std::filesystem::create_directory(path_);
  }
  ~ModelDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  ModelDirectory(const ModelDirectory&) = delete;
  ModelDirectory& operator=(const ModelDirectory&) = delete;

  const std::filesystem::path& path() const { return path_; }
  /// The file is then the only one.
  void put(const std::string& name, const uint8_t* data, size_t size) {
    if (name != name_ && !name_.empty()) std::filesystem::remove(path_ / name_);
    name_ = name;
    std::ofstream(path_ / name, std::ios::binary).write(reinterpret_cast<const char*>(data), std::streamsize(size));
  }

 private:
  const std::filesystem::path path_;
  std::string name_;
};
