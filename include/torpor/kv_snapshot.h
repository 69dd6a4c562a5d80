#pragma once
/// KV caches as bytes: where the store (files, no MLX) and the cache (arrays, no files) meet.
///
/// A *run* is the KV rows of consecutive tokens for every tensor of the layout, in one buffer. Order and shape are
/// those of a store file's data section, so that saving and waking move whole buffers:
///
///     [tensor 0: [1, H_kv, S, D]] [tensor 1: [1, H_kv, S, D]] ...      row-major, no gaps, little-endian
///
/// A run of kSegmentTokens tokens is *sealed*: it never changes again, and everyone who needs its rows shares one
/// SealedRun. The tokens past the last sealed run are the *tail*.
///
/// Everything here but SealedRun is plain data. Concurrent reads are safe.

#include <atomic>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace torpor {

/// Tokens in a sealed segment. Part of the file format.
inline constexpr int kSegmentTokens = 256;

/// Element types a KV tensor may have, with their safetensors names.
enum class KvDtype : uint8_t { kF32, kF16, kBF16, kU32 };

/// Bytes of one element.
size_t kv_dtype_size(KvDtype dtype) noexcept;
/// "F32", "F16", "BF16", "U32".
const char* kv_dtype_name(KvDtype dtype) noexcept;
/// The inverse; nullopt when `name` is none of them.
std::optional<KvDtype> parse_kv_dtype(std::string_view name) noexcept;

/// Bits of an element of quantized keys and of quantized values: each 8 or 4; both 0: not quantized.
struct KvBits {
  int keys = 0, values = 0;

  KvBits(int both = 0) : keys(both), values(both) {}
  KvBits(int keys, int values) : keys(keys), values(values) {}
  auto operator<=>(const KvBits&) const = default;
};

/// How an agent's rows are kept: in a float dtype, or quantized as mx::quantize does (affine, along head_dim) with
/// scales and biases of that dtype. Part of the identity.
struct KvFormat {
  KvDtype dtype = KvDtype::kF16;
  KvBits bits;
  int group = 64;  ///< elements that share a scale and a bias: 32, 64 or 128; of no meaning without bits
  /// Quantized keys lack the bias of the key projection. Attention adds it, rotated to each key's position.
  bool bias_free = false;
  /// What has 4 bits is multiplied by a Hadamard matrix along head_dim before it is quantized.
  bool rotated = false;

  KvFormat() = default;
  KvFormat(KvDtype dtype, KvBits bits = 0, int group = 64) : dtype(dtype), bits(bits), group(group) {}
  bool quantized() const noexcept { return bits.keys != 0; }
  bool rotates_keys() const noexcept { return rotated && bits.keys == 4; }
  bool rotates_values() const noexcept { return rotated && bits.values == 4; }
  /// Whether the two have the same dtype, bits and group, and so rows of the same size.
  bool same_size(const KvFormat& other) const noexcept {
    return dtype == other.dtype && bits == other.bits && (!quantized() || group == other.group);
  }
  /// Identity::kv: "f16", "q8 group 64 f16", "q8,4 group 64 f16 bias-free rotated".
  std::string name() const;
  /// The inverse; nullopt when `name` is none.
  static std::optional<KvFormat> parse(std::string_view name);
  auto operator<=>(const KvFormat&) const = default;
};

/// One tensor of the layout: `[1, n_kv_heads, tokens, dim]`.
struct KvTensorSpec {
  std::string name;  ///< "layer_0_keys", "layer_0_values"; quantized: also "..._scales", "..._biases"
  KvDtype dtype = KvDtype::kF16;
  int n_kv_heads = 0;
  int dim = 0;     ///< elements of one row: head_dim, or packed words of it
  int window = 0;  ///< rows further back than this are never attended again; 0 = all are
  /// On disk its rows are not in the segments, but in files beside them, where a window sees them (docs/format.md,
  /// "Window files"). Such tensors have a window, and come after all others.
  bool apart = false;

  /// Bytes of one token's rows over all heads.
  size_t bytes_per_token() const noexcept { return size_t(n_kv_heads) * dim * kv_dtype_size(dtype); }
  bool operator==(const KvTensorSpec&) const = default;
};

/// Some of a layout's tensors, by index. Empty: all of them.
using TensorMask = std::vector<bool>;
/// Whether `mask` has all that `other` has.
bool covers(const TensorMask& mask, const TensorMask& other) noexcept;

/// All KV tensors of a model, in file order.
struct KvLayout {
  std::vector<KvTensorSpec> tensors;

