"""/torpor/v1: agents over HTTP, and their OpenAPI description."""

import hashlib
import json
import signal
import time

import pytest

from conftest import Torpor
from serving import Server

AGENTS, TEAMS = "/torpor/v1/agents", "/torpor/v1/teams"


@pytest.fixture
def server(tiny, tmp_path):
    with Server(tiny, tmp_path) as server:
        server.torpor = tiny
        yield server


def names(server, key=None):
    return [agent["agent"] for agent in server.ask("GET", AGENTS, key=key).json()["agents"]]


def test_an_agent_is_listed_and_shown_as_the_command_line_knows_it(server):
    assert names(server) == []
    assert server.chat("Hi.", agent="ada").status == 200
    [listed] = server.ask("GET", AGENTS).json()["agents"]
    shown = server.ask("GET", f"{AGENTS}/ada").json()
    assert shown.items() >= listed.items()
    assert (shown["agent"], shown["awake"], shown["unsaved"], shown["in_turn"]) == ("ada", True, False, False)
    [kept] = server.torpor("ls", "--json").ok().json
    assert (kept["agent"], kept["cache_size"], kept["created_at"]) == ("ada", shown["tokens"], shown["created_at"])
    assert shown["disk_bytes"] == kept["bytes"]


def test_fork_rewind_rename_pin_sleep_wake_and_delete(server):
    server.chat("Hi.", agent="ada")
    tokens = server.ask("GET", f"{AGENTS}/ada").json()["tokens"]

    fork = server.ask("POST", f"{AGENTS}/ada/fork", {"as": "bea", "at_token": 3})
    assert (fork.status, fork.json()["agent"], fork.json()["tokens"]) == (201, "bea", 3)
    assert server.ask("POST", f"{AGENTS}/ada/fork", {"as": "eve"}).json()["tokens"] == tokens
    assert server.ask("POST", f"{AGENTS}/ada/rewind", {"tokens": 5}).json()["tokens"] == 5
    assert server.ask("POST", f"{AGENTS}/eve/rename", {"to": "eva"}).json()["agent"] == "eva"
    assert names(server) == ["ada", "bea", "eva"]
    assert server.ask("POST", f"{AGENTS}/ada/pin", {"pinned": True}).json()["pinned"] is True
    assert server.ask("POST", f"{AGENTS}/ada/save").json()["agent"] == "ada"
    slept = server.ask("POST", f"{AGENTS}/ada/sleep").json()
    assert (slept["awake"], slept["memory_bytes"]) == (False, 0)
    woken = server.ask("POST", f"{AGENTS}/ada/wake")
    assert (woken.status, woken.json()["waking"]) == (202, True)
    assert server.ask("DELETE", f"{AGENTS}/bea").status == 204
    assert names(server) == ["ada", "eva"]
    assert [agent["agent"] for agent in server.torpor("ls", "--json").ok().json] == ["ada", "eva"]


def turn(server, prompt, agent="ada", key=None, **more):
    return server.ask("POST", f"{AGENTS}/{agent}/turn", {"prompt": prompt, "max_tokens": 6, **more}, key=key)


def options(sampling):
    """As the command line takes what a turn's body says."""
    for name, value in sampling.items():
        for one in value if isinstance(value, list) else [value]:
            yield from ("--" + name.replace("_", "-"), json.dumps(one) if isinstance(one, dict) else str(one))


def test_turns_are_those_of_the_command_line(server, tiny_model, tmp_path):
    made = server.ask("POST", AGENTS, {"agent": "ada", "prompt": "Hi.", "system": "Be brief.", "max_tokens": 6})
    assert made.status == 201
    sampling = {"temperature": 0.9, "seed": 2**53 + 1, "top_k": 40, "min_p": 0.01, "top_p": 0.9,
                "repetition_penalty": 1.3, "penalty_context": 9, "presence_penalty": 0.5, "frequency_penalty": 0.25, "stop": ["~~", "e"],
                "logit_bias": {"5": 7, "6": -2.5}}
    said = [made.json(), turn(server, "And then?").json(), turn(server, "Why?", temperature=0.9, seed=3).json(),
            turn(server, "How?", **sampling).json()]
    other = Torpor(tmp_path / "other", tiny_model)
    for answer, prompt, *more in [(said[0], "Hi.", "--system", "Be brief."), (said[1], "And then?"),
                                  (said[2], "Why?", "--temperature", "0.9", "--seed", "3"),
                                  (said[3], "How?", *options(sampling))]:
        expected = other.run("ada", prompt, *more, max_tokens=6).ok().json
        for name in ("agent", "text", "finish_reason", "tokens"):
            assert answer[name] == expected[name], name
    assert server.stop() == 0
    for torpor in (server.torpor, other):  # and the command line goes on with what the server kept
        torpor.after = torpor.run("ada", "Go on.").ok().json["text"]
    assert server.torpor.after == other.after


