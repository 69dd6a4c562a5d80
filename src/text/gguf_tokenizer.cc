#include "text/gguf_tokenizer.h"

#include <algorithm>
#include <array>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "base/gguf_ends.h"
#include "base/json.h"
#include "base/safetensors.h"
#include "torpor/error.h"

namespace torpor::text {
namespace {

using nlohmann::json;

// tokenizer.ggml.token_type
constexpr int kNormal = 1, kControl = 3, kUserDefined = 4, kUnused = 5;

constexpr std::string_view kSpace = "▁";

/// The patterns that words are split by before they are merged, as in the tokenizer.json that files were made of.
#define TORPOR_CONTRACTIONS "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
#define TORPOR_SYMBOLS_AND_SPACES R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"
#define TORPOR_UPPER R"([\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}])"
#define TORPOR_LOWER R"([\p{Ll}\p{Lm}\p{Lo}\p{M}])"
constexpr const char* kQwen2 = TORPOR_CONTRACTIONS R"(|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N})" TORPOR_SYMBOLS_AND_SPACES;
constexpr const char* kLlama3 = TORPOR_CONTRACTIONS R"(|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3})" TORPOR_SYMBOLS_AND_SPACES;
constexpr const char* kQwen35 = TORPOR_CONTRACTIONS
    R"(|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kTekken = R"([^\r\n\p{L}\p{N}]?)" TORPOR_UPPER "*" TORPOR_LOWER
    R"(+|[^\r\n\p{L}\p{N}]?)" TORPOR_UPPER "+" TORPOR_LOWER
    R"(*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kGpt4o = R"([^\r\n\p{L}\p{N}]?)" TORPOR_UPPER "*" TORPOR_LOWER "+" TORPOR_CONTRACTIONS
    R"(?|[^\r\n\p{L}\p{N}]?)" TORPOR_UPPER "+" TORPOR_LOWER "*" TORPOR_CONTRACTIONS
    R"(?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
#undef TORPOR_CONTRACTIONS
#undef TORPOR_SYMBOLS_AND_SPACES
#undef TORPOR_UPPER
#undef TORPOR_LOWER

/// What `tokenizer.ggml.pre` stands for.
struct PreTokenizer {
  const char* name;
  const char* pattern;         ///< nullptr: that of GPT-2
  bool digits = false;         ///< each digit is a word
  bool composed = false;       ///< texts are brought into the normal form NFC
  bool whole_words = false;    ///< a word that is a token is not merged (`ignore_merges`)
  bool begins = false;         ///< texts begin with BOS, where the file does not say
};
constexpr PreTokenizer kPreTokenizers[] = {
    {.name = "gpt-2"},
    {.name = "olmo"},
    {.name = "smollm", .digits = true},
    {.name = "starcoder", .digits = true},
    {.name = "refact", .digits = true},
    {.name = "command-r", .digits = true, .composed = true},
    {.name = "qwen2", .pattern = kQwen2, .composed = true},
    {.name = "deepseek-r1-qwen", .pattern = kQwen2, .composed = true},
    {.name = "qwen35", .pattern = kQwen35},
    {.name = "llama-bpe", .pattern = kLlama3, .whole_words = true, .begins = true},
    {.name = "llama3", .pattern = kLlama3, .whole_words = true, .begins = true},
    {.name = "llama-v3", .pattern = kLlama3, .whole_words = true, .begins = true},
    {.name = "lfm2", .pattern = kLlama3, .whole_words = true, .begins = true},
    {.name = "smaug-bpe", .pattern = kLlama3},
    {.name = "glm4", .pattern = kLlama3, .whole_words = true},
    {.name = "tekken", .pattern = kTekken, .whole_words = true, .begins = true},
    {.name = "gpt-4o", .pattern = kGpt4o},
};

class Vocabulary {
 public:
  explicit Vocabulary(const GgufFile& file) : file_(file), model_(file.text("tokenizer.ggml.model").value_or("")) {
    const std::vector<std::string_view> given = file.texts("tokenizer.ggml.tokens");
    if (model_.empty() || given.empty()) {
      throw Error(ErrorCode::kNotFound,
                  "'" + file.file_name() + "' has no tokenizer; fetch a file of the model that has one.");
    }
    if (model_ != "gpt2" && model_ != "llama" && model_ != "gemma4") {
      refuse("a tokenizer of the kind " + printable(model_) + ", supported: gpt2, llama, gemma4");
    }
    types_ = file.numbers("tokenizer.ggml.token_type");
    scores_ = file.numbers("tokenizer.ggml.scores");
    if (types_.empty()) types_.assign(given.size(), kNormal);
    if (types_.size() != given.size() || (model_ == "llama" && scores_.size() != given.size())) {
      refuse("a tokenizer whose lists differ in length");
    }
    for (const int32_t end : gguf_ends(file).by_text) types_[size_t(end)] = kControl;
    for (size_t i = 0; i < given.size(); ++i) {
      // GGUF writes the runs of spaces that are pieces of their own as spaces.
      tokens.push_back(pieces() && is(i, kUserDefined) ? with_spaces(given[i]) : std::string(given[i]));
    }
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (!is(i, kUnused)) ids[tokens[i]] = i;
    }
  }

