// Token ids, decoded text and rendered chats against Hugging Face's own (scripts/make-goldens-text).

#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <thread>

#include "base/json.h"
#include "torpor/error.h"
#include "torpor/text.h"

namespace torpor {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

const fs::path kRoot = TORPOR_SOURCE_DIR;
const fs::path kGoldens = kRoot / "tests/goldens/text";

std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file.is_open()) << path;
  return {std::istreambuf_iterator<char>(file), {}};
}

void write(const fs::path& path, std::string_view text) { std::ofstream(path, std::ios::binary) << text; }

class ScratchDir {
 public:
  ScratchDir() {
    std::string name = (fs::temp_directory_path() / "torpor-text-XXXXXX").string();
    if (!mkdtemp(name.data())) throw std::runtime_error("mkdtemp");
    path_ = name;
  }
  ~ScratchDir() { fs::remove_all(path_); }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

template <typename Call>
Error error_of(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << "nothing was thrown";
  return {ErrorCode::kInternal, ""};
}

bool is_utf8(std::string_view text) {
  try {
    (void)dump_json(json(std::string(text)));
    return true;
  } catch (const json::exception&) {
    return false;
  }
}

std::string stream(const std::shared_ptr<const Tokenizer>& tokenizer, const std::vector<int32_t>& ids, bool skip_special) {
  Detokenizer detokenizer(tokenizer, skip_special);
  std::string text;
  for (const int32_t id : ids) {
    const std::string piece = detokenizer.push(id);
    EXPECT_TRUE(is_utf8(piece)) << "a character was split at id " << id;
    text += piece;
  }
  return text + detokenizer.finish();
}

/// Calls `check(tokenizer, golden)` for each tokenizer whose files are here; the model's are fetched, not committed.
template <typename Check>
void for_each_tokenizer(Check&& check) {
  for (const auto& golden : parse_json<json>(read(kGoldens / "tokenizers.json"))) {
    const std::string dir = golden.at("dir");
    SCOPED_TRACE(dir);
    if (!fs::exists(kRoot / dir / "tokenizer.json")) {
      std::cerr << "left out: " << dir << " (scripts/fetch-model)\n";
      continue;
    }
    static std::map<std::string, std::shared_ptr<const Tokenizer>> loaded;  // some take a second
    auto& tokenizer = loaded[dir];
    if (!tokenizer) tokenizer = Tokenizer::load(kRoot / dir);
    check(tokenizer, golden);
  }
}

TEST(Tokenizer, IdsEqualHuggingFaces) {
  for_each_tokenizer([](const auto& tokenizer, const json& golden) {
    for (const auto& sample : golden.at("cases")) {
      const std::string input = sample.at("input");
      EXPECT_EQ(json(tokenizer->encode(input, false)), sample.at("ids")) << sample.at("input");
      const json& ids = sample.at("ids");
      json with_special = sample.at("ids_with_special");
      // Hugging Face's puts a second BOS before a text that begins with one; mlx-lm, which decides here, does not.
      const bool has_bos = with_special.size() > ids.size() && std::equal(ids.begin(), ids.end(), with_special.begin() + 1);
      if (has_bos && !ids.empty() && ids[0] == with_special[0]) with_special.erase(0);
      EXPECT_EQ(json(tokenizer->encode(input, true)), with_special) << sample.at("input");
    }
  });
}

/// The same tokenizers from GGUF, which brings them as llama.cpp keeps them.
template <typename Check>
void for_each_gguf_tokenizer(Check&& check) {
  for (const auto& golden : parse_json<json>(read(kGoldens / "tokenizers.json"))) {
    const std::string file = golden.at("dir").get<std::string>() + ".gguf";
    SCOPED_TRACE(file);
    if (!fs::exists(kRoot / file)) continue;
    static std::map<std::string, std::shared_ptr<const Tokenizer>> loaded;
    auto& tokenizer = loaded[file];
    if (!tokenizer) tokenizer = Tokenizer::load(kRoot / file);
    check(tokenizer, golden);
  }
}

/// And those of llama.cpp on the models' files, but for texts in which the two differ.
TEST(GgufTokenizer, IdsEqualHuggingFacesAndLlamaCpps) {
  int files = 0;
  const auto compare = [](const auto& tokenizer, const json& samples) {
    for (const auto& sample : samples) {
      const std::string input = sample.at("input");
      EXPECT_EQ(json(tokenizer->encode(input, false)), sample.at("ids")) << sample.at("input");
    }
  };
  for_each_gguf_tokenizer([&](const auto& tokenizer, const json& golden) {
    ++files;
    compare(tokenizer, golden.at("cases"));
    const fs::path name = fs::path(golden.at("dir")).filename() += ".gguf.json";
    const fs::path of_model = kRoot / "tests/goldens/model" / name;
    if (fs::exists(of_model)) compare(tokenizer, parse_json<json>(read(of_model)).at("texts"));
  });
  EXPECT_GE(files, 1);
}

TEST(GgufTokenizer, DecodesAsHuggingFaceDoes) {
  for_each_gguf_tokenizer([](const auto& tokenizer, const json& golden) {
    for (const char* list : {"cases", "sequences"}) {
      for (const auto& sample : golden.at(list)) {
        const std::vector<int32_t> ids = sample.at("ids");
        EXPECT_EQ(tokenizer->decode(ids), sample.at("text")) << sample.at("ids");
        EXPECT_EQ(tokenizer->decode(ids, true), sample.at("text_without_special")) << sample.at("ids");
      }
    }
  });
}

// The vocabularies of llama.cpp's own tests, and what these expect (scripts/fetch-model vocabularies).
TEST(GgufTokenizer, IdsEqualLlamaCpps) {
  const fs::path directory = kRoot / ".models/vocabularies";
  if (!fs::exists(directory)) GTEST_SKIP() << "no .models/vocabularies";
  int files = 0;
  for (const auto& file : fs::directory_iterator(directory)) {
    if (file.path().extension() != ".gguf") continue;
    SCOPED_TRACE(file.path().filename().string());
    ++files;
    const auto tokenizer = Tokenizer::load(file.path());
    for (const auto& sample : parse_json<json>(read(fs::path(file.path()).replace_extension(".json")))) {
      const std::string input = sample.at("input");
      EXPECT_EQ(json(tokenizer->encode(input, false)), sample.at("ids")) << sample.at("input");
    }
  }
  EXPECT_GE(files, 10);
}

TEST(GgufTokenizer, Phi3sTokensTakeTheSpacesAfterThemAsInLlamaCpp) {
  const fs::path file = kRoot / ".models/vocabularies/phi-3.gguf";
  if (!fs::exists(file)) GTEST_SKIP() << "no .models/vocabularies";
  const auto tokenizer = Tokenizer::load(file);
  const auto id = [&](const char* token) { return tokenizer->token_to_id(token).value(); };
  const std::vector<int32_t> hi = tokenizer->encode("Hi", false);
  ASSERT_EQ(hi.size(), 1u);
  EXPECT_EQ(tokenizer->encode("<|user|>\nHi<|end|>\n<|assistant|>\n", false),
            (std::vector<int32_t>{id("<|user|>"), hi[0], id("<|end|>"), id("<|assistant|>")}));
  EXPECT_EQ(tokenizer->encode("</s> \n Hi", false), (std::vector<int32_t>{id("</s>"), hi[0]}));
  for (const char* token : {"<s>", "<unk>", "<|endoftext|>"}) {
    EXPECT_GT(tokenizer->encode(std::string(token) + "\nHi", false).size(), 2u) << token;
  }
}

TEST(GgufTokenizer, Gemma4BeginsWithBosWhateverTheFileSays) {
  const fs::path path = kRoot / ".models/vocabularies/gemma-4.gguf";
  if (!fs::exists(path)) GTEST_SKIP() << "no .models/vocabularies";
  std::string file = read(path);
  const std::string key = "tokenizer.ggml.add_bos_token";
  const size_t at = file.find(key);
  ASSERT_NE(at, std::string::npos);
  char& flag = file[at + key.size() + sizeof(uint32_t)];
  ASSERT_EQ(flag, 1);
  flag = 0;
  ScratchDir dir;
  write(dir.path() / "gemma-4.gguf", file);
  const std::vector<int32_t> ids = Tokenizer::load(dir.path() / "gemma-4.gguf")->encode("Hi", true);
  ASSERT_EQ(ids.size(), 2u);
  EXPECT_EQ(ids[0], 2);
}

/// A file of pieces with scores, and nothing else.
std::string pieces_as_gguf(const std::vector<std::string>& pieces) {
  std::string out = "GGUF";
  const auto number = [&](auto value) { out.append(reinterpret_cast<const char*>(&value), sizeof(value)); };
  const auto text = [&](const std::string& value) { number(uint64_t(value.size())), out += value; };
  const auto list = [&](const char* key, uint32_t kind) {
    text(key), number(uint32_t(9)), number(kind), number(uint64_t(pieces.size()));
  };
  number(uint32_t(3)), number(uint64_t(0)), number(uint64_t(3));
  text("tokenizer.ggml.model"), number(uint32_t(8)), text("llama");
  list("tokenizer.ggml.tokens", 8);
  for (const std::string& piece : pieces) text(piece);
  list("tokenizer.ggml.scores", 6);
  for (size_t i = 0; i < pieces.size(); ++i) number(-float(i));
  return out;
}

TEST(GgufTokenizer, PiecesThatWouldTakeLongToCutAreRefused) {
  ScratchDir dir;
  const fs::path file = dir.path() / "pieces.gguf";
  write(file, pieces_as_gguf({"a", std::string(256, 'a')}));
  EXPECT_EQ(Tokenizer::load(file)->vocab_size(), 2);
  write(file, pieces_as_gguf({"a", std::string(257, 'a')}));
  const Error error = error_of([&] { Tokenizer::load(file); });
  EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
  EXPECT_NE(std::string(error.what()).find("a token of 257 bytes"), std::string::npos) << error.what();
}

// The families' vocabularies and what llama.cpp's tests expect of them (scripts/fetch-model families).
TEST(Tokenizer, IdsEqualLlamaCpps) {
  int families = 0;
  for_each_tokenizer([&](const auto& tokenizer, const json& golden) {
    const fs::path cases = kRoot / golden.at("dir").get<std::string>() / "llama-cpp.json";
    if (!fs::exists(cases)) return;
    ++families;
    for (const auto& sample : parse_json<json>(read(cases))) {
      EXPECT_EQ(json(tokenizer->encode(sample.at("input").get<std::string>(), false)), sample.at("ids")) << sample.at("input");
    }
  });
  if (families == 0) GTEST_SKIP() << "no .models/families";
}

TEST(Tokenizer, DecodesAsHuggingFaceDoes) {
  for_each_tokenizer([](const auto& tokenizer, const json& golden) {
    for (const char* list : {"cases", "sequences"}) {
      for (const auto& sample : golden.at(list)) {
        const std::vector<int32_t> ids = sample.at("ids");
        EXPECT_EQ(tokenizer->decode(ids), sample.at("text")) << sample.at("ids");
        EXPECT_EQ(tokenizer->decode(ids, true), sample.at("text_without_special")) << sample.at("ids");
      }
    }
  });
}

TEST(Tokenizer, KnowsItsVocabulary) {
  for_each_tokenizer([](const auto& tokenizer, const json& golden) {
    EXPECT_EQ(tokenizer->vocab_size(), golden.at("vocab_size"));
    for (const auto& [token, id] : golden.at("tokens").items()) EXPECT_EQ(tokenizer->token_to_id(token), id) << token;
    EXPECT_EQ(tokenizer->token_to_id("no such token"), std::nullopt);
    EXPECT_EQ(tokenizer->token_to_id("\xff"), std::nullopt);
    EXPECT_EQ(tokenizer->digest().size(), 32u);
    EXPECT_EQ(tokenizer->decode({1 << 30}), "") << "an id past the vocabulary has no text";
  });
}

TEST(Detokenizer, PiecesAreTheWhole) {
  for_each_tokenizer([](const auto& tokenizer, const json& golden) {
    for (const char* list : {"cases", "sequences"}) {
      for (const auto& sample : golden.at(list)) {
        const std::vector<int32_t> ids = sample.at("ids");
        EXPECT_EQ(stream(tokenizer, ids, false), sample.at("text")) << sample.at("ids");
        EXPECT_EQ(stream(tokenizer, ids, true), sample.at("text_without_special")) << sample.at("ids");
      }
    }
  });
}

TEST(Detokenizer, PiecesAreTheWholeForRandomIds) {
  for_each_tokenizer([](const auto& tokenizer, const json&) {
    std::minstd_rand random(7);
    const auto size = static_cast<uint32_t>(tokenizer->vocab_size());
    for (int round = 0; round < 300; ++round) {
      // Low ids are the bytes and specials, where decoders differ most.
      const uint32_t range = round % 2 ? 280u : size;
      std::vector<int32_t> ids(random() % 80);
      for (auto& id : ids) id = static_cast<int32_t>(random() % range);
      const bool skip_special = round % 3 == 0;
      ASSERT_EQ(stream(tokenizer, ids, skip_special), tokenizer->decode(ids, skip_special)) << json(ids);
    }
  });
}

TEST(Detokenizer, GivesTextAsSoonAsItIsDecided) {
  const auto tokenizer = Tokenizer::load(kGoldens / "tokenizers/byte-level");
  Detokenizer detokenizer(tokenizer);
  const auto byte = [&](const char* token) { return tokenizer->token_to_id(token).value(); };
  EXPECT_EQ(detokenizer.push(byte("a")), "a");
  // U+20AC is E2 82 AC, in the byte-level alphabet "âĤ¬".
  EXPECT_EQ(detokenizer.push(byte("â")), "");
  EXPECT_EQ(detokenizer.push(byte("Ĥ")), "");
  EXPECT_EQ(detokenizer.push(byte("¬")), "\u20ac");
  EXPECT_EQ(detokenizer.push(byte("ÿ")), "\ufffd") << "FF begins no character";
  EXPECT_EQ(detokenizer.push(byte("â")), "");
  EXPECT_EQ(detokenizer.push(byte("a")), "\ufffda");
  EXPECT_EQ(detokenizer.push(byte("â")), "");
  EXPECT_EQ(detokenizer.finish(), "\ufffd");
  EXPECT_EQ(detokenizer.finish(), "");
  Detokenizer moved = std::move(detokenizer);
  EXPECT_EQ(moved.push(byte("a")), "a");
}

TEST(Tokenizer, SaysWhatIsWrong) {
  const auto tokenizer = Tokenizer::load(kGoldens / "tokenizers/byte-level");
  const Error bad = error_of([&] { tokenizer->encode("ab\xc3(", false); });
  EXPECT_EQ(bad.code(), ErrorCode::kInvalidArgument);
  EXPECT_STREQ(bad.what(), "the text is not valid UTF-8 at byte 2");
  EXPECT_EQ(error_of([&] { tokenizer->decode({-1}); }).code(), ErrorCode::kInvalidArgument);
  EXPECT_EQ(error_of([&] { Detokenizer(tokenizer).push(-1); }).code(), ErrorCode::kInvalidArgument);
  EXPECT_EQ(error_of([&] { Detokenizer(nullptr); }).code(), ErrorCode::kInvalidArgument);

  const ScratchDir dir;
  EXPECT_EQ(error_of([&] { Tokenizer::load(dir.path()); }).code(), ErrorCode::kNotFound);
  const std::string whole = read(kGoldens / "tokenizers/byte-level/tokenizer.json");
  for (const std::string& text : {std::string(), std::string("{}"), std::string("[1]"), whole.substr(0, 1000),
                                  std::string("\xff\xfe"), std::string(R"({"model": {"type": "?"}})")}) {
    write(dir.path() / "tokenizer.json", text);
    const Error error = error_of([&] { Tokenizer::load(dir.path()); });
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument) << error.what();
    EXPECT_NE(std::string(error.what()).find("tokenizer.json"), std::string::npos);
  }
}

