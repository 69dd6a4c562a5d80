#pragma once
/// State files: the state of a model's recurrent layers after a token, immutable, shared by every agent with the same
/// prefix (docs/format.md, "State files").

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "store/file_pool.h"
#include "store/torpor_file.h"
#include "torpor/store.h"

namespace torpor {

/// After which tokens a state is: what its file's name is made of.
struct StatePlace {
  std::string lineage;              ///< lineage_digest, where the last of the tokens is
  std::string layout_digest;        ///< of the rows
  std::string state_digest;         ///< state_layout_digest
  std::string parent;               ///< name of the last segment before it; empty for none
  std::span<const int32_t> tokens;  ///< those after that segment: fewer than kSegmentTokens
};

std::string state_name(const StatePlace& place, const std::string& variant);
/// Digest of "NAME:DTYPE:NxN" of each tensor, joined with ','.
std::string state_layout_digest(const StateLayout& layout);
/// kInvalidArgument when it can't be stored beside `rows`.
void check_state_layout(const StateLayout& layout, const KvLayout& rows);

/// Where each state of a conversation stands.
class StateChain {
 public:
  /// All must outlive the chain. `segments`: names of those that hold the first tokens.
  StateChain(const Identity& identity, const Lineage& lineage, const KvLayout& layout,
             std::span<const std::string> segments, std::span<const int32_t> tokens);
  /// Of one after `position` tokens: at least 1, at most those of the segments and kSegmentTokens - 1 more.
  StatePlace place(int64_t position, std::string state_digest) const;
  /// Whether some of the conversation's rows have that lineage.
  bool has_lineage(const std::string& lineage) const;
  int64_t length() const { return int64_t(tokens_.size()); }
  int64_t segment_tokens() const { return int64_t(segments_.size()) * kSegmentTokens; }

 private:
  std::span<const std::string> segments_;
  std::span<const int32_t> tokens_;
  std::string layout_digest_;
  std::vector<std::pair<int64_t, std::string>> lineages_;  ///< from which position on
};

struct StateFile {
  TorporFile file;
  StateLayout layout;
  std::string parent, lineage, variant;
  std::string content() const;
};

/// Every rule that can be checked without the data.
StateFile parse_state_file(std::span<const std::byte> prefix, uint64_t file_size, const std::string& file_name);
/// The layout of the state tensors of a file. kCorruption when it is that of no recurrent state.
StateLayout state_layout_of(const TorporFile& file, const std::string& file_name);

std::string encode_state_header(const StatePlace& place, const std::string& variant, const KvLayout& layout,
                                std::span<const KvState> state, const std::vector<std::string>& checksums);

/// A state's tensors, each where its bytes are.
std::vector<KvState> state_tensors(const StateLayout& layout, const StateCheckpoint& state);
std::vector<std::string> state_checksums(std::span<const KvState> state);

struct OpenedState {
  File handle;
  FileStat stat;
  StateFile state;
};
/// Opens a state file and checks all of it but the state: header, name, place, tokens. kNotFound, kCorruption.
OpenedState open_state(const FilePool& pool, const StateChain& chain, const StateRef& ref);
/// Its state, checked.
std::shared_ptr<const StateCheckpoint> read_state(const OpenedState& opened, const StateRef& ref,
                                                  const BufferAllocator& allocate);

/// "POSITION:FILE" of each, joined with ','.
std::string encode_states(std::span<const StateRef> states);
/// nullopt when the text is not that, or they are not in the order of their positions, from 1 to `n_tokens`. In an
/// export the one after the last token has no file.
std::optional<std::vector<StateRef>> decode_states(std::string_view text, int64_t n_tokens, bool in_export);

}  // namespace torpor
