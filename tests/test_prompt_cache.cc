/// mlx-lm's prompt-cache files: written and read back, refused, damaged. What mlx-lm itself makes of them is
/// tests/test_mlx_lm_files.py's.

#include "base/safetensors.h"
#include "store_fixture.h"
#include "torpor/exchange.h"

namespace torpor::testing {
namespace {

constexpr int kDim = 64, kHeads = 2, kLayers = 3, kWindow = 100;

/// As a model lays its rows out: every second layer has a window.
KvLayout layout_of(const KvFormat& format) {
  KvLayout layout;
  for (int i = 0; i < kLayers; ++i) {
    for (const char* side : {"_keys", "_values"}) {
      const std::string name = "layer_" + std::to_string(i) + side;
      const auto add = [&](const std::string& part, KvDtype dtype, int dim) {
        layout.tensors.push_back({name + part, dtype, kHeads, dim, i % 2 == 1 ? kWindow : 0});
      };
      if (!format.quantized()) {
        add("", format.dtype, kDim);
      } else {
        add("", KvDtype::kU32, kDim * (side[1] == 'k' ? format.bits.keys : format.bits.values) / 32);
        for (const char* part : {"_scales", "_biases"}) add(part, format.dtype, kDim / format.group);
      }
    }
  }
  return layout;
}

/// As the model room says it of this one.
bool rotates_windows(const std::string& architecture) { return architecture == "gemma3"; }

CacheModel model_of(const std::string& architecture = "llama") {
  CacheModel model{"some/model", test_identity(), {}, 4096, layout_of};
  model.identity.architecture = architecture;
  model.rotates_windows = rotates_windows(architecture);
  return model;
}

KvSnapshot snapshot_of(int n_tokens, const KvFormat& format, const std::string& architecture = "llama") {
  KvSnapshot snapshot = make_snapshot(n_tokens, layout_of(format));
  snapshot.identity = model_of(architecture).identity;
  snapshot.identity.kv = format.name();
  return snapshot;
}

/// The row of a token, of one head.
std::string row_of(const KvSnapshot& snapshot, size_t tensor, int head, int token) {
  const KvTensorSpec& spec = snapshot.layout.tensors[tensor];
  const size_t run = size_t(token / kSegmentTokens);
  const int n = snapshot.run_tokens(run);
  const size_t row = size_t(spec.dim) * kv_dtype_size(spec.dtype);
  const size_t at = snapshot.layout.offset(tensor, n) + size_t(head * n + token % kSegmentTokens) * row;
  return {reinterpret_cast<const char*>(snapshot.run_bytes(run).data()) + at, row};
}

class PromptCacheFiles : public ::testing::Test {
 protected:
  /// The bytes of the file that an agent with these rows is exported to.
  std::string exported(const KvSnapshot& snapshot, PromptCacheDialect dialect) {
    store_.save_agent_cache("a", snapshot, "some/model");
    export_prompt_cache(store_, "a", path_, rotates_windows, dialect);
    return read_all(path_);
  }
  PromptCache read(const CacheModel& model = model_of()) { return read_prompt_cache(path_, model); }
  void expect_refused(ErrorCode code, const std::string& part, const CacheModel& model = model_of()) {
    std::string message;
    EXPECT_EQ(code_of([&] { read(model); }, &message), code) << part;
    EXPECT_NE(message.find(part), std::string::npos) << message;
    EXPECT_NE(message.find(path_.string()), std::string::npos) << message;
  }
  /// A file with these tensors, all bytes of which are `fill`, or the value given for an I32.
  void write(const std::vector<std::pair<std::string, std::string>>& metadata, std::vector<SafetensorsTensor> tensors,
             const std::map<std::string, int32_t>& values = {}) {
    std::string bytes = encode_safetensors_header(tensors, metadata);
    for (const auto& tensor : tensors) {
      std::string data(size_t(tensor.size()), '\1');
      if (const auto found = values.find(tensor.name); found != values.end()) std::memcpy(data.data(), &found->second, 4);
      bytes += data;
    }
    write_all(path_, bytes);
  }