TEST(Tokenizer, ServesManyThreads) {
  const auto tokenizer = Tokenizer::load(kGoldens / "tokenizers/byte-level");
  const std::string text = "The quick brown fox, 你好 😀, jumps over the lazy dog";
  const auto expected = tokenizer->encode(text, false);
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int n = 0; n < 200; ++n) wrong += tokenizer->encode(text, false) != expected;
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(ChatTemplate, RendersAsHuggingFaceDoes) {
  for (const auto& golden : parse_json<json>(read(kGoldens / "templates.json"))) {
    const ScratchDir scratch;
    fs::path dir = scratch.path();
    if (golden.contains("dir")) {
      dir = kRoot / golden.at("dir").get<std::string>();
      if (!fs::exists(dir)) {
        std::cerr << "left out: " << golden.at("dir") << " (scripts/fetch-model)\n";
        continue;
      }
    } else {
      fs::copy_file(kGoldens / "templates" / golden.at("template").get<std::string>(), dir / "chat_template.jinja");
      write(dir / "tokenizer_config.json", golden.at("config").get<std::string>());
    }
    const auto chat_template = ChatTemplate::load(dir);
    ASSERT_TRUE(chat_template);
    for (const auto& sample : golden.at("cases")) {
      SCOPED_TRACE(golden.value("template", golden.value("dir", "")) + ": " + sample.at("name").get<std::string>());
      const auto render = [&] {
        return chat_template->render(sample.at("messages").get<std::string>(), sample.at("add_generation_prompt"),
                                     sample.at("extra").get<std::string>());
      };
      if (sample.contains("rendered")) {
        try {
          EXPECT_EQ(render(), sample.at("rendered").get<std::string>());
        } catch (const Error& error) {
          ADD_FAILURE() << error.what();
        }
      } else {
        const Error error = error_of(render);
        EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
        const std::string raised = sample.at("error");
        if (!raised.empty()) {
          EXPECT_EQ(error.what(), raised);
        }
      }
    }
  }
}

