"""/torpor/v1/teams: agents that work together, over HTTP."""

import concurrent.futures
import json
import select

import pytest

from conftest import Torpor, make_tiny_model
from serving import Server
from test_serve_agents import add_keys

AGENTS, TEAMS = "/torpor/v1/agents", "/torpor/v1/teams"
CREW = {"team": "crew", "coordinator": "eve", "system": "Be brief.",
        "members": [{"name": "ada", "role": "You doubt."}, {"name": "bob", "role": "You hope."}, {"name": "eve"}]}


@pytest.fixture
def server(tiny, tmp_path):
    with Server(tiny, tmp_path) as server:
        server.torpor = tiny
        yield server


def step(server, kind, team="crew", key=None, headers=None, max_tokens=6, **body):
    return server.ask("POST", f"{TEAMS}/{team}/{kind}", {"max_tokens": max_tokens, **body}, key=key, headers=headers)


def begin_long_turn(server, agent):
    """The connection of a turn that is answered, and that its client alone ends before the context is full."""
    body = {"messages": [{"role": "user", "content": "Go on."}], "max_tokens": 2000, "stream": True, "temperature": 0,
            "logit_bias": {"2": -100}}  # the end's token, of both models
    connection = server.connection()
    server.send(connection, "POST", "/v1/chat/completions", body, headers={"x-torpor-agent": agent})
    answer = connection.getresponse()
    assert answer.status == 200 and answer.readline()
    return connection


def answers(answer):
    assert answer.status == 200, answer.text
    return {one["member"]: one for one in answer.json()["answers"]}


def said(server, agent, tmp_path):
    """The messages that an agent holds, as the command line shows them."""
    return server.torpor("show", agent, "--json").ok().json["messages"]


def test_a_team_is_made_asked_and_removed(server, tmp_path):
    made = server.ask("POST", TEAMS, CREW)
    assert (made.status, made.json()["speaker"]) == (201, "eve")
    assert [member["agent"] for member in made.json()["members"]] == ["crew.ada", "crew.bob", "crew.eve"]
    assert server.ask("GET", AGENTS).json()["agents"] == []
    asked = answers(step(server, "ask", message="Who keeps the lamp?"))
    assert list(asked) == ["ada", "bob"] and not any(answer["kept"] for answer in asked.values())
    answers(step(server, "round", message="Go on."))
    concluded = answers(step(server, "conclude"))
    assert list(concluded) == ["eve"]
    handed = step(server, "handoff", to="bob", message="Take over.", summary=True)
    assert list(answers(handed)) == ["eve", "bob"] and handed.json()["speaker"] == "bob"
    assert list(answers(step(server, "turn", message="Are you there?"))) == ["bob"]
    ada = said(server, "crew.ada", tmp_path)
    assert [message["role"] for message in ada] == ["system", "user", "assistant", "user", "assistant"]
    assert ada[0]["content"] == "Be brief.\n\nYou are ada. You doubt."
    assert ada[1]["content"] == "Who keeps the lamp?"
    assert ada[3]["content"] == f"bob said:\n{said(server, 'crew.bob', tmp_path)[2]['content']}\n\nGo on."
    shown = server.ask("GET", f"{TEAMS}/crew").json()
    assert shown["step"] == {"kind": "turn", "turns": ["bob"], "open": False}
    assert server.ask("GET", TEAMS).json()["teams"] == [shown]
    assert server.torpor("du", "--json").ok().json["teams"] == 1
    assert server.torpor("verify", "--json").ok().json["teams"] == [{"team": "crew", "problem": ""}]
    assert server.ask("DELETE", f"{TEAMS}/crew").status == 204
    assert server.ask("GET", f"{TEAMS}/crew").status == 404
    assert server.ask("GET", AGENTS).json()["agents"] == []


def test_members_share_the_rows_of_their_beginning(server, words):
    server.ask("POST", TEAMS, {**CREW, "system": words(600)})
    asked = answers(step(server, "ask", message="Who keeps the lamp?", to=["ada", "bob", "eve"]))
    computed = sum(answer["tokens"]["prefilled"] for answer in asked.values())
    longest = max(answer["tokens"]["prompt"] for answer in asked.values())
    assert computed < longest + 300, asked  # and not three times as many


