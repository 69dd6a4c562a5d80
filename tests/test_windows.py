"""Layers with a sliding window: what a wake reads, forks and rewinds beyond the window, and saves that end in a turn."""

import subprocess
import sys

import json

import pytest

from conftest import Torpor, make_tiny_model

WINDOW, SEGMENT = 512, 256
ROW = 2 * 64 * 2  # one layer's key and value of one token: a head of 64, f16


@pytest.fixture(scope="module")
def windowed_model(tmp_path_factory):
    def change(config, weights):
        config.update(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=WINDOW)
    return make_tiny_model(tmp_path_factory.mktemp("models") / "windowed", change)


@pytest.fixture
def windowed(tmp_path, windowed_model):
    return Torpor(tmp_path / "store", windowed_model)


def test_a_wake_reads_only_what_its_layers_still_see(windowed, words):
    windowed.run("ada", words(3900), "--raw", max_tokens=1).ok()
    length = windowed("show", "ada", "--json").ok().json["cache_size"]
    result = windowed.run("ada", "and", "--raw").ok().json
    assert result["tokens"]["cached"] == length > 3500
    first = (length - WINDOW) // SEGMENT * SEGMENT  # the segment in which the window begins
    files = [path.read_bytes() for path in windowed.files() if path.suffix == ".safetensors"]
    sizes = [8 + int.from_bytes(content[:8], "little") for content in files]
    of_messages = [json.loads(content[8:size]).get("messages", {"shape": [0]})["shape"][0] for content, size in zip(files, sizes)]
    token_ids = 4 * (length + SEGMENT * len(windowed.segments()))
    assert result["bytes"]["read"] <= 2 * ROW * (length - first) + sum(sizes) + sum(of_messages) + token_ids
    assert result["bytes"]["read"] < 2 * ROW * length / 3


@pytest.mark.parametrize("kind", [(), ("--kv-bits", 4, "--kv-group", 32)], ids=["f16", "q4"])
def test_forks_and_rewinds_beyond_the_window_are_exact(windowed, words, kind):
    windowed.run("ada", words(1500), "--raw", *kind, max_tokens=1).ok()
    windowed.run("fresh", words(600), "--raw", *kind, max_tokens=1).ok()
    windowed("fork", "ada", "bob", "--at", 600).ok()
    windowed("rewind", "ada", 600).ok()
    windowed("rewind", "fresh", 600).ok()
    answers = [windowed.run(agent, "and then", "--raw").ok().json for agent in ("fresh", "bob", "ada")]
    assert len({answer["text"] for answer in answers}) == 1
    assert all(answer["tokens"]["cached"] == 600 for answer in answers)


ROWS_OF_A_TURN = """
import sys
import mlx.core as mx
import torpor
model, store, first, second = sys.argv[1:]

def two_turns(engine, save):
    ada = engine.agent("ada")
    ada.turn(first, raw=True, max_tokens=1, save=save)
    held = engine.memory_usage().kv_bytes
    ada.turn(second, raw=True, max_tokens=1, save="no")
    return held, ada.next_logits()

with torpor.Engine(model, store + "-alone", durability="none") as engine:
    held, expected = two_turns(engine, save="no")
with torpor.Engine(model, store, memory_budget=held + held // 3 + 1) as engine:
    engine.agent("bob").turn(first[:200], raw=True, max_tokens=1, save="no")
    assert mx.allclose(two_turns(engine, save="behind")[1], expected, atol=0.05), "rows went to the wrong place"
    assert [status.awake for status in engine.agents()] == [True, False], "nobody had to make room"
"""


def test_a_save_that_ends_while_a_turn_makes_room_moves_no_row_under_it(windowed_model, words, slow_disk, tmp_path):
    """With MLX's own arrays, which shrink when what a window has left behind is on disk."""
    env = {**slow_disk(0.2, tmp_path / "mark"), "TORPOR_BACKEND": "mlx"}
    ended = subprocess.run([sys.executable, "-c", ROWS_OF_A_TURN, windowed_model, tmp_path / "store", words(1500), words(1900)[-1500:]],
                           capture_output=True, text=True, timeout=300, env=env)
    assert ended.returncode == 0, ended.stderr