def test_a_streamed_turn_says_what_a_whole_one_does(server):
    whole = server.ask("POST", AGENTS, {"agent": "ada", "prompt": "Hi.", "max_tokens": 6}).json()
    streamed = server.ask("POST", AGENTS, {"agent": "bea", "prompt": "Hi.", "max_tokens": 6, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    names_of = [line[7:] for line in streamed.text.splitlines() if line.startswith("event: ")]
    events = list(zip(names_of, streamed.events()))
    assert events[-1][0] == "result" and set(names_of[:-1]) == {"prefill", "text"}
    assert "".join(data["text"] for name, data in events if name == "text") == whole["text"] == events[-1][1]["text"]
    assert events[-1][1]["agent"] == "bea"
    assert server.metric('torpor_turns_total{reason="length"}') == 2
    assert server.metric("torpor_generation_tokens_total") == 12


def test_a_turn_goes_on_and_only_create_begins(server):
    assert turn(server, "Hi.").status == 404 and names(server) == []
    assert server.ask("POST", AGENTS, {"agent": "ada", "prompt": "Hi.", "max_tokens": 2}).status == 201
    taken = server.ask("POST", AGENTS, {"agent": "ada", "prompt": "Hi.", "max_tokens": 2})
    assert (taken.status, taken.json()["error"]["agent"]) == (409, "ada")
    for wrong in ({"max_tokens": 0}, {"max_tokens": -2**62}, {"top_p": 2}, {"system": "Another."}, {"stream": "yes"},
                  {"stream": True, "max_tokens": 0}, {"seed": 1.5}, {"top_k": -2}, {"min_p": 2}, {"logit_bias": {"x": 1}},
                  {"logit_bias": {"99999999": 1}}, {"logit_bias": {"5": "no"}}, {"stop": [""]}, {"stop": "."},
                  {"repetition_penalty": 0}, {"penalty_context": -1}):
        assert turn(server, "And?", **wrong).json()["error"]["code"] == "kInvalidArgument", wrong


def test_why_says_where_a_conversation_parts_from_the_agent(server):
    text = server.ask("POST", AGENTS, {"agent": "ada", "prompt": "Hi.", "max_tokens": 6}).json()["text"]
    held = server.ask("GET", f"{AGENTS}/ada").json()["tokens"]

    def why(*messages):
        roles = ("user", "assistant")
        given = [{"role": roles[i % 2], "content": content} for i, content in enumerate(messages)]
        return server.ask("POST", f"{AGENTS}/ada/why", {"messages": given}).json()

    on = why("Hi.", text, "And then?")
    assert (on["common_messages"], on["held_messages"], on["held"], on["given"]) == (2, 2, None, None)
    assert on["held_tokens"] == held and 0 < on["common_tokens"] <= held < on["prompt_tokens"]
    parted = why("Hi.", "something else", "And then?")
    assert (parted["common_messages"], parted["given"]["content"]) == (1, "something else")
    assert parted["held"]["content"].strip() == text.strip() and parted["common_tokens"] < on["common_tokens"]
    assert why("Ho.")["common_tokens"] == 0
    for wrong in ([], [{"content": "no role"}], [7], "text"):
        assert server.ask("POST", f"{AGENTS}/ada/why", {"messages": wrong}).status == 400, wrong


def test_an_export_is_imported_as_the_same_agent(server, tiny_model, tmp_path):
    server.ask("POST", AGENTS, {"agent": "ada", "prompt": "Hi.", "max_tokens": 6})
    exported = server.ask("GET", f"{AGENTS}/ada/export")
    assert exported.status == 200 and "ada.safetensors" in exported.headers["content-disposition"]
    (tmp_path / "ada.safetensors").write_bytes(exported.bytes)
    other = Torpor(tmp_path / "other", tiny_model)
    other("import", tmp_path / "ada.safetensors", "eve").ok()
    assert other.run("eve", "And then?", max_tokens=6).ok().json["text"] == turn(server, "And then?").json()["text"]


def test_failures_are_told_with_code_and_sentence(server):
    server.chat("Hi.", agent="ada")

    def fails(status, code, method, path, body=None, **more):
        answer = server.ask(method, AGENTS + path, body)
        error = answer.json()["error"]
        assert (answer.status, error["code"]) == (status, code), error
        for name, value in more.items():
            assert error[name] == value, error

    fails(404, "kNotFound", "GET", "/absent", agent="absent")
    fails(404, "kNotFound", "DELETE", "/absent")
    fails(404, "kNotFound", "GET", "/ada/nothing")
    fails(405, "kInvalidArgument", "PUT", "/ada")
    fails(400, "kInvalidArgument", "GET", "/..%2fada")
    fails(409, "kInvalidArgument", "POST", "/ada/fork", {"as": "ada"}, agent="ada", field="agent")
    fails(409, "kInvalidArgument", "POST", "/ada/rename", {"to": "ada"}, agent="ada", field="agent")
    fails(400, "kInvalidArgument", "POST", "/ada/fork", {"as": "../eve"})
    for stream in (False, True):
        too_long = {"prompt": "word " * 5000, "stream": stream}
        full = {"field": "ModelInfo::max_context", "expected": "4096"}
        fails(400, "kResourceExhausted", "POST", "/ada/turn", too_long, **full)
        fails(400, "kResourceExhausted", "POST", "", {"agent": "eve", **too_long}, **full)
    fails(400, "kInvalidArgument", "POST", "/ada/fork", {}, field="as")
    fails(400, "kInvalidArgument", "POST", "/ada/fork", {"as": "eve", "att_token": 3}, field="att_token")
    fails(400, "kInvalidArgument", "POST", "/ada/fork", {"as": 7}, field="as")
    for wrong in (-1, 10**6, 1.5, "5", 2**64, True, None):
        fails(400, "kInvalidArgument", "POST", "/ada/rewind", {"tokens": wrong})
    for broken in ("", "{", "[]", "[" * 100_000, b"\xff", '{"tokens": 1} x'):
        fails(400, "kInvalidArgument", "POST", "/ada/rewind", broken)
    assert server.ask("PUT", f"{AGENTS}/ada").headers["allow"] == "GET, DELETE"


def add_keys(server):
    lines = server.keys.read_text()
    server.keys.write_text(lines + f"acme:first:{hashlib.sha256(b'sk-acme').hexdigest()}\n"
                           f"acme:second:{hashlib.sha256(b'sk-acme-2').hexdigest()}\n")
    server.signal(signal.SIGHUP)
    while server.ask("GET", AGENTS, key="sk-acme").status != 200:
        time.sleep(0.01)


def cached(answer):
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


LONG = " ".join(str(i * i) for i in range(200))  # more than a segment


def test_no_tenant_finds_the_prefix_of_another(tiny, tmp_path):
    with Server(tiny, tmp_path) as server:
        add_keys(server)
        assert cached(server.chat(LONG, agent="ada")) == 0
        assert cached(server.chat(LONG)) > 256
        assert cached(server.chat(LONG, key="sk-acme")) == 0
        assert cached(server.chat(LONG, agent="ada", key="sk-acme-2")) > 256  # another key of the tenant
        made = server.ask("POST", AGENTS, {"agent": "bea", "prompt": LONG, "max_tokens": 2}, key="sk-acme")
        assert made.json()["tokens"]["cached"] > 256
        assert server.stop() == 0
    tiny("gc").ok()
    tiny("verify").ok()
    with Server(tiny, tmp_path) as server:  # from the disk
        assert cached(server.chat(LONG, key="sk-acme")) > 256
        assert server.stop() == 0
    with Server(tiny, tmp_path, "--share-prefixes") as server:
        assert cached(server.chat(LONG, key="sk-acme")) > 256
        other = LONG[::-1]
        assert cached(server.chat(other)) == 24  # what the template begins each conversation with
        assert cached(server.chat(other, key="sk-acme")) > 256


def test_of_several_creates_of_one_name_one_wins(server):
    import concurrent.futures

    body = {"agent": "ada", "prompt": LONG, "max_tokens": 8}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: server.ask("POST", AGENTS, body), range(4)))
    assert sorted(answer.status for answer in answers) == [201, 409, 409, 409]
    [made] = [answer.json() for answer in answers if answer.status == 201]
    assert server.ask("GET", f"{AGENTS}/ada").json()["tokens"] == made["tokens"]["context"]


