#include "teams/team_step.h"

#include <algorithm>
#include <system_error>
#include <thread>
#include <utility>

#include "teams/team_file.h"

namespace torpor {
namespace {

/// Ends a turn whose step another one's callback has ended.
struct StepAbandoned {};

void say(TeamAnswer& answer, Message message) {
  answer.text = std::move(message.content);
  answer.tool_calls = std::move(message.tool_calls);
}

}  // namespace

TeamStep::TeamStep(std::unique_ptr<Plan> plan) : plan_(std::move(plan)) {}
TeamStep::TeamStep(TeamStep&&) noexcept = default;
TeamStep::~TeamStep() = default;
int TeamStep::turns() const { return plan_->turns(); }
StepResult TeamStep::run() { return plan_->run(); }

TeamStep::Plan::Plan(Store& store, Durability durability, std::unique_ptr<AgentLock> lock, Team team,
                     StepRequest request, TeamEngine& engine)
    : store_(store), durability_(durability), lock_(std::move(lock)), team_(std::move(team)),
      request_(std::move(request)), engine_(engine) {
  if (request_.generate.filter || request_.generate.cancel != nullptr)
    refuse_team("A filter is one answer's, and a cut answer is none; leave 'filter' and 'cancel' out.", "generate");
  StepState state = state_of_request();
  is_over_ = !state.open;
  team_.step = std::move(state);
  look_at_agents();
  for (const std::string& member : team_.step->turns) {
    Turn& turn = turns_.emplace_back();
    turn.member = turn.answer.member = member;
    turn.answer.agent = team_.agent(member);
  }
  const bool in_order = team_.step->words.kind == StepKind::kHandOff;
  keep_answers(0, in_order ? 1 : turns_.size());
  if (in_order && turns_.size() > 1 && turns_[0].done) keep_answers(1, 2);
  if (turns_[0].done) return;
  const StepKind kind = team_.step->words.kind;
  const bool hears = kind == StepKind::kRound || kind == StepKind::kConclude;
  const auto hears_nobody = [&](const Turn& turn) { return heard_by(turn.member).empty(); };
  if (hears && std::all_of(turns_.begin(), turns_.end(), hears_nobody))
    refuse_team("Nobody has said anything that the others could hear; ask the team first.", "message");
  if (in_order && prompt_of(0).empty()) {
    refuse_team("There is no message, and nothing that '" + team_.step->from + "' has said and could hand over.",
                "message");
  }
  if (encode_team(team_).size() > kMostTeamBytes) {
    refuse_team("The message is too long for the team's file.", "message");
  }
}

StepState TeamStep::Plan::state_of_request() {
  const StepWords& words = request_.words;
  if (const auto& last = team_.step) {
    const bool same_words = last->words == words;
    const bool same_key = !request_.key.empty() && last->key == request_.key;
    if (same_key && !same_words) refuse_team("The last step with this key had other words; use a new one.", "key");
    if (same_key || (same_words && last->open)) {
      is_new_ = false;
      StepState state = *last;
      if (!request_.key.empty()) state.key = request_.key;
      return state;
    }
  }
  StepState state{.words = words, .key = request_.key};
  state.turns = find_turns(state.from);
  return state;
}

std::vector<std::string> TeamStep::Plan::find_turns(std::string& from) const {
  const StepWords& words = request_.words;
  const std::vector<TeamMember>& members = team_.spec.members;
  const auto require_member = [&](const std::string& name, const char* field) {
    const bool found = std::any_of(members.begin(), members.end(), [&](const TeamMember& m) { return m.name == name; });
    if (!found) refuse_team("The team '" + team_.spec.id + "' has no member '" + name + "'.", field);
  };
  for (const std::string& name : words.to) require_member(name, "to");
  const bool names_many = words.kind == StepKind::kAsk || words.kind == StepKind::kRound;
  const bool hands_over = words.kind == StepKind::kHandOff;
  if (!names_many && !hands_over && !words.to.empty())
    refuse_team("It is settled who answers here; leave 'to' out.", "to");
  if (!hands_over && (!words.from.empty() || words.summary))
    refuse_team("Only who hands over says something first.", "from");
  const bool needs_message = words.kind == StepKind::kTurn || words.kind == StepKind::kAsk;
  if (needs_message && words.message.empty()) refuse_team("The message is empty.", "message");
  std::vector<std::string> turns;
  switch (words.kind) {
    case StepKind::kTurn: turns = {team_.speaker}; break;
    case StepKind::kConclude: turns = {team_.spec.coordinator}; break;
    case StepKind::kHandOff:
      if (words.to.size() != 1) refuse_team("A conversation is handed to one member; name it.", "to");
      from = words.from.empty() ? team_.speaker : words.from;
      require_member(from, "from");
      if (from == words.to[0]) refuse_team("'" + from + "' has the conversation already; name another member.", "to");
      if (words.summary) turns.push_back(from);
      turns.push_back(words.to[0]);
      break;
    default:
      for (const TeamMember& member : members) {
        const bool named = std::find(words.to.begin(), words.to.end(), member.name) != words.to.end();
        if (words.to.empty() ? member.name != team_.spec.coordinator : named) turns.push_back(member.name);
      }
  }
  return turns;
}

void TeamStep::Plan::look_at_agents() {
  StepState& step = *team_.step;
  for (const TeamMember& member : team_.spec.members) {
    if (request_.give_up != nullptr && *request_.give_up)
      throw Error(ErrorCode::kCancelled, "The step was given up; nothing has begun.");
    std::vector<Message>& messages = messages_[member.name];
    bool is_known = true;
    try {
      // They wait for the agent's turn, and the team with them.
      messages = engine_.messages(team_.agent(member.name), request_.give_up);
    } catch (const Error& error) {
      is_known = error.code() == ErrorCode::kNotFound;  // it has had no turn
      // What it held is not known, now and when it is mended; its own turn says so.
      if (!is_known && error.code() != ErrorCode::kCorruption) throw;
    }
    if (is_new_ && is_known) step.held[member.name] = int64_t(messages.size());
  }
}

std::string TeamStep::Plan::said(const std::string& member) const {
  const std::vector<Message>& messages = messages_.at(member);
  const auto held = team_.step->held.find(member);
  const size_t before = held == team_.step->held.end() ? 0 : size_t(std::max<int64_t>(held->second, 0));
  for (size_t i = std::min(before, messages.size()); i-- > 0;) {
    if (messages[i].role == "assistant") return messages[i].content;
  }
  return {};
}

std::optional<Message> TeamStep::Plan::answered(const std::string& member, const std::string& prompt) const {
  const std::vector<Message>& messages = messages_.at(member);
  const auto held = team_.step->held.find(member);
  if (held == team_.step->held.end()) return std::nullopt;
  size_t i = size_t(std::max<int64_t>(held->second, 0));
  while (i < messages.size() && messages[i].role == "system") ++i;
  const bool is_there = i + 1 < messages.size() && messages[i].role == "user" && messages[i].content == prompt &&
                        messages[i + 1].role == "assistant";
  return is_there ? std::optional(messages[i + 1]) : std::nullopt;
}

std::string TeamStep::Plan::heard_by(const std::string& member) const {
  std::string heard;
  for (const TeamMember& other : team_.spec.members) {
    if (other.name == member) continue;
    const std::string text = said(other.name);
    if (!text.empty()) heard += other.name + " said:\n" + text + "\n\n";
  }
  return heard;
}

std::string TeamStep::Plan::prompt_of(size_t turn) const {
  const StepState& step = *team_.step;
  const std::string& member = turns_[turn].member;
  const std::string& message = step.words.message;
  switch (step.words.kind) {
    case StepKind::kTurn:
    case StepKind::kAsk: return message;
    case StepKind::kRound: return heard_by(member) + (message.empty() ? "What do you say now?" : message);
    case StepKind::kConclude: return heard_by(member) + (message.empty() ? "Sum up what was said." : message);
    case StepKind::kHandOff: break;
  }
  if (step.words.summary && turn == 0) {
    return "You hand the conversation to " + step.words.to[0] + ". Sum up what " + step.words.to[0] + " needs to know.";
  }
  const std::string text = step.words.summary ? turns_[0].answer.text : said(step.from);
  std::string prompt = text.empty() ? text : step.from + " hands the conversation to you, and said:\n" + text;
  if (!prompt.empty() && !message.empty()) prompt += "\n\n";
  return prompt + message;
}

std::string TeamStep::Plan::system_of(const std::string& member) const {
  const auto& members = team_.spec.members;
  const auto own = std::find_if(members.begin(), members.end(), [&](const TeamMember& m) { return m.name == member; });
  std::string system = team_.spec.system;
  if (!system.empty()) system += "\n\n";
  system += "You are " + member + ".";
  if (!own->role.empty()) system += " " + own->role;
  return system;
}

void TeamStep::Plan::keep_answers(size_t first, size_t last) {
  for (size_t i = first; i < last; ++i) {
    Turn& turn = turns_[i];
    std::optional<Message> message = answered(turn.member, prompt_of(i));
    if (!message) continue;
    say(turn.answer, *std::move(message));
    turn.answer.kept = turn.done = true;
  }
}

int TeamStep::Plan::turns() const {
  return int(std::count_if(turns_.begin(), turns_.end(), [](const Turn& turn) { return !turn.done; }));
}

void TeamStep::Plan::save_team() const { store_.save_team(team_.spec.id, encode_team(team_), durability_); }

template <typename Callback, typename... Words>
void TeamStep::Plan::tell(const Callback& callback, const Words&... words) {
  const MutexLock lock(mutex_);
  if (thrown_) throw StepAbandoned();
  try {
    if (callback) callback(words...);
  } catch (...) {
    thrown_ = std::current_exception();
    throw StepAbandoned();
  }
}

void TeamStep::Plan::compute(size_t index) {
  Turn& turn = turns_[index];
  TeamAnswer& answer = turn.answer;
  try {
    if (turn.done) {
      engine_.save(answer.agent);  // it answered, perhaps without being saved
    } else {
      TurnRequest request{.agent = answer.agent, .salt = request_.salt, .prompt = prompt_of(index),
                          .system = system_of(turn.member), .tools = team_.spec.tools, .share = request_.share,
                          .background = request_.background, .give_up = request_.give_up};
      request.generate = request_.generate;
      request.generate.sampling.seed += index;
      request.generate.on_text = [&](std::string_view text) {
        tell(request_.on_text, turn.member, text);
      };
      request.generate.on_prefill = [&](int done, int total) {
        tell(request_.on_prefill, turn.member, done, total);
      };
      TurnResult result = engine_.turn(request);
      say(answer, result.message);
      answer.error = result.save_error;
      turn.done = result.finish_reason != FinishReason::kCancelled;
      if (!turn.done) answer.error = Error(ErrorCode::kCancelled, "The turn of '" + turn.member + "' was cancelled.");
      if (request.generate.sampling.temperature > 0) answer.seed = request.generate.sampling.seed;
      answer.turn = std::move(result);
    }
  } catch (const StepAbandoned&) {
    return;
  } catch (const Error& error) {
    answer.error = error;
  } catch (const std::exception& error) {
    answer.error = Error(ErrorCode::kInternal, "The turn of '" + turn.member + "' failed: " + error.what());
  }
  try {
    tell(request_.on_answer, answer);
  } catch (const StepAbandoned&) {
  }
}

void TeamStep::Plan::compute_together(size_t first, size_t last) {
  /// Whatever is thrown, no thread outlives what it works on.
  struct Threads : std::vector<std::thread> {
    ~Threads() {
      for (std::thread& thread : *this) thread.join();
    }
  } threads;
  threads.reserve(last - first);
  for (size_t i = first; i + 1 < last; ++i) {
    try {
      threads.emplace_back([this, i] { compute(i); });
    } catch (const std::exception&) {  // of the system, or there is no memory
      turns_[i].answer.error = Error(ErrorCode::kResourceExhausted,
                                     "The system refuses another thread; raise its limit or end some processes.");
    }
  }
  compute(last - 1);
}

StepResult TeamStep::Plan::run() {
  if (!is_over_) save_team();  // before any turn: what a crash leaves can be gone on with
  const StepWords& words = team_.step->words;
  if (words.kind == StepKind::kHandOff && turns_.size() > 1) {
    compute_together(0, 1);
    if (turns_[0].done && !turns_[0].answer.error) {
      compute_together(1, 2);
    } else {
      turns_[1].answer.error =
          Error(ErrorCode::kCancelled, "'" + turns_[0].member + "' has said nothing to hand over.");
    }
  } else {
    compute_together(0, turns_.size());
  }
  {
    const MutexLock lock(mutex_);
    if (thrown_) std::rethrow_exception(thrown_);
  }
  StepResult result{.kind = words.kind};
  for (const Turn& turn : turns_) result.answers.push_back(turn.answer);
  const auto failed = [](const TeamAnswer& answer) { return answer.error.has_value(); };
  result.complete = std::none_of(result.answers.begin(), result.answers.end(), failed);
  const bool nobody = std::none_of(turns_.begin(), turns_.end(), [](const Turn& turn) { return turn.done; });
  if (nobody) throw *result.answers.front().error;
  if (result.complete && !is_over_) {
    team_.step->open = false;
    if (words.kind == StepKind::kHandOff) team_.speaker = words.to[0];
    save_team();
  }
  result.speaker = team_.speaker;
  return result;
}

}  // namespace torpor
