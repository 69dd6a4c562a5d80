"""Layers with a sliding window, through the command line: what a wake reads, and forks and rewinds beyond the window."""

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