def test_an_export_holds_nothing_but_the_agent_as_its_tenant_knows_it(server, tmp_path):
    add_keys(server)
    server.ask("POST", AGENTS, {"agent": "ada", "prompt": LONG, "max_tokens": 2}, key="sk-acme")
    exported = server.ask("GET", f"{AGENTS}/ada/export", key="sk-acme")
    assert exported.status == 200 and b'"agent_id":"ada"' in exported.bytes
    assert b"acme" not in exported.bytes
    (tmp_path / "ada.safetensors").write_bytes(exported.bytes)
    server.torpor("import", tmp_path / "ada.safetensors", "eve").ok()


def test_a_tenant_sees_its_own_agents_and_no_others(server):
    add_keys(server)
    server.chat("Hi.", agent="ada")
    assert server.chat("Hello there, all of you.", agent="ada", key="sk-acme").status == 200
    mine, theirs = (server.ask("GET", f"{AGENTS}/ada", key=key).json() for key in (None, "sk-acme"))
    assert mine["tokens"] != theirs["tokens"] and mine["agent"] == theirs["agent"] == "ada"
    assert names(server) == names(server, "sk-acme") == names(server, "sk-acme-2") == ["ada"]
    assert server.ask("GET", f"{AGENTS}/t.acme.ada").status == 400
    assert server.chat("Hi.", agent="t.acme.ada").status == 400
    assert server.ask("DELETE", f"{AGENTS}/ada", key="sk-acme-2").status == 204
    assert (names(server), names(server, "sk-acme")) == (["ada"], [])
    for missing in (server.ask("GET", f"{AGENTS}/ada", key="sk-acme"), turn(server, "Hi.", key="sk-acme"),
                    server.ask("GET", f"{AGENTS}/ada/export", key="sk-acme")):
        assert missing.status == 404 and "t.acme" not in missing.text
    server.chat("Hi.", agent="bea")
    made = server.ask("POST", AGENTS, {"agent": "bea", "prompt": "Hi.", "max_tokens": 2}, key="sk-acme")
    assert (made.status, made.json()["agent"]) == (201, "bea")
    messages = {"messages": [{"role": "user", "content": "Hi."}]}
    assert server.ask("POST", f"{AGENTS}/bea/why", messages, key="sk-acme").json()["agent"] == "bea"