def test_answers_are_those_of_single_turns(server):
    server.ask("POST", TEAMS, CREW)
    team = answers(step(server, "ask", message="Who keeps the lamp?"))
    for name, role in (("ada", "You doubt."), ("bob", "You hope.")):
        alone = server.ask("POST", AGENTS, {"agent": f"{name}-alone", "prompt": "Who keeps the lamp?", "max_tokens": 6,
                                            "system": f"Be brief.\n\nYou are {name}. {role}"})
        assert alone.json()["text"] == team[name]["text"]


def events_of(answer):
    names = [line[7:] for line in answer.text.splitlines() if line.startswith("event: ")]
    return list(zip(names, answer.events()))


def test_a_stream_names_the_member_of_each_event(server):
    server.ask("POST", TEAMS, CREW)
    events = events_of(step(server, "ask", message="Who keeps the lamp?", stream=True))
    assert events[-1][0] == "result" and events[-1][1]["complete"]
    for member, whole in ((one["member"], one) for one in events[-1][1]["answers"]):
        own = [(name, data) for name, data in events[:-1] if data["member"] == member]
        assert {name for name, _ in own} == {"prefill", "text", "answer"} and own[-1][0] == "answer"
        assert "".join(data["text"] for name, data in own if name == "text") == whole["text"] == own[-1][1]["text"]


def test_of_several_makers_of_one_name_one_wins(server):
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda _: server.ask("POST", TEAMS, CREW), range(6)))
    assert sorted(answer.status for answer in made) == [201, 409, 409, 409, 409, 409]


def test_each_turn_takes_a_place_of_the_queue_before_anything_begins(real, tmp_path):
    with Server(real, tmp_path, "--queue", "2") as server:
        server.ask("POST", TEAMS, CREW)
        connection = begin_long_turn(server, "zoe")
        refused = step(server, "ask", message="Who?")
        assert refused.status == 429 and int(refused.headers["retry-after"]) > 0, refused.text
        assert "step" not in server.ask("GET", f"{TEAMS}/crew").json()
        assert step(server, "turn", message="Who?").status == 200  # one place is free
        connection.close()
        while server.metric("torpor_turns_running") != 0:
            pass
        assert list(answers(step(server, "ask", message="Who?"))) == ["ada", "bob"]
        assert step(server, "ask", message="Who?", to=["ada", "bob", "eve"]).status == 400


def test_another_tenant_neither_sees_nor_asks_a_team(server):
    add_keys(server)
    server.ask("POST", TEAMS, CREW)
    answers(step(server, "ask", message="Who?"))
    assert server.ask("GET", TEAMS, key="sk-acme").json() == {"teams": []}
    for missing in (server.ask("GET", f"{TEAMS}/crew", key="sk-acme"),
                    step(server, "ask", message="Who?", key="sk-acme"),
                    server.ask("DELETE", f"{TEAMS}/crew", key="sk-acme")):
        assert missing.status == 404, missing.text
    assert server.ask("POST", TEAMS, CREW, key="sk-acme").status == 201
    answers(step(server, "ask", message="Who?", key="sk-acme-2"))  # another key of the tenant
    assert server.ask("DELETE", f"{TEAMS}/crew", key="sk-acme").status == 204
    assert server.ask("GET", f"{TEAMS}/crew").status == 200
    assert server.ask("GET", f"{AGENTS}/crew.ada").status == 200


