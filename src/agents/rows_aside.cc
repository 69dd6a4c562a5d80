#include "agents/rows_aside.h"

#include "base/hash.h"
#include "store/temporary_file.h"
#include "torpor/error.h"

namespace torpor {

RowsAside::RowsAside(Env& env, const std::filesystem::path& directory, const KvCache& cache)
    : snapshot_(cache.snapshot({.kv = cache.format().name()})), keeps_state_(cache.keeps_state()) {
  std::vector<std::span<const std::byte>> pieces;
  uint64_t size = 0;
  for (size_t i = 0; i < snapshot_.n_runs(); ++i) {
    const bool sealed = i < snapshot_.sealed.size();
    if (sealed && snapshot_.sealed[i]->mapped()) {
      runs_.emplace_back();
      continue;
    }
    const std::span<const std::byte> bytes = snapshot_.run_bytes(i);
    Run run{.offset = size, .size = bytes.size(), .checksum = hash_hex(bytes)};
    if (sealed) {
      run.run = snapshot_.sealed[i];
      run.checked = snapshot_.sealed[i]->checked();
      run.segment = snapshot_.sealed[i]->segment();
    }
    runs_.push_back(std::move(run));
    pieces.push_back(bytes);
    size += bytes.size();
  }
  for (const auto& state : snapshot_.states) {
    const Run stored{.offset = size, .size = state->bytes().size(), .checksum = hash_hex(state->bytes())};
    states_.push_back({state->position(), stored, state, state->file()});
    pieces.push_back(state->bytes());
    size += state->bytes().size();
  }
  if (!pieces.empty()) {
    env.make_directory(directory);
    const std::filesystem::path path = directory / temporary_name();
    file_ = std::make_unique<File>(env.open(path, OpenMode::kLockFile));
    env.remove(path);
    file_->expect_size(size);
    file_->write_all(pieces);
  }
  for (auto& run : snapshot_.sealed) {
    if (!run->mapped()) run.reset();
  }
  tail_bytes_ = snapshot_.tail.bytes.size();
  snapshot_.tail = {.n_tokens = snapshot_.tail.n_tokens};
  snapshot_.states.clear();
}

size_t RowsAside::bytes(const KvLedger& ledger, Backend backend) const {
  const KvLayout& layout = snapshot_.layout;
  size_t bytes = 0;
  for (size_t i = 0; i < snapshot_.n_runs(); ++i) {
    const auto shared =
        i < snapshot_.sealed.size() ? (snapshot_.sealed[i] ? snapshot_.sealed[i] : runs_[i].run.lock()) : nullptr;
    if (backend == Backend::kKernels && shared != nullptr && ledger.holders(shared->bytes().data()) > 0) continue;
    const bool whole = backend == Backend::kKernels && (shared == nullptr || !shared->mapped());
    for (const KvTensorSpec& tensor : layout.tensors) {
      const bool attended = KvLayout::attended(tensor, int64_t(i) * kSegmentTokens, kSegmentTokens, length());
      if (whole || attended) bytes += tensor.bytes_per_token() * kSegmentTokens;
    }
  }
  for (const State& stored : states_) {
    const auto state = stored.state.lock();
    if (state == nullptr || ledger.holders(state->bytes().data()) == 0) bytes += snapshot_.state_layout.bytes();
  }
  return bytes;
}

std::shared_ptr<std::byte> RowsAside::read(const Run& run, size_t size, const BufferAllocator& allocate) const {
  std::shared_ptr<std::byte> buffer = allocate(size);
  const std::span<std::byte> bytes(buffer.get(), size);
  file_->read_at(bytes, run.offset);
  if (hash_hex(bytes) != run.checksum) {
    throw Error(ErrorCode::kCorruption, "The rows that a turn had put aside on disk were damaged there; ask again.");
  }
  return buffer;
}

std::unique_ptr<KvCache> RowsAside::restore(Backend backend) const {
  KvSnapshot whole = snapshot_;
  for (size_t i = 0; i < whole.sealed.size(); ++i) {
    if (whole.sealed[i] != nullptr || (whole.sealed[i] = runs_[i].run.lock()) != nullptr) continue;
    const size_t size = runs_[i].size;
    const std::shared_ptr<std::byte> bytes = read(runs_[i], size, mlx_buffer);
    whole.sealed[i] = std::make_shared<const SealedRun>(std::span<const std::byte>(bytes.get(), size), bytes, false,
                                                        runs_[i].checked);
    if (runs_[i].segment != nullptr) whole.sealed[i]->set_segment(*runs_[i].segment);
  }
  if (whole.tail.n_tokens > 0) {
    const std::shared_ptr<std::byte> bytes = read(runs_.back(), tail_bytes_, allocate_heap_buffer);
    whole.tail.bytes = {bytes.get(), tail_bytes_};
    whole.tail.owner = bytes;
  }
  for (const State& stored : states_) {
    std::shared_ptr<const StateCheckpoint> state = stored.state.lock();
    if (state == nullptr) {
      const std::shared_ptr<std::byte> bytes = read(stored.stored, whole.state_layout.bytes(), mlx_buffer);
      state = std::make_shared<const StateCheckpoint>(
          stored.position, std::span<const std::byte>(bytes.get(), whole.state_layout.bytes()), bytes);
      if (!stored.file.empty()) state->set_file(stored.file);
    }
    whole.states.push_back(std::move(state));
  }
  auto cache = KvCache::restore(whole, backend);
  if (keeps_state_) cache->keep_state();
  return cache;
}

}  // namespace torpor