def test_the_description_is_what_is_served(server):
    description = server.ask("GET", "/torpor/v1/openapi.json").json()
    assert description["openapi"].startswith("3.1")
    assert description["servers"] == [{"url": "/"}]
    schemas = description["components"]["schemas"]
    paths = {path: methods for path, methods in description["paths"].items() if path.startswith("/torpor/v1/")}

    def resolve(schema):
        return schemas[schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema

    def check(value, schema):
        schema = resolve(schema)
        kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
        assert isinstance(value, kinds[schema["type"]]), (value, schema)
        for name in schema.get("required", []):
            check(value[name], schema["properties"][name])
        if schema["type"] == "array" and "items" in schema:
            for one in value:
                check(one, schema["items"])

    bodies = {"forkAgent": {"as": "bea"}, "rewindAgent": {"tokens": 2}, "renameAgent": {"to": "ada2"},
              "pinAgent": {"pinned": False}, "turnAgent": {"prompt": "And?", "max_tokens": 2},
              "createAgent": {"agent": "zoe", "prompt": "Hi.", "max_tokens": 2},
              "whyAgent": {"messages": [{"role": "user", "content": "Hi."}]},
              "makeTeam": {"team": "other", "coordinator": "eve", "members": [{"name": "ada"}, {"name": "eve"}]},
              "turnTeam": {"message": "Hi.", "max_tokens": 2}, "askTeam": {"message": "Hi.", "max_tokens": 2},
              "roundTeam": {"max_tokens": 2}, "handOffTeam": {"to": "ada", "message": "Go.", "max_tokens": 2},
              "concludeTeam": {"max_tokens": 2}}
    seen = set()
    for path, methods in paths.items():
        for method, operation in methods.items():
            assert operation["operationId"] not in seen
            seen.add(operation["operationId"])
            server.chat("Hi.", agent="ada")  # an agent for each operation
            server.ask("POST", TEAMS, {**bodies["makeTeam"], "team": "crew"})  # and a team that has said something
            server.ask("POST", f"{TEAMS}/crew/handoff", {"to": "eve", "from": "ada", "message": "Go.", "max_tokens": 2})
            server.ask("POST", f"{TEAMS}/crew/ask", {"message": "Hi.", "max_tokens": 2})
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            members = resolve(content.get("schema", {}))
            body = bodies.get(operation["operationId"])
            assert set(body or {}) <= set(members.get("properties", {}))
            assert bool(body) == ("requestBody" in operation)
            answer = server.ask(method.upper(), path.replace("{agent}", "ada").replace("{team}", "crew"), body)
            # One that can be streamed too is 200 then, whatever it is when it is answered whole.
            status = next(status for status in operation["responses"] if status != "default")
            assert answer.status == int(status), (path, answer.text)
            content = operation["responses"][status].get("content")
            if content:
                kind = next(iter(content))
                assert answer.headers["content-type"] == kind
                if kind == "application/json":
                    check(answer.json(), content[kind]["schema"])
            failed = server.ask(method.upper(), path.replace("{agent}", "absent").replace("{team}", "absent"), body)
            if "{" in path:
                assert failed.status == 404, failed.text
                assert operation["responses"]["default"] == {"$ref": "#/components/responses/AgentsError"}
                check(failed.json(), {"$ref": "#/components/schemas/AgentsError"})
