#pragma once
/// One turn of an engine's, step by step: an agent's transaction and a generation over its rows. Engine thread only.

#include <chrono>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "agents/turn_transaction.h"
#include "engine/answer_states.h"
#include "engine/generation.h"
#include "engine/scheduler.h"
#include "torpor/engine.h"

namespace torpor {

/// What all turns of an engine compute with.
struct EngineParts {
  std::string model_name;
  double load_ms = 0;
  std::unique_ptr<Model> model;
  std::shared_ptr<const Tokenizer> tokenizer;
  std::shared_ptr<const ChatTemplate> chat_template;  ///< nullptr: the model has none
  std::unique_ptr<AgentManager> agents;
  std::optional<PrefillPace> pace;
  RowCost row_cost;
  EngineWork work;
  uint64_t ended = 0;  // turns
};

/// What a turn leaves to its caller.
struct TurnOutcome {
  TurnResult result;
  Writer::Saving saving;  ///< valid when the caller is to wait for it

  /// On the caller's thread.
  void wait_for_save();
};

class EngineTurn final : public Scheduler::Turn {
 public:
  /// Wakes or makes the agent and begins its transaction. All that is given outlives the turn. Errors leave the agent as it was.
  /// `branch_of`: the agent that a new one begins with, for OnDivergence::kBranch.
  EngineTurn(EngineParts& parts, const TurnRequest& request, std::string branch_of, Scheduler::Listener& listener,
             TurnOutcome& outcome);

  /// Computes the next rows of several turns, all of one engine in one forward pass per KV format: of each that decodes a token,
  /// of prompts what the pace gives (PrefillPace::share). On MLX's backend a prompt's chunk has a pass of its own.
  static void step(std::span<Scheduler::Step> steps, std::span<Scheduler::Turn* const> resting);
  /// Rows of a turn that is not committed are kept for when its prompt is asked again.
  ~EngineTurn() override;
  bool let_go() noexcept override;
  /// Commits and begins to save; the result is complete but for that.
  void commit() override;

 private:
  using Clock = std::chrono::steady_clock;

  /// The same of turns of one engine. `room`: whoever came before has all the room that it asked for.
  static void step(EngineParts& parts, std::span<Scheduler::Step* const> steps, std::span<EngineTurn* const> others, bool& room);
  static AgentHold wake(EngineParts& parts, const TurnRequest& request, TurnResult& result);
  TurnInput input() const;
  static GenerateOptions options_of(const TurnRequest& request, Scheduler::Listener& listener);
  struct Computing {
    EngineTurn* turn;
    Scheduler::Step* step;
    std::span<const int32_t> rows;
  };
  /// Tokens of the prompt, the last one not counted, that another turn begins with too.
  int alike(const EngineTurn& other) const;
  /// Takes the rows of its prompt that one of `others` has, itself among them, or has left. Whether it waits for more, which one
  /// of `earlier` turns computes.
  bool waits_for(std::span<const Computing> earlier, std::span<EngineTurn* const> others);
  /// At most `rows` of the prompt, up to where a state is kept next.
  int up_to_stop(int rows) const;
  /// Cuts the cache to `n_tokens`, of which rows behind the last state are computed again.
  void cut_again(int n_tokens);
  /// Generation::take, and the rows that it no longer wants go. `before`: rows that were there before the step.
  void take(std::span<const float> logits, int before);
  /// PrefillPace::share by the ranks of their steps.
  static std::vector<int> share(const PrefillPace& pace, std::span<const Computing> turns, std::span<const int> left,
                                std::span<const int> guesses);
  /// One forward pass; all caches have one format, and room. What fails ends those that it fails for.
  static void compute(EngineParts& parts, std::span<const Computing> batch);

  EngineParts& parts_;
  const TurnRequest& request_;
  const std::string branch_of_;
  TurnOutcome& outcome_;
  TurnResult& result_;
  const Clock::time_point start_;
  TurnTransaction transaction_;
  double begin_ms_ = 0;
  uint64_t ended_ = parts_.ended;  // when rows were last looked for among all that there are
  bool committed_ = false;
  Generation generation_;
  AnswerStates answer_states_;
};

}  // namespace torpor
