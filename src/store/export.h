#pragma once
/// What files outside the store need: a layer tensor whole, among a snapshot's runs, and a directory to be in.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <vector>

#include "base/env.h"
#include "torpor/kv_snapshot.h"

namespace torpor {

/// Consecutive tokens' rows of one head of a tensor, in one run.
struct Piece {
  int head = 0;
  int64_t token = 0;  ///< the first
  size_t run = 0;
  size_t offset = 0;  ///< of its bytes in the run
  size_t size = 0;
};

/// visit(piece) for the tokens [first, end) of a tensor in the order [head][token][dim]. All runs but the last hold
/// kSegmentTokens tokens, `n_tokens` in all.
template <typename Visit>
void for_each_piece(const KvLayout& layout, int64_t n_tokens, size_t tensor, int64_t first, int64_t end, Visit visit) {
  const KvTensorSpec& spec = layout.tensors[tensor];
  const size_t row = size_t(spec.dim) * kv_dtype_size(spec.dtype);
  for (int head = 0; head < spec.n_kv_heads; ++head) {
    for (int64_t token = first; token < end;) {
      const int64_t run = token / kSegmentTokens, run_first = run * kSegmentTokens;
      const int64_t run_tokens = std::min<int64_t>(kSegmentTokens, n_tokens - run_first);
      const int64_t n = std::min(end, run_first + run_tokens) - token;
      const size_t row_in_run = size_t(head) * size_t(run_tokens) + size_t(token - run_first);
      visit(Piece{head, token, size_t(run), layout.offset(tensor, int(run_tokens)) + row_in_run * row, size_t(n) * row});
      token += n;
    }
  }
}

/// Makes runs for `snapshot.tokens`, of its layout; these are their bytes, to be filled.
inline std::vector<std::shared_ptr<std::byte>> allocate_runs(KvSnapshot& snapshot) {
  std::vector<std::shared_ptr<std::byte>> buffers;
  for (size_t first = 0; first < snapshot.tokens.size(); first += kSegmentTokens) {
    const int n = int(std::min<size_t>(kSegmentTokens, snapshot.tokens.size() - first));
    const size_t size = snapshot.layout.offset(snapshot.layout.tensors.size(), n);
    buffers.push_back(allocate_heap_buffer(size));
    snapshot.add_run(n, {buffers.back().get(), size}, buffers.back());
  }
  return buffers;
}

/// The directory that a file `path` outside the store at `root` is to be written to. What a killed export left there a day ago goes.
/// kIo when there is none.
/// kInvalidArgument when it is the store.
std::filesystem::path export_directory(Env& env, const std::filesystem::path& root, const std::filesystem::path& path);

}  // namespace torpor
