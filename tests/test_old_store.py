"""Agents that Torpor 0.1.0 left behind (tests/goldens/agents-v1, by scripts/make-goldens-agents): they open, verify, go
on with the same words, fork and are cut. A store of an old version stays readable in every later one."""

import json
import shutil

import pytest

from conftest import ROOT, Torpor, make_tiny_model

GOLDEN = ROOT / "tests/goldens/agents-v1"
LONG = " ".join((ROOT / "examples/lighthouse-log.txt").read_text().split())[:2000]

# Agent, model, what it was told first.
AGENTS = [
    ("raw", "plain", LONG, "--raw"),
    ("cut", "plain", LONG, "--raw"),
    ("chat", "plain", "What did the keeper see? " + LONG[:600], "--system", "You keep a lighthouse."),
    ("quantized", "plain", LONG, "--raw", "--kv-bits", 8),
    ("window", "windowed", LONG, "--raw"),
]


def windowed(config, weights):
    """The second layer sees 64 tokens."""
    config.update(layer_types=["full_attention", "sliding_attention"], sliding_window=64)


def make_models(directory):
    return {"plain": make_tiny_model(directory / "plain"),
            "windowed": make_tiny_model(directory / "windowed", windowed)}


def tensors(torpor):
    """Every file but the sidecars, which are written anew where copying made them look stale."""
    return {name: what for name, what in torpor.state().items() if name.endswith(".safetensors")}


def go_on(torpor, models, agent):
    """What the agent holds, and what it says next."""
    torpor.model = models["windowed" if agent == "window" else "plain"]
    options = [] if agent == "chat" else ["--raw"]
    turn = torpor.run(agent, "And then? Go on.", *options, max_tokens=16).ok().json
    return {"held": turn["tokens"]["cached"], "text": turn["text"], "context": turn["tokens"]["context"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def said():
    return json.loads((GOLDEN / "said.json").read_text())


@pytest.fixture
def old(tmp_path):
    return Torpor(shutil.copytree(GOLDEN / "store", tmp_path / "store"), tmp_path)


def test_all_are_listed_and_every_byte_is_as_it_was_written(old, said):
    before = tensors(old)
    assert [agent["agent"] for agent in old("ls", "--json").ok().json] == sorted(said)
    reports = old("verify", "--json").ok().json["agents"]
    assert {report["agent"]: report["problems"] for report in reports} == {name: [] for name in said}
    assert tensors(old) == before, "looking at an old store changed it"


@pytest.mark.parametrize("agent", ["chat", "cut", "fork", "quantized", "raw", "window"])
def test_an_agent_goes_on_with_the_same_words(old, models, said, agent):
    assert go_on(old, models, agent) == said[agent]
    # And again, from what this version has saved.
    held = go_on(old, models, agent)["held"]
    assert held == said[agent]["context"]
    old("verify").ok()


@pytest.mark.parametrize("agent", ["chat", "cut", "quantized", "window"])
def test_an_upgraded_agent_goes_on_with_the_same_words_under_new_names(old, models, said, agent):
    before = old("show", agent, "--json").ok().json
    old("upgrade", agent).ok()
    after = old("show", agent, "--json").ok().json
    assert len(after["segments"]) == len(before["segments"])
    assert not set(after["segments"]) & set(before["segments"])
    for kept in ("cache_size", "identity", "messages", "numerics", "tokenizer", "chat_template", "created_at"):
        assert after[kept] == before[kept]
    old("gc").ok()
    old("verify").ok()
    state = tensors(old)
    old("upgrade", agent).ok()
    assert tensors(old) == state, "an agent that has today's names was written again"
    assert go_on(old, models, agent) == said[agent]


def test_a_fork_of_an_old_agent_says_what_the_old_fork_said(old, models, said):
    old("fork", "raw", "eve", "--at", 300).ok()
    assert go_on(old, models, "eve") == said["fork"]
    assert go_on(old, models, "raw") == said["raw"]


def test_a_cut_old_agent_says_what_the_old_cut_one_said(old, models, said):
    old("rewind", "raw", 260).ok()
    assert go_on(old, models, "raw") == said["cut"]


def test_old_segments_are_shared_by_new_agents(old, models, said):
    before = tensors(old)
    old.model = models["plain"]
    turn = old.run("new", LONG, "--raw").ok().json
    assert turn["tokens"]["cached"] >= 256
    after = tensors(old)
    assert {name: after[name] for name in before} == before


def test_an_old_conversation_is_shown(old):
    shown = old("show", "chat", "--json").ok().json
    assert [message["role"] for message in shown["messages"]] == ["system", "user", "assistant"]
    assert shown["messages"][0]["content"] == "You keep a lighthouse."
