#include "store/states.h"

#include <algorithm>
#include <functional>

#include "store/run_loader.h"

namespace torpor {

std::shared_ptr<const StateCheckpoint> load_state(Store::Impl& store, const StateChain& chain, const StateRef& ref,
                                                  const BufferAllocator& allocate, StateLayout& layout) {
  try {
    const OpenedState opened = open_state(store.states, chain, ref);
    auto state = read_state(opened, ref, allocate);
    const auto& checksums = opened.state.file.checksums;
    store.known.add_file(ref.file, {opened.stat, opened.state.content(), checksums[checksums.size() - 2], true});
    layout = opened.state.layout;
    return state;
  } catch (const Error& error) {
    if (is_damage(error)) store.known.forget(ref.file);
    throw;
  }
}

std::string missing_state(Store::Impl& store, const StateRef& ref) {
  return "The state '" + store.states.path(ref.file).string() + "' after " + std::to_string(ref.position) +
         " tokens is missing; restore it from a copy, or wake the agent with salvage.";
}

std::shared_ptr<const StateCheckpoint> load_state(Store::Impl& store, const KvSnapshot& conversation,
                                                  std::span<const std::string> segments, const StateRef& ref,
                                                  const BufferAllocator& allocate) {
  if (ref.position < 1 || ref.position > int64_t(conversation.tokens.size()) ||
      ref.position / kSegmentTokens > int64_t(segments.size())) {
    throw Error(ErrorCode::kInvalidArgument, "A state after " + std::to_string(ref.position) +
                                                 " tokens can't be that of a conversation of " +
                                                 std::to_string(conversation.tokens.size()) + " tokens.");
  }
  const StateChain chain(conversation.identity, conversation.lineage, conversation.layout, segments,
                         conversation.tokens);
  StateLayout layout;
  auto state = load_state(store, chain, ref, allocate, layout);
  if (!conversation.state_layout.empty() && !(layout == conversation.state_layout)) {
    throw Error(ErrorCode::kCorruption,
                "'" + store.states.path(ref.file).string() + "' is damaged: it is not of the model's layout.");
  }
  return state;
}

std::vector<StateRef> find_states(Store::Impl& store, const StateChain& chain, const StatesSought& sought) {
  std::vector<int64_t> positions;
  for (int64_t end = kSegmentTokens; end <= chain.segment_tokens(); end += kSegmentTokens) positions.push_back(end);
  for (const int64_t position : sought.positions) {
    if (position > 0 && position <= std::min(chain.segment_tokens(), chain.length())) positions.push_back(position);
  }
  std::ranges::sort(positions, std::greater<>());
  positions.erase(std::unique(positions.begin(), positions.end()), positions.end());
  const std::string digest = state_layout_digest(sought.layout);
  std::vector<std::string> names;
  for (const int64_t position : positions) names.push_back(state_name(chain.place(position, digest), ""));
  const auto found = store.states.find(names);
  std::vector<StateRef> states;
  for (size_t i = 0; i < names.size(); ++i) {
    if (found[i]) states.push_back({positions[i], names[i]});
  }
  return states;
}

std::vector<StateRef> find_windows(Store::Impl& store, const StateChain& chain, const KvLayout& layout) {
  const std::string digest = state_layout_digest(window_rows(layout));
  std::vector<StateRef> windows;
  std::vector<std::string> names;
  for (int64_t end = kSegmentTokens; end <= chain.segment_tokens(); end += kSegmentTokens) {
    windows.push_back({end, state_name(chain.place(end, digest), "")});
    names.push_back(windows.back().file);
  }
  const auto found = store.states.find(names);
  std::vector<StateRef> there;
  for (size_t i = 0; i < windows.size(); ++i) {
    if (found[i]) there.push_back(std::move(windows[i]));
  }
  return there;
}

int64_t resumable_by_files(const KvLayout& layout, std::span<const StateRef> windows, int64_t sealed,
                           int64_t n_tokens) {
  return resumable_by_windows(layout, n_tokens, [&](int64_t run) {
    const int64_t end = (run + 1) * kSegmentTokens;
    return end > sealed || std::ranges::find(windows, end, &StateRef::position) != windows.end();
  });
}

int64_t resumable_tokens(const AgentInfo& info, int64_t n_tokens) {
  const int64_t sealed = int64_t(info.segments.size()) * kSegmentTokens;
  if (info.bare_tail) n_tokens = std::min(n_tokens, sealed);
  if (info.window > 0) {
    const KvLayout layout{{{.window = info.window, .apart = true}}};
    return resumable_by_files(layout, states_of(info), sealed, n_tokens);
  }
  if (!info.states) return n_tokens;
  int64_t last = 0;
  for (const StateRef& state : *info.states) {
    if (state.position <= n_tokens) last = state.position;
  }
  return last;
}

}  // namespace torpor
