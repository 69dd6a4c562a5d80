#include "store/run_loader.h"

namespace torpor {
namespace {

/// Digests are long; their beginnings tell them apart.
std::string abridged(const std::string& value) { return value.size() <= 16 ? value : value.substr(0, 12) + "..."; }

}  // namespace

LoadedAgent Store::Impl::load(const std::string& id, const LoadOptions& options, RowSink* sink) {
  if (options.n_tokens.value_or(0) < 0) {
    throw Error(ErrorCode::kInvalidArgument, "An agent can't be loaded up to token " + std::to_string(*options.n_tokens) + ".");
  }
  constexpr int kAttempts = 5;
  for (int attempt = 1;; ++attempt) {
    const OpenedAgent opened = open_agent(id);
    const AgentFile& agent = opened.agent;
    if (options.expected != nullptr) {
      if (const auto field = agent.info.identity.first_difference(*options.expected)) {
        const std::string has = agent.info.identity.value(*field), wants = options.expected->value(*field);
        throw Error(ErrorCode::kIncompatible, "The agent '" + id + "' was cached with another " + *field + " ('" + abridged(has) +
                                                  "') than the model now has ('" + abridged(wants) +
                                                  "'); use the model it was saved with, or rebuild it from its text.")
            .with_agent(id)
            .with_field(*field, wants, has);
      }
    }
    LoadedAgent loaded;
    loaded.info = agent.info;
    KvSnapshot& snapshot = loaded.snapshot;
    snapshot.identity = agent.info.identity;
    snapshot.layout = agent.file.layout;
    const std::vector<int32_t> tokens = read_tokens(opened.handle, agent.file);
    const int64_t length = std::min(options.n_tokens.value_or(agent.info.cache_size), agent.info.cache_size);
    if (length < agent.info.cache_size && !agent.file.state().empty()) {
      throw Error(ErrorCode::kInvalidArgument, "The agent '" + id + "' holds state of its last token besides its rows, so not fewer than its " +
                                                   std::to_string(agent.info.cache_size) + " tokens can be loaded.");
    }
    loaded.tokens.assign(tokens.begin(), tokens.begin() + length);

    const SegmentChain chain{snapshot.identity.digest(), layout_digest(snapshot.layout), agent.info.segments, tokens};
    RunLoader loader(*this, snapshot.layout, chain, &opened, options);
    // Everything but the rows, before a byte is allocated for them.
    loader.open(length, /*share_held=*/sink == nullptr);
    if (loader.missing() && attempt < kAttempts) {
      // A save in another process may have put a new agent file in place, and its segments are others.
      const auto now = env.stat(agent_path(id));
      if (!now || !(*now == opened.stat)) continue;
    }
    try {
      snapshot.state = read_state(opened.handle, agent.file, options.allocate);
    } catch (const Error& error) {
      if (!options.salvage || !is_damage(error)) throw;
      loaded.damage = error.what();
    }
    if (sink != nullptr && loader.complete()) {
      snapshot.tokens = loaded.tokens;
      sink->begin(loaded.info, snapshot);
      loader.read_into(*sink);
    } else if (loader.complete() || options.salvage) {
      loader.read();
    }
    if (!loader.complete()) {
      if (!options.salvage) throw Error(ErrorCode::kCorruption, loader.problem());
      loaded.damage = loader.problem();
    }
    // State is that after the last token: none of a prefix.
    if (loaded.damage) snapshot.state.clear();
    if (sink == nullptr) loader.take(snapshot);
    snapshot.tokens.assign(loaded.tokens.begin(), loaded.tokens.begin() + loader.usable_tokens());
    const TorporFile& file = agent.file;
    loaded.bytes_read = loader.bytes_read() + int64_t(file.header.data_start + file.tokens_tensor().end - file.rows_bytes());
    for (size_t i = 0; i < agent.info.segments.size(); ++i) {
      auto size = loader.segment_size(i);
      if (!size) {
        if (const auto stat = env.stat(segment_path(agent.info.segments[i]))) size = stat->size;
      }
      loaded.info.bytes += int64_t(size.value_or(0));
    }
    return loaded;
  }
}

}  // namespace torpor
