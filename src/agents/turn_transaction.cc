#include "agents/turn_transaction.h"

#include <algorithm>
#include <new>
#include <utility>

#include "agents/checkpoints.h"
#include "torpor/error.h"

namespace torpor {
namespace {

void require_template(const TurnInput& input) {
  if (input.chat_template != nullptr) return;
  throw Error(ErrorCode::kInvalidArgument, "The model has no chat template; append the prompt as plain text instead.")
      .with_field("TurnRequest::raw");
}

}  // namespace

TurnTransaction::TurnTransaction(AgentManager& manager, AgentHold hold, const TurnInput& input)
    : manager_(manager), hold_(std::move(hold)) {
  try {
    begin(input);
  } catch (const std::bad_alloc&) {
    roll_back();
    throw Error(ErrorCode::kResourceExhausted, "Out of memory at the beginning of a turn; let other agents sleep first.");
  } catch (...) {
    roll_back();
    throw;
  }
}

TurnTransaction::~TurnTransaction() {
  if (committed_) {
    hold_->in_turn = false;
  } else {
    roll_back();
  }
}

void TurnTransaction::begin(const TurnInput& input) {
  Agent& agent = *hold_;
  if (agent.in_turn) throw Error(ErrorCode::kBusy, "The agent '" + agent.id + "' is in a turn; wait until that is over.");
  agent.in_turn = begun_ = true;
  version_ = agent.version;
  queued_version_ = agent.queued_version;
  held_ = agent.cache->length();

  input.messages.empty() ? plan_prompt(input) : plan_messages(input);

  const std::span<const int32_t> wanted = std::span(tokens_).first(tokens_.empty() ? 0 : tokens_.size() - 1);
  known_ = std::ranges::mismatch(wanted, agent.history).in1 - wanted.begin();
  if (held_ > 0) agent.cache->keep_state();
  const std::vector<int32_t>& held = agent.cache->tokens();
  if (!held.empty()) {
    const auto agree = std::mismatch(held.begin(), held.end(), tokens_.begin(), tokens_.end());
    const int common = int(std::min<ptrdiff_t>(agree.first - held.begin(), std::max<ptrdiff_t>(ssize(tokens_) - 1, 0)));
    if (common < agent.cache->length()) {
      if (size_t(common) < agent.history.size()) agent.record().cut(size_t(common));  // throws where that can't be
      cut_ = agent.cache->clone();
      cut_segments_ = agent.segments;
      cut_states_ = agent.states;
      cut_checkpoints_ = agent.checkpoints;
      cut_lineage_ = agent.lineage;
      manager_.truncate(agent, common);
    }
  }
  if (agent.cache->length() == 0) {
    manager_.reuse_prefix(agent, tokens_, checkpoints_, &known_);
  } else if (tokens_.size() > size_t(agent.cache->length()) + kSegmentTokens) {
    reuse_longer_prefix();
  }
  goes_on_here();
  // The prompt parts from what is known there, and others may part there, too.
  if (again() > 0) checkpoints_.push_back(known_);
  if (manager_.has_states()) {
    stops_ = checkpoint_stops(reused_, ssize(tokens_), manager_.stride_of(agent), checkpoints_);
  }
  if (has_unknown_tokens(pending())) {
    throw Error(ErrorCode::kCorruption, "The agent '" + agent.id + "' is damaged, and can't be computed again: it was imported "
                                        "without its token ids. Import it once more.");
  }
}

void TurnTransaction::plan_checkpoints(const Phrasing& phrasing, std::span<const Message> messages) {
  if (!manager_.has_checkpoints()) return;
  asked_at_ = ssize(tokens_) - int64_t(count_asking(phrasing, tokens_));
  const int64_t system = int64_t(count_system(phrasing, messages, tokens_));
  // Who has no more in common than the system's part finds it on disk at the end of a segment.
  checkpoints_ = {system / kSegmentTokens * kSegmentTokens, system, asked_at_};
}

void TurnTransaction::plan_prompt(const TurnInput& input) {
  const Agent& agent = *hold_;
  messages_ = agent.messages;
  if (input.system) {
    const bool has_own = !messages_.empty() && messages_.front().role == "system";
    if (agent.history.empty() && messages_.empty()) {
      said_.push_back({"system", *input.system});
    } else if (!has_own || messages_.front().content != *input.system) {
      throw Error(ErrorCode::kInvalidArgument, "The agent '" + agent.id + "' already has another system prompt; give none, or "
                                               "start a new agent.")
          .with_agent(agent.id)
          .with_field("TurnRequest::system", has_own ? messages_.front().content : "", *input.system);
    }
    if (input.raw) {
      throw Error(ErrorCode::kInvalidArgument, "A system prompt needs the chat template, which plain text goes without; put it into "
                                               "the prompt.")
          .with_field("TurnRequest::system");
    }
  }
  variables_ = messages_.empty() && agent.history.empty() ? input.variables : agent.variables;
  std::vector<int32_t> added;
  if (input.raw) {
    added = agent.history.empty() ? input.tokenizer->encode(input.prompt, true)
                                  : input.tokenizer->encode(RenderedText{input.prompt}, agent.history.back());
  } else {
    require_template(input);
    std::vector<Message> so_far(messages_.begin(), messages_.end());
    so_far.insert(so_far.end(), said_.begin(), said_.end());
    const Phrasing phrasing{*input.tokenizer, *input.chat_template, input.variables.empty() ? variables_ : input.variables,
                            input.special};
    added = encode_user_turn(phrasing, std::move(so_far), agent.history, input.prompt, variables_);
  }
  said_.push_back({"user", input.prompt});
  tokens_ = agent.history;
  tokens_.insert(tokens_.end(), added.begin(), added.end());
  if (input.raw) {
    asked_at_ = ssize(tokens_) - 1;  // the same text may come again
    checkpoints_ = {asked_at_};
  } else {
    std::vector<Message> all(messages_.begin(), messages_.end());
    all.insert(all.end(), said_.begin(), said_.end());
    plan_checkpoints({*input.tokenizer, *input.chat_template, variables_, input.special}, all);
  }
}

void TurnTransaction::plan_messages(const TurnInput& input) {
  const Agent& agent = *hold_;
  const std::span<const Message> given = input.messages;
  require_template(input);
  if (given.back().role == "assistant") {
    throw Error(ErrorCode::kInvalidArgument, "The last message is the assistant's own; end with what it is to answer.")
        .with_field("TurnRequest::messages");
  }
  const bool branches = agent.history.empty() && !input.branch_of.empty();
  Remembered held = branches ? manager_.remembered(input.branch_of) : Remembered{agent.messages, agent.variables, agent.history};
  const size_t equal = count_equal(held.messages, given);
  if (equal < held.messages.size() || (equal == 0 && !held.history.empty())) {
    divergence_ = {.message = int(equal), .held = equal < held.messages.size() ? message_to_json(held.messages[equal]) : "",
              .given = equal < given.size() ? message_to_json(given[equal]) : ""};
  }
  const Phrasing phrasing{*input.tokenizer, *input.chat_template, input.variables, input.special};
  size_t answered = last_answer(held.messages, equal);
  if (answered > 0) {
    const size_t end = size_t(held.messages[answered - 1].end);
    const int32_t last = held.history.at(end - 1);
    const auto added = encode_after_answer(phrasing, {given.begin(), given.end()}, answered, last, held.variables);
    if (added) {
      tokens_.assign(held.history.begin(), held.history.begin() + ptrdiff_t(end));
      tokens_.insert(tokens_.end(), added->begin(), added->end());
    } else {
      if (!same_variables(held.variables, input.variables)) {
        divergence_ = {.message = 0, .held = held.variables, .given = input.variables, .beginning = true};
      }
      answered = 0;
    }
  }
  if (divergence_ && input.keeps && !branches) {
    throw Error(ErrorCode::kBusy, "The agent '" + agent.id + "' has gone on otherwise meanwhile; ask again.")
        .with_agent(agent.id)
        .with_field(kBranchTaken);
  }
  if (answered == 0) tokens_ = encode_conversation(phrasing, given);
  variables_ = answered == 0 ? input.variables : std::move(held.variables);
  messages_.assign(std::make_move_iterator(held.messages.begin()),
                   std::make_move_iterator(held.messages.begin() + ptrdiff_t(answered)));
  said_.assign(given.begin() + ptrdiff_t(answered), given.end());
  plan_checkpoints(phrasing, given);
}

std::span<const int32_t> TurnTransaction::pending() const noexcept {
  const size_t held = size_t(hold_->cache->length());
  return held < tokens_.size() ? std::span(tokens_).subspan(held) : std::span<const int32_t>();
}

void TurnTransaction::reuse_longer_prefix() {
  Agent& agent = *hold_;
  auto before = agent.cache->clone();
  std::vector<std::string> segments = agent.segments;
  std::vector<StateRef> states = agent.states;
  std::vector<int64_t> checkpoints = agent.checkpoints;
  Lineage lineage = agent.lineage;
  if (manager_.reuse_prefix(agent, tokens_, checkpoints_) == 0 || cut_ != nullptr) return;
  cut_ = std::move(before);
  cut_segments_ = std::move(segments);
  cut_states_ = std::move(states);
  cut_checkpoints_ = std::move(checkpoints);
  cut_lineage_ = std::move(lineage);
}

void TurnTransaction::share_rows(const TurnTransaction& other, int n_tokens) {
  if (!is_new()) return;
  known_ = std::max<int64_t>(known_, n_tokens);
  if (manager_.share_rows(*hold_, *other.hold_, n_tokens)) goes_on_here();
}

void TurnTransaction::reuse_prefix() {
  if (is_new() && manager_.reuse_prefix(*hold_, tokens_, checkpoints_, &known_) > 0) goes_on_here();
}

int TurnTransaction::again() const noexcept {
  return manager_.has_checkpoints() ? int(std::max<int64_t>(0, known_ - reused_)) : 0;
}

void TurnTransaction::stop_at(int64_t position) {
  const auto next = std::ranges::lower_bound(stops_, position);
  const bool is_there = next != stops_.end() && *next == position;
  if (!manager_.has_states() || is_there || position <= hold_->cache->length() || position >= ssize(tokens_)) return;
  checkpoints_.push_back(position);
  stops_.insert(next, position);
}

void TurnTransaction::keep_due_state() {
  if (!std::ranges::binary_search(stops_, int64_t(hold_->cache->length()))) return;
  hold_->cache->keep_state();
  manager_.thin_states_of_turn(*hold_, reused_, checkpoints_);
}

void TurnTransaction::goes_on_here() {
  reused_ = hold_->cache->length();
  if (reused_ > 0) hold_->cache->keep_state();
}

void TurnTransaction::keep_for_retry(bool on_disk) noexcept {
  const int length = aside_ != nullptr ? aside_->length() : hold_->cache->length();
  if (length > reused_) manager_.keep_for_retry(*hold_, aside_, reused_, on_disk, std::min(int(tokens_.size()), length));
}

void TurnTransaction::put_aside() {
  if (aside_ != nullptr) return;
  auto cut = cut_ != nullptr ? manager_.put_aside(*cut_) : nullptr;
  aside_ = manager_.put_aside(*hold_);
  if (cut == nullptr) return;
  cut_aside_ = std::move(cut);  // brought back by nothing but a roll-back
  cut_.reset();
}

void TurnTransaction::bring_back() {
  if (aside_ == nullptr) return;
  manager_.bring_back(*hold_, *aside_);
  aside_.reset();
}

void TurnTransaction::commit(Message answer, bool complete) {
  Agent& agent = *hold_;
  if (!complete && !agent.whole() && (was_cut() || !agent.agrees())) {
    // The agent has none of these rows: in its file they would stand under its messages.
    keep_for_retry(false);
    restore(false);
    committed_ = true;
    return;
  }
  if (complete) {
    for (Message& message : said_) messages_.push_back({std::move(message), int(tokens_.size())});
    messages_.push_back({std::move(answer), agent.cache->length()});
    std::vector<int32_t> history = agent.cache->tokens();
    agent.messages = std::move(messages_);
    agent.variables = std::move(variables_);
    agent.history = std::move(history);
    if (size_t(reused_) < agent.shortest_cut) agent.shortest_cut = 0;  // the rows that it was for are gone
  }
  manager_.thin_states(agent, asked_at_, checkpoints_);
  notices_ = manager_.adapt(agent, reused_);
  if (again() > 0) {
    const std::string from = std::to_string(reused_), to = std::to_string(known_);
    notices_.push_back(std::to_string(again()) + " tokens that were known are computed again: there " +
                       (manager_.has_states() ? "is no state" : "are no rows of the sliding windows") + " between " +
                       from + " and " + to + " tokens.");
  }
  agent.changed();
  committed_ = true;
  cut_.reset();
  cut_aside_.reset();
}

Writer::Saving TurnTransaction::save(SaveMode mode) {
  Agent& agent = *hold_;
  // Of a save behind an earlier turn. One that waits now tries again.
  if (mode != SaveMode::kWait) save_error_ = std::exchange(agent.save_error, std::nullopt);
  try {
    if (mode == SaveMode::kWait) return manager_.begin_save(agent);
    if (mode == SaveMode::kBehind) manager_.save_behind(agent);
  } catch (const Error& error) {
    save_error_ = save_failed(agent.id, error);
  }
  return {};
}

Error TurnTransaction::save_failed(const std::string& agent, const Error& error) {
  const std::string what = agent.empty() ? "its segments" : "agent '" + agent + "'";
  return Error(error.code(), "The answer is complete, but " + what + " could not be saved: " + error.what())
      .with_agent(agent)
      .with_path(error.path())
      .with_field(error.field(), error.expected(), error.found());
}

void TurnTransaction::restore(bool may_sleep) noexcept {
  Agent& agent = *hold_;
  // Somebody saved it meanwhile, rows of this turn with it.
  const bool queued = agent.queued_version != queued_version_;
  const bool cut = was_cut();
  const RowsAside* const before = cut_aside_ != nullptr ? cut_aside_.get() : aside_.get();
  // One that goes back to sleep needs no rows.
  const bool rowless = may_sleep && before != nullptr && hold_.woke() && version_ == agent.saved_version &&
                       agent.holds == 1 && !queued;
  try {
    if (before != nullptr && !rowless) manager_.bring_back(agent, *before, true);
    if (cut_ != nullptr) agent.cache = std::move(cut_);
    if (cut) {
      agent.segments = std::move(cut_segments_);
      agent.states = std::move(cut_states_);
      agent.checkpoints = std::move(cut_checkpoints_);
      agent.lineage = std::move(cut_lineage_);
    } else if (agent.cache->length() > held_) {
      manager_.take_back(agent, held_);
    }
  } catch (...) {
    // The rows stay: those of the history, and of a prompt that may be asked again.
  }
  const bool as_before = rowless || (agent.cache->length() == held_ && !queued);
  as_before ? void(agent.version = version_) : agent.changed();
}

void TurnTransaction::roll_back() noexcept {
  Agent& agent = *hold_;
  const std::string id = agent.id;
  if (begun_) {
    agent.in_turn = false;
    restore(true);
  }
  const bool sleeps = hold_.woke() && !agent.dirty() && agent.holds == 1;
  hold_.release();
  if (!sleeps || id.empty()) return;
  try {
    manager_.drop(id);
  } catch (...) {
    // It stays awake.
  }
}

}  // namespace torpor
