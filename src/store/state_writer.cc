#include "store/state_writer.h"

#include <algorithm>

#include "base/parallel.h"
#include "store/segment.h"

namespace torpor {

void add_windows(Store::Impl& store, KvSnapshot& snapshot, std::span<const StateRef> kept) {
  const KvLayout& layout = snapshot.layout;
  if (!layout.has_apart()) return;
  snapshot.state_layout = window_rows(layout);
  for (size_t i = 0; i < snapshot.sealed.size(); ++i) {
    const int64_t end = int64_t(i + 1) * kSegmentTokens;
    // Also from the end of the last segment, for there a prompt of nobody's finds it.
    const bool seen = sees_window_rows(layout, int64_t(i), int64_t(snapshot.tokens.size())) ||
                      sees_window_rows(layout, int64_t(i), ssize(snapshot.sealed) * kSegmentTokens);
    if (!seen || !snapshot.has_window_rows(i)) continue;
    const auto is_it = [&](const auto& state) { return state->position() == end; };
    if (std::ranges::any_of(snapshot.states, is_it)) continue;
    const auto ref = std::ranges::find(kept, end, &StateRef::position);
    if (ref != kept.end() && store.states.find(ref->file)) continue;
    snapshot.states.push_back(snapshot.window_rows_of(i));
  }
  std::ranges::sort(snapshot.states, {}, [](const auto& state) { return state->position(); });
}

StateWriter::StateWriter(Store::Impl& store, const KvSnapshot& snapshot, std::span<const StateRef> kept)
    : store_(store),
      snapshot_(snapshot),
      kept_(kept),
      state_digest_(state_layout_digest(snapshot.state_layout)),
      checksums_(snapshot.states.size()) {}

void StateWriter::plan(std::span<const int32_t> tokens, std::vector<std::string> segments) {
  states_.clear();
  tokens_ = tokens;
  segments_ = std::move(segments);
  const StateChain chain(snapshot_.identity, snapshot_.lineage, snapshot_.layout, segments_, tokens_);
  for (size_t i = 0; i < snapshot_.states.size(); ++i) {
    Planned& planned = states_.emplace_back();
    planned.state = snapshot_.states[i];
    planned.position = planned.state->position();
    planned.checksums = &checksums_[i];
    planned.place = chain.place(planned.position, state_digest_);
    choose_name(planned, chain);
  }
  for (const StateRef& ref : kept_) {
    const auto is_there = [&](const Planned& planned) { return planned.position == ref.position; };
    if (ref.position > chain.length() || std::any_of(states_.begin(), states_.end(), is_there)) continue;
    // One that somebody removed is computed again by whoever needs it.
    if (const auto stat = store_.states.find(ref.file)) {
      Planned& planned = states_.emplace_back();
      planned.position = ref.position;
      planned.name = ref.file;
      planned.stat = *stat;
    }
  }
  std::ranges::sort(states_, {}, &Planned::position);
}

const std::vector<std::string>& StateWriter::checksums_of(Planned& planned) {
  if (planned.checksums->empty()) {
    *planned.checksums = state_checksums(state_tensors(snapshot_.state_layout, *planned.state));
  }
  return *planned.checksums;
}

std::string StateWriter::header_of(Planned& planned) {
  return encode_state_header(planned.place, planned.variant, snapshot_.layout,
                             state_tensors(snapshot_.state_layout, *planned.state), checksums_of(planned));
}

void StateWriter::choose_name(Planned& planned, const StateChain& chain) {
  for (const bool plain : {true, false}) {
    planned.variant = plain ? "" : content_digest(checksums_of(planned));
    planned.name = state_name(planned.place, planned.variant);
    const FoundFile found = look_up(planned, chain);
    if (found == FoundFile::kSame) return;
    if (found == FoundFile::kOther && plain) continue;
    // A variant's name holds the state's digest: what is there and differs is not what it says.
    if (found == FoundFile::kOther) planned.damaged = planned.stat;
    break;
  }
  planned.write = true;
  planned.stat = {.size = header_of(planned).size() + planned.state->bytes().size() +
                          token_bytes(planned.place.tokens).size()};
}

FoundFile StateWriter::look_up(Planned& planned, const StateChain& chain) {
  const auto stat = store_.states.find(planned.name);
  if (!stat) return FoundFile::kNothing;
  planned.stat = *stat;
  // The file's name alone says nothing: another store, or a computation with other bits, has other ones under it.
  const std::string content = content_digest(checksums_of(planned));
  const auto known = store_.known.file(planned.name);
  if (known && known->stat == *stat && known->whole) {
    if (known->content != content) return FoundFile::kOther;
  } else {
    // Not seen whole by this process: read it before anything is built on it. A damaged one is written again, for the
    // good bytes are here.
    try {
      const StateRef ref{planned.position, planned.name};
      const OpenedState opened = open_state(store_.states, chain, ref);
      if (opened.state.content() != content) return FoundFile::kOther;
      read_state(opened, ref, allocate_heap_buffer);
      planned.stat = opened.stat;
    } catch (const Error& error) {
      if (error.code() == ErrorCode::kIo) throw;
      if (error.code() != ErrorCode::kNotFound) planned.damaged = *stat;
      return FoundFile::kNothing;
    }
    store_.known.add_file(planned.name, {planned.stat, content, checksums_of(planned).back(), true});
  }
  planned.state->set_file(planned.name);
  return FoundFile::kSame;
}

std::optional<std::vector<StateRef>> StateWriter::refs() const {
  if (snapshot_.state_layout.empty()) return std::nullopt;
  std::vector<StateRef> refs;
  for (const Planned& planned : states_) refs.push_back({planned.position, planned.name});
  return refs;
}

void StateWriter::write_missing(bool durable, Writing& writing, SaveResult& result) {
  while (!put_missing(durable, result)) {
    do plan(tokens_, std::move(segments_));
    while (!writing.claim(names_of(states_), {}, found()));
  }
  if (const auto all = refs()) result.states = *all;
  if (durable) store_.states.flush(stored_files(states_, true));
}

bool StateWriter::put_missing(bool durable, SaveResult& result) {
  std::vector<Planned*> missing;
  for (Planned& planned : states_) {
    if (planned.write) missing.push_back(&planned);
  }
  std::vector<StoredFile> put;
  for (Planned* const planned : missing) {
    const std::string header = header_of(*planned);
    TemporaryFile file = store_.states.write(
        planned->name, {as_bytes_of(header), planned->state->bytes(), token_bytes(planned->place.tokens)}, durable);
    if (!put_in_place(store_, store_.states, *planned, file)) break;
    planned->stat = file.stat();
    planned->write = false;
    store_.written.add(planned->stat);
    store_.known.add_file(planned->name, {planned->stat, content_digest(checksums_of(*planned)),
                                          checksums_of(*planned).back(), true});
    planned->state->set_file(planned->name);
    put.push_back({planned->name, planned->stat});
    result.bytes_written += int64_t(planned->stat.size);
    ++result.states_written;
  }
  if (durable) store_.states.flush_names(put);
  return put.size() == missing.size();
}

}  // namespace torpor