  TemporaryDirectory directory_{TemporaryDirectory::in_memory()};
  Store store_{directory_.path() / "store"};
  fs::path path_ = directory_.path() / "cache.safetensors";
};

TEST_F(PromptCacheFiles, ComesBackBitForBitUnderNamesOfItsOwn) {
  for (const KvFormat& format : {KvFormat(KvDtype::kF32), KvFormat(KvDtype::kF16), KvFormat(KvDtype::kBF16),
                                 KvFormat(KvDtype::kF16, 8, 64), KvFormat(KvDtype::kBF16, 4, 32)}) {
    for (const int n : {1, 255, 256, 300, 600}) {
      for (const PromptCacheDialect dialect : {PromptCacheDialect::kNew, PromptCacheDialect::kOld}) {
        KvSnapshot snapshot = snapshot_of(n, format);
        exported(snapshot, dialect);
        EXPECT_TRUE(is_prompt_cache(path_));
        const PromptCache cache = read();
        EXPECT_EQ(cache.shortest_cut, 0);
        for (const int32_t id : cache.snapshot.tokens) ASSERT_LT(id, 0);
        snapshot.tokens = cache.snapshot.tokens;
        EXPECT_TRUE(same(cache.snapshot, snapshot)) << format.name() << ", " << n;
      }
    }
  }
}

TEST_F(PromptCacheFiles, OfRotatingLayersWhatTheWindowSees) {
  for (const PromptCacheDialect dialect : {PromptCacheDialect::kNew, PromptCacheDialect::kOld}) {
    for (const int n : {60, 100, 300}) {
      const KvSnapshot snapshot = snapshot_of(n, KvDtype::kF16, "gemma3");
      exported(snapshot, dialect);
      const PromptCache cache = read(model_of("gemma3"));
      EXPECT_EQ(cache.shortest_cut, n > kWindow ? n : 0);
      for (size_t t = 0; t < snapshot.layout.tensors.size(); ++t) {
        const int first = snapshot.layout.tensors[t].window == 0 ? 0 : std::max(0, n - kWindow);
        for (int head = 0; head < kHeads; ++head) {
          for (int token = 0; token < n; ++token) {
            const std::string row = row_of(cache.snapshot, t, head, token);
            ASSERT_EQ(row, token < first ? std::string(row.size(), '\0') : row_of(snapshot, t, head, token)) << t << " " << token;
          }
        }
      }
    }
  }
  // Whole layers, for mlx-lm knows no window of these.
  exported(snapshot_of(300, KvDtype::kF16, "gemma2"), PromptCacheDialect::kNew);
  EXPECT_EQ(read(model_of("gemma2")).shortest_cut, 0);
  // mlx-lm quantizes no RotatingKVCache.
  exported(snapshot_of(300, {KvDtype::kF16, 8, 64}, "gemma3"), PromptCacheDialect::kNew);
  EXPECT_EQ(read(model_of("gemma3")).shortest_cut, 0);
}

/// The layout with the windows' rows kept apart.
KvLayout apart_layout_of(const KvFormat& format) {
  KvLayout layout = layout_of(format);
  for (KvTensorSpec& tensor : layout.tensors) tensor.apart = tensor.window > 0;
  std::ranges::stable_partition(layout.tensors, [](const KvTensorSpec& tensor) { return !tensor.apart; });
  return layout;
}

TEST_F(PromptCacheFiles, RowsKeptApartAreWrittenAndReadInTheOrderOfTheLayers) {
  CacheModel model = model_of("gemma3");
  model.kv_layout = apart_layout_of;
  for (const PromptCacheDialect dialect : {PromptCacheDialect::kNew, PromptCacheDialect::kOld}) {
    for (const KvFormat& format : {KvFormat(KvDtype::kF16), KvFormat(KvDtype::kBF16, 8, 64)}) {
      for (const int n : {60, 300, 1500}) {
        const KvSnapshot snapshot = snapshot_of(n, format, "gemma3");
        const KvSnapshot apart = in_layout(snapshot, apart_layout_of(format)).value();
        ASSERT_NE(apart.layout, snapshot.layout);
        const std::string expected = exported(snapshot, dialect);
        if (format.quantized() && n > 1000) {  // mlx-lm quantizes no RotatingKVCache, and all rows are not there
          exported(apart, dialect);  // by who has them in memory
          const Store other(directory_.path() / "store");
          EXPECT_EQ(code_of([&] { export_prompt_cache(other, "a", path_, rotates_windows, dialect); }),
                    ErrorCode::kIncompatible);
          continue;
        }
        EXPECT_EQ(exported(apart, dialect), expected) << n;
        export_prompt_cache(Store(directory_.path() / "store"), "a", path_, rotates_windows, dialect);
        EXPECT_EQ(read_all(path_), expected) << n;
        const PromptCache read_apart = read(model), plain = read(model_of("gemma3"));
        EXPECT_EQ(read_apart.snapshot.layout, apart.layout);
        EXPECT_EQ(read_apart.shortest_cut, plain.shortest_cut);
        EXPECT_TRUE(same(in_layout(read_apart.snapshot, snapshot.layout).value(), plain.snapshot)) << n;
        store_.save_agent_cache("b", read_apart.snapshot, "m");
        EXPECT_EQ(store_.load_agent_cache("b").snapshot.tokens.size(), size_t(n));
      }
    }
  }
}

TEST_F(PromptCacheFiles, ARingThatWentRoundIsReadInTheOrderOfItsTokens) {
  const int n = 300, index = 37;
  const KvSnapshot snapshot = snapshot_of(n, KvDtype::kF16, "gemma3");
  std::string bytes = exported(snapshot, PromptCacheDialect::kOld);
  const SafetensorsHeader header = parse_safetensors_header(std::as_bytes(std::span(bytes)), bytes.size(), "exported");
  for (const char* name : {"1.0", "1.1"}) {
    const SafetensorsTensor& tensor = *header.find(name);
    ASSERT_EQ(tensor.shape[2], uint64_t(kWindow));
    const size_t head_size = size_t(tensor.size()) / kHeads, row = head_size / kWindow;
    for (size_t head = 0; head < kHeads; ++head) {
      const auto begin = bytes.begin() + ptrdiff_t(header.data_start + tensor.begin + head * head_size);
      std::rotate(begin, begin + ptrdiff_t((kWindow - index) * row), begin + ptrdiff_t(head_size));
    }
  }
  const std::string full = "\"0.1.3\":\"100\"", rotated = "\"0.1.3\":\"037\"";
  bytes.replace(bytes.find(full), full.size(), rotated);
  write_all(path_, bytes);
  const PromptCache cache = read(model_of("gemma3"));
  for (const size_t t : {size_t(2), size_t(3)}) {
    for (int head = 0; head < kHeads; ++head) {
      for (int token = n - kWindow; token < n; ++token) {
        ASSERT_EQ(row_of(cache.snapshot, t, head, token), row_of(snapshot, t, head, token)) << token;
      }
    }
  }
  expect_refused(ErrorCode::kIncompatible, "forgotten the first 200 rows of layer 1");  // of a model that attends them
}

TEST_F(PromptCacheFiles, SaysInWhatItDiffersFromTheModel) {
  exported(snapshot_of(300, KvDtype::kF16), PromptCacheDialect::kNew);
  const auto with = [](auto change) {
    CacheModel model = model_of();
    model.kv_layout = [change](const KvFormat& format) {
      KvLayout layout = layout_of(format);
      change(layout);
      return layout;
    };
    return model;
  };
  expect_refused(ErrorCode::kIncompatible, "3 layers", with([](KvLayout& layout) { layout.tensors.resize(4); }));
  expect_refused(ErrorCode::kIncompatible, "2 KV heads in layer 1", with([](KvLayout& layout) { layout.tensors[2].n_kv_heads = 3; }));
  expect_refused(ErrorCode::kIncompatible, "64 dims", with([](KvLayout& layout) { layout.tensors[0].dim = 32; }));
  CacheModel model = model_of();
  model.max_context = 299;
  expect_refused(ErrorCode::kIncompatible, "300 tokens", model);
}

TEST_F(PromptCacheFiles, RefusesWhatTheEngineHasNoUseFor) {
  const auto rows = [](const std::string& name, uint64_t batch, uint64_t n, const std::string& dtype = "F16", uint64_t dim = kDim) {
    return SafetensorsTensor{.name = name, .dtype = dtype, .shape = {batch, kHeads, n, dim}};
  };
  const auto number = [](const std::string& name) { return SafetensorsTensor{.name = name, .dtype = "I32", .shape = {}}; };
  using Texts = std::vector<std::pair<std::string, std::string>>;
  for (const char* name : {"ArraysCache", "CacheList", "ChunkedKVCache"}) {
    write({{"2.0", name}, {"0.0", ""}}, {rows("0.0", 1, 3), rows("0.1", 1, 3)});
    expect_refused(ErrorCode::kIncompatible, std::string(name) + "', which Torpor's engine has no use for");
  }
  write({{"2.0", "KVCache"}, {"0.0", ""}}, {rows("0.0", 2, 3), rows("0.1", 2, 3)});
  expect_refused(ErrorCode::kIncompatible, "a batch of 2");
  write({{"2.0", "RotatingKVCache"}, {"0.0.0", "4"}, {"0.0.1", "8"}, {"0.0.2", "20"}, {"0.0.3", "8"}}, {rows("0.0", 1, 8), rows("0.1", 1, 8)});
  expect_refused(ErrorCode::kIncompatible, "but for the first 4");
  write({{"2.0", "KVCache"}, {"0.0", ""}, {"2.1", "KVCache"}, {"0.1", ""}},
        {rows("0.0", 1, 3), rows("0.1", 1, 3), rows("1.0", 1, 3, "BF16"), rows("1.1", 1, 3, "BF16")});
  expect_refused(ErrorCode::kIncompatible, "layer 0 as f16 and layer 1 as bf16");
  const Texts quantized = {{"2.0", "QuantizedKVCache"}, {"0.0.0", "3"}, {"0.0.1", "64"}, {"0.0.2", "6"}};
  write(quantized, {rows("0.0.0", 1, 3, "U32", 12)});
  expect_refused(ErrorCode::kIncompatible, "6 bits");

  const Texts kv = {{"2.0", ""}, {"1.0", "KVCache"}, {"2.1.0", "0.2"}, {"2.1.1", "scalar"}};
  const std::vector<SafetensorsTensor> tensors = {rows("0.0", 1, 3), rows("0.1", 1, 3), number("0.2")};
  for (const int32_t offset : {4, 0, -1, INT32_MIN, INT32_MAX}) {
    write(kv, tensors, {{"0.2", offset}});
    expect_refused(ErrorCode::kCorruption, "layer 0");
  }
  write({{"2.0", ""}, {"1.0", "KVCache"}}, tensors, {{"0.2", 3}});
  expect_refused(ErrorCode::kCorruption, "'0.2' is not a number");
  write(kv, {rows("0.0", 1, 3), rows("0.1", 1, 4), number("0.2")}, {{"0.2", 3}});
  expect_refused(ErrorCode::kCorruption, "do not fit each other");
  write(kv, {rows("0.0", 1, 3), rows("0.1", 1, 3), number("0.2"), number("0.3")}, {{"0.2", 3}});
  expect_refused(ErrorCode::kCorruption, "'0.3' that belongs to no layer");
  write({{"2.0", ""}}, {});
  expect_refused(ErrorCode::kCorruption, "no layer");
  write({{"format", "mlx"}}, {rows("weight", 1, 3)});
  EXPECT_FALSE(is_prompt_cache(path_));
  expect_refused(ErrorCode::kInvalidArgument, "no prompt-cache file");
}

TEST_F(PromptCacheFiles, ExportsOnlyWhatTheEngineMade) {
  store_.save_agent_cache("empty", snapshot_of(0, KvDtype::kF16), "m");
  EXPECT_EQ(code_of([&] { export_prompt_cache(store_, "empty", path_, rotates_windows); }), ErrorCode::kInvalidArgument);
  KvSnapshot foreign = snapshot_of(3, KvDtype::kF16);
  foreign.identity.kv = "mlx-lm";
  store_.save_agent_cache("foreign", foreign, "m");
  EXPECT_EQ(code_of([&] { export_prompt_cache(store_, "foreign", path_, rotates_windows); }), ErrorCode::kIncompatible);
  foreign = snapshot_of(3, KvDtype::kF16);
  foreign.layout.tensors[2].name = "layer_1_cache";
  store_.save_agent_cache("foreign", foreign, "m");
  EXPECT_EQ(code_of([&] { export_prompt_cache(store_, "foreign", path_, rotates_windows); }), ErrorCode::kIncompatible);
  EXPECT_FALSE(fs::exists(path_));
  EXPECT_EQ(code_of([&] { export_prompt_cache(store_, "nobody", path_, rotates_windows); }), ErrorCode::kNotFound);
  EXPECT_EQ(code_of([&] { export_prompt_cache(store_, "empty", directory_.path() / "store/x", rotates_windows); }), ErrorCode::kInvalidArgument);
}

// There is no checksum, so flipped rows are other rows. All else is either found or changes nothing.
TEST_F(PromptCacheFiles, DamageOutsideTheRowsIsFoundOrHarmless) {
  for (const PromptCacheDialect dialect : {PromptCacheDialect::kNew, PromptCacheDialect::kOld}) {
    for (const auto& [format, architecture] : {std::pair<KvFormat, const char*>{KvDtype::kF16, "gemma3"},
                                               std::pair<KvFormat, const char*>{{KvDtype::kF16, 8, 64}, "llama"}}) {
      const CacheModel model = model_of(architecture);
      const std::string bytes = exported(snapshot_of(kWindow + 5, format, architecture), dialect);
      const KvSnapshot whole = read(model).snapshot;
      const SafetensorsHeader header = parse_safetensors_header(std::as_bytes(std::span(bytes)), bytes.size(), "exported");
      size_t numbers = bytes.size();
      for (const auto& tensor : header.tensors) {
        if (tensor.dtype == "I32") numbers = std::min(numbers, size_t(header.data_start + tensor.begin));
      }
      const auto expect_found_or_harmless = [&](const std::string& where) {
        const auto code = code_of([&] { ASSERT_TRUE(same(read(model).snapshot, whole)) << where; });
        ASSERT_TRUE(!code || *code == ErrorCode::kCorruption || *code == ErrorCode::kIncompatible ||
                    *code == ErrorCode::kInvalidArgument) << where;
      };
      for (size_t at = 0; at < bytes.size(); at = at + 1 == header.data_start ? numbers : at + 1) {
        std::string damaged = bytes;
        damaged[at] ^= char(1 << (at % 8));
        write_all(path_, damaged);
        expect_found_or_harmless("bit of byte " + std::to_string(at));
      }
      for (size_t size = 0; size < bytes.size(); size += size < header.data_start ? 1 : 997) {
        write_all(path_, bytes.substr(0, size));
        ASSERT_EQ(code_of([&] { read(model); }), ErrorCode::kCorruption) << size;
      }
    }
  }
}

}  // namespace
}  // namespace torpor::testing
