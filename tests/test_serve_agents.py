"""/torpor/v1: agents over HTTP, and their OpenAPI description."""

import hashlib

import pytest

from serving import Server

AGENTS = "/torpor/v1/agents"


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
    fails(400, "kInvalidArgument", "POST", "/ada/fork", {"as": "ada"})
    fails(400, "kInvalidArgument", "POST", "/ada/fork", {"as": "../eve"})
    fails(400, "kInvalidArgument", "POST", "/ada/fork", {}, field="as")
    fails(400, "kInvalidArgument", "POST", "/ada/fork", {"as": "eve", "att_token": 3}, field="att_token")
    fails(400, "kInvalidArgument", "POST", "/ada/fork", {"as": 7}, field="as")
    for wrong in (-1, 10**6, 1.5, "5", 2**64, True, None):
        fails(400, "kInvalidArgument", "POST", "/ada/rewind", {"tokens": wrong})
    for broken in ("", "{", "[]", "[" * 100_000, b"\xff", '{"tokens": 1} x'):
        fails(400, "kInvalidArgument", "POST", "/ada/rewind", broken)
    assert server.ask("PUT", f"{AGENTS}/ada").headers["allow"] == "GET, DELETE"


def test_a_tenant_sees_its_own_agents_and_no_others(server):
    import signal
    import time

    lines = server.keys.read_text()
    server.keys.write_text(lines + f"acme:first:{hashlib.sha256(b'sk-acme').hexdigest()}\n"
                           f"acme:second:{hashlib.sha256(b'sk-acme-2').hexdigest()}\n")
    server.signal(signal.SIGHUP)
    while server.ask("GET", AGENTS, key="sk-acme").status != 200:
        time.sleep(0.01)
    server.chat("Hi.", agent="ada")
    assert server.chat("Hello there, all of you.", agent="ada", key="sk-acme").status == 200
    mine, theirs = (server.ask("GET", f"{AGENTS}/ada", key=key).json() for key in (None, "sk-acme"))
    assert mine["tokens"] != theirs["tokens"] and mine["agent"] == theirs["agent"] == "ada"
    assert names(server) == names(server, "sk-acme") == names(server, "sk-acme-2") == ["ada"]
    assert server.ask("GET", f"{AGENTS}/t.acme.ada").status == 400
    assert server.chat("Hi.", agent="t.acme.ada").status == 400
    assert server.ask("DELETE", f"{AGENTS}/ada", key="sk-acme-2").status == 204
    assert (names(server), names(server, "sk-acme")) == (["ada"], [])
    missing = server.ask("GET", f"{AGENTS}/ada", key="sk-acme").text
    assert "t.acme" not in missing


def test_the_description_is_what_is_served(server):
    description = server.ask("GET", "/torpor/v1/openapi.json").json()
    assert description["openapi"].startswith("3.1")
    assert description["servers"] == [{"url": "/torpor/v1"}]
    schemas = description["components"]["schemas"]

    def resolve(schema):
        return schemas[schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema

    def check(value, schema):
        schema = resolve(schema)
        kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}
        assert isinstance(value, kinds[schema["type"]]), (value, schema)
        for name in schema.get("required", []):
            check(value[name], schema["properties"][name])
        if schema["type"] == "array":
            for one in value:
                check(one, schema["items"])

    bodies = {"forkAgent": {"as": "bea"}, "rewindAgent": {"tokens": 2}, "renameAgent": {"to": "ada2"},
              "pinAgent": {"pinned": False}}
    seen = set()
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            assert operation["operationId"] not in seen
            seen.add(operation["operationId"])
            server.chat("Hi.", agent="ada")  # an agent for each operation
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            members = resolve(content.get("schema", {}))
            body = bodies.get(operation["operationId"])
            assert set(body or {}) <= set(members.get("properties", {}))
            assert bool(body) == ("requestBody" in operation)
            answer = server.ask(method.upper(), "/torpor/v1" + path.replace("{agent}", "ada"), body)
            [status] = [status for status in operation["responses"] if status != "default"]
            assert answer.status == int(status), (path, answer.text)
            content = operation["responses"][status].get("content")
            if content:
                check(answer.json(), content["application/json"]["schema"])
            failed = server.ask(method.upper(), "/torpor/v1" + path.replace("{agent}", "absent"), body)
            if "{agent}" in path:
                assert failed.status == 404, failed.text
                check(failed.json(), operation["responses"]["default"]["content"]["application/json"]["schema"])
    # And no other method of a path is answered.
    for path, methods in description["paths"].items():
        for method in {"get", "post", "put", "patch", "delete"} - set(methods):
            assert server.ask(method.upper(), "/torpor/v1" + path.replace("{agent}", "ada")).status == 405
