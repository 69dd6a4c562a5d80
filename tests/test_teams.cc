/// Teams without a model: what members hear, what a step keeps, and how it goes on.

#include <atomic>
#include <fstream>
#include <iterator>
#include <set>
#include <thread>

#include "scripted_team.h"
#include "store_fixture.h"
#include "teams/team_file.h"

namespace torpor::testing {
namespace {

class TeamsTest : public ::testing::Test {
 protected:
  TeamsTest() { teams_.make(crew(), engine_); }

  static TeamSpec crew() {
    return {.id = "crew",
            .members = {{"ada", "You doubt."}, {"bob", "You hope."}, {"eve", "You decide."}},
            .coordinator = "eve",
            .system = "Be brief.",
            .tools = R"([{"name":"look"}])",
            .model = "scripted"};
  }
  static StepWords words(StepKind kind, const std::string& message = {}, std::vector<std::string> to = {}) {
    return {.kind = kind, .message = message, .to = std::move(to)};
  }
  StepResult step(StepWords words, const std::string& key = {}) {
    return teams_.begin("crew", {.words = std::move(words), .key = key}, engine_).run();
  }
  StepResult ask(const std::string& message) { return step(words(StepKind::kAsk, message)); }
  static std::vector<std::string> members(const StepResult& result) {
    std::vector<std::string> names;
    for (const TeamAnswer& answer : result.answers) names.push_back(answer.member);
    return names;
  }
  std::optional<ErrorCode> code_of_step(StepWords words, const std::string& key = {}) {
    return code_of([&] { step(std::move(words), key); });
  }

