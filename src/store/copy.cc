/// Copies of an agent that read no sealed row: fork, rewind, rename, a change of metadata.

#include <algorithm>

#include "store/run_loader.h"
#include "store/states.h"
#include "store/writing.h"

namespace torpor {
namespace {

/// The first `n` rows of a segment. `window`: the file of those that are kept apart, which are 0 where there is none.
KvTail first_rows(const OpenedSegment& segment, const OpenedState* window, int n) {
  const KvLayout& layout = segment.segment.file.layout;
  const size_t read_size = layout.offset(layout.tensors.size(), kSegmentTokens),
               size = layout.offset(layout.tensors.size(), n);
  const auto read = allocate_heap_buffer(read_size), rows = allocate_heap_buffer(size);
  const std::span<std::byte> all(read.get(), read_size);
  read_rows(segment.handle, segment.segment.file, {}, all.first(size_t(segment.segment.file.rows_bytes())));
  const auto apart = all.subspan(layout.together_bytes());
  if (window != nullptr) {
    read_state_bytes(window->handle, window->state.file, apart);
  } else {
    std::ranges::fill(apart, std::byte(0));
  }
  copy_rows(layout, {read.get(), kSegmentTokens, 0}, {rows.get(), n, 0}, n);
  return {.n_tokens = n, .bytes = {rows.get(), size}, .owner = rows};
}

/// The file of an agent's rows kept apart that ends at `position`. nullopt where there is none, or it is damaged: those
/// rows are computed again.
std::optional<OpenedState> open_window(Store::Impl& store, const KvLayout& layout, const AgentInfo& info,
                                       std::span<const int32_t> ids, int64_t position) {
  const auto ref = std::ranges::find(states_of(info), position, &StateRef::position);
  if (!layout.has_apart() || ref == states_of(info).end()) return std::nullopt;
  try {
    OpenedState window =
        open_state(store.states, StateChain(info.identity, info.lineage, layout, info.segments, ids), *ref);
    if (window.state.layout != window_rows(layout)) return std::nullopt;
    read_state(window, *ref, allocate_heap_buffer);
    return window;
  } catch (const Error& error) {
    if (!is_damage(error)) throw;
    return std::nullopt;
  }
}

/// What of `files` an agent of `n_tokens` still consists of, `sealed` of them in segments. `messages`: all of its.
std::vector<OwnFile> keep_files(const std::vector<OpenedFile>& files, int64_t sealed, int64_t n_tokens,
                                std::span<const StoredMessage> messages) {
  std::vector<OwnFile> kept;
  for (const OpenedFile& opened : files) {
    if (opened.ref.first > n_tokens) break;
    OwnFile file{
        .ref = opened.ref, .path = opened.path, .stat = opened.stat, .has_state = !opened.file->state().empty()};
    int64_t end = std::min(file.ref.end(), n_tokens);
    if (end > sealed && file.ref.end() - file.ref.rows > std::max(sealed, file.ref.first)) end = sealed;
    const bool cut = end < file.ref.end();
    if (cut && end <= file.ref.first) break;
    file.ref.tokens = end - file.ref.first;
    const int64_t without_rows = int64_t(opened.file->n_tokens - opened.file->rows);
    file.ref.rows = std::clamp<int64_t>(file.ref.tokens - without_rows, 0, file.ref.rows);
    while (file.n_messages < messages.size() && messages[file.n_messages].end <= end) ++file.n_messages;
    messages = messages.subspan(file.n_messages);
    kept.push_back(std::move(file));
    if (cut) break;
  }
  return kept;
}

/// nullopt when something that `src` needs was removed meanwhile.
std::optional<SaveResult> copy_once(Store::Impl& store, const std::string& src, const std::string& dst,
                                    const CopyOptions& options, bool keep_dates) {
  Writing writing(store);
  const OpenedAgent opened = store.agents.open(src);
  const TorporFile& file = opened.agent.file;
  AgentInfo info = opened.agent.info;
  if (src != dst) store.agents.require_replaceable(dst);
  if (!options.replace && store.agents.contains(dst)) {
    throw Error(ErrorCode::kInvalidArgument, "There is an agent '" + dst + "' already; choose another id.")
        .with_agent(dst)
        .with_field(kAgentTaken);
  }
  const int64_t n = options.n_tokens.value_or(info.cache_size);
  if (n < 0 || n > info.cache_size) {
    throw Error(ErrorCode::kInvalidArgument, "The agent '" + src + "' has " + std::to_string(info.cache_size) +
                                                 " tokens; it can't be cut to " + std::to_string(n) + ".")
        .with_agent(src);
  }
  if (n < info.cache_size && !file.state().empty()) {
    throw Error(ErrorCode::kInvalidArgument,
                "The agent '" + src + "' holds state of its last token besides its rows, so it can't be cut to " +
                    std::to_string(n) + " tokens; copy it whole.")
        .with_agent(src);
  }
  const std::vector<KvState> state = read_state(opened.handle, file);
  const std::vector<OpenedFile> files = store.agents.open_files(opened);
  const int64_t all_sealed = int64_t(info.segments.size()) * kSegmentTokens,
                sealed = n / kSegmentTokens * kSegmentTokens;
  // Ids of the segment that the cut falls into are needed whole.
  const int64_t read = std::min(info.cache_size, sealed < all_sealed ? sealed + kSegmentTokens : n);
  OwnState own = read_own_state(files, file.layout, {.sealed = all_sealed, .length = read, .rows = false});
  if (!own.problem.empty())
    throw Error(own.missing ? ErrorCode::kNotFound : ErrorCode::kCorruption, own.problem).with_agent(src);
  if (!opened.agent.old_messages.empty()) own.messages = opened.agent.old_messages;
  if (n < info.cache_size) std::erase_if(own.messages, [&](const StoredMessage& message) { return message.end > n; });

  AgentState agent{.layout = file.layout,
                   .tokens = std::span(own.ids).first(size_t(n)),
                   .sealed = sealed,
                   .state = state,
                   .messages = own.messages};
  const std::vector<std::string> all_segments = info.segments;
  info.segments.resize(size_t(sealed / kSegmentTokens));
  info.lineage.cut(n);
  std::vector<StoredFile> found;
  info.bytes = 0;
  const auto stats = store.segments.find(info.segments);
  for (size_t i = 0; i < stats.size(); ++i) {
    const std::string& name = info.segments[i];
    if (!stats[i]) {
      throw Error(ErrorCode::kCorruption, "The segment '" + store.segments.path(name).string() + "' of agent '" + src +
                                              "' is missing; restore it from a copy, or cut the agent before it.")
          .with_agent(src);
    }
    found.push_back({name, *stats[i]});
    info.bytes += int64_t(stats[i]->size);
  }
  std::vector<StoredFile> found_states;
  info.state_bytes = 0;
  if (info.states) {
    std::erase_if(*info.states, [&](const StateRef& state) {
      const auto stat = state.position <= n ? store.states.find(state.file) : std::nullopt;
      // One that is gone is computed again by whoever needs it.
      if (!stat) return true;
      found_states.push_back({state.file, *stat});
      info.state_bytes += int64_t(stat->size);
      return false;
    });
    info.bytes += info.state_bytes;
  }
  info.agent_id = dst;
  if (options.user) info.user = *options.user;
  if (options.record) info.record = *options.record;
  const std::optional<AgentFile> replaced = src == dst ? opened.agent : store.agents.header(dst);
  if (!keep_dates) {
    info.updated_at = format_time(store.env.now());
    info.created_at = replaced ? replaced->info.created_at : info.updated_at;
  }
  std::vector<OwnFile> kept;
  if (file.version == kFormatVersion) kept = keep_files(files, sealed, n, own.messages);
  if (n == sealed) info.bare_tail = false;
  agent.without_tail = opened.agent.without_tail && n > all_sealed;
  // Rows that no file keeps: of a segment that the cut falls into, else of the files that are merged.
  if (n > sealed && sealed < all_sealed) {
    const SegmentChain chain(info.identity, opened.agent.info.lineage, file.layout, all_segments, own.ids);
    const size_t i = size_t(sealed / kSegmentTokens);
    SegmentHeaders headers;
    const auto window = open_window(store, file.layout, opened.agent.info, own.ids, sealed + kSegmentTokens);
    info.bare_tail = file.layout.has_apart() && !window;
    agent.tail = first_rows(open_segment(store.segments, all_segments[i], chain.place(i), headers),
                            window ? &*window : nullptr, int(n - sealed));
  } else if (n > sealed && rows_to_write(kept, agent) > 0) {
    agent.tail = read_own_state(files, file.layout, {.sealed = all_sealed, .length = n}).tail;
    if (agent.tail.n_tokens != n - sealed) {
      throw Error(ErrorCode::kCorruption, "The rows of agent '" + src +
                                              "' past its last segment are damaged; restore its files "
                                              "from a copy, or wake it with salvage.")
          .with_agent(src);
    }
  }
  const bool in_place = src == dst && !opened.agent.uid.empty();
  AgentDraft draft =
      draft_agent(std::move(info), in_place ? opened.agent.uid : store.env.random_id(), agent, std::move(kept));
  draft.digests_known = draft.kept.empty();
  if (replaced) store.agents.find_obsolete(replaced->uid, part_names(replaced->parts), draft);
  writing.make_room("Copying the agent '" + src + "' to '" + dst + "'", bytes_to_write(draft), claims_of(draft));
  if (!writing.claim(claims_of(draft), found, found_states)) return std::nullopt;
  SaveResult result;
  result.segments = draft.info.segments;
  result.segments_shared = int(result.segments.size());
  if (draft.info.states) result.states = *draft.info.states;
  if (options.durability == Durability::kFull) {
    store.segments.flush(found);
    store.states.flush(found_states);
  }
  store.agents.commit(draft, options.durability, result);
  return result;
}

}  // namespace

SaveResult copy(Store::Impl& store, const std::string& src, const std::string& dst, const CopyOptions& options,
                bool keep_dates) {
  check_agent_id(src);
  check_agent_id(dst);
  constexpr int kAttempts = 20;
  for (int attempt = 1;; ++attempt) {
    // A save in another process may put a new file of `src` in place, and then nobody keeps what the old one needs.
    const auto before = store.agents.stat(src);
    try {
      if (auto result = copy_once(store, src, dst, options, keep_dates)) return std::move(*result);
    } catch (const Error& error) {
      if (!is_damage(error) || attempt == kAttempts || store.agents.stat(src) == before) throw;
      continue;
    }
    if (attempt == kAttempts) {
      throw Error(ErrorCode::kBusy, "The agent '" + src + "' changes while it is copied; try again later.");
    }
  }
}

SaveResult upgrade_agent(Store::Impl& store, const std::string& id) {
  (void)store.agents.open(id);  // a lock that nothing comes of would leave its file behind
  const AgentFileLock lock = lock_agent(store, id);
  const OpenedAgent opened = store.agents.open(id);
  SaveResult result;
  result.segments = opened.agent.info.segments;
  if (opened.agent.file.version == kFormatVersion && !opened.agent.info.lineage.old_names) return result;
  LoadedAgent loaded = load(store, id, {.map_rows = true});
  loaded.snapshot.lineage.old_names.reset();
  return save(store, id, loaded.snapshot, nullptr, loaded.info.model, loaded.info.user, Durability::kFull,
              {std::move(loaded.messages), loaded.info.record});
}

void rename_agent(Store::Impl& store, const std::string& id, const std::string& new_id) {
  check_agent_id(id);
  check_agent_id(new_id);
  (void)store.agents.open(id);
  if (store.agents.holder(new_id).kind == Catalogue::Holder::kAgent) {
    throw Error(ErrorCode::kInvalidArgument, "There is an agent '" + new_id + "' already; choose another id.")
        .with_agent(new_id)
        .with_field(kAgentTaken);
  }
  const AgentFileLock lock = lock_agent(store, id), new_lock = lock_agent(store, new_id);
  // Under a uid of its own: after a crash here there are two agents, and neither may remove the other's parts.
  copy(store, id, new_id, {}, /*keep_dates=*/true);
  store.agents.remove(id);
  store.agents.remove_sidecar(id);
}

}  // namespace torpor
