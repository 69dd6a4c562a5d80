#pragma once
/// Parts: an agent's ids, messages and rows that an earlier save has written (docs/format.md, "Parts"). What a save writes again
/// and what it leaves in place is decided here, from numbers alone.

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace torpor {

/// A part as its agent's file lists it.
struct PartRef {
  std::string name;    ///< the checksum of its file
  int64_t first = 0;   ///< position of its first id
  int64_t tokens = 0;  ///< so many of its ids count
  int64_t rows = 0;    ///< of the rows that these ids have, so many count, from the first on
  int64_t end() const { return first + tokens; }
  bool operator==(const PartRef&) const = default;
};

std::vector<std::string> part_names(std::span<const PartRef> parts);
/// A part's file in `parts/`, without its extension: UID-NAME.
inline std::string part_stem(const std::string& uid, const std::string& name) { return uid + "-" + name; }
/// What a part is called by who claims it, or removes what is not claimed: as long as a segment's name.
std::string part_claim(const std::string& uid, const std::string& name);

/// "NAME:FIRST:TOKENS:ROWS" of each, joined with ','.
std::string encode_parts(std::span<const PartRef> parts);
/// nullopt when the text is not that, or the parts' ids do not follow each other from 0.
std::optional<std::vector<PartRef>> decode_parts(std::string_view text);

/// At most so many rows are written again by a save that seals nothing.
inline constexpr int64_t kMostRowsAgain = 32;
/// Where so many parts with rows stand, the newest is taken along whatever its size.
inline constexpr int64_t kManyParts = 8;

/// Of an agent's parts on disk, what the agent still consists of. The file that a save replaces counts as the last part.
struct HeldPart {
  int64_t first = 0, tokens = 0;  ///< ids
  int64_t rows = 0;               ///< of the last so many of them
  bool again = false;             ///< has to be written again: it holds state of its own
  int64_t end() const { return first + tokens; }
};

struct PartsPlan {
  size_t keep = 0;  ///< so many of the held parts stay as they are
  /// The ids and messages of the next ones, up to there, go into a part without rows; nullopt: there are none to go.
  std::optional<int64_t> history_end;
  int64_t history_first = 0;
  int64_t first = 0;  ///< of the new file's ids
  int64_t rows = 0;   ///< in the new file
};

/// `held`: ids that follow each other from 0, and rows of all of them from `sealed` on. `sealed`: tokens in segments, of
/// `n_tokens` in all. `has_state`: the new file holds state, and then all rows past the segments.
PartsPlan plan_parts(std::span<const HeldPart> held, int64_t sealed, int64_t n_tokens, bool has_state);

}  // namespace torpor