  [[noreturn]] void refuse(const std::string& what) const {
    throw Error(ErrorCode::kInvalidArgument, "'" + file_.file_name() + "' has " + what + ".");
  }
  const GgufFile& file() const { return file_; }
  bool is(size_t id, int type) const { return types_[id] == type; }
  bool pieces() const { return model_ != "gpt2"; }
  bool scored() const { return model_ == "llama"; }
  double score(size_t id) const { return scores_[id]; }

  /// Whitespace after the token is part of it: no metadata say so, and llama.cpp has it so for Phi-3's.
  bool takes_spaces(size_t id) const {
    if (!scored() || file_.text("general.architecture") != "phi3") return false;
    return tokens[id] != "<unk>" && tokens[id] != "<s>" && tokens[id] != "<|endoftext|>";
  }
  /// The token that the metadata name so, or "".
  std::string special(const char* name) const {
    const int64_t id = file_.integer(std::string("tokenizer.ggml.") + name + "_token_id").value_or(-1);
    return id >= 0 && size_t(id) < tokens.size() ? tokens[size_t(id)] : "";
  }
  /// Found before all else in a text. Runs of spaces are not: they are found by merging, since a text is cut at added
  /// tokens before its spaces become "▁".
  bool added(size_t id) const {
    if (is(id, kControl)) return true;
    return is(id, kUserDefined) && !(pieces() && only_spaces(tokens[id]));
  }
  const PreTokenizer& pre() const {
    const std::string_view name = file_.text("tokenizer.ggml.pre").value_or("");
    if (name.empty() || name == "default") {
      refuse("a tokenizer that does not say how it splits texts (tokenizer.ggml.pre); fetch a newer file of the model");
    }
    std::string supported;
    for (const PreTokenizer& known : kPreTokenizers) {
      if (name == known.name) return known;
      supported += std::string(supported.empty() ? "" : ", ") + known.name;
    }
    refuse("a tokenizer that splits texts as " + printable(name) + " does, supported: " + supported);
  }
  bool begins() const {
    if (model_ == "gemma4") return true;  // some files say that it does not, and llama.cpp too does not believe them
    const std::optional<bool> said = file_.flag("tokenizer.ggml.add_bos_token");
    return said.value_or(pieces() || pre().begins);
  }

  std::vector<std::string> tokens;
  std::unordered_map<std::string_view, size_t> ids;  // of tokens; the last of equal ones

 private:
  static std::string printable(std::string_view text) {
    std::string out;
    for (const char c : text.substr(0, 64)) out += c > ' ' && c < 127 ? c : '?';
    return out;
  }
  static std::string with_spaces(std::string_view text) {
    std::string out;
    for (const char c : text) out += c == ' ' ? std::string(kSpace) : std::string(1, c);
    return out;
  }
  static bool only_spaces(std::string_view text) {
    while (text.starts_with(kSpace)) text.remove_prefix(kSpace.size());
    return text.empty();
  }

  const GgufFile& file_;
  const std::string model_;
  std::vector<double> types_, scores_;
};

/// A list or an object of many entries, written as they come.
class Entries {
 public:
  explicit Entries(char open) { out_ += open; }
  std::string& next() { return out_ += out_.size() > 1 ? "," : ""; }
  std::string closed(char close) && { return std::move(out_ += close); }

