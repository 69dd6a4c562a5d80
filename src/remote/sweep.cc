#include "remote/sweep.h"

#include <algorithm>
#include <map>
#include <set>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "torpor/error.h"

namespace torpor::remote {
namespace {

constexpr uint64_t kManifestGuess = 16384;  ///< bytes that are read at first
constexpr size_t kHeldAtOnce = 64;          ///< answers
constexpr int kRounds = 8;                  ///< in which heads of owners that are gone are freed

/// All saves of one agent, as listed.
struct Listed {
  bool has_head = false;
  std::vector<std::pair<std::string, uint64_t>> saves;  ///< names and bytes
};

std::map<std::string, Listed> by_agent(const std::vector<ObjectInfo>& objects) {
  std::map<std::string, Listed> agents;
  for (const ObjectInfo& object : objects) {
    const std::string rest = object.key.substr(std::string_view(kAgentsPrefix).size());
    const size_t slash = rest.find('/');
    if (slash == rest.npos || !is_name(std::string_view(rest).substr(0, slash))) continue;
    Listed& agent = agents[rest.substr(0, slash)];
    std::string name = rest.substr(slash + 1);
    if (name == "head") {
      agent.has_head = true;
    } else if (parse_save_name(name)) {
      agent.saves.emplace_back(std::move(name), object.bytes);
    }
  }
  return agents;
}

using Heads = std::map<std::string, HeadVersion>;

Operation<Heads> read_heads(Exchange& exchange, std::vector<std::string> agents) {
  Heads heads;
  for (size_t first = 0; first < agents.size(); first += kHeldAtOnce) {
    const std::vector<std::string> some(agents.begin() + std::ptrdiff_t(first),
                                        agents.begin() + std::ptrdiff_t(std::min(agents.size(), first + kHeldAtOnce)));
    std::vector<Request> requests;
    for (const std::string& agent : some) requests.push_back(get_request(head_key(agent)));
    const std::vector<Answer> answers = co_await ask_all_firmly(exchange, std::move(requests));
    for (size_t i = 0; i < some.size(); ++i) {
      if (answers[i].done()) heads[some[i]] = {decode_head(answers[i].text, head_key(some[i])), answers[i].tag};
    }
  }
  co_return heads;
}

std::vector<std::string> with_heads(const std::map<std::string, Listed>& listed) {
  std::vector<std::string> agents;
  for (const auto& [agent, of] : listed) {
    if (of.has_head) agents.push_back(agent);
  }
  return agents;
}

/// What saves name.
struct Named {
  std::unordered_set<std::string> keys;
  std::vector<std::string> missing;  ///< saves that are not there
};

/// `saves`: keys and bytes; 0: not known. Adds what they name to `named`.
Operation<bool> read_some_manifests(Exchange& exchange, std::map<std::string, uint64_t> saves, Named& named) {
  std::vector<Request> requests;
  for (const auto& [key, bytes] : saves) {
    requests.push_back(bytes == 0 ? get_request(key, kMostSaveBytes)
                                  : read_request(key, 0, std::min(bytes, kManifestGuess)));
  }
  std::vector<Answer> answers = co_await ask_all_firmly(exchange, requests);
  std::vector<Request> longer;
  std::vector<size_t> which;
  for (size_t i = 0; i < requests.size(); ++i) {
    const std::string& key = requests[i].key;
    if (!answers[i].done()) {
      named.missing.push_back(key);
      continue;
    }
    const uint64_t bytes = saves[key] == 0 ? answers[i].text.size() : saves[key];
    if (const size_t needed = manifest_bytes(answers[i].text, bytes, key); needed > answers[i].text.size()) {
      longer.push_back(read_request(key, 0, needed));
      which.push_back(i);
    }
  }
  std::vector<Answer> whole = co_await ask_all_firmly(exchange, std::move(longer));
  for (size_t k = 0; k < which.size(); ++k) answers[which[k]] = std::move(whole[k]);
  for (size_t i = 0; i < requests.size(); ++i) {
    if (!answers[i].done()) continue;
    for (std::string& name : decode_manifest(answers[i].text, requests[i].key)) named.keys.insert(std::move(name));
  }
  co_return true;
}

Operation<Named> read_manifests(Exchange& exchange, std::map<std::string, uint64_t> saves) {
  Named named;
  std::map<std::string, uint64_t> some;
  for (auto save = saves.begin(); save != saves.end();) {
    some.insert(*save);
    if (++save != saves.end() && some.size() < kHeldAtOnce) continue;
    co_await read_some_manifests(exchange, std::exchange(some, {}), named);
  }
  co_return named;
}

class SaveIds {
 public:
  explicit SaveIds(std::string begin) : begin_(std::move(begin)) {}
  std::string next() {
    static constexpr char kDigits[] = "0123456789abcdef";
    std::string id = begin_;
    for (int shift = 28; shift >= 0; shift -= 4) id.push_back(kDigits[count_ >> shift & 15]);
    ++count_;
    return id;
  }