  /// Bytes of one token over all tensors.
  size_t bytes_per_token() const noexcept;
  /// Whether any tensor has a window.
  bool has_windows() const noexcept;
  /// How many tensors the segments hold: all before the first that is kept apart.
  size_t n_together() const noexcept;
  bool has_apart() const noexcept { return n_together() < tensors.size(); }
  /// Bytes of a sealed run without the tensors kept apart, which come last in it: what a segment holds.
  size_t together_bytes() const noexcept { return offset(n_together(), kSegmentTokens); }
  /// Index of the first of the `per_layer` tensors that the model's `layer`-th layer with rows has.
  size_t first_of(int layer, size_t per_layer) const;
  /// True if a later token can attend any of rows [first, first + n), given `length` cached tokens. A token attends
  /// itself and the `window` - 1 tokens before it. The next token is at `length`, or at `length - 1` if the last one is
  /// computed again for its logits.
  static bool attended(const KvTensorSpec& tensor, int64_t first, int64_t n, int64_t length) noexcept;
  /// The tensors of which that is true.
  TensorMask attended(int64_t first, int64_t n, int64_t length) const;
  /// Byte offset of tensor `i` in a run of `n_tokens` tokens; `i == tensors.size()` gives the run's size.
  size_t offset(size_t i, int n_tokens) const noexcept;
  bool operator==(const KvLayout&) const = default;
};

/// One tensor of the state that a recurrent layer has after a token: of fixed size, however many tokens came before.
struct StateTensorSpec {
  std::string name;           ///< "layer_0_conv", "layer_0_recurrent"; none of the KV layout's names
  KvDtype dtype = KvDtype::kF32;
  std::vector<int64_t> shape; ///< of at least one element

  size_t bytes() const noexcept;
  bool operator==(const StateTensorSpec&) const = default;
};

/// All state tensors of a model, in file order; none: all its layers keep rows. They follow each other in one buffer
/// without gaps, row-major, little-endian.
struct StateLayout {
  std::vector<StateTensorSpec> tensors;

  bool empty() const noexcept { return tensors.empty(); }
  /// Byte offset of tensor `i`; `i == tensors.size()` gives the size of a state.
  size_t offset(size_t i) const noexcept;
  size_t bytes() const noexcept { return offset(tensors.size()); }
  bool operator==(const StateLayout&) const = default;
};

/// What a window file holds, as if it were a state: of each tensor kept apart the rows of a run. They are the end of
/// the run's bytes. Empty where no tensor is kept apart.
StateLayout window_rows(const KvLayout& layout);
/// Whether rows of run `run` of tensors kept apart can be attended when `length` tokens are held.
bool sees_window_rows(const KvLayout& layout, int64_t run, int64_t length) noexcept;
/// The greatest m <= n_tokens that can be gone on from: there the rows of all runs that a window sees are had.
/// `has_run` says so of a run. Where no tensor is kept apart it is n_tokens.
int64_t resumable_by_windows(const KvLayout& layout, int64_t n_tokens, const std::function<bool(int64_t run)>& has_run);

/// What rows depend on, so what must match for them to be used. Each field is a short text or a hex digest; the empty
/// field is a value like any other.
struct Identity {
  std::string architecture;   ///< "llama"
  std::string config;         ///< digest of the config fields that shape the computation
  std::string weights;        ///< digest of every weight byte (names, dtypes and shapes included)
  std::string rope;           ///< base and scaling, readable
  std::string kv;             ///< KV dtype and quantization, readable: KvFormat::name()

  /// Field names and values in a fixed order.
  std::vector<std::pair<std::string, std::string>> fields() const;
  /// From such a list; unknown names are kIncompatible, missing ones stay empty.
  static Identity from_fields(const std::vector<std::pair<std::string, std::string>>& fields);
  /// Name of the first field in which the two differ, or nullopt when they are equal.
  std::optional<std::string> first_difference(const Identity& other) const;
  /// What a field of `fields` is; empty when there is none of that name.
  std::string value(std::string_view field) const;
  bool operator==(const Identity&) const = default;
};

/// What the ids of a conversation depend on. Recorded with an agent; another one makes no row unusable.
struct ConversationIdentity {
  std::string tokenizer;      ///< digest of tokenizer.json
  std::string chat_template;  ///< digest of the template text
  bool operator==(const ConversationIdentity&) const = default;
};

/// How an agent's rows are computed, and with that how its segments are named (docs/format.md, "Names").
struct Lineage {
  struct Range {
    int64_t first = 0;     ///< a position, a multiple of kSegmentTokens
    std::string numerics;  ///< "f32/kernels/l16-fma"; neither ',' nor ':' in it
    bool operator==(const Range&) const = default;
  };
  /// Ascending, the first from 0 on. Of segments from `first` on to the next range's. None: it is not known.
  std::vector<Range> ranges;
  /// Segments are named as format versions 1 and 2 did, for a conversation of this identity.
  std::optional<ConversationIdentity> old_names;
  /// A part of the names, so that only agents of one salt find each other's rows. Old names have none.
  std::string salt;

