"""torpor.Team: agents that work together, over the engine."""

import pytest

import torpor

ROLES = {"ada": "You doubt.", "bob": "You hope.", "eve": "You decide."}


@pytest.fixture
def engine(tiny_model, tmp_path):
    with torpor.Engine(tiny_model, tmp_path / "store") as engine:
        yield engine


@pytest.fixture
def team(engine):
    return torpor.Team.make(engine, "crew", ROLES, "eve", system="Be brief.")


def test_a_team_is_asked_hears_itself_and_concludes(engine, team):
    assert torpor.Team.names(engine) == ["crew"] and team.members == ROLES and team.coordinator == team.speaker == "eve"
    asked = team.ask("Who keeps the lamp?", max_tokens=6)
    assert list(asked.answers) == ["ada", "bob"] and asked.complete and asked.kind == "ask"
    ada = asked.answers["ada"]
    assert ada.agent == "crew.ada" and ada.text == ada.turn.text and ada.turn.tokens.generated == 6 and not ada.kept
    alone = engine.agent("alone", system="Be brief.\n\nYou are ada. You doubt.")
    alone = alone.turn("Who keeps the lamp?", max_tokens=6)
    assert alone.text == ada.text
    team.round("Go on.", max_tokens=6)
    heard = team.agent("bob").messages
    assert heard[-2]["content"] == f"ada said:\n{team.agent('ada').messages[2]['content']}\n\nGo on."
    assert list(team.conclude(max_tokens=6).answers) == ["eve"]
    assert team.hand_off("bob", "Take over.", summary=True, max_tokens=6).speaker == "bob" == team.speaker
    assert list(team.turn("Are you there?", max_tokens=6).answers) == ["bob"]


def test_a_team_outlives_its_engine(tiny_model, tmp_path):
    with torpor.Engine(tiny_model, tmp_path / "store") as engine:
        torpor.Team.make(engine, "crew", ROLES, "eve").ask("Who?", max_tokens=4, key="first")
    with torpor.Engine(tiny_model, tmp_path / "store") as engine:
        team = torpor.Team(engine, "crew")
        again = team.ask("Who?", max_tokens=4, key="first")
        assert all(answer.kept and answer.turn is None for answer in again.answers.values())
        assert engine.work().answer_tokens == 0
        with pytest.raises(torpor.InvalidArgumentError):
            team.ask("What?", key="first")
        team.remove()
        assert torpor.Team.names(engine) == [] and engine.agents() == []
        with pytest.raises(torpor.NotFoundError):
            team.ask("Who?")


def test_text_is_told_by_member_and_what_on_text_raises_takes_turns_back(engine, team):
    told = {}

    def hear(member, text):
        told[member] = told.get(member, "") + text

    result = team.ask("Who?", max_tokens=6, on_text=hear)
    assert told == {member: answer.text for member, answer in result.answers.items()}
    before = len(team.agent("ada").tokens), len(team.agent("bob").tokens)

    def stop(member, text):
        raise KeyError(member)

    with pytest.raises(KeyError):
        team.round(max_tokens=2000, on_text=stop)
    assert (len(team.agent("ada").tokens), len(team.agent("bob").tokens)) == before
    assert team.round(max_tokens=4).complete


def test_on_text_that_would_wait_for_a_member_is_refused(engine, team):
    team.ask("Who?", max_tokens=4)
    for wait in (lambda: team.agent("ada").messages, lambda: team.agent("bob").tokens,
                 lambda: team.agent("eve").turn("Hi."), engine.save_all):
        with pytest.raises(torpor.InvalidArgumentError):
            team.round(max_tokens=8, on_text=lambda member, text: wait())
    assert len(team.agent("ada").messages) == 3  # all callbacks are over


def test_a_step_that_is_dropped_is_given_up(engine, team):
    running = torpor._core.start_step(engine._core, "crew", "ask", "Who?", [], "", False, "", 2000, 0.0, 1.0, 1, 0, 0.0,
                                      [])
    assert running.next() is not None
    del running
    assert not any(answer.kept for answer in team.ask("Who?", max_tokens=4).answers.values())


def test_members_differ_by_their_seeds(engine):
    team = torpor.Team.make(engine, "twins", {"a": "", "b": "", "c": ""}, "c")
    result = team.ask("Who?", temperature=1.0, seed=7, max_tokens=8)
    assert [answer.turn.seed for answer in result.answers.values()] == [7, 8]


def test_what_is_wrong_raises(engine, team):
    with pytest.raises(torpor.InvalidArgumentError) as taken:
        torpor.Team.make(engine, "crew", ROLES, "eve")
    assert taken.value.field == "team"
    for members, coordinator in (({"ada": ""}, "ada"), (ROLES, "zoe"), ({"-": "", "b": ""}, "b")):
        with pytest.raises(torpor.InvalidArgumentError):
            torpor.Team.make(engine, "other", members, coordinator)
    for wrong in (lambda: team.round(), lambda: team.ask(""), lambda: team.ask("Hi.", to=["zoe"]),
                  lambda: team.hand_off("eve"), lambda: team.ask("Hi.", max_tokens=0), lambda: team.ask(7),
                  lambda: team.ask("Hi.", top_p=2), lambda: team.ask("Hi.", to="ada"), lambda: team.ask("Hi.", to=[]),
                  lambda: team.round("Hi.", to=iter(())), lambda: team.hand_off("")):
        with pytest.raises(torpor.InvalidArgumentError):
            wrong()
    engine.agent("other.bob").turn("Hi.", max_tokens=2, save="no")  # in memory alone
    with pytest.raises(torpor.InvalidArgumentError) as taken:
        torpor.Team.make(engine, "other", ROLES, "eve")
    assert taken.value.agent == "other.bob"
    with pytest.raises(torpor.BusyError):
        team.ask("Who?", max_tokens=2000, on_text=lambda member, text: team.ask("And?"))
