#include "base/gguf_ends.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <limits>
#include <map>
#include <string>
#include <string_view>

namespace torpor {
namespace {

/// Of one family or another.
constexpr std::string_view kEnds[] = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["};

/// Between the files of a repository. Their texts count where the metadata don't name them.
struct BetweenFiles {
  const char* key;
  std::array<std::string_view, 5> texts;
};
constexpr BetweenFiles kBetweenFiles[] = {
    {"fim_pad", {"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"}},
    {"fim_rep", {"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"}},
    {"fim_sep", {"<|file_sep|>"}},
};

}  // namespace

GgufEnds gguf_ends(const GgufFile& metadata) {
  GgufEnds ends;
  const auto add_named = [&](const char* which) {
    const int64_t id = metadata.integer(std::string("tokenizer.ggml.") + which + "_token_id").value_or(-1);
    if (id < 0 || id > std::numeric_limits<int32_t>::max()) return false;
    ends.ids.insert(int32_t(id));
    return true;
  };
  for (const char* which : {"eos", "eot", "eom"}) add_named(which);
  std::set<std::string_view> texts(std::begin(kEnds), std::end(kEnds));
  for (const auto& [key, known] : kBetweenFiles) {
    if (!add_named(key)) texts.insert(known.begin(), known.end());
  }
  texts.erase("");

  constexpr std::string_view kStruckOut = "</s>";
  constexpr double kControl = 3;
  const std::vector<std::string_view> tokens = metadata.texts("tokenizer.ggml.tokens");
  const std::vector<double> types = metadata.numbers("tokenizer.ggml.token_type");
  std::map<std::string_view, int32_t> found;
  for (size_t i = 0; i < tokens.size(); ++i) {
    const bool control = i < types.size() && types[i] == kControl;
    if (tokens[i] == kStruckOut ? control : texts.contains(tokens[i])) found[tokens[i]] = int32_t(i);
  }
  const auto remove = [&](std::string_view text) {
    const auto it = found.find(text);
    if (it == found.end()) return;
    ends.ids.erase(it->second);
    found.erase(it);
  };
  // Messages end with <|end|>, and turns with these.
  const bool calls = found.contains("<|call|>") || found.contains("<|calls|>");
  if (calls && (found.contains("<|return|>") || found.contains("<|flush|>"))) remove("<|end|>");
  if (found.contains("<|tool_response>")) remove(kStruckOut);
  for (const auto& [text, id] : found) ends.by_text.insert(id);
  ends.ids.insert(ends.by_text.begin(), ends.by_text.end());
  return ends;
}

}  // namespace torpor