def test_a_round_that_kill_9_cut_is_asked_again_and_nobody_answers_twice(tmp_path):
    model = make_tiny_model(tmp_path / "model", lambda config, _: config.update(max_position_embeddings=1024))
    torpor = Torpor(tmp_path / "store", model)
    with Server(torpor, tmp_path) as server:
        server.ask("POST", TEAMS, CREW)
        answers(step(server, "ask", message="Who keeps the lamp?"))
        # ada has little room left in her context, so she is the first to be done.
        filler = server.ask("POST", f"{AGENTS}/crew.ada/turn", {"prompt": " ".join(["lamp"] * 800), "max_tokens": 1})
        assert 800 < filler.json()["tokens"]["context"] < 960, filler.text
        connection = server.connection()
        body = {"message": "Go on.", "max_tokens": 800, "stream": True}
        stream = server.send(connection, "POST", f"{TEAMS}/crew/round", body).getresponse()
        while stream.readline() != b"event: answer\n":
            pass
        first = json.loads(stream.readline().removeprefix(b"data: "))
        server.process.kill()
        server.process.wait()
        assert first["member"] == "ada"
    with Server(torpor, tmp_path) as server:
        assert server.ask("GET", f"{TEAMS}/crew").json()["step"]["open"] is True
        held = server.ask("GET", f"{AGENTS}/crew.ada").json()["tokens"]
        again = step(server, "round", message="Go on.", max_tokens=8)
        assert again.json()["complete"]
        found = answers(again)
        assert found["ada"]["kept"] and found["ada"]["text"].strip() == first["text"].strip()
        assert not found["bob"]["kept"] and found["bob"]["tokens"]["generated"] == 8
        assert server.ask("GET", f"{AGENTS}/crew.ada").json()["tokens"] == held
        assert server.metric("torpor_generation_tokens_total") == 8
        assert server.ask("GET", f"{TEAMS}/crew").json()["step"]["open"] is False
        assert server.stop() == 0
    torpor("verify").ok()


def test_one_members_error_stands_beside_the_others_answers(tmp_path):
    model = make_tiny_model(tmp_path / "model", lambda config, _: config.update(max_position_embeddings=512))
    with Server(Torpor(tmp_path / "store", model), tmp_path) as server:
        server.ask("POST", TEAMS, CREW)
        answers(step(server, "ask", message="Who?"))
        server.ask("POST", f"{AGENTS}/crew.bob/turn", {"prompt": " ".join(["lamp"] * 400), "max_tokens": 1})
        partly = step(server, "ask", message=" ".join(["door"] * 80))
        assert partly.json()["complete"] is False
        found = answers(partly)
        assert found["bob"]["error"]["code"] == "kResourceExhausted" and found["ada"]["text"]
        server.ask("POST", f"{AGENTS}/crew.bob/rewind", {"tokens": 100})
        whole = answers(step(server, "ask", message=" ".join(["door"] * 80)))
        assert whole["ada"]["kept"] and not whole["bob"]["kept"] and whole["bob"]["text"]


def test_a_retry_with_a_key_is_the_same_step_also_after_a_restart(tiny, tmp_path):
    key = {"idempotency-key": "first"}
    with Server(tiny, tmp_path) as server:
        server.ask("POST", TEAMS, CREW)
        first = step(server, "ask", message="Who?", headers=key)
        made = server.ask("POST", AGENTS, {"agent": "zoe", "prompt": "Hi.", "max_tokens": 4}, headers=key)
        server.process.kill()
        server.process.wait()
    with Server(tiny, tmp_path) as server:
        assert step(server, "ask", message="Who?", headers=key).text == first.text
        again = server.ask("POST", AGENTS, {"agent": "zoe", "prompt": "Hi.", "max_tokens": 4}, headers=key)
        assert (again.status, again.text) == (201, made.text)
        for turn in range(2):
            body = {"prompt": "And?", "max_tokens": 4, "stream": bool(turn)}
            told = [server.ask("POST", f"{AGENTS}/zoe/turn", body, headers={"idempotency-key": f"turn-{turn}"}).bytes
                    for _ in range(2)]
            assert told[0] == told[1]
        assert server.metric("torpor_generation_tokens_total") == 8
        assert server.stop() == 0


