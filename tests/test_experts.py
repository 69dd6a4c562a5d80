"""Mixtures of experts through the command line: as checkpoints keep them, and a real model cut into experts."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import ROOT, Torpor, make_tiny_model
from test_weight_formats import TEXT, TOKENS, mlx_lms_perplexity

SMOLLM = ROOT / ".models/smollm2-135m"
EXPERTS = 4


def perplexity(model, tmp_path, tokens, **env):
    torpor = Torpor(tmp_path / "store", model)
    return torpor("perplexity", "--model", model, "--file", "-", "--tokens", tokens, "--kv-dtype", "f32", "--json", stdin=TEXT,
                  env={"TORPOR_ACTIVATIONS": "f32", **env}).ok().json["perplexity"]


def mixtral(config, weights):
    """Experts as Hugging Face keeps them, each in tensors of its own."""
    config |= {"model_type": "mixtral", "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    random = np.random.default_rng(3)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        whole = {part: weights.pop(f"{layer}mlp.{name}.weight")
                 for part, name in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))}
        for e in range(EXPERTS):
            for part, value in whole.items():
                weights[f"{layer}block_sparse_moe.experts.{e}.{part}.weight"] = np.roll(value, e, axis=0)
        weights[f"{layer}block_sparse_moe.gate.weight"] = random.normal(0, 0.3, (EXPERTS, 128)).astype(np.float16)


def test_experts_in_tensors_of_their_own_are_found(tmp_path, tokenizer):
    model = make_tiny_model(tmp_path / "model", mixtral)
    expected = mlx_lms_perplexity(model, tokenizer.encode(TEXT).ids[:TOKENS])
    for backend in ("kernels", "mlx"):
        assert abs(perplexity(model, tmp_path, TOKENS, TORPOR_BACKEND=backend) / expected - 1) < 1e-5, backend


def test_more_experts_for_a_token_than_there_are_is_told(tmp_path):
    def greedy(config, weights):
        mixtral(config, weights)
        config["num_experts_per_tok"] = 5

    model = make_tiny_model(tmp_path / "model", greedy)
    result = Torpor(tmp_path / "store", model)("bench", "--model", model, "--prefill", 4)
    assert result.code != 0 and "a token goes to 5 of 4 experts" in result.err


def cut_into_experts(directory, chosen, router):
    """SmolLM2 as a Mixtral: the columns between its MLPs' projections are shared out, and what comes back is four times as much
    for being weighed by a quarter."""
    directory.mkdir()
    for file in SMOLLM.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, directory)
    config = json.loads((SMOLLM / "config.json").read_text())
    config |= {"model_type": "mixtral", "num_local_experts": EXPERTS, "num_experts_per_tok": chosen,
               "intermediate_size": config["intermediate_size"] // EXPERTS}
    (directory / "config.json").write_text(json.dumps(config))
    weights = load_file(SMOLLM / "model.safetensors")
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{i}.mlp.", f"model.layers.{i}.block_sparse_moe."
        for part in ("gate_proj", "up_proj", "down_proj"):
            for kind in ("weight", "scales", "biases"):
                value = weights.pop(f"{ours}{part}.{kind}")
                if part == "down_proj":
                    value = np.stack(np.split(value, EXPERTS, axis=1))
                    value = value if kind == "weight" else (value * np.float16(EXPERTS)).astype(np.float16)
                weights[f"{theirs}switch_mlp.{part}.{kind}"] = value.reshape(EXPERTS, -1, value.shape[-1])
        weights[f"{theirs}gate.weight"] = router((EXPERTS, config["hidden_size"])).astype(np.float16)
    save_file(weights, directory / "model.safetensors", metadata={"format": "mlx"})
    return directory


def test_a_real_model_cut_into_four_experts_speaks_as_it_did(tmp_path):
    model = cut_into_experts(tmp_path / "model", EXPERTS, np.zeros)
    assert abs(perplexity(model, tmp_path, 300) / perplexity(SMOLLM, tmp_path, 300) - 1) < 1e-4


def test_with_two_of_its_four_experts_it_is_what_mlx_lm_computes(tmp_path, tokenizer):
    random = np.random.default_rng(5)
    model = cut_into_experts(tmp_path / "model", 2, lambda shape: random.normal(0, 0.05, shape))
    expected = mlx_lms_perplexity(model, tokenizer.encode(TEXT).ids[:24])
    assert abs(perplexity(model, tmp_path, 24) / expected - 1) < 1e-4
