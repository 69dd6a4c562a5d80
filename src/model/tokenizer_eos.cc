/// The end-of-turn token of a model's tokenizer.

#include <fstream>
#include <limits>
#include <sstream>
#include <string>

#include "base/json.h"
#include "base/model_file.h"
#include "model/config.h"

namespace torpor::model {
namespace {

using nlohmann::json;

json read_object(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  json value = parse_json<json>(plain_json(text.str()), nullptr, false);
  return value.is_object() ? value : json::object();
}

/// A token is a string, or an object with its `content`.
std::string token_text(const json& object, const char* key) {
  const auto it = object.find(key);
  if (it == object.end()) return "";
  const json& token = it->is_object() && it->contains("content") ? (*it)["content"] : *it;
  return token.is_string() ? token.get<std::string>() : "";
}

std::optional<int32_t> checked_id(int64_t id) {
  if (id < 0 || id > std::numeric_limits<int32_t>::max()) return std::nullopt;
  return int32_t(id);
}

/// Looks for one token in a tokenizer.json, which is megabytes of vocabulary: in `added_tokens`, which stand at its beginning, else
/// in the model's vocabulary. Parsing ends where the id is known.
class TokenFinder final : public nlohmann::json_sax<json> {
 public:
  explicit TokenFinder(const std::string& token) : token_(token) {}
  std::optional<int64_t> id;

  bool key(std::string& name) override {
    key_ = name;
    if (depth_ == 1) section_ = name;
    if (depth_ == 2) part_ = name;
    return true;
  }
  bool string(std::string& value) override {
    if (section_ == "added_tokens" && depth_ == 3 && key_ == "content") named_ = value == token_;
    if (in_list() && depth_ == 4) named_ = value == token_;  // ["text", score]
    return settle();
  }
  bool number_integer(number_integer_t value) override { return number(value); }
  bool number_unsigned(number_unsigned_t value) override { return number(int64_t(value)); }
  bool number_float(number_float_t, const std::string&) override { return true; }
  bool boolean(bool) override { return true; }
  bool null() override { return true; }
  bool binary(json::binary_t&) override { return true; }
  bool start_object(size_t) override { return enter(); }
  bool start_array(size_t) override { return enter(); }
  bool end_object() override { return leave(); }
  bool end_array() override { return leave(); }
  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception&) override { return false; }

 private:
  bool in_vocabulary() const { return section_ == "model" && part_ == "vocab"; }
  bool in_list() const { return in_vocabulary() && list_; }
  bool enter() {
    ++depth_;
    if (in_vocabulary() && depth_ == 4) list_ = true;
    if (section_ == "added_tokens" && depth_ == 3) named_ = false, number_.reset();
    return true;
  }
  bool leave() {
    --depth_;
    if (in_list() && depth_ == 3) ++at_;
    return true;
  }
  bool number(int64_t value) {
    if (section_ == "added_tokens" && depth_ == 3 && key_ == "id") number_ = value;
    if (in_vocabulary() && !list_ && depth_ == 3 && key_ == token_) named_ = true, number_ = value;
    return settle();
  }
  bool settle() {
    if (named_ && in_list()) number_ = at_;
    if (named_ && number_) id = number_;
    return !id;
  }

  const std::string token_;
  std::string section_, part_, key_;
  int depth_ = 0;
  bool named_ = false, list_ = false;
  int64_t at_ = 0;
  std::optional<int64_t> number_;
};

}  // namespace

std::optional<int32_t> tokenizer_eos(const std::filesystem::path& dir) {
  const json config = read_object(dir / "tokenizer_config.json");
  const auto known = config.find("added_tokens_decoder");
  std::string eos = token_text(config, "eos_token");
  if (known == config.end()) {
    if (const std::string mapped = token_text(read_object(dir / "special_tokens_map.json"), "eos_token");
        !mapped.empty())
      eos = mapped;
  }
  if (eos.empty()) return std::nullopt;
  if (known != config.end() && known->is_object()) {
    for (const auto& [id, token] : known->items()) {
      if (token.is_object() && token_text(token, "content") == eos) return checked_id(std::atoll(id.c_str()));
    }
  }
  std::ifstream in(dir / "tokenizer.json", std::ios::binary);
  TokenFinder finder(eos);
  if (in) json::sax_parse(in, &finder);
  return finder.id ? checked_id(*finder.id) : std::nullopt;
}

}  // namespace torpor::model
