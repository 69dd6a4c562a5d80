#pragma once
/// Files by name that are made once, never change, and belong to whoever names them: segments, and states.
///
/// A pool is a directory, ROOT/segments or ROOT/states. Nothing is written, listed or removed through a symbolic link.
/// Its verbs are those that a pool on another machine can offer, too: find many at once, open, put, list, remove. A put
/// keeps what has the name already. Whoever asks knows names, and no path to write to.

#include <atomic>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/env.h"
#include "store/known.h"
#include "store/sweep.h"
#include "store/temporary_file.h"

namespace torpor {

/// A pool's file as it was when it was looked at.
struct StoredFile {
  std::string name;
  FileStat stat;
};

/// Thread-safe. kIo.
class FilePool {
 public:
  /// `directory` is that in `root`; errors call one of its files a `kind`.
  FilePool(Env& env, const std::filesystem::path& root, const char* directory, const char* kind)
      : env_(env), directory_(root / directory), kind_(kind) {}

  /// Of each name the file that has it; nullopt where there is none. One question, however many names.
  std::vector<std::optional<FileStat>> find(std::span<const std::string> names) const;
  std::optional<FileStat> find(const std::string& name) const;

  /// For reading. kNotFound.
  File open(const std::string& name) const;

  /// A file for `name`, whole and under no name yet; flushed with `durable`.
  TemporaryFile write(const std::string& name, const std::vector<std::span<const std::byte>>& pieces, bool durable);
  /// Gives the file its name unless that is taken: false then. kIo when it is taken by what is no file.
  bool put_new(const std::string& name, TemporaryFile& file);
  /// Gives the file its name in place of another. The caller holds the store's lock exclusively.
  void replace(const std::string& name, TemporaryFile& file);
  /// Flushes the names of files that `write` has flushed: they survive a power cut.
  void flush_names(std::span<const StoredFile> files);
  /// Flushes files and names, but for those that this process has seen flushed. Who wrote them may have asked for less.
  void flush(std::span<const StoredFile> files);

  /// Notes that `name` is a variant of the segment `plain`, for whoever looks for the rows of some tokens. A note that
  /// can't be written is none: the variant is found by those who know its name.
  void note_variant(const std::string& plain, const std::string& name) noexcept;
  /// Names of variants, by the plain names. They may be gone.
  std::unordered_multimap<std::string, std::string> variants() const;
  /// Notes of variants that are gone.
  std::vector<Removable> stale_notes() const;

  std::vector<StoredFile> list() const;
  /// What a Sweep needs to remove one.
  Removable removable(const StoredFile& file) const { return {path(file.name), file.stat, file.name}; }
  std::vector<std::filesystem::path> temporary_files() const;

  /// How errors call a file.
  std::filesystem::path path(const std::string& name) const { return directory_of(name) / (name + ".safetensors"); }
  /// Of all of them.
  const std::filesystem::path& directory() const { return directory_; }

 private:
  std::filesystem::path directory_of(const std::string& name) const { return directory_ / name.substr(0, 2); }
  /// The directories that files are in.
  std::vector<std::filesystem::path> directories() const;
  void sync_directories(std::span<const StoredFile> files);
  std::filesystem::path notes() const { return directory_.parent_path() / "variants"; }

  Env& env_;
  const std::filesystem::path directory_;
  const char* const kind_;
  DurableFiles durable_;
  std::atomic<bool> is_new_ = false;  ///< the root does not name the pool's directory durably yet
};

}  // namespace torpor