 private:
  std::string begin_;
  uint64_t count_ = 0;
};

/// Whether a sweep that the record names is over. One under way renews its lease again and again.
Operation<bool> is_over(Exchange& exchange, LeaseWatch& watch, std::string sweeper, SweepOptions options) {
  std::string tag;
  for (int look = 0; look < options.looks; ++look) {
    if (look > 0) co_await exchange.ask(wait_request(options.look_every));
    const bool looked = co_await watch.look(exchange);
    if (!looked) continue;
    if (watch.is_gone(sweeper)) co_return true;
    const auto seen = watch.seen().find(sweeper);
    if (seen == watch.seen().end()) continue;
    if (!tag.empty() && tag != seen->second.tag) break;
    tag = seen->second.tag;
  }
  co_return false;
}

/// Steps 3 to 8, once the record is `mine`.
Operation<Swept> sweep_generation(Exchange& exchange, LeaseWatch& watch, SweepOptions options, SweepRecord mine,
                                  Heads before, SaveIds& ids) {
  Swept result;
  result.outcome = Swept::Outcome::kWaited;
  const int64_t generation = result.generation = mine.generation;

  // 3
  std::set<std::string> announced, gone;
  bool all = false;
  for (int look = 0; look < options.looks && !all; ++look) {
    if (look > 0) co_await exchange.ask(wait_request(options.look_every));
    all = co_await watch.look(exchange, true);
    announced.clear();
    gone.clear();
    for (const auto& [session, seen] : watch.seen()) {
      if (seen.is_gone()) {
        gone.insert(session);
      } else if (seen.lease.generation >= generation) {
        announced.insert(session);
      } else {
        all = false;
      }
    }
  }
  if (!all) co_return result;

  // 4
  Answer second = co_await ask_firmly(exchange, list_request(kAgentsPrefix));
  const std::map<std::string, Listed> listed = by_agent(second.objects);
  std::vector<std::string> to_read = with_heads(listed);
  Heads heads;
  for (int round = 0; !to_read.empty(); ++round) {
    if (round == kRounds) co_return result;
    Heads read = co_await read_heads(exchange, to_read);
    to_read.clear();
    const bool looked = co_await watch.look(exchange);
    if (!looked) co_return result;
    for (auto& [agent, version] : read) {
      const std::string& owner = version.head.owner;
      const bool young = gone.count(owner) == 0 && watch.lease(owner) != nullptr;
      heads[agent] = version;
      if (owner.empty() || announced.count(owner) > 0 || young) continue;
      Head freed = version.head;
      ++freed.epoch;
      ++freed.sequence;
      freed.owner.clear();
      freed.save_id = ids.next();
      Swap swapped = co_await swap(exchange, head_key(agent), Condition::of_tag(version.tag), encode(freed));
      if (swapped.outcome == Swap::Outcome::kDone) {
        heads[agent] = {std::move(freed), std::move(swapped.tag)};
        ++result.freed;
      } else {
        to_read.push_back(agent);
      }
    }
  }

  // 5
  std::map<std::string, uint64_t> roots;
  std::set<std::string> current;
  for (const auto& [agent, version] : heads) {
    if (version.head.file.empty()) continue;
    current.insert(save_key(agent, version.head.file));
    roots[save_key(agent, version.head.file)] = 0;
  }
  for (const auto& [agent, of] : listed) {
    const auto was = before.find(agent);
    for (const auto& [name, bytes] : of.saves) {
      const bool later = was == before.end() || name == was->second.head.file ||
                         parse_save_name(name)->sequence > was->second.head.sequence;
      const std::string key = save_key(agent, name);
      if (later || current.count(key) > 0) roots[key] = bytes;
    }
  }
  const Named named = co_await read_manifests(exchange, std::move(roots));

  // 6
  Answer again = co_await ask_firmly(exchange, get_request(kSweepKey));
  if (!again.done() || decode_sweep(again.text, kSweepKey) != mine) {
    result.outcome = Swept::Outcome::kReplaced;
    co_return result;
  }
  for (const std::string& key : named.missing) {
    if (current.count(key) == 0) continue;
    throw Error(ErrorCode::kCorruption, "The object '" + key + "' is missing from the bucket, so nothing was removed; "
                                        "restore it from a copy, or remove its agent.")
        .with_path(key);
  }

  // 7
  std::vector<Request> removals;
  const auto remove = [&](const std::string& key, uint64_t bytes) {
    removals.push_back(remove_request(key));
    ++result.objects;
    result.bytes += int64_t(bytes);
  };
  for (const char* prefix : kPoolPrefixes) {
    Answer pool = co_await ask_firmly(exchange, list_request(prefix));
    for (const ObjectInfo& object : pool.objects) {
      const auto name = parse_pool_key(object.key);
      if (name && name->generation < generation && named.keys.count(object.key) == 0) remove(object.key, object.bytes);
    }
  }
  for (const auto& [agent, of] : listed) {
    const auto head = heads.find(agent);
    if (head == heads.end()) continue;
    for (const auto& [name, bytes] : of.saves) {
      const bool behind = parse_save_name(name)->sequence <= head->second.head.sequence;
      if (behind && name != head->second.head.file) remove(save_key(agent, name), bytes);
    }
  }

  // 8
  for (const std::string& session : gone) removals.push_back(remove_request(lease_key(session)));
  co_await ask_all_firmly(exchange, std::move(removals));
  result.outcome = Swept::Outcome::kDone;
  co_return result;
}

}  // namespace

Operation<Swept> sweep(Exchange& exchange, LeaseWatch& watch, SweepOptions options) {
  Swept result;
  SaveIds ids(options.save_ids);

  // 1
  Answer first = co_await ask_firmly(exchange, list_request(kAgentsPrefix));
  Heads before = co_await read_heads(exchange, with_heads(by_agent(first.objects)));

  // 2
  Answer record = co_await ask_firmly(exchange, get_request(kSweepKey));
  SweepRecord mine{1, options.session, ids.next()};
  Condition condition = Condition::absent();
  if (record.done()) {
    const SweepRecord there = decode_sweep(record.text, kSweepKey);
    if (!there.sweeper.empty() && there.sweeper != options.session) {
      const bool over = co_await is_over(exchange, watch, there.sweeper, options);
      if (!over) co_return result;
    }
    mine.generation = there.generation + 1;
    condition = Condition::of_tag(record.tag);
  }
  Swap raised = co_await swap(exchange, kSweepKey, std::move(condition), encode(mine));
  if (raised.outcome != Swap::Outcome::kDone) co_return result;

  std::exception_ptr error;
  try {
    result = co_await sweep_generation(exchange, watch, options, mine, std::move(before), ids);
  } catch (...) {
    error = std::current_exception();
  }
  // However it went, others may sweep. If no answer comes, this session may, or all once its lease is gone.
  SweepRecord ended{mine.generation, {}, ids.next()};
  co_await swap(exchange, kSweepKey, Condition::of_tag(raised.tag), encode(ended));
  if (error) std::rethrow_exception(error);
  co_return result;
}

}  // namespace torpor::remote
