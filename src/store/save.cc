#include <set>

#include "base/hash.h"
#include "store/store_impl.h"

namespace torpor {
namespace {

/// One sealed run of the snapshot on its way to disk.
struct PlannedSegment {
  const KvRun* run = nullptr;
  SegmentPlace place;
  std::string name;
  std::string variant;
  std::vector<std::string> checksums;  ///< empty until someone needed them
  bool write = false;
  uint64_t file_size = 0;

  const std::vector<std::string>& computed_checksums(const KvLayout& layout) {
    if (checksums.empty()) checksums = run_checksums(layout, *run);
    return checksums;
  }
};

bool same_owner(const std::weak_ptr<const void>& known, const std::shared_ptr<const void>& owner) {
  return owner != nullptr && !known.owner_before(owner) && !owner.owner_before(known);
}

class Saver {
 public:
  Saver(Store::Impl& store, const KvSnapshot& snapshot, bool durable)
      : store_(store), snapshot_(snapshot), durable_(durable) {}

  /// Gives every sealed run its name, and finds out which are on disk already.
  void plan() {
    const std::string identity = snapshot_.identity.digest(), layout = layout_digest(snapshot_.layout);
    std::string parent;
    for (size_t i = 0; i < snapshot_.runs.size() && snapshot_.runs[i].n_tokens == kSegmentTokens; ++i) {
      PlannedSegment segment;
      segment.run = &snapshot_.runs[i];
      segment.place = {identity, layout, parent,
                       std::span(snapshot_.tokens).subspan(i * kSegmentTokens, kSegmentTokens)};
      choose_name(segment);
      parent = segment.name;
      segments_.push_back(std::move(segment));
    }
  }

  /// Writes what is missing; with durability, all of it is on the disk when this returns.
  void write_missing(SaveResult& result) {
    std::vector<PlannedSegment*> missing;
    std::set<std::filesystem::path> directories;
    for (auto& segment : segments_) {
      if (segment.write) missing.push_back(&segment);
      if (segment.write) directories.insert(store_.segment_directory(segment.name));
    }
    result.segments_shared = int(segments_.size() - missing.size());
    if (!missing.empty()) {
      const bool first = store_.env.make_directory(store_.segments_path());
      for (const auto& directory : directories) store_.env.make_directory(directory);
      // Two writers: one fills the page cache while the other waits for its fsync.
      parallel_for(missing.size(), 2, [&](size_t i) { write(*missing[i]); });
      if (durable_) {
        for (const auto& directory : directories) store_.env.sync_directory(directory);
        store_.env.sync_directory(store_.segments_path());
        if (first) store_.env.sync_directory(store_.root);
      }
    }
    for (const auto* segment : missing) result.bytes_written += int64_t(segment->file_size);
    result.segments_written = int(missing.size());
    if (durable_) flush_shared();
  }

  const std::vector<PlannedSegment>& segments() const { return segments_; }

 private:
  void choose_name(PlannedSegment& segment) {
    // First the plain name. Rows of the same tokens that differ from those under it get a name of their own.
    for (const bool plain : {true, false}) {
      segment.variant = plain ? "" : content_digest(segment.computed_checksums(snapshot_.layout));
      segment.name = segment_name(segment.place, segment.variant);
      switch (look_up(segment)) {
        case Found::kSame: segment.write = false; return;
        case Found::kNothing: segment.write = true; return;
        case Found::kOther: break;
      }
    }
    // The variant's name holds the rows' digest: what is there and differs is not what it says.
    segment.write = true;
  }

  enum class Found { kNothing, kSame, kOther };

  Found look_up(PlannedSegment& segment) {
    const auto path = store_.segment_path(segment.name);
    const auto stat = store_.env.stat(path);
    if (!stat) return Found::kNothing;
    segment.file_size = stat->size;
    const auto known = store_.recall(segment.name);
    const bool same_rows =
        known && same_owner(known->owner, segment.run->owner) && known->bytes == segment.run->bytes.data();
    if (same_rows && known->stat != *stat && known->content != content_digest(segment.computed_checksums(snapshot_.layout))) {
      // A mapped segment that somebody wrote to: what is in memory is the damage.
      throw Error(ErrorCode::kCorruption, "'" + path.string() + "' was changed while it was in use; wake the agent again, "
                                          "which goes on from what is intact.");
    }
    if (known && known->stat == *stat) {
      if (same_rows) return Found::kSame;
      if (known->content != content_digest(segment.computed_checksums(snapshot_.layout))) return Found::kOther;
      store_.remember(segment.name,
                      {known->stat, known->content, segment.run->owner, segment.run->bytes.data(), known->durable});
      return Found::kSame;
    }
    // Not seen by this process: read it whole before anything is built on it. A damaged one is written again, for the
    // good bytes are here.
    try {
      const OpenedSegment opened = open_segment(store_.env, path, segment.name, segment.place);
      const std::string content = opened.segment.content();
      if (content != content_digest(segment.computed_checksums(snapshot_.layout))) return Found::kOther;
      check_rows(opened.handle, opened.segment.file);
      store_.remember(segment.name, {opened.stat, content, segment.run->owner, segment.run->bytes.data(), false});
      return Found::kSame;
    } catch (const Error& error) {
      if (error.code() == ErrorCode::kIo) throw;
      return Found::kNothing;
    }
  }

