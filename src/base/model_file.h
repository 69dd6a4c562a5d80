#pragma once
/// Files of a model directory as others write them.

#include <filesystem>
#include <string>
#include <string_view>

namespace torpor {

/// kNotFound, with the way out, when `beginning` begins a Git LFS pointer: three lines for a file that is not fetched.
void refuse_lfs_pointer(std::string_view beginning, const std::filesystem::path& path);

/// JSON as Python's json module writes and reads it, made plain JSON: NaN, Infinity and -Infinity outside of strings
/// become null. A byte-order mark at the beginning goes.
std::string plain_json(std::string_view python_json);

}  // namespace torpor
