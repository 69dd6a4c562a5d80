#include "base/model_file.h"

#include "torpor/error.h"

namespace torpor {

void refuse_lfs_pointer(std::string_view beginning, const std::filesystem::path& path) {
  if (!beginning.starts_with("version https://git-lfs.github.com/spec/")) return;
  throw Error(ErrorCode::kNotFound, "'" + path.string() +
                                        "' is a Git LFS pointer, not the file itself; fetch it with `git lfs "
                                        "pull` in its directory, or the model with `hf download`.");
}

std::string plain_json(std::string_view text) {
  if (text.starts_with("\xEF\xBB\xBF")) text.remove_prefix(3);
  std::string plain;
  plain.reserve(text.size());
  bool inside = false;  // of a string
  for (size_t i = 0; i < text.size();) {
    if (inside && text[i] == '\\') {
      plain += text.substr(i, 2);
      i += 2;
      continue;
    }
    if (text[i] == '"') inside = !inside;
    std::string_view word;
    if (!inside) {
      for (const std::string_view name : {"NaN", "Infinity", "-Infinity"}) {
        if (text.substr(i).starts_with(name)) word = name;
      }
    }
    plain += word.empty() ? text.substr(i, 1) : std::string_view("null");
    i += word.empty() ? 1 : word.size();
  }
  return plain;
}

}  // namespace torpor