  void write(PlannedSegment& segment) {
    const auto& checksums = segment.computed_checksums(snapshot_.layout);
    const std::string header = encode_segment_header(segment.place, segment.variant, snapshot_.layout, checksums);
    const FileStat stat =
        store_.write_file(store_.segment_path(segment.name),
                          {as_bytes_of(header), segment.run->bytes, token_bytes(segment.place.tokens)}, durable_);
    segment.file_size = stat.size;
    store_.remember(segment.name,
                    {stat, content_digest(checksums), segment.run->owner, segment.run->bytes.data(), false});
  }

  /// A shared segment may have been written by a save that asked for less, or whose fsync we did not see.
  void flush_shared() {
    std::set<std::filesystem::path> directories;
    for (auto& segment : segments_) {
      auto known = store_.recall(segment.name);
      if (known && known->durable) continue;
      if (!segment.write) {
        store_.env.open(store_.segment_path(segment.name), OpenMode::kRead).sync();
        directories.insert(store_.segment_directory(segment.name));
      }
    }
    for (const auto& directory : directories) store_.env.sync_directory(directory);
    if (!directories.empty()) store_.env.sync_directory(store_.segments_path());
    for (auto& segment : segments_) {
      if (auto known = store_.recall(segment.name); known && !known->durable) {
        known->durable = true;
        store_.remember(segment.name, *known);
      }
    }
  }

  Store::Impl& store_;
  const KvSnapshot& snapshot_;
  const bool durable_;
  std::vector<PlannedSegment> segments_;
};

}  // namespace

SaveResult Store::Impl::save(const std::string& id, const KvSnapshot& snapshot, const std::string& model,
                             const UserMetadata& user, Durability durability) {
  check_agent_id(id);
  check_layout(snapshot.layout);
  snapshot.validate();
  if (snapshot.layout.tensors.empty() && !snapshot.tokens.empty()) {
    throw Error(ErrorCode::kInvalidArgument, "The KV layout can't be stored: it has tokens and no tensors.");
  }
  AgentInfo info;
  info.agent_id = id;
  info.model = model;
  info.identity = snapshot.identity;
  info.cache_size = int64_t(snapshot.tokens.size());
  info.user = user;
  info.created_at = info.updated_at = format_time(env.now());
  // Refuses what can't be stored before anything is written.
  for (const auto& [key, value] : agent_metadata(info)) json_quote(key), json_quote(value);

  const FileLock lock = lock_store(LockMode::kShared);
  if (env.exists(agent_path(id))) {
    try {
      info.created_at = open_agent(id).agent.info.created_at;
    } catch (const Error&) {
      // A damaged file is being replaced: the agent begins anew.
    }
  }
  const bool durable = durability == Durability::kFull;
  SaveResult result;
  Saver saver(*this, snapshot, durable);
  saver.plan();
  saver.write_missing(result);
  for (const auto& segment : saver.segments()) {
    info.segments.push_back(segment.name);
    info.bytes += int64_t(segment.file_size);
  }

  const bool has_tail = saver.segments().size() < snapshot.runs.size();
  std::vector<std::string> checksums;
  std::span<const std::byte> tail;
  if (has_tail) {
    checksums = run_checksums(snapshot.layout, snapshot.runs.back());
    tail = snapshot.runs.back().bytes;
  }
  checksums.push_back(hash_hex(token_bytes(snapshot.tokens)));
  const std::string header =
      encode_torpor_header("agent", agent_metadata(info), snapshot.layout,
                           has_tail ? uint64_t(snapshot.runs.back().n_tokens) : 0, snapshot.tokens.size(), checksums,
                           &info.hash);
  const FileStat stat =
      write_file(agent_path(id), {as_bytes_of(header), tail, token_bytes(snapshot.tokens)}, durable);
  if (durable) env.sync_directory(root);
  info.tail_bytes = int64_t(stat.size);
  info.bytes += info.tail_bytes;
  result.bytes_written += info.tail_bytes;
  if (durability != Durability::kNone) result.bytes_written += write_sidecar(info, stat);
  return result;
}

}  // namespace torpor