TEST(ChatTemplate, IsFoundWhereHuggingFaceLooks) {
  const ScratchDir dir;
  const auto config = dir.path() / "tokenizer_config.json";
  EXPECT_EQ(ChatTemplate::load(dir.path()), nullptr);
  write(config, R"({"chat_template": null})");
  EXPECT_EQ(ChatTemplate::load(dir.path()), nullptr);
  write(config, R"({"chat_template": "plain {{ bos_token }}", "bos_token": {"content": "<s>", "lstrip": false}})");
  EXPECT_EQ(ChatTemplate::load(dir.path())->render("[]", false), "plain <s>");
  write(config, R"({"chat_template": [{"name": "rag", "template": "rag"}, {"name": "default", "template": "listed"}]})");
  const auto listed = ChatTemplate::load(dir.path());
  EXPECT_EQ(listed->render("[]", false), "listed");
  write(dir.path() / "chat_template.jinja", "from its own file\n");
  const auto own = ChatTemplate::load(dir.path());
  EXPECT_EQ(own->render("[]", false), "from its own file");
  EXPECT_NE(own->digest(), listed->digest());
  fs::remove(config);
  EXPECT_EQ(ChatTemplate::load(dir.path())->digest(), own->digest());
}

TEST(ChatTemplate, SaysWhatIsWrong) {
  const ScratchDir dir;
  const auto load = [&](const char* text) {
    write(dir.path() / "chat_template.jinja", text);
    return ChatTemplate::load(dir.path());
  };
  for (const char* broken : {"{% if %}", "{{ ", "{% nonsense %}", "{% for x in y %}", "{{ 'a }}", "\xff"}) {
    EXPECT_EQ(error_of([&] { load(broken); }).code(), ErrorCode::kInvalidArgument) << broken;
  }
  const auto raising = load("{% macro m() %}{{ raise_exception('no tools, please') }}{% endmacro %}\n{{ m() }}");
  EXPECT_STREQ(error_of([&] { raising->render("[]", false); }).what(), "no tools, please");
  const auto failing = load("a\n{{ missing.field.field }}");
  const std::string message = error_of([&] { failing->render("[]", false); }).what();
  EXPECT_NE(message.find("on line 2"), std::string::npos) << message;
  const auto endless = load("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}");
  EXPECT_EQ(error_of([&] { endless->render("[]", false); }).code(), ErrorCode::kInvalidArgument);

  const auto good = load("{{ messages|length }}{{ extra }}");
  EXPECT_EQ(good->render(R"([{"role": "user"}])", false, R"({"extra": "!"})"), "1!");
  for (const char* messages : {"", "{}", "[1]", "[{]", "\xff", R"([{"role": "\ud800"}])"}) {
    EXPECT_EQ(error_of([&] { good->render(messages, false); }).code(), ErrorCode::kInvalidArgument) << messages;
  }
  EXPECT_EQ(error_of([&] { good->render("[]", false, "[]"); }).code(), ErrorCode::kInvalidArgument);

  fs::remove(dir.path() / "chat_template.jinja");
  for (const char* config : {"", "[", R"({"chat_template": 1})", R"({"chat_template": [{"name": "x"}]})"}) {
    write(dir.path() / "tokenizer_config.json", config);
    EXPECT_EQ(error_of([&] { ChatTemplate::load(dir.path()); }).code(), ErrorCode::kInvalidArgument) << config;
  }
}

}  // namespace
}  // namespace torpor