  const TemporaryDirectory directory_{TemporaryDirectory::in_memory()};
  Store store_{directory_.path() / "store"};
  Teams teams_{store_, Durability::kRename};
  ScriptedTeam engine_;
};

using Names = std::vector<std::string>;

TEST_F(TeamsTest, AllAnswerOneMessageAndTheCoordinatorWaits) {
  const StepResult result = ask("Who keeps the lamp?");
  EXPECT_EQ(members(result), (Names{"ada", "bob"}));
  EXPECT_TRUE(result.complete);
  EXPECT_EQ(result.answers[0].text, "I am crew.ada.");
  EXPECT_EQ(result.answers[0].agent, "crew.ada");
  ASSERT_EQ(engine_.heard.size(), 2u);
  for (const TurnRequest& turn : engine_.heard) {
    EXPECT_EQ(turn.prompt, "Who keeps the lamp?");
    EXPECT_EQ(turn.tools, R"([{"name":"look"}])");
    const bool is_ada = turn.agent == "crew.ada";
    EXPECT_EQ(*turn.system, is_ada ? "Be brief.\n\nYou are ada. You doubt." : "Be brief.\n\nYou are bob. You hope.");
    EXPECT_EQ(turn.generate.sampling.seed, is_ada ? 0u : 1u);
  }
  EXPECT_EQ(members(step(words(StepKind::kAsk, "And you?", {"eve", "ada"}))), (Names{"ada", "eve"}));
}

TEST_F(TeamsTest, InARoundEachHearsTheOthersAndNotItself) {
  EXPECT_EQ(code_of_step(words(StepKind::kRound)), ErrorCode::kInvalidArgument);  // nobody has said anything
  ask("Who keeps the lamp?");
  step(words(StepKind::kRound, "Go on."));
  EXPECT_EQ(engine_.prompt("crew.ada"), "bob said:\nI am crew.bob.\n\nGo on.");
  EXPECT_EQ(engine_.prompt("crew.bob"), "ada said:\nI am crew.ada.\n\nGo on.");
}

TEST_F(TeamsTest, TheCoordinatorSumsUpWhatTheOthersSaidLast) {
  EXPECT_EQ(code_of_step(words(StepKind::kConclude)), ErrorCode::kInvalidArgument);
  ask("Who keeps the lamp?");
  engine_.script = [](const TurnRequest& turn) { return "Still " + turn.agent; };
  step(words(StepKind::kRound));
  const StepResult result = step(words(StepKind::kConclude, "So?"));
  EXPECT_EQ(members(result), (Names{"eve"}));
  EXPECT_EQ(engine_.prompt("crew.eve"), "ada said:\nStill crew.ada\n\nbob said:\nStill crew.bob\n\nSo?");
}

TEST_F(TeamsTest, AConversationIsHandedToAnotherMemberWhoGoesOn) {
  step(words(StepKind::kTurn, "Hello."));
  EXPECT_EQ(engine_.prompt("crew.eve"), "Hello.");
  StepResult result = step(words(StepKind::kHandOff, "Take over.", {"bob"}));
  EXPECT_EQ(members(result), (Names{"bob"}));
  EXPECT_EQ(result.speaker, "bob");
  EXPECT_EQ(engine_.prompt("crew.bob"), "eve hands the conversation to you, and said:\nI am crew.eve.\n\nTake over.");
  EXPECT_EQ(members(step(words(StepKind::kTurn, "Are you there?"))), (Names{"bob"}));
  StepWords summed = words(StepKind::kHandOff, {}, {"ada"});
  summed.summary = true;
  engine_.script = [](const TurnRequest& turn) { return turn.agent == "crew.bob" ? "In short." : "Thanks."; };
  result = step(summed);
  EXPECT_EQ(members(result), (Names{"bob", "ada"}));
  EXPECT_EQ(engine_.prompt("crew.ada"), "bob hands the conversation to you, and said:\nIn short.");
  EXPECT_EQ(teams_.find("crew").speaker, "ada");
  EXPECT_EQ(code_of_step(words(StepKind::kHandOff, {}, {"ada"})), ErrorCode::kInvalidArgument);  // she has it
}

TEST_F(TeamsTest, MembersHearWhatIsKeptOfAnAnswerWithoutThinkingAndCalls) {
  engine_.read_answer = [](const std::string& text) {
    return Message{.role = "assistant", .content = "So " + text, .thinking = "Hm.", .tool_calls = {{"look", "{}"}}};
  };
  step(words(StepKind::kTurn, "Hello."));
  StepWords summed = words(StepKind::kHandOff, {}, {"ada"});
  summed.summary = true;
  engine_.script = [](const TurnRequest& turn) -> std::string {
    if (turn.agent == "crew.ada") throw Error(ErrorCode::kCancelled, "Killed.");
    return "be it.";
  };
  const StepResult cut = step(summed);
  EXPECT_EQ(cut.answers[0].text, "So be it.");
  ASSERT_EQ(cut.answers[0].tool_calls.size(), 1u);
  EXPECT_EQ(engine_.prompt("crew.ada"), "eve hands the conversation to you, and said:\nSo be it.");
  engine_.script = nullptr;
  const StepResult result = step(summed);
  EXPECT_TRUE(result.answers[0].kept);
  EXPECT_EQ(result.answers[0].text, "So be it.");
  EXPECT_EQ(result.answers[0].tool_calls, cut.answers[0].tool_calls);
  EXPECT_EQ(engine_.prompt("crew.ada"), "eve hands the conversation to you, and said:\nSo be it.");
}

TEST_F(TeamsTest, OnesErrorStandsBesideTheOthersAnswersAndIsMadeUpForAlone) {
  engine_.script = [](const TurnRequest& turn) -> std::string {
    if (turn.agent == "crew.bob") throw Error(ErrorCode::kResourceExhausted, "There is no memory.");
    return "Yes.";
  };
  StepResult result = ask("Is it?");
  EXPECT_FALSE(result.complete);
  EXPECT_EQ(result.answers[0].text, "Yes.");
  ASSERT_TRUE(result.answers[1].error);
  EXPECT_EQ(result.answers[1].error->code(), ErrorCode::kResourceExhausted);
  engine_.script = nullptr;
  engine_.heard.clear();
  result = ask("Is it?");
  EXPECT_TRUE(result.complete);
  EXPECT_TRUE(result.answers[0].kept);
  EXPECT_EQ(result.answers[0].text, "Yes.");
  EXPECT_FALSE(result.answers[1].kept);
  ASSERT_EQ(engine_.heard.size(), 1u);
  EXPECT_EQ(engine_.heard[0].agent, "crew.bob");
  ask("Is it?");  // a new step, for that one was complete
  EXPECT_EQ(engine_.heard.size(), 3u);
}

TEST_F(TeamsTest, AnAgentThatCantBeReadStopsNobodyElse) {
  ask("Is it?");
  engine_.damaged = "crew.bob";
  const StepResult result = step(words(StepKind::kRound, "Go on.", {"ada", "bob", "eve"}));
  EXPECT_EQ(members(result), (Names{"ada", "bob", "eve"}));
  EXPECT_EQ(engine_.prompt("crew.ada"), "Go on.");  // nobody else has said anything
  EXPECT_EQ(engine_.prompt("crew.eve"), "ada said:\nI am crew.ada.\n\nGo on.");
  EXPECT_EQ(engine_.prompt("crew.bob"), "ada said:\nI am crew.ada.\n\nGo on.");
}

TEST_F(TeamsTest, AMendedAgentsOldAnswerIsNotTakenForANewOne) {
  ask("Is it?");
  engine_.damaged = "crew.bob";
  engine_.script = [](const TurnRequest&) -> std::string { throw Error(ErrorCode::kCancelled, "Killed."); };
  EXPECT_EQ(code_of_step(words(StepKind::kAsk, "Is it?")), ErrorCode::kCancelled);
  engine_.damaged.clear();
  engine_.script = nullptr;
  engine_.heard.clear();
  const StepResult result = ask("Is it?");
  EXPECT_FALSE(result.answers[1].kept);
  EXPECT_EQ(engine_.heard.size(), 2u);
}

TEST_F(TeamsTest, AnAgentThatIsBusyElsewhereBeginsNoStep) {
  ask("Is it?");
  engine_.busy = "crew.eve";
  EXPECT_EQ(code_of_step(words(StepKind::kAsk, "And now?")), ErrorCode::kBusy);
  EXPECT_EQ(teams_.find("crew").step->words.message, "Is it?");
}

TEST_F(TeamsTest, WhenNobodyAnswersTheErrorIsThrown) {
  engine_.script = [](const TurnRequest&) -> std::string { throw Error(ErrorCode::kIo, "The disk is full."); };
  EXPECT_EQ(code_of_step(words(StepKind::kAsk, "Is it?")), ErrorCode::kIo);
}

TEST_F(TeamsTest, ARoundThatWasCutGoesOnWithWhatTheOthersSaidBeforeIt) {
  ask("Who keeps the lamp?");
  // As a crash between two turns leaves it: ada has answered the round, bob has not, and the step is open.
  engine_.script = [](const TurnRequest& turn) -> std::string {
    if (turn.agent == "crew.bob") throw Error(ErrorCode::kCancelled, "Killed.");
    return "A new thought.";
  };
  step(words(StepKind::kRound, "Go on."));
  engine_.script = nullptr;
  engine_.heard.clear();
  Teams again(store_);
  TeamStep planned = again.begin("crew", {.words = words(StepKind::kRound, "Go on.")}, engine_);
  EXPECT_EQ(planned.turns(), 1);
  const StepResult result = planned.run();
  EXPECT_TRUE(result.complete);
  EXPECT_EQ(result.answers[0].text, "A new thought.");
  ASSERT_EQ(engine_.heard.size(), 1u);
  EXPECT_EQ(engine_.prompt("crew.bob"), "ada said:\nI am crew.ada.\n\nGo on.");
}

TEST_F(TeamsTest, AHandOffThatWasCutKeepsTheSummary) {
  step(words(StepKind::kTurn, "Hello."));
  StepWords summed = words(StepKind::kHandOff, "Go.", {"ada"});
  summed.summary = true;
  engine_.script = [](const TurnRequest& turn) -> std::string {
    if (turn.agent == "crew.ada") throw Error(ErrorCode::kCancelled, "Killed.");
    return "In short.";
  };
  EXPECT_FALSE(step(summed).complete);
  EXPECT_EQ(teams_.find("crew").speaker, "eve");
  engine_.script = nullptr;
  engine_.heard.clear();
  const StepResult result = step(summed);
  EXPECT_TRUE(result.answers[0].kept);
  EXPECT_EQ(engine_.heard.size(), 1u);
  EXPECT_EQ(engine_.prompt("crew.ada"), "eve hands the conversation to you, and said:\nIn short.\n\nGo.");
  EXPECT_EQ(result.speaker, "ada");
}

TEST_F(TeamsTest, ACompleteStepGivesItsAnswersAgainToItsKey) {
  const StepResult first = step(words(StepKind::kAsk, "Who?"), "k1");
  const StepResult again = step(words(StepKind::kAsk, "Who?"), "k1");
  EXPECT_EQ(engine_.heard.size(), 2u);
  EXPECT_EQ(again.answers[1].text, first.answers[1].text);
  EXPECT_TRUE(again.complete);
  EXPECT_EQ(code_of_step(words(StepKind::kAsk, "What?"), "k1"), ErrorCode::kInvalidArgument);
  step(words(StepKind::kHandOff, "Go.", {"ada"}), "k2");
  EXPECT_EQ(step(words(StepKind::kHandOff, "Go.", {"ada"}), "k2").speaker, "ada");
  EXPECT_EQ(engine_.heard.size(), 3u);
  step(words(StepKind::kAsk, "Who?"), "k3");
  EXPECT_EQ(engine_.heard.size(), 5u);
}

TEST_F(TeamsTest, TurnsOfAStepRunTogetherAndCallbacksOneAtATime) {
  std::atomic<int> here{0};
  engine_.script = [&](const TurnRequest&) -> std::string {
    ++here;
    while (here < 2) std::this_thread::yield();  // each waits for the other
    return "Now.";
  };
  std::set<std::string> told, over;
  StepRequest request{.words = words(StepKind::kAsk, "Together?")};
  request.on_text = [&](const std::string& member, std::string_view text) { told.insert(member + std::string(text)); };
  request.on_answer = [&](const TeamAnswer& answer) { over.insert(answer.member); };
  teams_.begin("crew", std::move(request), engine_).run();
  EXPECT_EQ(told, (std::set<std::string>{"adaNow.", "bobNow."}));
  EXPECT_EQ(over, (std::set<std::string>{"ada", "bob"}));
}

TEST_F(TeamsTest, WhatACallbackThrowsComesOutAndTakesTheOthersBack) {
  StepRequest request{.words = words(StepKind::kAsk, "Who?")};
  int calls = 0;
  request.on_text = [&](const std::string&, std::string_view) {
    ++calls;
    throw std::runtime_error("stop");
  };
  EXPECT_THROW(teams_.begin("crew", std::move(request), engine_).run(), std::runtime_error);
  EXPECT_EQ(calls, 1);
  EXPECT_TRUE(engine_.agents.empty());
  EXPECT_TRUE(teams_.find("crew").step->open);
}

TEST_F(TeamsTest, WhatIsThrownAtAnAnswerTakesTheOthersBackToo) {
  std::atomic<bool> thrown{false};
  engine_.script = [&](const TurnRequest& turn) -> std::string {
    while (turn.agent == "crew.bob" && !thrown) std::this_thread::yield();
    return "Yes.";
  };
  StepRequest request{.words = words(StepKind::kAsk, "Who?")};
  request.on_answer = [&](const TeamAnswer&) {
    thrown = true;
    throw std::runtime_error("stop");
  };
  EXPECT_THROW(teams_.begin("crew", std::move(request), engine_).run(), std::runtime_error);
  EXPECT_TRUE(engine_.agents.contains("crew.ada"));
  EXPECT_FALSE(engine_.agents.contains("crew.bob"));
}

TEST_F(TeamsTest, AStepThatIsGivenUpWhileItIsPlannedLetsItsTeamGo) {
  std::atomic<bool> give_up{false};
  engine_.read = [&] { give_up = true; };
  const StepRequest request{.words = words(StepKind::kAsk, "Who?"), .give_up = &give_up};
  EXPECT_EQ(code_of([&] { teams_.begin("crew", request, engine_); }), ErrorCode::kCancelled);
  engine_.read = nullptr;
  EXPECT_TRUE(ask("Who?").complete);
}

TEST_F(TeamsTest, ATeamIsInOneStepAtATime) {
  std::optional<TeamStep> planned = teams_.begin("crew", {.words = words(StepKind::kAsk, "Who?")}, engine_);
  EXPECT_EQ(code_of_step(words(StepKind::kAsk, "Who?")), ErrorCode::kBusy);
  EXPECT_EQ(code_of([&] { teams_.remove("crew", engine_); }), ErrorCode::kBusy);
  planned.reset();
  EXPECT_FALSE(teams_.find("crew").step) << "nothing was written";
  ask("Who?");
}

TEST_F(TeamsTest, GivingUpKeepsWhatWasAnswered) {
  std::atomic<bool> give_up{false}, answered{false};
  engine_.script = [&](const TurnRequest& turn) -> std::string {
    if (turn.agent == "crew.ada") return "Done.";
    while (!answered) std::this_thread::yield();
    give_up = true;
    throw Error(ErrorCode::kCancelled, "The turn was taken back.");
  };
  StepRequest request{.words = words(StepKind::kAsk, "Who?"), .give_up = &give_up};
  request.on_answer = [&](const TeamAnswer& answer) { answered = answered || answer.member == "ada"; };
  const StepResult result = teams_.begin("crew", std::move(request), engine_).run();
  EXPECT_EQ(result.answers[0].text, "Done.");
  EXPECT_EQ(result.answers[1].error->code(), ErrorCode::kCancelled);
  EXPECT_TRUE(teams_.find("crew").step->open);
}

TEST_F(TeamsTest, ACancelledTurnIsNoAnswer) {
  engine_.cancelled = "crew.bob";
  const StepResult result = ask("Who?");
  EXPECT_FALSE(result.complete);
  ASSERT_TRUE(result.answers[1].error);
  EXPECT_EQ(result.answers[1].error->code(), ErrorCode::kCancelled);
  EXPECT_TRUE(teams_.find("crew").step->open);
}

TEST_F(TeamsTest, OptionsOfOneAnswerAreRefused) {
  struct Any : TokenFilter {
    void allow(std::span<uint32_t>) override {}
    void accept(int32_t) override {}
  };
  const std::atomic<bool> cancel{false};
  StepRequest filtered{.words = words(StepKind::kAsk, "Who?")}, cut = filtered;
  filtered.generate.filter = std::make_shared<Any>();
  cut.generate.cancel = &cancel;
  for (const StepRequest& request : {filtered, cut})
    EXPECT_EQ(code_of([&] { teams_.begin("crew", request, engine_); }), ErrorCode::kInvalidArgument);
}

TEST_F(TeamsTest, WordsThatFitNoStepAreRefusedAndWriteNothing) {
  StepWords from = words(StepKind::kAsk, "Who?");
  from.from = "ada";
  for (const StepWords& wrong :
       {words(StepKind::kAsk), words(StepKind::kTurn), words(StepKind::kAsk, "Who?", {"zoe"}),
        words(StepKind::kTurn, "Who?", {"ada"}), words(StepKind::kHandOff, "Go."),
        words(StepKind::kHandOff, "Go.", {"ada", "bob"}), words(StepKind::kHandOff, "Go.", {"eve"}),
        words(StepKind::kConclude, "So?", {"ada"}), words(StepKind::kHandOff, {}, {"ada"}), from}) {
    EXPECT_EQ(code_of_step(wrong), ErrorCode::kInvalidArgument);
  }
  EXPECT_FALSE(teams_.find("crew").step);
  EXPECT_TRUE(engine_.heard.empty());
  StepRequest request{.words = words(StepKind::kAsk, "Who?")};
  EXPECT_EQ(code_of([&] { teams_.begin("none", request, engine_); }), ErrorCode::kNotFound);
}

TEST_F(TeamsTest, WhatIsNoTeamIsNotMade) {
  const auto refused = [&](auto change) {
    TeamSpec spec = crew();
    spec.id = "other";
    change(spec);
    EXPECT_EQ(code_of([&] { teams_.make(spec, engine_); }), ErrorCode::kInvalidArgument);
  };
  refused([](TeamSpec& spec) { spec.id = "crew"; });
  refused([](TeamSpec& spec) { spec.id = "../crew"; });
  refused([](TeamSpec& spec) { spec.members.resize(1); });
  refused([](TeamSpec& spec) {
    for (int i = 0; i < 17; ++i) spec.members.push_back({"m" + std::to_string(i), ""});
  });
  refused([](TeamSpec& spec) { spec.members[1].name = "ada"; });
  refused([](TeamSpec& spec) { spec.members[1].name = "-b"; });
  refused([](TeamSpec& spec) { spec.members[1].name = std::string(125, 'x'); });
  refused([](TeamSpec& spec) { spec.coordinator = "zoe"; });
  refused([](TeamSpec& spec) { spec.tools = "{}"; });
  refused([](TeamSpec& spec) { spec.tools = std::string(1'000'000, '[') + std::string(1'000'000, ']'); });
  refused([](TeamSpec& spec) { spec.system = "\xff"; });
  EXPECT_EQ(teams_.list(), Names{"crew"});
}

TEST_F(TeamsTest, ATeamTakesNoAgentOverThatOnlyTheEngineKnows) {
  engine_.agents["other.bob"] = {};
  TeamSpec spec = crew();
  spec.id = "other";
  EXPECT_EQ(code_of([&] { teams_.make(spec, engine_); }), ErrorCode::kInvalidArgument);
  EXPECT_EQ(teams_.list(), Names{"crew"});
}

TEST_F(TeamsTest, WordsTooLongForTheFileAreRefusedAndTheTeamStays) {
  EXPECT_EQ(code_of_step(words(StepKind::kAsk, std::string(kMostTeamBytes, 'x'))), ErrorCode::kInvalidArgument);
  EXPECT_TRUE(engine_.heard.empty());
  const size_t rest = kMostTeamBytes - encode_team(teams_.find("crew")).size() - 512;
  EXPECT_TRUE(ask(std::string(rest, 'x')).complete);
  EXPECT_FALSE(teams_.find("crew").step->open);
  teams_.remove("crew", engine_);
}

TEST_F(TeamsTest, ARemovedTeamTakesItsAgentsAlong) {
  ask("Who?");
  engine_.agents["crewmate"] = {{"user", "Hi."}};
  teams_.remove("crew", engine_);
  EXPECT_EQ(engine_.agents.size(), 1u);
  EXPECT_EQ(code_of([&] { teams_.find("crew"); }), ErrorCode::kNotFound);
  EXPECT_EQ(code_of([&] { teams_.remove("crew", engine_); }), ErrorCode::kNotFound);
  teams_.make(crew(), engine_);
}

TEST_F(TeamsTest, AFileIsAsThePageOnTheFormatHasIt) {
  std::ifstream page(std::string(TORPOR_SOURCE_DIR) + "/docs/format.md");
  const std::string text{std::istreambuf_iterator<char>(page), {}};
  const size_t begin = text.find("{\n  \"team_checksum\"");
  ASSERT_NE(begin, std::string::npos);
  const std::string example = text.substr(begin, text.find("\n```", begin) + 1 - begin);
  Team team{.spec = {.id = "crew",
                     .members = {{"ada", "You doubt."}, {"eve", ""}},
                     .coordinator = "eve",
                     .system = "Be brief.",
                     .model = "demo/tiny"},
            .speaker = "eve"};
  team.step = StepState{.words = words(StepKind::kAsk, "Shall we sail?")};
  team.step->turns = {"ada"};
  team.step->held = {{"ada", 3}, {"eve", 0}};
  store_.save_team("crew", encode_team(team));
  EXPECT_EQ(read_all(store_.root() / "teams" / "crew.json"), example);
  EXPECT_EQ(encode_team(decode_team(example, "crew")), encode_team(team));
}

TEST_F(TeamsTest, AFileIsReadBackAsItWasAndHostileOnesAreRefused) {
  step(words(StepKind::kHandOff, "Go.", {"ada"}), "k");
  const Team team = teams_.find("crew");
  const std::string json = encode_team(team);
  EXPECT_EQ(encode_team(decode_team(json, "crew")), json);
  EXPECT_EQ(code_of([&] { decode_team(json, "CREW"); }), ErrorCode::kNotFound);
  const auto with = [&](const std::string& what, const std::string& by) {
    std::string bad = json;
    const size_t at = bad.find(what);
    EXPECT_NE(at, std::string::npos) << what;
    return bad.replace(at, what.size(), by);
  };
  const std::string newer = with("\"team_version\": 1", "\"team_version\": 2");
  EXPECT_EQ(code_of([&] { decode_team(newer, "crew"); }), ErrorCode::kIncompatible);
  for (const std::string& bad :
       {std::string(), std::string("{"), std::string("[]"), std::string("{}"), std::string(100'000, '['),
        with("\"ada\"", "\"bob\""), with("\"coordinator\": \"eve\"", "\"coordinator\": \"zoe\""),
        with("\"kind\": \"handoff\"", "\"kind\": \"what\""),
        with("\"speaker\": \"ada\"", "\"speaker\": \"zoe\""), with("\"ada\": 0", "\"ada\": -1"),
        with("\"ada\": 0", "\"ada\": 1e300"), with("\"hands_over\": \"eve\"", "\"hands_over\": \"zoe\""),
        with("\"open\": false", "\"open\": 0"), with("\"members\"", "\"m\"")}) {
    EXPECT_EQ(code_of([&] { decode_team(bad, "crew"); }), ErrorCode::kCorruption) << bad;
  }
}

}  // namespace
}  // namespace torpor::testing
