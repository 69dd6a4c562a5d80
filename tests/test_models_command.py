"""`torpor models`: what lies in the caches of other programs, and what of it runs (docs/cli.md, "models")."""

import json
import os
import shutil

import pytest

from conftest import MODEL, Torpor


@pytest.fixture
def caches(tmp_path):
    """Three empty caches, and what makes a program see them alone."""
    home = tmp_path / "home"
    torpor = Torpor(tmp_path / "store", MODEL)
    torpor.hub = home / "hub"
    torpor.studio = home / ".lmstudio" / "models"
    torpor.ollama = home / "ollama"
    torpor.env = {"HOME": str(home), "HF_HUB_CACHE": str(torpor.hub), "OLLAMA_MODELS": str(torpor.ollama)}
    home.mkdir()
    torpor.list = lambda: torpor("models", "--json", env=torpor.env).ok().json["models"]
    return torpor


def put_in_hub(caches, name, directory):
    repo = caches.hub / ("models--" + name.replace("/", "--"))
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    shutil.copytree(directory, repo / "snapshots" / "abc", symlinks=True)
    return repo / "snapshots" / "abc"


def test_a_repository_of_the_hub_is_listed_by_the_name_that_model_takes(caches, tiny_model):
    put_in_hub(caches, "org/tiny", tiny_model)
    [found] = caches.list()
    assert (found["model"], found["place"], found["runs"]) == ("org/tiny", "Hugging Face", True)
    config = json.loads((tiny_model / "config.json").read_text())
    assert (found["family"], found["context"]) == (config["model_type"], config["max_position_embeddings"])
    assert found["bytes"] == sum(path.stat().st_size for path in tiny_model.iterdir())
    caches("run", "--model", found["model"], "--prompt", "Who?", "--max-tokens", 2, env=caches.env).ok()


def test_bytes_of_a_token_are_those_that_an_agent_takes(caches, tiny_model):
    put_in_hub(caches, "org/tiny", tiny_model)
    [found] = caches.list()
    config = json.loads((tiny_model / "config.json").read_text())
    kept = found["kv_formats"][0]
    size = {"f32": 4, "f16": 2, "bf16": 2}[kept["kv"]]
    head = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    assert kept["bytes_per_token"] == 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head * size
    memory = caches("models", "--json", env=caches.env).ok().json["available_memory"]
    assert 0 < kept["tokens_in_memory"] * kept["bytes_per_token"] < 2 * memory


def test_what_does_not_run_says_why(caches, tiny_model):
    snapshot = put_in_hub(caches, "org/other", tiny_model)
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps({**config, "model_type": "xlnet"}))
    [found] = caches.list()
    assert not found["runs"] and "unsupported architecture xlnet" in found["problem"]
    text = caches("models", env=caches.env).ok().out
    assert text.startswith("not run here:\norg/other: ")


def test_models_of_lm_studio_and_ollama_are_listed_by_their_paths(caches, tiny_model):
    shutil.copytree(tiny_model, caches.studio / "org" / "tiny")
    blob = caches.ollama / "blobs" / "sha256-0123"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"GGUF")
    manifest = caches.ollama / "manifests" / "registry" / "library" / "tiny" / "1b"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"layers": [
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:4567"},
        {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:0123"}]}))
    (manifest.parent / "broken").write_text("{")
    (manifest.parent / "odd").write_text(json.dumps({"layers": [{"mediaType": 1, "digest": []}, "x", None]}))
    studio, ollama = caches.list()
    assert (studio["place"], studio["runs"]) == ("LM Studio", True)
    assert studio["model"] == str(caches.studio / "org" / "tiny")
    assert (ollama["place"], ollama["model"], ollama["runs"]) == ("Ollama tiny:1b", str(blob), False)
    assert str(blob) in ollama["problem"]


def test_of_a_gguf_file_in_pieces_the_first_is_listed(caches):
    repo = caches.hub / "models--org--pieces"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")  # beside GGUF files alone it is of no model here
    for name in ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "mmproj-m.gguf", "Mixture-of-Experts.gguf"]:
        (snapshot / name).write_bytes(b"GGUF")
    assert {found["model"]: found["bytes"] for found in caches.list()} == {
        "org/pieces:m-00001-of-00002.gguf": 8, "org/pieces:Mixture-of-Experts.gguf": 4}


def test_without_caches_it_says_how_to_fetch_a_model(caches):
    assert caches.list() == []
    assert "fetch one with" in caches("models", env=caches.env).ok().out


def test_a_repository_that_was_not_fetched_whole_is_no_trouble(caches, tiny_model):
    os.makedirs(caches.hub / "models--org--empty" / "refs")
    (caches.hub / "datasets--org--data").mkdir()
    (caches.hub / "version.txt").write_text("1")
    put_in_hub(caches, "org/tiny", tiny_model)
    assert [found["model"] for found in caches.list()] == ["org/tiny"]
