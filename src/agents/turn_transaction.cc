#include "agents/turn_transaction.h"

#include <algorithm>
#include <new>
#include <utility>

#include "torpor/error.h"

namespace torpor {

TurnTransaction::TurnTransaction(AgentManager& manager, AgentHold hold, const TurnInput& input)
    : manager_(manager), hold_(std::move(hold)), prompt_(input.prompt) {
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

  messages_ = agent.messages;
  if (input.system) {
    const bool has_own = !messages_.empty() && messages_.front().role == "system";
    if (agent.history.empty() && messages_.empty()) {
      messages_.push_back({"system", *input.system});
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
  tokens_ = agent.history;
  const std::vector<int32_t> added = added_tokens(input);
  tokens_.insert(tokens_.end(), added.begin(), added.end());

  const std::vector<int32_t>& held = agent.cache->tokens();
  if (held.empty()) {
    manager_.reuse_prefix(agent, tokens_);
  } else {
    const auto agree = std::mismatch(held.begin(), held.end(), tokens_.begin(), tokens_.end());
    const int common = int(std::min<ptrdiff_t>(agree.first - held.begin(), std::max<ptrdiff_t>(ssize(tokens_) - 1, 0)));
    if (common < agent.cache->length()) {
      cut_ = agent.cache->clone();
      cut_segments_ = agent.segments;
      cut_lineage_ = agent.lineage;
      manager_.truncate(agent, common);
    }
  }
  reused_ = agent.cache->length();
  if (has_unknown_tokens(pending())) {
    throw Error(ErrorCode::kCorruption, "The agent '" + agent.id + "' is damaged, and can't be computed again: it was imported "
                                        "without its token ids. Import it once more.");
  }
}

std::vector<int32_t> TurnTransaction::added_tokens(const TurnInput& input) const {
  const std::vector<int32_t>& history = hold_->history;
  if (input.raw) return input.tokenizer->encode(input.prompt, history.empty());
  if (input.chat_template == nullptr) {
    throw Error(ErrorCode::kInvalidArgument, "The model has no chat template; append the prompt as plain text instead.")
        .with_field("TurnRequest::raw");
  }
  return encode_user_turn(*input.tokenizer, *input.chat_template, messages_, history, input.prompt);
}

std::span<const int32_t> TurnTransaction::pending() const noexcept {
  const size_t held = size_t(hold_->cache->length());
  return held < tokens_.size() ? std::span(tokens_).subspan(held) : std::span<const int32_t>();
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

void TurnTransaction::commit(const std::string& answer, bool complete) {
  Agent& agent = *hold_;
  if (complete) {
    for (Message& message : messages_) {
      if (message.end == 0) message.end = int(tokens_.size());  // a new system message
    }
    messages_.push_back({"user", prompt_, int(tokens_.size())});
    messages_.push_back({"assistant", answer, agent.cache->length()});
    std::vector<int32_t> history = agent.cache->tokens();
    agent.messages = std::move(messages_);
    agent.history = std::move(history);
  }
  notices_ = manager_.adapt(agent, reused_);
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

void TurnTransaction::roll_back() noexcept {
  Agent& agent = *hold_;
  const std::string id = agent.id;
  if (begun_) {
    agent.in_turn = false;
    const bool queued = agent.queued_version != queued_version_;  // somebody saved it meanwhile, rows of this turn with it
    const bool was_cut = cut_ != nullptr || cut_aside_ != nullptr;
    const RowsAside* const before = cut_aside_ != nullptr ? cut_aside_.get() : aside_.get();
    // One that goes back to sleep needs no rows.
    const bool rowless = before != nullptr && hold_.woke() && version_ == agent.saved_version && agent.holds == 1 && !queued;
    try {
      if (before != nullptr && !rowless) manager_.bring_back(agent, *before, true);
      if (cut_ != nullptr) agent.cache = std::move(cut_);
      if (was_cut) {
        agent.segments = std::move(cut_segments_);
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