 private:
  std::string out_;
};

std::string merge_text(std::string_view left, std::string_view right) {
  return "[" + json_quote(left) + "," + json_quote(right) + "]";
}

/// As the file lists them, best first.
std::string listed_merges(const Vocabulary& vocabulary) {
  Entries merges('[');
  for (const std::string_view merge : vocabulary.file().texts("tokenizer.ggml.merges")) {
    const size_t space = merge.find(' ', 1);  // the left one may begin with a space
    if (space == merge.npos) vocabulary.refuse("a tokenizer with a merge of one part");
    merges.next() += merge_text(merge.substr(0, space), merge.substr(space + 1));
  }
  return std::move(merges).closed(']');
}

/// SentencePiece keeps scores instead: what joins to the piece of the highest score goes first.
std::string scored_merges(const Vocabulary& v) {
  struct Merge {
    double score;
    size_t left, right;  // lengths, in characters
    std::string_view text;
    size_t cut;          // in bytes
  };
  const auto mergeable = [&](size_t id) { return v.is(id, kNormal) || v.is(id, kUserDefined); };
  // A piece that the user defined is found first: as one of the highest score.
  const auto score_of = [&](size_t id) { return v.is(id, kUserDefined) ? 0.0 : v.score(id); };
  const auto piece = [&](std::string_view text) -> std::optional<size_t> {
    const auto it = v.ids.find(text);
    return it != v.ids.end() && mergeable(it->second) ? std::optional(it->second) : std::nullopt;
  };
  constexpr size_t kLongest = 256;  // bytes; cutting a piece takes the square of its length
  std::vector<Merge> merges;
  for (size_t id = 0; id < v.tokens.size(); ++id) {
    const std::string_view text = v.tokens[id];
    if (!mergeable(id) || v.ids.at(text) != id) continue;
    if (text.size() > kLongest) v.refuse("a tokenizer with a token of " + std::to_string(text.size()) + " bytes");
    const auto begins = [&](size_t i) { return (static_cast<unsigned char>(text[i]) & 0xc0) != 0x80; };
    const auto characters = size_t(std::ranges::count_if(text, [](char c) { return (c & 0xc0) != 0x80; }));
    struct Pair {
      size_t left_id, right_id, left, cut;
    };
    std::vector<Pair> pairs;
    size_t left = 0;
    for (size_t cut = 1; cut < text.size(); ++cut) {
      if (!begins(cut)) continue;
      ++left;
      const auto a = piece(text.substr(0, cut)), b = piece(text.substr(cut));
      if (a && b) pairs.push_back({*a, *b, left, cut});
    }
    std::ranges::stable_sort(pairs, {}, [](const Pair& p) { return std::pair(p.left_id, p.right_id); });
    for (const Pair& p : pairs) merges.push_back({score_of(id), p.left, characters - p.left, text, p.cut});
  }
  std::ranges::stable_sort(merges, std::greater(), [](const Merge& m) { return std::tuple(m.score, m.left, m.right); });
  Entries list('[');
  for (const Merge& m : merges) list.next() += merge_text(m.text.substr(0, m.cut), m.text.substr(m.cut));
  return std::move(list).closed(']');
}

json byte_level(bool regex) {
  return {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", regex}};
}

struct Steps {
  json normalizer, pre_tokenizer, decoder;
};

Steps byte_level_steps(const PreTokenizer& pre) {
  json splits = json::array();
  if (pre.digits) splits.push_back({{"type", "Digits"}, {"individual_digits", true}});
  if (pre.pattern != nullptr) {
    splits.push_back(
        {{"type", "Split"}, {"pattern", {{"Regex", pre.pattern}}}, {"behavior", "Isolated"}, {"invert", false}});
  }
  splits.push_back(byte_level(pre.pattern == nullptr));
  json decoder = byte_level(true);
  decoder["add_prefix_space"] = true;  // as a decoder only the type matters
  return {.normalizer = pre.composed ? json{{"type", "NFC"}} : json(),
          .pre_tokenizer = {{"type", "Sequence"}, {"pretokenizers", splits}},
          .decoder = decoder};
}

Steps piece_steps(bool space_before) {
  const json to_piece = {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", kSpace}};
  const json to_space = {{"type", "Replace"}, {"pattern", {{"String", kSpace}}}, {"content", " "}};
  json decoders = json::array({to_space, {{"type", "ByteFallback"}}, {{"type", "Fuse"}}});
  if (!space_before) return {to_piece, json(), {{"type", "Sequence"}, {"decoders", decoders}}};
  decoders.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
  const json normalizers = json::array({{{"type", "Prepend"}, {"prepend", kSpace}}, to_piece});
  return {{{"type", "Sequence"}, {"normalizers", normalizers}}, json(), {{"type", "Sequence"}, {"decoders", decoders}}};
}

json begin_with(const std::string& bos, size_t id) {
  const json special = {{"SpecialToken", {{"id", bos}, {"type_id", 0}}}};
  const auto sequence = [](const char* name, int type) -> json {
    return {{"Sequence", {{"id", name}, {"type_id", type}}}};
  };
  return {{"type", "TemplateProcessing"},
          {"single", json::array({special, sequence("A", 0)})},
          {"pair", json::array({sequence("A", 0), sequence("B", 1)})},
          {"special_tokens", {{bos, {{"id", bos}, {"ids", json::array({id})}, {"tokens", json::array({bos})}}}}}};
}

std::string tokenizer_json(const Vocabulary& v) {
  // Some vocabularies keep whole tokens apart from the BPE, others inside it; inside gives the same ids.
  Entries vocab('{'), added('[');
  for (size_t id = 0; id < v.tokens.size(); ++id) {
    if (!v.is(id, kUnused)) vocab.next() += json_quote(v.tokens[id]) + ":" + std::to_string(id);
    if (!v.added(id)) continue;
    const json token = {{"id", id}, {"content", v.tokens[id]}, {"single_word", false}, {"lstrip", false},
                        {"rstrip", v.takes_spaces(id)}, {"normalized", false}, {"special", v.is(id, kControl)}};
    added.next() += dump_json(token);
  }
  const bool space_before = v.file().flag("tokenizer.ggml.add_space_prefix").value_or(v.scored());
  const Steps steps = v.pieces() ? piece_steps(space_before) : byte_level_steps(v.pre());
  json model = {{"type", "BPE"}, {"dropout", nullptr}, {"unk_token", nullptr}, {"continuing_subword_prefix", nullptr},
                {"end_of_word_suffix", nullptr}, {"fuse_unk", v.pieces()}, {"byte_fallback", v.pieces()},
                {"ignore_merges", !v.pieces() && v.pre().whole_words}};
  const std::string unknown = v.special("unknown"), bos = v.special("bos");
  if (v.pieces() && !unknown.empty()) model["unk_token"] = unknown;
  json post;
  if (const auto id = v.ids.find(bos); v.begins() && id != v.ids.end()) post = begin_with(bos, id->second);

  std::string out = "{\"version\":\"1.0\",\"truncation\":null,\"padding\":null,\"added_tokens\":";
  out += std::move(added).closed(']') + ",\"normalizer\":" + dump_json(steps.normalizer);
  out += ",\"pre_tokenizer\":" + dump_json(steps.pre_tokenizer) + ",\"post_processor\":" + dump_json(post);
  out += ",\"decoder\":" + dump_json(steps.decoder) + ",\"model\":" + dump_json(model);
  out.pop_back();  // the model's lists are long
  out += ",\"vocab\":" + std::move(vocab).closed('}');
  out += ",\"merges\":" + (v.scored() ? scored_merges(v) : listed_merges(v)) + "}}";
  return out;
}

/// `make(vocabulary)`; a text that is not UTF-8 is an error of the file's.
template <typename Make>
std::string made(const GgufFile& file, Make make) {
  const Vocabulary vocabulary(file);
  try {
    return make(vocabulary);
  } catch (const json::exception&) {
  } catch (const Error& error) {
    if (std::string_view(error.what()).starts_with("'" + file.file_name() + "'")) throw;
  }
  vocabulary.refuse("a tokenizer with a text that is not UTF-8");
}

}  // namespace

std::string gguf_tokenizer(const GgufFile& metadata) { return made(metadata, tokenizer_json); }

std::string gguf_tokenizer_config(const GgufFile& metadata) {
  return made(metadata, [](const Vocabulary& v) {
    json config = {{"added_tokens_decoder", json::object()}, {"clean_up_tokenization_spaces", false}};
    for (const auto& [name, key] : {std::pair{"bos", "bos_token"}, std::pair{"eos", "eos_token"},
                                    std::pair{"unknown", "unk_token"}, std::pair{"padding", "pad_token"}}) {
      if (const std::string token = v.special(name); !token.empty()) config[key] = token;
    }
    const auto plain = v.file().text("tokenizer.chat_template");
    const auto tools = v.file().text("tokenizer.chat_template.tool_use");
    if (plain && tools) {
      config["chat_template"] = json::array({{{"name", "default"}, {"template", *plain}},
                                             {{"name", "tool_use"}, {"template", *tools}}});
    } else if (plain) {
      config["chat_template"] = *plain;
    }
    return dump_json(config);
  });
}

}  // namespace torpor::text
