"""torpor perplexity, against mlx-lm's own figure for the same text (tests/goldens/model, f32)."""

import json

import pytest

from conftest import ROOT

GOLDENS = ROOT / "tests" / "goldens" / "model"


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDENS / "smollm2-135m.json").read_text())["prompts"]["long"]


def perplexity(torpor, *args, text=None, **kwargs):
    text = (GOLDENS / "long.txt").read_text().strip() if text is None else text
    return torpor("perplexity", "--model", torpor.model, "--file", "-", "--json", *args, stdin=text, **kwargs)


# 4 bits cost so small a model 12% here: the bound tells noise from garbage, no more.
@pytest.mark.parametrize("kind, bound", [(("--kv-dtype", "f32"), 1e-3), (("--kv-dtype", "f16"), 1e-3),
                                         (("--kv-bits", 8), 5e-3), (("--kv-bits", 4), 0.2)])
def test_it_is_that_of_mlx_lm(real, golden, kind, bound):
    report = perplexity(real, *kind).ok().json
    assert report["tokens"] == len(golden["tokens"])
    assert abs(report["perplexity"] / golden["perplexity"] - 1) < bound


def test_chunks_make_no_difference(tiny):
    reports = [perplexity(tiny, "--tokens", 70, "--chunk", chunk, "--kv-bits", 4).ok().json for chunk in (1, 7, 64, 512)]
    assert reports[0]["tokens"] == 70
    assert all(report == reports[0] for report in reports)


def test_bad_texts(tiny):
    perplexity(tiny, text="").fails("invalid", "too short")
    perplexity(tiny, text="a " * 5000).fails("exhausted", "--tokens")
    perplexity(tiny, "--kv-bits", 4, "--kv-group", 128, text="a b c").fails("invalid", "groups of 128")
