#include <algorithm>
#include <cstring>
#include <ranges>

#include "store/run_loader.h"
#include "store/states.h"

namespace torpor {
namespace {

/// Digests are long; their beginnings tell them apart.
std::string abridged(const std::string& value) {
  return value.size() <= 16 || value.find(' ') != std::string::npos ? value : value.substr(0, 12) + "...";
}

/// The ids of sealed tokens, from their segments: as many as can be believed.
std::vector<int32_t> ids_of_segments(Store::Impl& store, const AgentInfo& info, const KvLayout& layout, int64_t first,
                                     int64_t end) {
  std::vector<int32_t> ids;
  try {
    for (int64_t position = first; position < end;) {
      const size_t i = size_t(position / kSegmentTokens);
      const File handle = store.segments.open(info.segments[i]);
      const uint64_t size = handle.stat().size;
      const SegmentFile segment = parse_segment_file(read_header_bytes(handle, size), size, handle.path().string());
      const std::vector<int32_t> own = read_tokens(handle, segment.file);
      // The name is made of the ids, so it says whether they are the agent's.
      SegmentPlace place = SegmentChain(info.identity, info.lineage, layout, info.segments, {}).place(i);
      place.tokens = own;
      if (segment_name(place, segment.variant) != info.segments[i]) break;
      const int64_t begin = int64_t(i) * kSegmentTokens, stop = std::min(end, begin + kSegmentTokens);
      ids.insert(ids.end(), own.begin() + (position - begin), own.begin() + (stop - begin));
      position = stop;
    }
  } catch (const Error& error) {
    if (!is_damage(error)) throw;
  }
  return ids;
}

void check_identity(const std::string& id, const Identity& own, const Identity& expected) {
  const auto field = own.first_difference(expected);
  if (!field) return;
  // As Python programs save mlx-lm's caches: what the other fields say is of no use.
  if (own.kv != expected.kv && (own.kv.empty() || own.kv == "mlx-lm")) {
    throw Error(ErrorCode::kIncompatible, "The agent '" + id +
                                              "' was saved from a cache by a program, and not by an engine; go on with "
                                              "it there, or take another agent.")
        .with_agent(id)
        .with_field("made_by");
  }
  const std::string found = own.value(*field), wanted = expected.value(*field);
  throw Error(ErrorCode::kIncompatible, "The agent '" + id + "' was cached with another " + *field + " ('" +
                                            abridged(found) + "') than the model now has ('" + abridged(wanted) +
                                            "'); use the model it was saved with, or rebuild it from its text.")
      .with_agent(id)
      .with_field(*field, wanted, found);
}

/// The rows past the last segment, to where the sink wants them.
void place_tail(RowSink& sink, const KvLayout& layout, int64_t first, const KvTail& tail) {
  if (tail.n_tokens == 0) return;
  for (size_t t = 0; t < layout.tensors.size(); ++t) {
    put_rows(sink.place(t, first, tail.n_tokens), layout.tensors[t], tail.n_tokens,
             tail.bytes.data() + layout.offset(t, tail.n_tokens));
  }
}

/// The first `n` rows of a tail.
KvTail first_of(const KvTail& tail, const KvLayout& layout, int64_t n, const BufferAllocator& allocate) {
  if (n >= tail.n_tokens) return tail;
  if (n <= 0) return {};
  KvTail first = tail;
  first.n_tokens = int(n);
  if (tail.run != nullptr) return first;
  const size_t size = layout.offset(layout.tensors.size(), int(n));
  const std::shared_ptr<std::byte> rows = allocate(size);
  copy_rows(layout, {tail.bytes.data(), tail.n_tokens, 0}, {rows.get(), int(n), 0}, int(n));
  first.bytes = {rows.get(), size};
  first.owner = rows;
  return first;
}

/// Gives `snapshot` the last state of the first `held` tokens that can be read, and says after how many of them it is: 0
/// when there is none. `damaged` hears of others; a negative number stands for one that is missing where `replaced`.
int64_t load_last_state(Store::Impl& store, const StateChain& chain, std::span<const StateRef> states, int64_t held,
                        const LoadOptions& options, KvSnapshot& snapshot, const std::function<bool()>& replaced,
                        const std::function<void(const std::string&)>& damaged) {
  snapshot.states.clear();
  snapshot.state_layout = {};
  for (const StateRef& ref : states | std::views::reverse) {
    if (ref.position > held) continue;
    try {
      snapshot.states = {load_state(store, chain, ref, options.allocate, snapshot.state_layout)};
      return ref.position;
    } catch (const Error& error) {
      if (!is_damage(error)) throw;
      if (error.code() == ErrorCode::kNotFound && replaced()) return -1;
      damaged(error.code() == ErrorCode::kNotFound ? missing_state(store, ref) : error.what());
    }
  }
  return 0;
}

}  // namespace

LoadedAgent load(Store::Impl& store, const std::string& id, const LoadOptions& options, RowSink* sink) {
  if (options.n_tokens.value_or(0) < 0) {
    throw Error(ErrorCode::kInvalidArgument,
                "An agent can't be loaded up to token " + std::to_string(*options.n_tokens) + ".");
  }
  constexpr int kAttempts = 5;
  for (int attempt = 1;; ++attempt) {
    const OpenedAgent opened = store.agents.open(id);
    const AgentFile& agent = opened.agent;
    if (options.expected != nullptr) check_identity(id, agent.info.identity, *options.expected);
    const int64_t length = std::min(options.n_tokens.value_or(agent.info.cache_size), agent.info.cache_size);
    if (length < agent.info.cache_size && !agent.file.state().empty()) {
      throw Error(ErrorCode::kInvalidArgument,
                  "The agent '" + id + "' holds state of its last token besides its rows, so not fewer than its " +
                      std::to_string(agent.info.cache_size) + " tokens can be loaded.")
          .with_agent(id);
    }
    LoadedAgent loaded;
    loaded.info = agent.info;
    KvSnapshot& snapshot = loaded.snapshot;
    snapshot.identity = agent.info.identity;
    snapshot.lineage = agent.info.lineage;
    snapshot.conversation = agent.info.conversation;
    snapshot.layout = agent.file.layout;

    // A save in another process may have put a new agent file in place, which needs other files.
    const auto replaced = [&] {
      const auto now = store.agents.stat(id);
      return attempt < kAttempts && (!now || *now != opened.stat);
    };
    const std::vector<OpenedFile> files = store.agents.open_files(opened);
    OwnStateOptions own_options{.sealed = int64_t(agent.info.segments.size()) * kSegmentTokens, .length = length};
    // Ids of the segment that the end falls into are needed whole.
    if (length < own_options.sealed) {
      own_options.length = std::min(own_options.sealed, (length + kSegmentTokens - 1) / kSegmentTokens * kSegmentTokens);
    }
    own_options.map = options.map_rows || sink != nullptr;  // a sink has the rows copied
    own_options.tail_in_run = options.tail_in_run && sink == nullptr;
    if (sink == nullptr) own_options.allocate = options.allocate;
    if (options.salvage) {
      own_options.recover_ids = [&](int64_t first, int64_t end) {
        return ids_of_segments(store, agent.info, snapshot.layout, first, end);
      };
    }
    OwnState own = read_own_state(files, snapshot.layout, own_options);
    if (!own.problem.empty()) {
      if (own.missing && replaced()) continue;
      // Without ids nothing would say what the agent was.
      if (!options.salvage || own.files.empty()) throw Error(ErrorCode::kCorruption, own.problem).with_agent(id);
      loaded.damage = own.problem;
    }
    loaded.tokens = std::move(own.ids);
    loaded.messages = agent.old_messages.empty() ? std::move(own.messages) : agent.old_messages;
    std::erase_if(loaded.messages,
                  [&](const StoredMessage& message) { return length < agent.info.cache_size && message.end > length; });
    const int64_t sealed = std::min({own_options.sealed, length, int64_t(loaded.tokens.size())});
    int64_t held = std::min<int64_t>(sealed + own.tail.n_tokens, length);
    const auto damaged = [&](const std::string& problem) {
      if (!options.salvage) throw Error(ErrorCode::kCorruption, problem).with_agent(id);
      loaded.damage = problem;
    };

    const SegmentChain chain(snapshot.identity, snapshot.lineage, snapshot.layout, agent.info.segments, loaded.tokens);
    const StateChain state_chain(snapshot.identity, snapshot.lineage, snapshot.layout, agent.info.segments,
                                 loaded.tokens);
    std::optional<RunLoader> loader;
    bool again = false;
    const bool apart = snapshot.layout.has_apart();
    if (agent.info.bare_tail) held = std::min(held, sealed);
    for (;;) {
      if (apart) {
        held = resumable_by_files(snapshot.layout, states_of(agent.info), own_options.sealed, held);
      } else if (agent.info.states) {
        held = load_last_state(store, state_chain, *agent.info.states, held, options, snapshot, replaced, damaged);
        if (held < 0) again = true;
      }
      if (again) break;
      loader.emplace(store, snapshot.layout, chain, options, states_of(agent.info), &state_chain);
      // Everything but the rows, before a byte is allocated for them.
      loader->open(held, /*share_held=*/sink == nullptr);
      if (loader->missing() && replaced()) again = true;
      if (again || sink != nullptr) break;
      if (loader->complete() || options.salvage) loader->read();
      if (loader->complete()) break;
      if (loader->missing() && replaced()) {
        again = true;
        break;
      }
      damaged(loader->problem());
      if (!apart && !agent.info.states) break;
      held = loader->usable_tokens();  // rows that end behind a state, or lack some that windows see, are of no use
    }
    if (again) continue;
    try {
      snapshot.state = read_state(opened.handle, agent.file, options.allocate);
    } catch (const Error& error) {
      if (!options.salvage || !is_damage(error)) throw;
      loaded.damage = error.what();
    }
    own.tail = first_of(own.tail, snapshot.layout, held - sealed, options.allocate);
    if (sink != nullptr && loader->complete()) {
      snapshot.tokens.assign(loaded.tokens.begin(), loaded.tokens.begin() + held);
      sink->begin(loaded.info, snapshot);
      loader->read_into(*sink);
      place_tail(*sink, snapshot.layout, sealed, own.tail);
    }
    if (sink != nullptr && !loader->complete()) damaged(loader->problem());
    // State is that after the last token: none of a prefix.
    if (loaded.damage) snapshot.state.clear();
    int64_t usable = loader->usable_tokens();
    if (sink == nullptr) loader->take(snapshot);
    if (loader->complete() && own.tail.n_tokens > 0) {
      if (sink == nullptr) snapshot.tail = own.tail;
      usable += own.tail.n_tokens;
    }
    snapshot.tokens.assign(loaded.tokens.begin(), loaded.tokens.begin() + usable);
    loaded.tokens.resize(size_t(std::min(length, int64_t(loaded.tokens.size()))));
    loaded.bytes_read = loader->bytes_read() + own.bytes_read +
                        int64_t(snapshot.layout.offset(snapshot.layout.tensors.size(), own.tail.n_tokens));
    for (const auto& state : snapshot.states) loaded.bytes_read += int64_t(state->bytes().size());
    if (own.problem.empty() && length == agent.info.cache_size) store.agents.know(id, opened, std::move(own.files));
    for (size_t i = 0; i + 1 < files.size(); ++i) loaded.info.tail_bytes += int64_t(files[i].stat.size);
    for (const StateRef& state : states_of(agent.info)) {
      loaded.info.state_bytes += int64_t(store.states.find(state.file).value_or(FileStat{}).size);
    }
    loaded.info.bytes = loaded.info.tail_bytes + loaded.info.state_bytes;
    for (size_t i = 0; i < agent.info.segments.size(); ++i) {
      auto size = loader->segment_size(i);
      if (!size) {
        if (const auto stat = store.segments.find(agent.info.segments[i])) size = stat->size;
      }
      loaded.info.bytes += int64_t(size.value_or(0));
    }
    return loaded;
  }
}

}  // namespace torpor
