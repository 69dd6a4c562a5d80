"""Agents of every kind of row in mlx-lm's prompt-cache files, on the random models in the shapes of published families:
mlx-lm goes on from them, and they become agents again."""

import json
import shutil

import pytest

from conftest import ROOT, Torpor, held_ids
from gguf_files import byte_tokenizer

mx = pytest.importorskip("mlx.core")
import mlx_lm.models.cache as mlx_cache  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402

from test_mlx_lm_files import rows  # noqa: E402
from test_python_caches import same  # noqa: E402

TEXT = "TheQuickBrownFoxJumpsOverTheLazyDog"  # each character is a token
Q8 = ("--kv-bits", 8, "--kv-group", 32)


@pytest.fixture
def torpor_of(tmp_path, monkeypatch):
    monkeypatch.setenv("TORPOR_ACTIVATIONS", "f32")

    def make(name):
        directory = shutil.copytree(ROOT / f"tests/goldens/model/tiny-{name}", tmp_path / "model")
        byte_tokenizer(directory)
        config = json.loads((directory / "config.json").read_text())
        if name == "gpt-oss":  # mlx-lm truncates whatever this says
            config["rope_scaling"]["truncate"] = True
        (directory / "config.json").write_text(json.dumps(config))
        return Torpor(tmp_path / "store", directory)

    return make


def held(cache):
    return cache.cache if isinstance(cache, mlx_cache.ArraysCache) else rows(cache)


def likeliest(model, ids, cache, n):
    tokens = []
    while len(tokens) < n:
        tokens.append(int(model(mx.array([ids]), cache=cache)[0, -1].argmax()))
        ids = tokens[-1:]
    return tokens


@pytest.mark.parametrize("name, options", [
    ("gemma3", ()), ("gemma4", ()), ("gpt-oss", ()), ("gpt-oss", Q8), ("deepseek-v3", ()), ("glm4-moe-lite", ()),
    ("glm4-moe-lite", Q8), ("lfm2", ()), ("lfm2-moe", ()), ("qwen3-5", ()), ("qwen3-next", ()), ("nemotron-h-moe", ()),
    ("granite-hybrid-moe", ())])
def test_mlx_lm_goes_on_from_an_agent_of_any_rows_and_gives_it_back(torpor_of, tmp_path, name, options):
    torpor, files = torpor_of(name), [tmp_path / f"{i}.safetensors" for i in range(3)]
    torpor.run("ada", TEXT, "--raw", "--kv-dtype", "f32", *options, max_tokens=2).ok()
    torpor("export", "--format", "mlx-lm", "ada", files[0]).ok()
    model, _ = load_model(torpor.model)
    model.set_dtype(mx.float32)
    cache = mlx_cache.load_prompt_cache(str(files[0]))
    kinds = [type(layer) for layer in mlx_cache.make_prompt_cache(model)]
    assert [type(layer) for layer in cache] == kinds, "rows that its attention takes"
    mlx_cache.save_prompt_cache(str(files[1]), cache)
    before = len(held_ids(torpor.store, "ada"))
    asked = [40, 41, 42]
    expected = likeliest(model, asked, cache, n=1 if options else 4)
    torpor.run("ada", "IJK", "--raw", max_tokens=len(expected)).ok()
    assert held_ids(torpor.store, "ada")[before:][:len(asked) + len(expected)] == asked + expected

    torpor("import", "--model", torpor.model, files[1], "bob").ok()
    torpor("export", "--format", "mlx-lm", "bob", files[2]).ok()
    first, again = (mlx_cache.load_prompt_cache(str(file)) for file in (files[0], files[2]))
    assert all(same(held(a), held(b)) for a, b in zip(first, again, strict=True))
    if not options:
        torpor.run("bob", "IJK", "--raw", max_tokens=len(expected)).ok()
        assert held_ids(torpor.store, "bob")[before:] == held_ids(torpor.store, "ada")[before:]


def test_what_mlx_lms_cache_has_no_place_for_is_refused(torpor_of, tmp_path):
    torpor = torpor_of("deepseek-v2")
    torpor.run("ada", TEXT, "--raw", max_tokens=1).ok()
    torpor("export", "--format", "mlx-lm", "ada", tmp_path / "x").fails("incompatible", "latents", "Torpor's own")


def test_states_are_of_newer_files_and_of_the_models_shape(torpor_of, tmp_path):
    torpor, file = torpor_of("qwen3-5"), tmp_path / "x.safetensors"
    torpor.run("ada", TEXT, "--raw", max_tokens=1).ok()
    torpor("export", "--format", "mlx-lm-0.31", "ada", file).fails("incompatible", "recurrent layers", "0.32")
    torpor("export", "--format", "mlx-lm", "ada", file).ok()

    def changed(change):
        cache = mlx_cache.load_prompt_cache(str(file))
        change(cache)
        mlx_cache.save_prompt_cache(str(tmp_path / "changed.safetensors"), cache)
        return torpor("import", "--model", torpor.model, tmp_path / "changed.safetensors", "bob")

    def set_array(i, value):
        return lambda cache: cache[0].cache.__setitem__(i, value)

    changed(set_array(1, mx.zeros((1, 4, 16, 24)))).fails("incompatible", "state in layer 0")
    changed(set_array(0, mx.zeros((2, 3, 160)))).fails("corruption", "no state of one sequence")
    changed(lambda cache: setattr(cache[0], "lengths", mx.array([3]))).fails("corruption", "layer 0")
    changed(lambda cache: cache[0].cache.pop()).fails("incompatible", "state")
    changed(lambda cache: None).ok()
    torpor("rewind", "bob", 3).fails("invalid", "can't be cut to")