def test_a_team_of_a_model_that_is_not_served_is_told_and_can_be_removed(tiny, tmp_path):
    with Server(tiny, tmp_path) as server:
        assert server.ask("POST", TEAMS, CREW).status == 201
        assert server.stop() == 0
    other = Torpor(tiny.store, make_tiny_model(tmp_path / "models" / "other"))
    with Server(other, tmp_path) as server:
        refused = step(server, "ask", message="Who keeps the lamp?")
        assert refused.status == 404 and "'tiny'" in refused.text and "'other'" in refused.text
        assert server.ask("GET", f"{TEAMS}/crew").json()["model"] == "tiny"
        assert server.ask("GET", AGENTS).json()["agents"] == []
        assert server.ask("DELETE", f"{TEAMS}/crew").status == 204


def test_a_step_that_waits_for_a_members_turn_is_over_when_its_client_goes(server):
    left = 'torpor_requests_total{route="/torpor/v1/teams/step",status="499"}'
    server.ask("POST", TEAMS, CREW)
    turn = begin_long_turn(server, "crew.ada")
    asks = [server.send(server.connection(), "POST", f"{TEAMS}/crew/ask", {"message": "Who?"}) for _ in range(2)]
    answered = select.select([ask.sock for ask in asks], [], [])[0]  # 423: the other one holds the team, and waits
    assert len(answered) == 1
    for ask in asks:
        if ask.sock in answered:
            assert ask.getresponse().status == 423
        ask.close()
    while server.metric(left) is None:
        pass
    assert [one["agent"] for one in server.ask("GET", "/torpor/v1/now").json()["turns"]] == ["crew.ada"]
    turn.close()


def test_a_damaged_team_is_told_and_can_be_removed(server):
    server.ask("POST", TEAMS, CREW)
    file = server.torpor.store / "teams" / "crew.json"
    good = file.read_bytes()
    file.write_bytes(good.replace(b"You hope.", b"You hate."))
    [listed] = server.ask("GET", TEAMS).json()["teams"]
    assert (listed["team"], listed["error"]["code"]) == ("crew", "kCorruption")
    assert server.ask("GET", f"{TEAMS}/crew").status == 500
    found = server.torpor("verify", "--json")
    assert found.code == 4 and found.json["ok"] is False and "crew.json" in found.json["teams"][0]["problem"]
    assert server.ask("DELETE", f"{TEAMS}/crew").status == 204
    assert server.ask("GET", TEAMS).json() == {"teams": []} and not file.exists()


def test_what_is_wrong_is_told(server):
    def fails(status, code, method, path, body=None):
        answer = server.ask(method, TEAMS + path, body)
        assert (answer.status, answer.json()["error"]["code"]) == (status, code), answer.text

    for wrong in ({"members": []}, {"members": [{"name": "ada"}]}, {"coordinator": "zoe"},
                  {"members": [{"name": 7}] * 2}, {"members": [{"name": "ada", "rule": "x"}, {"name": "eve"}]},
                  {"team": "../crew"}, {"tools": [7]},
                  {"members": [{"name": "ada"}, {"name": "ada"}, {"name": "eve"}]}, {"team": "x" * 127}):
        fails(400, "kInvalidArgument", "POST", "", {**CREW, **wrong})
    fails(404, "kNotFound", "POST", "", {**CREW, "model": "none"})
    server.chat("Hi.", agent="crew.bob")
    fails(409, "kInvalidArgument", "POST", "", CREW)  # a member's agent is there
    server.ask("DELETE", f"{AGENTS}/crew.bob")
    assert server.ask("POST", TEAMS, CREW).status == 201
    for path, body in (("ask", {}), ("ask", {"message": ""}), ("ask", {"message": "Hi.", "to": ["zoe"]}), ("round", {}),
                       ("conclude", {}), ("handoff", {"to": "eve", "message": "Hi."}),
                       ("turn", {"message": "Hi.", "to": ["ada"]}), ("ask", {"message": "Hi.", "max_tokens": 0}),
                       ("ask", {"message": "Hi.", "to": "ada"}), ("ask", {"message": "Hi.", "to": []})):
        fails(400, "kInvalidArgument", "POST", f"/crew/{path}", body)
    fails(404, "kNotFound", "POST", "/none/ask", {"message": "Hi."})
    fails(404, "kNotFound", "POST", "/crew/what", {"message": "Hi."})
    fails(405, "kInvalidArgument", "PUT", "/crew")
