#include "store/segment_writer.h"

#include <algorithm>

#include "base/hash.h"

namespace torpor {

SegmentWriter::SegmentWriter(Store::Impl& store, const KvSnapshot& snapshot, const BorrowedRows* rows)
    : store_(store),
      snapshot_(snapshot),
      together_{{snapshot.layout.tensors.begin(),
                 snapshot.layout.tensors.begin() + ptrdiff_t(snapshot.layout.n_together())}},
      borrowed_(rows),
      tokens_(snapshot.tokens),
      checksums_(snapshot.tokens.size() / kSegmentTokens) {
  name_unknown_tokens();
  plan();
}

std::vector<std::span<const std::byte>> SegmentWriter::rows_of(size_t i) const {
  if (borrowed_ != nullptr) return borrowed_->runs[i].pieces;
  return {snapshot_.sealed[i]->bytes().first(snapshot_.layout.together_bytes())};
}

void SegmentWriter::name_unknown_tokens() {
  std::vector<size_t> unknown;
  for (size_t i = 0; i < checksums_.size(); ++i) {
    if (tokens_[i * kSegmentTokens] == kUnknownToken) unknown.push_back(i);
  }
  parallel_for(unknown.size(), reader_threads(), [&](size_t k) {
    const size_t i = unknown[k];
    checksums_[i] = run_checksums(together_, kSegmentTokens, rows_of(i));
    torpor::name_unknown_tokens(std::span(tokens_).subspan(i * kSegmentTokens, kSegmentTokens),
                                content_digest(checksums_[i]));
  });
}

void SegmentWriter::plan() {
  segments_.clear();
  const SegmentChain chain(snapshot_.identity, snapshot_.lineage, snapshot_.layout, {}, tokens_);
  const size_t rows_size = snapshot_.layout.together_bytes();
  std::string parent;
  for (size_t i = 0; i < checksums_.size(); ++i) {
    Planned& segment = segments_.emplace_back();
    if (borrowed_ != nullptr) {
      segment.borrowed = &borrowed_->runs[i];
    } else {
      segment.run = snapshot_.sealed[i];
    }
    segment.rows = rows_of(i);
    segment.checksums = &checksums_[i];
    segment.place = chain.place(i, parent);
    choose_name(segment);
    if (segment.write) {
      segment.stat = {.size = header_size(segment) + rows_size + token_bytes(segment.place.tokens).size()};
    }
    parent = segment.name;
  }
}

size_t SegmentWriter::header_size(const Planned& segment) {
  // Names and checksums are all of one length.
  size_t& size = header_sizes_[{segment.place.parent.size(), segment.variant.size()}];
  if (size == 0) {
    const std::vector<std::string> checksums(together_.tensors.size(), std::string(32, '0'));
    size = encode_segment_header(segment.place, segment.variant, snapshot_.layout, checksums).size();
  }
  return size;
}

void SegmentWriter::choose_name(Planned& segment) {
  // Rows that came from a segment of this store keep its name, and nothing is read to find that out.
  if (segment.run != nullptr) segment.origin = segment.run->segment();
  if (segment.origin != nullptr && segment_name(segment.place, segment.origin->variant) == segment.origin->name) {
    segment.name = segment.origin->name;
    segment.variant = segment.origin->variant;
    const auto stat = store_.segments.find(segment.name);
    const auto file = store_.known.file(segment.name);
    if (stat && file && file->stat == *stat && file->content == segment.origin->content) {
      segment.stat = *stat;
      return;
    }
  }
  if (take_hint(segment)) return;
  // Else the plain name. Rows of the same tokens that differ from those under it get a name of their own.
  for (const bool plain : {true, false}) {
    segment.variant = plain ? "" : content_of(segment);
    segment.name = segment_name(segment.place, segment.variant);
    switch (look_up(segment)) {
      case FoundFile::kSame: return;
      case FoundFile::kNothing: segment.write = true; return;
      case FoundFile::kOther: break;
    }
  }
  // The variant's name holds the rows' digest: what is there and differs is not what it says.
  segment.write = true;
  segment.damaged = segment.stat;
}

bool SegmentWriter::take_hint(Planned& segment) {
  if (segment.borrowed == nullptr || segment.borrowed->segment.empty()) return false;
  const std::string& name = segment.borrowed->segment;
  const auto file = store_.known.file(name);
  if (!file || !file->whole) return false;
  const auto stat = store_.segments.find(name);
  if (!stat || file->stat != *stat) return false;
  const bool plain = segment_name(segment.place, "") == name;
  if (!plain && segment_name(segment.place, file->content) != name) return false;
  // What is computed anew with other bits differs in the last tensor too, for that depends on all before it.
  if (run_checksums(together_, kSegmentTokens, segment.rows, together_.tensors.size() - 1).front() !=
      file->last)
    return false;
  segment.name = name;
  segment.variant = plain ? "" : file->content;
  segment.stat = *stat;
  return true;
}

const std::vector<std::string>& SegmentWriter::checksums_of(Planned& segment) {
  if (!segment.checksums->empty()) return *segment.checksums;
  *segment.checksums = run_checksums(together_, kSegmentTokens, segment.rows);
  if (segment.origin != nullptr && content_digest(*segment.checksums) != segment.origin->content) {
    // A mapped file that somebody wrote to, or rows that no one had reason to check: what is in memory is the damage.
    throw Error(ErrorCode::kCorruption,
                "'" + store_.segments.path(segment.origin->name).string() +
                    "' was changed while it was in use; wake the agent again, which goes on from what is intact.");
  }
  return *segment.checksums;
}

FoundFile SegmentWriter::look_up(Planned& segment) {
  const auto stat = store_.segments.find(segment.name);
  if (!stat) return FoundFile::kNothing;
  segment.stat = *stat;
  const std::string content = content_of(segment);
  const auto known = store_.known.file(segment.name);
  if (known && known->stat == *stat && known->whole) {
    if (known->content != content) return FoundFile::kOther;
  } else {
    // Not seen whole by this process: read it before anything is built on it. A damaged one is written again, for the
    // good bytes are here.
    try {
      const OpenedSegment opened = open_segment(store_.segments, segment.name, segment.place, headers_);
      if (opened.segment.content() != content) return FoundFile::kOther;
      check_rows(opened.handle, opened.segment.file);
      segment.stat = opened.stat;
    } catch (const Error& error) {
      if (error.code() == ErrorCode::kIo) throw;
      if (error.code() != ErrorCode::kNotFound) segment.damaged = *stat;
      return FoundFile::kNothing;
    }
    store_.known.add_file(segment.name, {segment.stat, content, checksums_of(segment).back(), true});
  }
  remember(segment, content);
  return FoundFile::kSame;
}

void SegmentWriter::remember(const Planned& segment, const std::string& content) {
  if (segment.run == nullptr) return;
  segment.run->set_segment({segment.name, segment.variant, content});
  store_.known.add_run(segment.run);
}

void SegmentWriter::write_missing(bool durable, Writing& writing, SaveResult& result) {
  while (!put_missing(durable, result)) {
    do plan();
    while (!writing.claim(names(), found()));
  }
  result.segments_shared = int(segments_.size()) - result.segments_written;
  result.segments = names();
  if (durable) store_.segments.flush(stored_files(segments_, true));
}

bool SegmentWriter::put_missing(bool durable, SaveResult& result) {
  std::vector<Planned*> missing;
  for (auto& segment : segments_) {
    if (segment.write) missing.push_back(&segment);
  }
  if (missing.empty()) return true;
  // Two writers: one fills the page cache while the other waits for its fsync.
  std::vector<std::optional<TemporaryFile>> files(missing.size());
  parallel_for(missing.size(), 2, [&](size_t i) { files[i].emplace(write(*missing[i], durable)); });
  // In order: a segment's name says which rows come before it, so none may be there before those are.
  std::vector<StoredFile> put;
  for (size_t i = 0; i < missing.size(); ++i) {
    Planned& segment = *missing[i];
    if (!put_in_place(store_, store_.segments, segment, *files[i])) break;
    segment.stat = files[i]->stat();
    store_.written.add(segment.stat);
    const std::string content = content_of(segment);
    store_.known.add_file(segment.name, {segment.stat, content, checksums_of(segment).back(), true});
    remember(segment, content);
    if (!segment.variant.empty()) store_.segments.note_variant(segment_name(segment.place, ""), segment.name);
    put.push_back({segment.name, segment.stat});
    result.bytes_written += int64_t(segment.stat.size);
    ++result.segments_written;
  }
  if (durable) store_.segments.flush_names(put);
  return put.size() == missing.size();
}

TemporaryFile SegmentWriter::write(Planned& segment, bool durable) {
  const std::string header =
      encode_segment_header(segment.place, segment.variant, snapshot_.layout, checksums_of(segment));
  std::vector<std::span<const std::byte>> pieces{as_bytes_of(header)};
  pieces.insert(pieces.end(), segment.rows.begin(), segment.rows.end());
  pieces.push_back(token_bytes(segment.place.tokens));
  return store_.segments.write(segment.name, pieces, durable);
}

}  // namespace torpor
