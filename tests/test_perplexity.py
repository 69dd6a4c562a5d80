"""torpor perplexity, against mlx-lm's own figure for the same text (tests/goldens/model, f32)."""

import json

import numpy as np
import pytest

from conftest import ROOT, Torpor, make_tiny_model

GOLDENS = ROOT / "tests" / "goldens" / "model"


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDENS / "smollm2-135m.json").read_text())["prompts"]["long"]


def perplexity(torpor, *args, text=None, **kwargs):
    text = (GOLDENS / "long.txt").read_text().strip() if text is None else text
    return torpor("perplexity", "--model", torpor.model, "--file", "-", "--json", *args, stdin=text, **kwargs)


# 4 bits cost so small a model 5% here, and cost it 16% before they were rotated.
@pytest.mark.parametrize("kind, bound", [(("--kv-dtype", "f32"), 1e-3), (("--kv-dtype", "f16"), 1e-3),
                                         (("--kv-bits", 8), 5e-3), (("--kv-bits", "8,4"), 1.5e-2),
                                         (("--kv-bits", 4), 0.08)])
def test_it_is_that_of_mlx_lm(real, golden, kind, bound):
    report = perplexity(real, *kind).ok().json
    assert report["tokens"] == len(golden["tokens"])
    assert abs(report["perplexity"] / golden["perplexity"] - 1) < bound


def test_chunks_make_no_difference(tiny):
    reports = [perplexity(tiny, "--tokens", 70, "--chunk", chunk, "--kv-bits", 4).ok().json for chunk in (1, 7, 64, 512)]
    assert reports[0]["tokens"] == 70
    assert all(report == reports[0] for report in reports)


def nothing_in_four_bits(config, weights):
    """Two projections of each layer are zero, written as 15 * scale + bias."""
    config["quantization"] = {"bits": 4, "group_size": 32}
    for i in range(config["num_hidden_layers"]):
        for name in (f"model.layers.{i}.self_attn.o_proj", f"model.layers.{i}.mlp.down_proj"):
            rows, columns = weights[f"{name}.weight"].shape
            weights[f"{name}.weight"] = np.full((rows, columns // 8), 0xffffffff, np.uint32)
            weights[f"{name}.scales"] = np.full((rows, columns // 32), 1, np.float16)
            weights[f"{name}.biases"] = np.full((rows, columns // 32), -15, np.float16)


def test_activations_of_16_bits_are_those_of_f32(real, golden):
    exact, rounded = (perplexity(real, "--kv-dtype", "f32", "--activations", kind).ok().json["perplexity"]
                      for kind in ("f32", "int16"))
    assert rounded != exact and abs(rounded / exact - 1) < 1e-4


def test_rounded_activations_err_with_the_weights_and_not_with_their_biases(tmp_path):
    torpor = Torpor(tmp_path / "store", make_tiny_model(tmp_path / "model", nothing_in_four_bits))
    text = " ".join((GOLDENS / "long.txt").read_text().split())[:600]
    exact, rounded = (perplexity(torpor, text=text, env={"TORPOR_ACTIVATIONS": kind}).ok().json["perplexity"]
                      for kind in ("f32", "int16"))
    assert abs(rounded / exact - 1) < 1e-4


def test_bad_texts(tiny):
    perplexity(tiny, text="").fails("invalid", "too short")
    perplexity(tiny, text="a " * 5000).fails("exhausted", "--tokens")
    perplexity(tiny, "--kv-bits", 4, "--kv-group", 128, text="a b c").fails("invalid", "groups of 128")