  /// How new rows are computed; empty when that is not known.
  const std::string& numerics() const noexcept;
  /// How rows of the segment that begins at `position` were computed.
  const std::string& numerics_at(int64_t position) const noexcept;
  /// New rows, from `n_tokens` on, are computed so. False when that is no change. ("f32" of version 1 is any "f32/".)
  bool go_on_with(const std::string& numerics, int64_t n_tokens);
  /// The agent has only its first `n_tokens` tokens from now on.
  void cut(int64_t n_tokens);
  bool operator==(const Lineage&) const = default;
};

/// Stands for the id of a token that is not known. A sealed run whose first id it is gets, when saved, ids made of its
/// rows' checksums (name_unknown_tokens).
inline constexpr int32_t kUnknownToken = -1;

/// The rows of kSegmentTokens consecutive tokens in memory: all of the layout's, or `together_bytes()` of them where no
/// window sees the rest. They never change. All holders share the run, which says whether it is on disk. Thread-safe.
class SealedRun {
 public:
  /// The segment that holds these rows on disk.
  struct Segment {
    std::string name;     ///< 32 hex digits
    std::string variant;  ///< empty, or `content` where the plain name is taken by other rows
    std::string content;  ///< digest of the rows' checksums, 32 hex digits
  };

  /// `owner` keeps `bytes` alive. `mapped`: they are a read-only mapping of a segment file. `checked`: the tensors
  /// whose rows were computed here, or read and compared with their checksums; no other tensor's rows may be read.
  SealedRun(std::span<const std::byte> bytes, std::shared_ptr<const void> owner, bool mapped = false, TensorMask checked = {})
      : bytes_(bytes), owner_(std::move(owner)), mapped_(mapped), checked_(std::move(checked)) {}
  SealedRun(const SealedRun&) = delete;
  SealedRun& operator=(const SealedRun&) = delete;

  std::span<const std::byte> bytes() const noexcept { return bytes_; }
  bool mapped() const noexcept { return mapped_; }
  const TensorMask& checked() const noexcept { return checked_; }

  /// Where the store last read or wrote these rows; nullptr when it never did. The file may be gone since.
  std::shared_ptr<const Segment> segment() const;
  /// Whether a look at the bytes has found that they are no longer what was checked (Store::recheck).
  bool damaged() const noexcept { return damaged_; }
  // For the store.
  void set_segment(Segment segment) const;
  void set_damaged() const noexcept { damaged_ = true; }

 private:
  const std::span<const std::byte> bytes_;
  const std::shared_ptr<const void> owner_;
  const bool mapped_;
  const TensorMask checked_;
  mutable std::atomic<bool> damaged_ = false;
  mutable std::mutex mutex_;
  mutable std::shared_ptr<const Segment> segment_;
};

/// The state after the first `position` tokens: `StateLayout::bytes()` bytes that never change. A conversation can go on
/// from it without the tokens before being computed again. Caches, snapshots and the store share it. Thread-safe.
class StateCheckpoint {
 public:
  /// `owner` keeps `bytes` alive.
  StateCheckpoint(int64_t position, std::span<const std::byte> bytes, std::shared_ptr<const void> owner)
      : position_(position), bytes_(bytes), owner_(std::move(owner)) {}
  StateCheckpoint(const StateCheckpoint&) = delete;
  StateCheckpoint& operator=(const StateCheckpoint&) = delete;

  int64_t position() const noexcept { return position_; }
  std::span<const std::byte> bytes() const noexcept { return bytes_; }
  const std::shared_ptr<const void>& owner() const noexcept { return owner_; }

  /// The state file that holds it, 32 hex digits; empty when no save has written it and no load has read it.
  std::string file() const;
  void set_file(std::string name) const;  ///< for the store

 private:
  const int64_t position_;
  const std::span<const std::byte> bytes_;
  const std::shared_ptr<const void> owner_;
  mutable std::mutex mutex_;
  mutable std::string file_;
};

/// The rows past the last sealed run: fewer than kSegmentTokens.
struct KvTail {
  int n_tokens = 0;
  std::span<const std::byte> bytes;   ///< `layout.offset(tensors.size(), capacity())` of them
  std::shared_ptr<const void> owner;  ///< keeps `bytes` alive; they do not change while any snapshot holds them
  /// When set, `bytes` is all of this buffer of a run's size, and each head has room for kSegmentTokens rows. A cache
  /// may take it over and add rows, unless others hold it too.
  std::shared_ptr<std::byte> run = nullptr;

  /// Rows that each head of `bytes` has room for.
  int capacity() const noexcept { return run != nullptr ? kSegmentTokens : n_tokens; }
};

