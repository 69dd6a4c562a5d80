"""`torpor serve` with several models: who is asked, who is loaded, and what lists them."""

import time

import pytest

from conftest import Torpor, make_tiny_model
from serving import Server

AGENTS = "/torpor/v1/agents"


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_model):
    directory = tmp_path_factory.mktemp("models")
    other_tiny_model = make_tiny_model(directory / "second", lambda config, weights: weights.update(
        {"model.norm.weight": weights["model.norm.weight"] / 2}))
    torpor = Torpor(directory / "store", tiny_model)
    with Server(torpor, directory, "--model", other_tiny_model, "--alias", f"claude-*={other_tiny_model.name}",
                "--idle-unload", "0.2") as server:
        server.torpor = torpor
        server.other = other_tiny_model.name
        yield server
        assert server.stop() == 0


def ask(server, model, text="Hi.", **headers):
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4, **({"model": model} if model else {})}
    return server.ask("POST", "/v1/chat/completions", body, headers=headers)


def running(server):
    return [model["name"] for model in server.ask("GET", "/api/ps").json()["models"]]


def test_each_list_has_all_models_and_ps_those_that_are_loaded(two):
    both = ["tiny", two.other]
    assert [model["id"] for model in two.ask("GET", "/v1/models").json()["data"]] == both
    assert [model["name"] for model in two.ask("GET", "/api/tags").json()["models"]] == both
    assert two.ask("POST", "/api/show", {"model": two.other}).status == 200
    assert two.ask("GET", f"/v1/models/{two.other}").json()["id"] == two.other
    assert ask(two, two.other).json()["model"] == two.other
    assert "tiny" in running(two)
    assert [model["name"] for model in two.ask("GET", "/torpor/v1/now").json()["models"]] == both


def test_a_request_without_a_model_gets_the_first_and_an_alias_its_own(two):
    assert ask(two, None).json()["model"] == "tiny"
    assert ask(two, "claude-sonnet-9").json()["model"] == two.other
    absent = ask(two, "absent")
    assert absent.status == 404 and two.other in absent.text


def test_an_idle_model_is_unloaded_and_its_agents_are_still_there(two):
    first = ask(two, two.other, **{"x-torpor-agent": "bea"}).json()["choices"][0]["message"]["content"]
    while running(two) != ["tiny"]:
        time.sleep(0.01)
    shown = two.ask("GET", f"{AGENTS}/bea").json()
    assert (shown["agent"], shown["awake"]) == ("bea", False)
    assert two.ask("POST", f"{AGENTS}/bea/turn", {"prompt": "And?", "max_tokens": 2}).status == 200
    assert {agent["agent"]: agent["awake"] for agent in two.ask("GET", AGENTS).json()["agents"]}["bea"] in (True, False)
    assert ask(two, two.other, **{"x-torpor-agent": "bea"}).json()["choices"][0]["message"]["content"] == first


def test_an_agent_is_made_on_the_model_that_is_named(two):
    made = two.ask("POST", AGENTS, {"agent": "eve", "prompt": "Hi.", "max_tokens": 2, "model": two.other})
    assert made.status == 201 and made.json()["model"].endswith(two.other)
    assert two.ask("POST", AGENTS, {"agent": "ivy", "prompt": "Hi.", "model": "absent"}).status == 404
    assert two.ask("DELETE", f"{AGENTS}/eve").status == 204


def test_a_session_is_forgotten_after_its_time_and_an_agent_is_not(tiny, tmp_path):
    with Server(tiny, tmp_path, "--session-ttl", "1") as server:
        assert ask(server, None, **{"x-session-id": "s"}).headers["x-torpor-agent"].startswith("session-")
        assert ask(server, None, **{"x-torpor-agent": "ada"}).status == 200
        while [agent["agent"] for agent in server.ask("GET", AGENTS).json()["agents"]] != ["ada"]:
            time.sleep(0.05)


@pytest.mark.parametrize("options, word", [
    (["--alias", "claude-*=absent"], "absent"), (["--alias", "claude"], "PATTERN=NAME"), (["--model", "/nowhere/m"], "/nowhere/m")])
def test_mistakes_are_told_at_the_start(tiny, tmp_path, options, word):
    failed = tiny("serve", "--model", tiny.model, "--port", "0", "--api-key-file", tmp_path / "keys", *options)
    assert failed.code != 0 and word in failed.err
