#pragma once
/// Agents that work together: members with roles over one beginning, and one of them, the coordinator, who sums up.
///
/// A team is a file of the store (docs/format.md, "Teams"). Each member is an agent of its own, TEAM.MEMBER, which its
/// first turn makes. Its system message is the team's and then its role, so members share the rows of the team's.
///
/// What a team is asked is a step: turns of some of its members, each an ordinary turn of an Engine. They begin
/// together and are computed in one batch. A step stays open until all of its members have answered. Asked again with
/// the same words it goes on: what a member has answered is taken from its agent, and computed once. So a step survives
/// kill -9.
///
/// Errors are torpor::Error. A team is in one step at a time, across processes: else kBusy.

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "torpor/engine.h"
#include "torpor/error.h"
#include "torpor/message.h"
#include "torpor/store.h"

namespace torpor {

/// Turns of one team at a time.
inline constexpr size_t kMostTeamMembers = 16;

struct TeamMember {
  std::string name;  ///< letters, digits, '.', '_' or '-'
  std::string role;  ///< of the system message; may be empty
};

struct TeamSpec {
  std::string id;                   ///< as an agent's; TEAM.MEMBER must be one, too
  std::vector<TeamMember> members;  ///< 2 to kMostTeamMembers, each name once
  std::string coordinator;          ///< one of them
  std::string system;               ///< what all system messages begin with; may be empty
  std::string tools;                ///< JSON array, as TurnRequest::tools; empty: none
  std::string model;                ///< kept as given
};

/// What a step is.
enum class StepKind {
  kTurn,      ///< the speaker answers: whoever the conversation was handed to, at first the coordinator
  kAsk,       ///< all answer one message
  kRound,     ///< each hears what the others said last, and answers
  kHandOff,   ///< the conversation goes on with another member, who becomes the speaker
  kConclude,  ///< the coordinator hears what the others said last, and sums up
};
/// "turn", "ask", "round", "handoff", "conclude".
const char* step_kind_name(StepKind kind);

/// What a step was asked, as a team's file keeps it.
struct StepWords {
  StepKind kind = StepKind::kAsk;
  std::string message;          ///< UTF-8; kTurn and kAsk need one
  /// kAsk, kRound: who answers; empty: all but the coordinator. kHandOff: the one who goes on. Else empty.
  std::vector<std::string> to;
  std::string from;             ///< of kHandOff: who hands over; empty: the speaker
  bool summary = false;         ///< of kHandOff: `from` sums up first; else its last answer is heard
  bool operator==(const StepWords&) const = default;
};

/// The last step of a team.
struct StepState {
  StepWords words;
  std::string key;                   ///< StepRequest::key
  std::string from;                  ///< of kHandOff, as found
  std::vector<std::string> turns;    ///< who answers, in the order of turns
  std::map<std::string, int64_t> held;  ///< messages that each member's agent held before it; absent: unknown
  bool open = true;                  ///< somebody has not answered
};

struct Team {
  TeamSpec spec;
  std::string speaker;
  std::optional<StepState> step;

  /// Id of a member's agent.
  std::string agent(const std::string& member) const { return spec.id + "." + member; }
};

/// What one member answered.
struct TeamAnswer {
  std::string member, agent;
  std::string text;                  ///< what the others hear: the content of its message (TurnResult::message)
  std::vector<ToolCall> tool_calls;  ///< of that message; no step takes their results
  bool kept = false;                 ///< it had answered before; nothing was computed
  std::optional<TurnResult> turn;    ///< of a turn that was computed
  std::optional<uint64_t> seed;      ///< of that turn
  std::optional<Error> error;        ///< why it did not answer, or why its answer could not be saved
};

struct StepResult {
  StepKind kind = StepKind::kAsk;
  std::vector<TeamAnswer> answers;   ///< in the order of turns
  bool complete = false;             ///< all have answered
  std::string speaker;               ///< from now on
};

struct StepRequest {
  StepWords words;
  /// The caller's name for this step. A step that is complete gives its answers again when it is asked with the same
  /// key; a key with other words is kInvalidArgument. Of the last step alone. Empty: none.
  std::string key;
  std::string salt, share;           ///< of each turn, as in TurnRequest
  bool background = false;
  /// Of each turn. Turn number i has the seed plus i. Its callbacks are not used. It has no `filter`, which one
  /// answer uses up, and no `cancel`, which would leave half an answer (`give_up`): else kInvalidArgument.
  GenerateOptions generate;
  // Called on the turns' threads, by one at a time. What one throws takes all turns back that are not complete, and
  // comes out of `run`. A callback that waits makes this team's turns wait, and no others. So none
  // may ask the Engine about an agent of the team's: it would wait for a turn that waits for it.
  std::function<void(const std::string& member, std::string_view text)> on_text;
  std::function<void(const std::string& member, int done, int total)> on_prefill;
  std::function<void(const TeamAnswer& answer)> on_answer;
  /// Set from any thread to take turns back that are not complete. Theirs are kCancelled then, and so is a plan that
  /// waits for a member's agent.
  const std::atomic<bool>* give_up = nullptr;
};

/// Where members take their turns. `turn` is called by several threads at a time. Errors as Engine gives them.
class TeamEngine {
 public:
  virtual ~TeamEngine() = default;
  virtual TurnResult turn(const TurnRequest& request) = 0;
  virtual std::vector<Message> messages(const std::string& agent, const std::atomic<bool>* give_up) = 0;
  virtual void save(const std::string& agent) = 0;
  virtual void remove(const std::string& agent) = 0;
  /// Whether there is such an agent, on disk or in memory alone. Waits for no turn.
  virtual bool holds(const std::string& agent) = 0;
};

/// An Engine as it is. It must live longer.
std::unique_ptr<TeamEngine> team_engine(Engine& engine);

/// A step that was planned, and holds its team. Move-only. One thread at a time.
class TeamStep {
 public:
  TeamStep(TeamStep&&) noexcept;
  ~TeamStep();
  /// Turns that `run` will compute: those of members who have not answered.
  int turns() const;
  /// Once. One member's error stands beside the others' answers. When nobody answers, the first error is thrown. What a
  /// callback throws is, too.
  StepResult run();

 private:
  friend class Teams;
  struct Plan;
  explicit TeamStep(std::unique_ptr<Plan> plan);
  std::unique_ptr<Plan> plan_;
};

/// The teams of a store. Any thread.
class Teams {
 public:
  /// `store` must live longer.
  explicit Teams(Store& store, Durability durability = Durability::kFull) : store_(store), durability_(durability) {}

  /// Computes nothing. kInvalidArgument: what is no team, a name that is taken (field kTeamTaken), or an agent of a
  /// member's that `engine` holds already (kAgentTaken). Of several makers of one name one succeeds.
  Team make(const TeamSpec& spec, TeamEngine& engine);
  /// kNotFound, kCorruption; kIncompatible: a newer version's.
  Team find(const std::string& id) const;
  /// Ids, sorted.
  std::vector<std::string> list() const { return store_.teams(); }
  /// Removes the members' agents and then the team. A team whose file is damaged goes without its agents. kNotFound,
  /// kBusy.
  void remove(const std::string& id, TeamEngine& engine);

  /// Plans a step; nothing is computed or written until it runs. `engine` must live longer than the step.
  TeamStep begin(const std::string& id, StepRequest request, TeamEngine& engine);

 private:
  Store& store_;
  const Durability durability_;
};

}  // namespace torpor