/// A tensor that is not one row per token: what a layer of another engine's kind (an mlx-lm ring) holds after the
/// last token. Torpor's recurrent layers have StateCheckpoints. An agent that has any can't be cut to fewer tokens.
struct KvState {
  std::string name;             ///< `A-Za-z0-9_.-`; another than the layout's names and "tokens"
  std::string dtype;            ///< as safetensors calls it: "F16", "U8"
  std::vector<uint64_t> shape;  ///< of at least one element
  std::span<const std::byte> bytes;
  std::shared_ptr<const void> owner;  ///< keeps `bytes` alive
};

/// Rows to be saved that lie apart in memory which the caller goes on using. They are read while the save runs. Nothing
/// is remembered of where they were.
struct BorrowedRows {
  struct Run {
    /// The run's bytes in order.
    std::vector<std::span<const std::byte>> pieces;
    /// The segment that these rows came from or went to (SaveResult::segments), or empty. If this process has seen that
    /// file whole, and it is still the same, only the last tensor's rows are read and compared with it.
    std::string segment;
  };
  std::vector<Run> runs;  ///< of kSegmentTokens tokens each; the last one may have fewer
};

/// An agent's KV cache at rest, with the tokens it belongs to.
struct KvSnapshot {
  Identity identity;
  Lineage lineage;
  ConversationIdentity conversation;
  KvLayout layout;
  std::vector<int32_t> tokens;  ///< one id per cached row
  std::vector<std::shared_ptr<const SealedRun>> sealed;
  KvTail tail;
  std::vector<KvState> state;
  /// Of a model with recurrent layers: what its states consist of, and those that are held, ascending by position. The
  /// last one is that after the last token. Of a layout with tensors kept apart: window_rows, and rows that are to be
  /// saved. The position is the end of their run; those that the last token's windows see need not be given.
  StateLayout state_layout;
  std::vector<std::shared_ptr<const StateCheckpoint>> states;

  /// Throws kInvalidArgument naming the first disagreement between tokens, rows, layout and state.
  void validate() const;
  /// The same for a snapshot whose rows are all in `rows`.
  void validate(const BorrowedRows& rows) const;

  /// Sealed runs and tail as one sequence: their number, and of run `i` the tokens and bytes.
  size_t n_runs() const noexcept { return sealed.size() + (tail.n_tokens > 0 ? 1 : 0); }
  int run_tokens(size_t i) const noexcept { return i < sealed.size() ? kSegmentTokens : tail.n_tokens; }
  /// Rows that each head of run_bytes(i) has room for.
  int run_capacity(size_t i) const noexcept { return i < sealed.size() ? kSegmentTokens : tail.capacity(); }
  std::span<const std::byte> run_bytes(size_t i) const noexcept { return i < sealed.size() ? sealed[i]->bytes() : tail.bytes; }
  /// Adds the rows of the next `n_tokens` tokens: a sealed run when they are kSegmentTokens, else the tail.
  void add_run(int n_tokens, std::span<const std::byte> bytes, std::shared_ptr<const void> owner);
  /// Whether the sealed run `i` has the rows of tensors kept apart, and they may be read.
  bool has_window_rows(size_t i) const noexcept;
  /// These rows, which share the run's memory; it has them.
  std::shared_ptr<const StateCheckpoint> window_rows_of(size_t i) const;
};

/// The same rows in a layout that has the same tensors in another order, or keeps others apart. nullopt where it has
/// others. What a run lacks, or was not checked, it lacks then, too.
std::optional<KvSnapshot> in_layout(const KvSnapshot& snapshot, const KvLayout& layout);

/// Gives the unknown tokens of a run ids that no model has: all are negative. They are equal only where the rows are,
/// since prefixes and segments are found by their ids. `rows_digest`: 32 hex digits made of the run's rows.
void name_unknown_tokens(std::span<int32_t> ids, const std::string& rows_digest);
/// Whether any id is such a name.
bool has_unknown_tokens(std::span<const int32_t> ids) noexcept;

/// A run's memory as the kernels work on it. Only the run that is still open is ever written; a sealed one may be a
/// read-only mapping of its segment file.
struct KvBuffer {
  std::byte* data = nullptr;
  size_t size = 0;
  std::shared_ptr<const void> owner;  ///< keeps `data` alive
  bool mapped = false;                ///< as SealedRun::mapped
};

/// Where a load puts a run: `size` writable bytes, aligned to 8. The cache room supplies MLX buffers, so that waking
/// reads from the file straight into memory that MLX accounts for. Called on the thread that called load.
using BufferAllocator = std::function<std::shared_ptr<std::byte>(size_t size)>;
/// Plain aligned heap memory.
std::shared_ptr<std::byte> allocate_heap_buffer(size_t size);

}  // namespace torpor
