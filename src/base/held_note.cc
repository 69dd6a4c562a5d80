#include "base/held_note.h"

#include <span>

#include "torpor/error.h"

namespace torpor {
namespace {

FileLock lock_note(const std::filesystem::path& directory, const std::string& name) {
  // Who looks whether its process lives holds a note for a moment.
  constexpr std::chrono::seconds kMoment{1};
  Env& env = Env::posix();
  if (!env.is_own_directory(directory)) env.make_directory(directory);
  const std::filesystem::path path = directory / (name + ".lock");
  auto lock = env.lock(path, LockMode::kExclusive, kMoment);
  if (!lock) throw Error(ErrorCode::kBusy, "another process has the note '" + path.string() + "'");
  return std::move(*lock);
}

}  // namespace

HeldNote::HeldNote(const std::filesystem::path& directory, const std::string& name, std::string_view text)
    : lock_(lock_note(directory, name)) {
  lock_.file().write_all({std::as_bytes(std::span(text))});
}

HeldNote::~HeldNote() {
  try {
    Env::posix().remove(lock_.path());
  } catch (const std::exception&) {
    // The next process finds it.
  }
}

std::vector<std::filesystem::path> notes_in(const std::filesystem::path& directory, std::string_view prefix) {
  std::vector<std::filesystem::path> notes;
  for (const std::string& name : Env::posix().list_own(directory)) {
    if (name.starts_with(prefix)) notes.push_back(directory / name);
  }
  return notes;
}

void clear_notes(const std::filesystem::path& directory, std::string_view prefix,
                 const std::function<bool(const std::string& text)>& is_done) {
  Env& env = Env::posix();
  for (const auto& note : notes_in(directory, prefix)) {
    const auto left = env.lock(note, LockMode::kExclusive, {});
    if (left && is_done(env.read_file(note, kLongestNote))) env.remove(note);
  }
}

}  // namespace torpor
