#pragma once
/// Notes that running processes leave in a directory for others: each is locked while its process lives.

#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "base/env.h"

namespace torpor {

/// A process's own note, from its construction to its destruction. One that was killed leaves its note behind, unlocked.
class HeldNote {
 public:
  /// DIRECTORY/NAME.lock with `text`. The directory is made if it is not there. kBusy: another process has it. kIo.
  HeldNote(const std::filesystem::path& directory, const std::string& name, std::string_view text);
  ~HeldNote();
  HeldNote(const HeldNote&) = delete;
  HeldNote& operator=(const HeldNote&) = delete;

 private:
  FileLock lock_;
};

/// Notes whose names begin with `prefix`, those of processes that were killed among them.
std::vector<std::filesystem::path> notes_in(const std::filesystem::path& directory, std::string_view prefix);
/// Tells `is_done` the text of each note whose process has ended, and removes the note if that is true. kIo, and what
/// `is_done` throws: that note stays.
void clear_notes(const std::filesystem::path& directory, std::string_view prefix,
                 const std::function<bool(const std::string& text)>& is_done);
inline constexpr uint64_t kLongestNote = 16'384;  ///< bytes

}  // namespace torpor
