#pragma once
/// One user turn of an agent as a transaction: begin, append, commit or roll back. It owns what a turn changes of an
/// agent: messages, history, version, rows and save error. Engine thread only.

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "agents/manager.h"
#include "torpor/agents.h"
#include "torpor/text.h"

namespace torpor {

/// What is said to the agent.
struct TurnInput {
  std::string prompt;                              ///< UTF-8; one user message, or plain text with `raw`
  std::optional<std::string> system;               ///< for a new agent; must equal the agent's own otherwise
  bool raw = false;                                ///< the prompt is appended as it stands, without the chat template
  std::span<const Message> messages{};             ///< the whole conversation, instead of these three
  bool keeps = false;                              ///< by messages: kBusy where the agent holds what they don't repeat
  std::string branch_of{};                         ///< by messages: a new agent begins with what it shares with this one
  std::string variables{};                         ///< of the template (template_variables); by prompt, empty: the agent's own
  bool special = false;                            ///< Phrasing::special
  std::shared_ptr<const Tokenizer> tokenizer;
  std::shared_ptr<const ChatTemplate> chat_template;  ///< nullptr: the model has none
};

/// The field of the kBusy that TurnInput::keeps gives.
inline constexpr const char* kBranchTaken = "TurnRequest::on_divergence";

/// Begins in the constructor. Whoever computes then appends the rows of `pending()`, and of the answer, to `cache()`,
/// and tells it their ids (KvCache::record_tokens). Memory for them is reserved with AgentManager::reserve. Then
/// `commit`, and `save`.
///
/// The destructor rolls back what was not committed: rows, messages, history and version are what they were before. An
/// agent that the turn had to wake goes back to sleep if it has nothing unsaved. A new one vanishes.
class TurnTransaction {
 public:
  /// Renders the turn. Leaves rows to start from in the agent's cache: its own, or for a new agent those of the longest
  /// prefix that anyone has. One token at least is left to compute. kInvalidArgument for a system prompt or a prompt that
  /// can't be said to this agent. kBusy when the agent is in another turn. kCorruption when rows that were lost can't be
  /// computed again. kResourceExhausted. After an error all is as if the transaction had never been.
  TurnTransaction(AgentManager& manager, AgentHold hold, const TurnInput& input);
  ~TurnTransaction();
  TurnTransaction(const TurnTransaction&) = delete;

  const Agent& agent() const noexcept { return *hold_; }
  /// Whether the agent had to be woken, or made, for this turn.
  bool woke() const noexcept { return hold_.woke(); }
  /// Every id that the agent is to hold before it answers.
  const std::vector<int32_t>& tokens() const noexcept { return tokens_; }
  /// How many of them had their rows when the turn began.
  int reused() const noexcept { return reused_; }
  KvCache& cache() noexcept { return *hold_->cache; }
  /// How many of the prompt's tokens somebody has rows of, though they are computed again for want of a state between
  /// reused() and them.
  int again() const noexcept;
  /// Of a model with recurrent layers: after which tokens of the prompt a state is to be kept (KvCache::keep_state).
  const std::vector<int64_t>& stops() const noexcept { return stops_; }
  /// Another turn waits for the rows of the first `position` tokens. It can go on from a state alone, so one is kept.
  void stop_at(int64_t position);
  /// After rows were computed: keeps the live state if it is one of stops(). Earlier ones go that a commit would not
  /// leave.
  void keep_due_state();
  /// Takes back the rows from `n_tokens` on.
  void take_back(int n_tokens) { manager_.take_back(*hold_, n_tokens); }
  /// Whether the agent had no rows before the turn, so that others' may take the place of those that it has by now.
  bool is_new() const noexcept { return held_ == 0; }
  /// The rows of the first tokens that another turn has (AgentManager::share_rows).
  void share_rows(const TurnTransaction& other, int n_tokens);
  /// The same of all that there are, as at the beginning (AgentManager::reuse_prefix).
  void reuse_prefix();
  /// Keeps the rows computed so far for when the prompt is asked again, or gone on from (AgentManager::keep_for_retry).
  void keep_for_retry(bool on_disk) noexcept;
  /// Puts the rows aside, so that others have their memory; `cache()` is empty until bring_back. Nothing when they are.
  /// kIo, kResourceExhausted; then nothing has changed.
  void put_aside();
  /// The inverse. kResourceExhausted when the budget has no room, kCorruption; then they stay aside.
  void bring_back();
  /// Of a turn by messages: where they part from what the agent holds.
  const std::optional<MessageDivergence>& divergence() const noexcept { return divergence_; }
  /// The ids of `tokens()` whose rows are still to be computed.
  std::span<const int32_t> pending() const noexcept;

  /// Ends the turn with this answer, whose rows follow those of `tokens()`. Without `complete` the turn was cancelled
  /// before all of the prompt's rows were computed. It did not happen, but they stay for when it is asked again. Where
  /// they take the place of rows that the agent's history has, they are kept as by keep_for_retry, in memory alone.
  void commit(Message answer, bool complete);
  /// After commit. With kWait the future is what the save comes to; else it is not valid. An error is not thrown, for
  /// the answer stands: it is in save_error, as is one of a save behind an earlier turn.
  Writer::Saving save(SaveMode mode);
  /// What is said of an answer whose save has failed so.
  static Error save_failed(const std::string& agent, const Error& error);
  const std::optional<Error>& save_error() const noexcept { return save_error_; }
  /// After commit: what has changed since the agent's last turn (AgentManager::adapt).
  const std::vector<std::string>& notices() const noexcept { return notices_; }

 private:
  void begin(const TurnInput& input);
  void plan_prompt(const TurnInput& input);
  void plan_messages(const TurnInput& input);
  /// Where states of the prompt are worth keeping.
  void plan_checkpoints(const Phrasing& phrasing, std::span<const Message> messages);
  /// The turn computes what follows the rows that the agent has now.
  void goes_on_here();
  /// Takes a longer prefix than the agent's own rows, where somebody has one.
  void reuse_longer_prefix();
  bool was_cut() const noexcept { return cut_ != nullptr || cut_aside_ != nullptr; }
  /// Rows and version are what they were before. With `may_sleep` an agent that is to go to sleep may be without rows.
  void restore(bool may_sleep) noexcept;
  void roll_back() noexcept;

  AgentManager& manager_;
  AgentHold hold_;
  bool begun_ = false, committed_ = false;
  // What the agent gets when the turn is committed: messages that it holds, and those that are new.
  std::vector<HeldMessage> messages_;
  std::vector<Message> said_;
  std::string variables_;
  std::optional<MessageDivergence> divergence_;
  std::vector<int32_t> tokens_;
  int reused_ = 0;
  int64_t known_ = 0;                   // tokens of the prompt that somebody has rows of
  std::vector<int64_t> checkpoints_, stops_;
  int64_t asked_at_ = 0;                // where the prompt is over but for the asking for an answer
  std::optional<Error> save_error_;
  std::vector<std::string> notices_;

  // What was before.
  uint64_t version_ = 0, queued_version_ = 0;
  int held_ = 0;
  std::unique_ptr<KvCache> cut_;        // the rows, where the turn began by cutting them
  std::shared_ptr<const RowsAside> aside_, cut_aside_;  // the agent's rows, and those of `cut_`, while they are in files
  std::vector<std::string> cut_segments_;
  std::vector<StateRef> cut_states_;
  std::vector<int64_t> cut_checkpoints_;
  Lineage cut_lineage_;
};

}  // namespace torpor
