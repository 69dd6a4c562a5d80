"""Every format of quantized weights through the command line, against mlx-lm on the same directory."""

import json
import math

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from conftest import ROOT, Torpor, make_tiny_model

TEXT = " ".join((ROOT / "tests/goldens/model/long.txt").read_text().split())
TOKENS = 40
FORMATS = [("affine", 2, 32), ("affine", 3, 64), ("affine", 5, 128), ("affine", 6, 64), ("mxfp4", 4, 32), ("mxfp8", 8, 32),
           ("nvfp4", 4, 16)]


def quantized(mode, bits, group, names=("embed_tokens", "_proj")):
    def change(config, weights):
        config["quantization"] = {"mode": mode, "bits": bits, "group_size": group}
        for name in [name.removesuffix(".weight") for name in weights if any(part in name for part in names)]:
            parts = mx.quantize(mx.array(weights[f"{name}.weight"].astype(np.float32)), group, bits, mode, stream=mx.cpu)
            for part, value in zip(("weight", "scales", "biases"), parts):
                value = np.array(value)
                weights[f"{name}.{part}"] = value.astype(np.float16) if value.dtype == np.float32 else value
    return change


def mlx_lms_perplexity(directory, ids):
    with mx.stream(mx.cpu):
        model, _ = load_model(directory)
        model.set_dtype(mx.float32)
        logits = np.array(model(mx.array([ids]))[0]).astype(np.float64)[:-1]
    top = logits.max(axis=-1)
    norm = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1))
    return math.exp((norm - logits[np.arange(len(ids) - 1), ids[1:]]).mean())


@pytest.mark.parametrize("mode, bits, group", FORMATS, ids=lambda value: str(value))
def test_a_format_is_computed_as_mlx_lm_computes_it(tmp_path, tokenizer, mode, bits, group):
    model = make_tiny_model(tmp_path / "model", quantized(mode, bits, group))
    torpor = Torpor(tmp_path / "store", model)
    expected = mlx_lms_perplexity(model, tokenizer.encode(TEXT).ids[:TOKENS])
    for backend in ("kernels", "mlx"):
        report = torpor("perplexity", "--model", model, "--file", "-", "--tokens", TOKENS, "--kv-dtype", "f32", "--json", stdin=TEXT,
                        env={"TORPOR_BACKEND": backend, "TORPOR_ACTIVATIONS": "f32"}).ok().json
        assert report["tokens"] == TOKENS
        assert abs(report["perplexity"] / expected - 1) < 1e-5, backend


@pytest.mark.parametrize("change, sentence", [
    ({"mode": "nf4"}, "unsupported quantization mode nf4, supported: affine, mxfp4, mxfp8, nvfp4."),
    ({"lm_head": {"mode": "nf4"}}, "unsupported quantization mode nf4 of lm_head, supported: affine, mxfp4, mxfp8, nvfp4."),
    ({"model.layers.1.mlp.up_proj": {"mode": "mxfp8"}}, "The quantized weight model.layers.1.mlp.up_proj is not packed as")])
def test_a_mode_that_is_not_the_weights_is_named_with_its_module(tmp_path, change, sentence):
    def spoiled(config, weights):
        quantized("mxfp4", 4, 32, ["layers.1.mlp"])(config, weights)
        config["quantization"] |= change

    model = make_tiny_model(tmp_path / "model", spoiled)
    result = Torpor(tmp_path / "store", model)("bench", "--model", model, "--prefill", 4)
    assert result.code != 0 and sentence in result.err, result.err


def test_widths_that_nobody_packs_are_named_with_their_module(tmp_path):
    def spoiled(config, weights):
        quantized("affine", 8, 32, ["layers.1.mlp.up"])(config, weights)
        name = "model.layers.1.mlp.up_proj"
        weights[f"{name}.weight"] = np.repeat(weights[f"{name}.weight"], 2, axis=1)

    model = make_tiny_model(tmp_path / "model", spoiled)
    result = Torpor(tmp_path / "store", model)("bench", "--model", model, "--prefill", 4)
    assert result.code != 0 and "unsupported quantization of model.layers.1.mlp.up_proj: 16 bits in groups of 32" in result.err
