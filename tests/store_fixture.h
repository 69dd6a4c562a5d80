#pragma once
/// What the store's tests share: a directory that goes away, and snapshots whose every byte is known.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <list>
#include <map>
#include <random>
#include <string>

#include <gtest/gtest.h>

#include "store/torpor_file.h"
#include "torpor/error.h"
#include "torpor/store.h"

namespace torpor::testing {

namespace fs = std::filesystem;

class TemporaryDirectory {
 public:
  /// Somewhere in memory, for tests that make thousands of files and don't need a disk below them.
  static fs::path in_memory() {
    std::error_code ignored;
    return fs::is_directory("/dev/shm", ignored) ? "/dev/shm" : fs::temp_directory_path();
  }

  explicit TemporaryDirectory(const fs::path& parent = fs::temp_directory_path()) {
    static int counter = 0;
    std::random_device random;
    path_ = parent / ("torpor-test-" + std::to_string(random()) + "-" + std::to_string(counter++));
    fs::create_directories(path_);
  }
  ~TemporaryDirectory() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

/// Tests that fail, cut or flip everything in turn take one of so many: TORPOR_EVERY, else each. With a sanitizer they
/// would take the same few paths for minutes.
inline size_t every() {
  const char* text = std::getenv("TORPOR_EVERY");
  return text != nullptr ? size_t(std::atoi(text)) : 1;
}

inline Identity test_identity(const std::string& weights = "w0") {
  Identity identity;
  identity.architecture = "llama";
  identity.config = "c0";
  identity.weights = weights;
  identity.rope = "theta 10000";
  identity.kv = "f16";
  return identity;
}

inline KvLayout small_layout(KvDtype dtype = KvDtype::kF16, int layers = 1, int heads = 1, int dim = 1) {
  KvLayout layout;
  for (int i = 0; i < layers; ++i) {
    for (const char* part : {"_keys", "_values"}) {
      layout.tensors.push_back({"layer_" + std::to_string(i) + part, dtype, heads, dim, i % 2 == 1 ? 512 : 0});
    }
  }
  return layout;
}

/// Token `t`'s bytes depend on (seed, tensor, head, t) alone, so equal prefixes have equal rows.
inline KvTail make_run(const KvLayout& layout, int first, int n_tokens, uint32_t seed) {
  const size_t size = layout.offset(layout.tensors.size(), n_tokens);
  auto buffer = allocate_heap_buffer(size);
  size_t at = 0;
  for (size_t tensor = 0; tensor < layout.tensors.size(); ++tensor) {
    const auto& spec = layout.tensors[tensor];
    const size_t row = size_t(spec.dim) * kv_dtype_size(spec.dtype);
    for (int head = 0; head < spec.n_kv_heads; ++head) {
      for (int t = 0; t < n_tokens; ++t) {
        uint64_t state = (uint64_t(seed) << 48) ^ (uint64_t(tensor) << 32) ^ (uint64_t(head) << 24) ^ uint64_t(first + t);
        for (size_t b = 0; b < row; ++b) {
          state = state * 6364136223846793005ull + 1442695040888963407ull;
          buffer.get()[at++] = std::byte(state >> 56);
        }
      }
    }
  }
  return {n_tokens, {buffer.get(), size}, buffer};
}

inline KvSnapshot make_snapshot(int n_tokens, const KvLayout& layout = small_layout(), uint32_t seed = 1,
                                int32_t first_token = 100) {
  KvSnapshot snapshot;
  snapshot.identity = test_identity();
  snapshot.lineage.ranges = {{0, "f32/test/l1"}};
  snapshot.conversation = {"t0", "m0"};
  snapshot.layout = layout;
  for (int t = 0; t < n_tokens; ++t) snapshot.tokens.push_back(first_token + t % 1000);
  for (int done = 0; done < n_tokens; done += kSegmentTokens) {
    const KvTail run = make_run(layout, done, std::min(kSegmentTokens, n_tokens - done), seed);
    snapshot.add_run(run.n_tokens, run.bytes, run.owner);
  }
  return snapshot;
}

/// `snapshot` with state of two tensors beside its rows.
inline KvSnapshot with_state(KvSnapshot snapshot, uint32_t seed = 7) {
  for (const auto& [name, dtype, shape, size] :
       {std::tuple("layer_9_ring", "BF16", std::vector<uint64_t>{1, 2, 3}, 12), std::tuple("layer_9_flags", "U8", std::vector<uint64_t>{5}, 5)}) {
    const auto buffer = allocate_heap_buffer(size_t(size));
    for (int i = 0; i < size; ++i) buffer.get()[i] = std::byte(seed++ * 37);
    snapshot.state.push_back({name, dtype, shape, {buffer.get(), size_t(size)}, buffer});
  }
  return snapshot;
}

inline StateLayout small_state_layout() {
  return {{{"layer_2_conv", KvDtype::kF32, {3, 2}}, {"layer_2_recurrent", KvDtype::kF16, {2, 2, 3}}}};
}

/// The state after `position` tokens, whose bytes depend on (seed, position) alone.
inline std::shared_ptr<const StateCheckpoint> make_state(int64_t position, uint32_t seed = 1) {
  const size_t size = small_state_layout().bytes();
  const auto buffer = allocate_heap_buffer(size);
  for (size_t i = 0; i < size; ++i) buffer.get()[i] = std::byte(seed * 131 + size_t(position) * 7 + i);
  return std::make_shared<const StateCheckpoint>(position, std::span<const std::byte>(buffer.get(), size), buffer);
}

/// `snapshot` of a model with recurrent layers: with states after these numbers of tokens, and after its last.
inline KvSnapshot with_states(KvSnapshot snapshot, std::vector<int64_t> positions = {}, uint32_t seed = 1) {
  snapshot.state_layout = small_state_layout();
  if (!snapshot.tokens.empty()) positions.push_back(int64_t(snapshot.tokens.size()));
  for (const int64_t position : positions) snapshot.states.push_back(make_state(position, seed));
  return snapshot;
}

/// A snapshot whose rows are in pieces that lie apart in memory, in no order.
struct Scattered {
  explicit Scattered(const KvSnapshot& whole, size_t piece = 300) : snapshot(whole) {
    snapshot.sealed.clear();
    snapshot.tail = {};
    for (size_t i = 0; i < whole.n_runs(); ++i) {
      BorrowedRows::Run& run = rows.runs.emplace_back();
      const auto bytes = whole.run_bytes(i);
      for (size_t at = 0; at < bytes.size(); at += piece) {
        const auto part = bytes.subspan(at, std::min(piece, bytes.size() - at));
        memory.emplace_front(part.begin(), part.end());
        run.pieces.emplace_back(memory.front());
      }
    }
  }
  /// Overwrites all of it.
  void scribble() {
    for (auto& piece : memory) std::fill(piece.begin(), piece.end(), std::byte{0x5a});
  }
  SaveResult save(Store& store, const std::string& id, Durability durability = Durability::kFull) const {
    return store.save_agent_cache(id, snapshot, rows, "m", {}, durability);
  }
  std::list<std::vector<std::byte>> memory;
  KvSnapshot snapshot;
  BorrowedRows rows;
};

/// Puts an agent together from what a load reads into it.
class CollectingSink : public RowSink {
 public:
  KvSnapshot snapshot;
  void begin(const AgentInfo& info, const KvSnapshot& of) override {
    EXPECT_EQ(info.cache_size, int64_t(of.tokens.size()));
    snapshot = of;
    asked_.assign(of.layout.tensors.size() * (of.tokens.size() / kSegmentTokens + 1), 0);
    for (int done = 0; done < int(of.tokens.size()); done += kSegmentTokens) {
      const int n = std::min(kSegmentTokens, int(of.tokens.size()) - done);
      const size_t size = of.layout.offset(of.layout.tensors.size(), n);
      const auto buffer = allocate_heap_buffer(size);
      snapshot.add_run(n, {buffer.get(), size}, buffer);
    }
  }
  Place place(size_t tensor, int64_t first, int n) override {
    const size_t run = size_t(first) / kSegmentTokens;
    EXPECT_EQ(snapshot.run_tokens(run), n);
    const KvTensorSpec& spec = snapshot.layout.tensors[tensor];
    EXPECT_EQ(asked_[run * snapshot.layout.tensors.size() + tensor]++, 0) << "asked for twice";
    return {const_cast<std::byte*>(snapshot.run_bytes(run).data()) + snapshot.layout.offset(tensor, n),
            size_t(n) * spec.bytes_per_token() / size_t(spec.n_kv_heads)};
  }

