#include "remote/ownership.h"

#include "torpor/error.h"

namespace torpor::remote {
namespace {

constexpr int kRaces = 4;  ///< that an acquisition loses before it gives up

/// Swaps the head of an agent that is one's own.
Operation<Saved> swap_head(Exchange& exchange, std::string agent, std::string tag, Head next) {
  const std::string key = head_key(agent);
  Swap swapped = co_await swap(exchange, key, Condition::of_tag(std::move(tag)), encode(next));
  Saved saved;
  if (swapped.outcome == Swap::Outcome::kUnknown) co_return saved;
  saved.version.tag = std::move(swapped.tag);
  if (swapped.outcome == Swap::Outcome::kDone) {
    saved.outcome = Saved::Outcome::kCommitted;
    saved.version.head = std::move(next);
  } else {
    saved.outcome = Saved::Outcome::kMoved;
    if (swapped.text) saved.version.head = decode_head(*swapped.text, key);
  }
  co_return saved;
}

Head next_of(const Head& head, std::string save_id) {
  Head next = head;
  ++next.sequence;
  next.save_id = std::move(save_id);
  return next;
}

}  // namespace

Operation<Acquired> acquire(Exchange& exchange, std::string agent, std::string session, Make make, std::string save_id,
                            IsGone is_gone) {
  const std::string key = head_key(agent);
  Acquired result;
  for (int race = 0; race < kRaces && result.outcome != Acquired::Outcome::kOwned; ++race) {
    Answer found = co_await ask_firmly(exchange, get_request(key));
    Head next;
    Condition condition = Condition::absent();
    const bool is_there = found.status != Answer::Status::kAbsent;
    if (is_there) {
      result.version = {decode_head(found.text, key), found.tag};
      condition = Condition::of_tag(found.tag);
      next = next_of(result.version.head, save_id);
      ++next.epoch;
    }
    const Head& head = result.version.head;
    if (is_there && head.save_id == save_id) {  // an earlier attempt of this very call
      result.outcome = Acquired::Outcome::kOwned;
      break;
    }
    const bool is_agent = is_there && !head.deleted;
    if (is_agent ? make == Make::kAlways : make == Make::kNever) {
      result.outcome = is_agent ? Acquired::Outcome::kTaken : Acquired::Outcome::kAbsent;
      co_return result;
    }
    if (is_agent && head.owner == session) {
      result.outcome = Acquired::Outcome::kOwned;
      break;
    }
    if (is_agent && !head.owner.empty() && !is_gone(head.owner)) {
      result.outcome = Acquired::Outcome::kMoved;
      co_return result;
    }
    next.save_id = save_id;
    next.owner = session;
    if (next.deleted) {
      next.deleted = false;
      next.file.clear();
      next.turn.reset();
      next.past.clear();
    }
    Swap swapped = co_await swap(exchange, key, std::move(condition), encode(next));
    if (swapped.outcome == Swap::Outcome::kDone) {
      result.outcome = Acquired::Outcome::kOwned;
      result.version = {std::move(next), std::move(swapped.tag)};
    }
  }
  if (result.outcome != Acquired::Outcome::kOwned) co_return result;
  Answer sweep = co_await ask_firmly(exchange, get_request(kSweepKey));
  if (sweep.done()) result.generation = decode_sweep(sweep.text, kSweepKey).generation;
  co_return result;
}

Operation<Saved> save(Exchange& exchange, HeadVersion version, SaveRequest request, int64_t generation) {
  Saved saved;
  saved.keys = request.kept;
  const auto key_of = [&](size_t i) -> const std::string& { return saved.keys[request.kept.size() + i]; };
  std::vector<Request> looks;
  for (const Upload& upload : request.uploads) {
    saved.keys.push_back(pool_key({upload.path, generation}));
    looks.push_back(read_request(saved.keys.back(), kChecksumAt, kChecksumDigits));
  }
  // What somebody else has put is not sent. Something damaged is there, too.
  std::vector<Answer> contents = co_await ask_all_firmly(exchange, std::move(looks), true);
  const auto is_there = [](const Answer& look) { return look.status != Answer::Status::kAbsent; };
  std::vector<Request> puts;
  std::vector<size_t> put;
  for (size_t i = 0; i < request.uploads.size(); ++i) {
    if (is_there(contents[i])) continue;
    puts.push_back(put_request(key_of(i), {}, Condition::absent(), request.uploads[i].blob));
    put.push_back(i);
  }
  Head next = next_of(version.head, request.save_id);
  next.file = save_name({next.epoch, next.sequence, request.save_id});
  // The last turn's answer is where the agent ended, and that is elsewhere now.
  if (next.turn && next.turn != request.turn) next.past.insert(next.past.begin(), turn_mark(next.turn->id));
  if (next.past.size() > kMostPast) next.past.resize(kMostPast);
  next.turn = request.turn;
  puts.push_back(put_request(save_key(request.agent, next.file), encode_manifest(saved.keys), {}, request.agent_file));
  const std::vector<Answer> answers = co_await ask_all_firmly(exchange, std::move(puts));

  // What is there already may be one's own put, another's of the same bytes, or rows that differ.
  std::vector<Request> reads;
  std::vector<size_t> read;
  for (size_t k = 0; k < put.size(); ++k) {
    if (answers[k].done()) {
      ++saved.uploaded;
      continue;
    }
    reads.push_back(read_request(key_of(put[k]), kChecksumAt, kChecksumDigits));
    read.push_back(put[k]);
  }
  std::vector<Answer> again = co_await ask_all_firmly(exchange, std::move(reads), true);
  for (size_t k = 0; k < read.size(); ++k) contents[read[k]] = std::move(again[k]);
  for (const size_t i : read) {
    if (is_there(contents[i])) continue;
    saved.outcome = Saved::Outcome::kMoved;  // swept: this save is so old that its worker was taken for dead
    co_return saved;
  }
  for (size_t i = 0; i < request.uploads.size(); ++i) {
    if (!is_there(contents[i])) continue;  // it was put just now
    if (!contents[i].done() || contents[i].text != request.uploads[i].content) {
      saved.taken.push_back(request.uploads[i].path);
    }
  }
  if (!saved.taken.empty()) {
    saved.outcome = Saved::Outcome::kVariant;
    co_return saved;
  }
  Saved swapped = co_await swap_head(exchange, request.agent, version.tag, std::move(next));
  swapped.keys = std::move(saved.keys);
  swapped.uploaded = saved.uploaded;
  co_return swapped;
}

Operation<Saved> release(Exchange& exchange, std::string agent, HeadVersion version, std::string save_id) {
  Head next = next_of(version.head, std::move(save_id));
  next.owner.clear();
  Saved saved = co_await swap_head(exchange, std::move(agent), std::move(version.tag), std::move(next));
  co_return saved;
}

Operation<Saved> remove_agent(Exchange& exchange, std::string agent, HeadVersion version, std::string save_id) {
  Head next = next_of(version.head, std::move(save_id));
  next.owner.clear();
  next.file.clear();
  next.turn.reset();
  next.past.clear();
  next.deleted = true;
  Saved saved = co_await swap_head(exchange, std::move(agent), std::move(version.tag), std::move(next));
  co_return saved;
}

Operation<std::optional<ReadSave>> read_save(Exchange& exchange, std::string agent) {
  const std::string key = head_key(agent);
  std::string missing;
  for (;;) {
    Answer found = co_await ask_firmly(exchange, get_request(key));
    if (found.status == Answer::Status::kAbsent) co_return std::nullopt;
    ReadSave result;
    result.version = {decode_head(found.text, key), found.tag};
    const Head& head = result.version.head;
    if (head.file.empty()) co_return std::nullopt;
    const std::string from = save_key(agent, head.file);
    if (from == missing) {
      throw Error(ErrorCode::kCorruption,
                  "The object '" + from + "' is missing from the bucket; restore it from a copy.")
          .with_agent(agent)
          .with_path(from);
    }
    Answer saved = co_await ask_firmly(exchange, get_request(from, kMostSaveBytes));
    if (saved.done()) {
      result.keys = decode_manifest(saved.text, from);
      result.agent_file = saved.text.substr(manifest_bytes(saved.text, saved.text.size(), from));
      co_return result;
    }
    missing = from;
  }
}

TurnCheck check_turn(const Head& head, const std::string& id, const std::string& digest) {
  if (!head.turn || head.turn->id != id) {
    const bool is_past = std::find(head.past.begin(), head.past.end(), turn_mark(id)) != head.past.end();
    return is_past ? TurnCheck::kPast : TurnCheck::kRun;
  }
  return head.turn->digest == digest ? TurnCheck::kAnswered : TurnCheck::kOther;
}

}  // namespace torpor::remote