 private:
  std::vector<int> asked_;
};

/// Equal in every byte.
inline ::testing::AssertionResult same(const KvSnapshot& a, const KvSnapshot& b) {
  if (!(a.identity == b.identity)) return ::testing::AssertionFailure() << "identities differ";
  if (!(a.layout == b.layout)) return ::testing::AssertionFailure() << "layouts differ";
  if (a.tokens != b.tokens) return ::testing::AssertionFailure() << "tokens differ: " << a.tokens.size() << ", " << b.tokens.size();
  if (a.n_runs() != b.n_runs()) return ::testing::AssertionFailure() << "numbers of runs differ";
  for (size_t i = 0; i < a.n_runs(); ++i) {
    if (a.run_tokens(i) != b.run_tokens(i) || !std::ranges::equal(a.run_bytes(i), b.run_bytes(i))) {
      return ::testing::AssertionFailure() << "run " << i << " differs";
    }
  }
  if (a.state.size() != b.state.size()) return ::testing::AssertionFailure() << "numbers of state tensors differ";
  for (size_t i = 0; i < a.state.size(); ++i) {
    const KvState &x = a.state[i], &y = b.state[i];
    if (x.name != y.name || x.dtype != y.dtype || x.shape != y.shape || !std::ranges::equal(x.bytes, y.bytes)) {
      return ::testing::AssertionFailure() << "state " << i << " differs";
    }
  }
  if (a.states.empty() != b.states.empty()) return ::testing::AssertionFailure() << "one has no state";
  if (!a.states.empty()) {
    // Of states the last one counts: a load gives no other.
    const StateCheckpoint &x = *a.states.back(), &y = *b.states.back();
    if (!(a.state_layout == b.state_layout)) return ::testing::AssertionFailure() << "layouts of states differ";
    if (x.position() != y.position() || !std::ranges::equal(x.bytes(), y.bytes())) {
      return ::testing::AssertionFailure() << "states after " << x.position() << " and " << y.position() << " differ";
    }
  }
  return ::testing::AssertionSuccess();
}

/// A snapshot whose tail lies in a run (LoadOptions::tail_in_run) with the tail on its own.
inline KvSnapshot packed(KvSnapshot snapshot) {
  KvTail& tail = snapshot.tail;
  if (tail.n_tokens == 0) return snapshot;
  EXPECT_NE(tail.run, nullptr);
  EXPECT_EQ(tail.bytes.size(), snapshot.layout.offset(snapshot.layout.tensors.size(), kSegmentTokens));
  const size_t size = snapshot.layout.offset(snapshot.layout.tensors.size(), tail.n_tokens);
  const auto rows = allocate_heap_buffer(size);
  copy_rows(snapshot.layout, {tail.bytes.data(), tail.capacity(), 0}, {rows.get(), tail.n_tokens, 0}, tail.n_tokens);
  tail = {tail.n_tokens, {rows.get(), size}, rows};
  return snapshot;
}

/// `prefix` is `whole` cut at a run's end.
inline ::testing::AssertionResult is_prefix(const KvSnapshot& prefix, const KvSnapshot& whole) {
  KvSnapshot cut = whole;
  if (prefix.n_runs() > whole.n_runs()) return ::testing::AssertionFailure() << "more runs than there were";
  if (prefix.n_runs() < whole.n_runs()) {
    cut.sealed.resize(prefix.n_runs());
    cut.tail = {};
    cut.tokens.resize(prefix.n_runs() * kSegmentTokens);
  }
  const size_t tokens = cut.tokens.size();
  // State is that after the last token: a prefix has none, and the whole may have lost it alone.
  if (tokens < whole.tokens.size() || prefix.state.empty()) cut.state.clear();
  return same(prefix, cut);
}

inline std::string read_all(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

inline void write_all(const fs::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

/// Every regular file below `root` but the locks and the marker, by relative path.
inline std::map<std::string, std::string> tree(const fs::path& root) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(root)) {
    const std::string name = fs::relative(entry.path(), root).string();
    if (entry.is_regular_file() && !name.starts_with(".locks") && name != "torpor.json") files[name] = read_all(entry.path());
  }
  return files;
}

/// The code of the Error that `call` throws; nullopt when it throws none.
template <typename Call>
std::optional<ErrorCode> code_of(Call call, std::string* message = nullptr) {
  try {
    call();
  } catch (const Error& error) {
    if (message != nullptr) *message = error.what();
    return error.code();
  }
  return std::nullopt;
}

}  // namespace torpor::testing
