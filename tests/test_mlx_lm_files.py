"""mlx-lm's prompt-cache files through the command line, with mlx-lm itself on the other side: each goes on from what the other
wrote, with the same tokens as mlx-lm gives that read the whole text."""

import functools
import re
import shutil
import struct
import subprocess
import sys

import pytest

from conftest import BIN, MODEL, ROOT, Torpor, make_tiny_model

mx = pytest.importorskip("mlx.core")
import mlx_lm  # noqa: E402
import mlx_lm.models.cache as mlx_cache  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.generate import generate_step  # noqa: E402

from test_python_caches import same  # noqa: E402, also puts the module torpor on the path
import torpor as module  # noqa: E402

N, WINDOW = 300, 64  # more than a segment, and more than four windows
MORE = " and then she"
DIALECTS = ["mlx-lm", "mlx-lm-0.31"]
QUANTIZED = {"q8": ("--kv-bits", 8), "q4": ("--kv-bits", 4, "--kv-group", 32)}


LONG = 1024  # a window whose rows are kept apart


def gemma(config, weights, window=WINDOW):
    """Every second layer has a window."""
    config.update(model_type="gemma3_text", architectures=["Gemma3ForCausalLM"], sliding_window=window, sliding_window_pattern=2,
                  query_pre_attn_scalar=64, rope_local_base_freq=1e4, hidden_activation="gelu_pytorch_tanh")
    for name in list(weights):
        if name.endswith("norm.weight"):
            weights[name] = np.zeros_like(weights[name])  # Gemma's norms add one
        if name.endswith("post_attention_layernorm.weight"):
            for part, size in (("pre_feedforward_layernorm", 128), ("post_feedforward_layernorm", 128),
                               ("self_attn.q_norm", 64), ("self_attn.k_norm", 64)):
                weights[name.replace("post_attention_layernorm", part)] = np.zeros(size, np.float16)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(name): a directory. "f32", "f16", "bf16" are Llamas of that dtype, "gemma" has windows and is f32; those of
    "gemma-long" are LONG."""
    root = tmp_path_factory.mktemp("models")

    def make(name):
        directory = root / name
        if not directory.exists():
            make_tiny_model(directory, {"gemma": gemma, "gemma-long": functools.partial(gemma, window=LONG)}.get(name))
            dtype = {"f16": mx.float16, "bf16": mx.bfloat16}.get(name, mx.float32)
            weights = {key: value.astype(dtype) for key, value in mx.load(str(directory / "model.safetensors")).items()}
            mx.eval(weights)
            mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "mlx"})
        return directory

    return make


@pytest.fixture
def store(tmp_path, models):
    return lambda name: Torpor(tmp_path / "store", models(name))


class MlxLm:
    """mlx-lm in this process."""

    def __init__(self, directory):
        self.model, self.tokenizer = mlx_lm.load(str(directory))

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def go_on(self, ids, cache, n=8, **kinds):
        """The text of the `n` likeliest tokens; leaves their rows in the cache, but for the last one's."""
        tokens = [int(token) for token, _ in generate_step(mx.array(ids), self.model, max_tokens=n, prompt_cache=cache, **kinds)]
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def read(self, ids):
        """A new cache that holds `ids`."""
        cache = mlx_cache.make_prompt_cache(self.model)
        for part in (ids[:-1], ids[-1:]):  # a ring is cut to its size by the first token that comes alone
            mx.eval(self.model(mx.array([part]), cache=cache))
        return cache


def held_ids(torpor, agent):
    return mx.load(str(torpor.agent_file(agent)))["tokens"].tolist()


def rows(cache):
    """The rows that a layer's offset counts, oldest first."""
    if isinstance(cache, mlx_cache.RotatingKVCache):
        return [cache._temporal_order(a)[..., -min(cache.offset, cache.max_size):, :] for a in (cache.keys, cache.values)]
    return [array for _, array in tree_flatten(cache.keys_and_values())]


def load(path, dialect):
    """As the mlx-lm of that dialect would."""
    return mlx_cache.load_prompt_cache(str(path)) if dialect == "mlx-lm" else module.load_prompt_cache(path)[0]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name, length", [("f32", N), ("f16", N), ("bf16", N), ("gemma", N), ("gemma-long", N + LONG)])
def test_mlx_lm_goes_on_from_an_agent_as_from_the_whole_text(store, words, tmp_path, name, length, dialect):
    torpor, theirs = store(name), MlxLm(store(name).model)
    torpor.run("ada", words(length), "--raw", max_tokens=2).ok()
    torpor("export", "--format", dialect, "ada", tmp_path / "ada.safetensors").ok()
    ids, more = held_ids(torpor, "ada"), theirs.encode(MORE)
    cache = load(tmp_path / "ada.safetensors", dialect)
    assert all(type(a) is type(b) for a, b in zip(cache, mlx_cache.make_prompt_cache(theirs.model), strict=True))
    assert [layer.offset for layer in cache] == [length + 2] * 2
    n = 1 if name == "bf16" else 8  # mlx's bf16 activations are too coarse for more tokens of random weights
    text = theirs.go_on(more, cache, n)
    assert text == theirs.go_on([*ids, *more], mlx_cache.make_prompt_cache(theirs.model), n)
    assert text == torpor.run("ada", MORE, "--raw", max_tokens=n).ok().json["text"]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("name", ["f16", "gemma"])
def test_mlx_lm_goes_on_from_quantized_rows(store, words, tmp_path, name, kind, dialect):
    torpor, theirs = store(name), MlxLm(store(name).model)
    torpor.run("ada", words(N), "--raw", *QUANTIZED[kind], max_tokens=2).ok()
    torpor("export", "--format", dialect, "ada", tmp_path / "ada.safetensors").ok()
    cache = load(tmp_path / "ada.safetensors", dialect)
    n = 8
    if kind == "q8":
        assert all(isinstance(layer, mlx_cache.QuantizedKVCache) for layer in cache)
    else:  # rotated, which mlx-lm does not know: it keeps floats, so only the first token's logits are of the same rows
        n = 1
        assert all(type(a) is type(b) for a, b in zip(cache, mlx_cache.make_prompt_cache(theirs.model), strict=True))
    ours = torpor.run("ada", MORE, "--raw", max_tokens=n).ok().json["text"]
    assert theirs.go_on(theirs.encode(MORE), cache, n) == ours


def command(name, *args):
    result = subprocess.run([sys.executable, "-m", "mlx_lm", name, *map(str, args)], capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_mlx_lms_own_commands_and_ours_take_each_others_files(store, words, tmp_path):
    torpor, theirs = store("f32"), MlxLm(store("f32").model)
    ours, file = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    torpor.run("ada", words(N), "--raw", max_tokens=2).ok()
    torpor("export", "--format", "mlx-lm", "ada", ours).ok()
    said = command("generate", "--prompt-cache-file", ours, "--prompt", MORE, "--max-tokens", 8, "--temp", 0, "--ignore-chat-template")
    text = torpor.run("ada", MORE, "--raw").ok().json["text"]
    assert text.strip() in said
    assert re.search(r"Prompt: (\d+) tokens", said)[1] == str(len(theirs.encode(MORE)))

    command("cache_prompt", "--model", torpor.model, "--prompt", words(N), "--prompt-cache-file", file)
    torpor("import", "--model", torpor.model, file, "bob").ok()
    turn = torpor.run("bob", MORE, "--raw").ok().json
    assert turn["text"] == theirs.go_on(theirs.encode(MORE), mlx_cache.load_prompt_cache(str(file)))
    assert turn["tokens"]["cached"] > N and turn["tokens"]["prefilled"] == len(theirs.encode(MORE))


def test_the_real_model_goes_on_from_mlx_lms_file(tmp_path):
    torpor, theirs = Torpor(tmp_path / "store", MODEL), MlxLm(MODEL)
    cache = theirs.read(theirs.encode("The lighthouse"))
    mlx_cache.save_prompt_cache(str(tmp_path / "theirs.safetensors"), cache, {"model": str(MODEL), "tokenizer_config": "{}"})
    torpor("import", "--model", MODEL, tmp_path / "theirs.safetensors", "ada").ok()
    assert torpor.run("ada", " keeper", "--raw", max_tokens=2).ok().json["text"] == theirs.go_on(theirs.encode(" keeper"), cache, 2)


@pytest.mark.parametrize("name, kinds", [("f32", {}), ("f16", {}), ("bf16", {}), ("gemma", {}),
                                         ("f16", {"kv_bits": 8}), ("f32", {"kv_bits": 4, "kv_group_size": 32})])
def test_a_file_of_mlx_lm_becomes_an_agent_and_a_file_again(store, words, tmp_path, name, kinds):
    torpor, theirs = store(name), MlxLm(store(name).model)
    cache = mlx_cache.make_prompt_cache(theirs.model)
    theirs.go_on(theirs.encode(words(N)), cache, n=5, quantized_kv_start=0, **kinds)  # a ring goes round
    mlx_cache.save_prompt_cache(str(tmp_path / "theirs.safetensors"), cache)
    torpor("import", "--model", torpor.model, tmp_path / "theirs.safetensors", "ada").ok()
    for dialect in DIALECTS:
        again = tmp_path / f"{dialect}.safetensors"
        torpor("export", "--format", dialect, "ada", again).ok()
        for a, b in zip(cache, load(again, dialect), strict=True):
            assert type(a) is type(b) and a.offset == b.offset and same(rows(a), rows(b))
        torpor("import", "--model", torpor.model, again, f"again-{dialect}").ok()
        assert held_ids(torpor, f"again-{dialect}") == held_ids(torpor, "ada")
    text = theirs.go_on(theirs.encode(MORE), cache, **kinds)
    for agent in ("ada", *(f"again-{dialect}" for dialect in DIALECTS)):
        assert torpor.run(agent, MORE, "--raw").ok().json["text"] == text


@pytest.fixture
def imported(store, words, tmp_path):
    """imported(model): a store with an agent `ada` of N tokens that mlx-lm computed."""

    def make(name):
        torpor, theirs = store(name), MlxLm(store(name).model)
        mlx_cache.save_prompt_cache(str(tmp_path / "theirs.safetensors"), theirs.read(theirs.encode(words(N))))
        torpor("import", "--model", torpor.model, tmp_path / "theirs.safetensors", "ada").ok()
        return torpor

    return make


def test_an_imported_agent_is_like_any_other(imported, words):
    torpor = imported("f32")
    assert all(token < 0 for token in held_ids(torpor, "ada"))
    assert torpor("ls", "--json").ok().json[0]["cache_size"] == N
    assert torpor("show", "ada", "--json").ok().json["messages"] == []
    assert torpor("verify", "--json").ok().json["ok"]
    torpor("fork", "ada", "bob").ok()
    torpor("fork", "ada", "cut", "--at", 280).ok()
    torpor.run("ada", "Hello", "--system", "Be brief.").fails("invalid", "system prompt")
    turns = [torpor.run(agent, "Hello").ok().json for agent in ("ada", "bob")]
    assert turns[0]["text"] == turns[1]["text"] and turns[0]["tokens"]["cached"] == N
    assert torpor.run("cut", "Hello").ok().json["tokens"]["cached"] == 280
    second = torpor.run("ada", "And you?").ok().json
    assert second["tokens"]["cached"] == turns[0]["tokens"]["context"]
    torpor("rewind", "ada", N).ok()
    assert torpor.run("ada", "Hello").ok().json["text"] == turns[0]["text"]
    assert torpor.chat("bob", [f"/rewind {N}", "Hello", f"/fork eve {N - 1}", "Hello"])[0]["text"] == turns[0]["text"]

    # The same text computed by the engine takes none of these rows, nor does the agent take the engine's.
    assert torpor.run("own", words(N) + MORE, "--raw").ok().json["tokens"]["cached"] == 0
    prompt = torpor.store / "prompt.txt"
    prompt.write_text(words(N))
    torpor("why", "ada", "--model", torpor.model, "--prompt-file", prompt).fails("invalid", "token ids")


def test_damaged_rows_of_unknown_tokens_are_not_made_up(imported):
    torpor = imported("f32")
    segment = torpor.segments()[0]
    data = bytearray(segment.read_bytes())
    data[struct.unpack("<Q", data[:8])[0] + 100] ^= 1
    segment.write_bytes(data)
    before = torpor.state()
    torpor.run("ada", "Hello").fails("corruption", "ada", "Import it once more")
    assert torpor.state() == before
    assert torpor("verify", "ada").code == 4


def test_what_a_window_has_forgotten_is_never_needed(imported):
    torpor = imported("gemma")
    for n in (N - 1, 256, 1):
        torpor("rewind", "ada", n).fails("invalid", str(n), str(N))
        torpor("fork", "ada", "bob", "--at", n).fails("invalid")
    first = torpor.run("ada", "Hello").ok().json
    context = torpor.run("ada", "More", max_tokens=100).ok().json["tokens"]["context"]
    assert context - WINDOW > 256 > N - WINDOW  # a wake leaves out the first segment, a cut back to N needs it
    for line in (f"/rewind {N - 1}", f"/fork bob {N - 1}"):  # of an agent that is awake
        chat = torpor("chat", "--model", torpor.model, "--agent", "ada", "--max-tokens", 1, "--json", stdin=f"Hello\n{line}\n")
        chat.fails("invalid", "can't be cut to", answered=True)
    torpor("fork", "ada", "bob", "--at", N).ok()
    torpor("rewind", "ada", N).ok()
    for agent in ("ada", "bob"):
        again = torpor.run(agent, "Hello").ok().json
        assert again["text"] == first["text"] and again["tokens"]["cached"] == N
        torpor("rewind", agent, N - 1).fails("invalid")
    torpor("rewind", "ada", 0).ok()
    assert torpor.run("ada", "Hello").ok().json["tokens"]["cached"] == 0
    torpor("rewind", "ada", 3).ok()  # a new life


def test_files_that_can_not_become_agents(store, tmp_path, words):
    torpor, file = store("f32"), tmp_path / "theirs.safetensors"

    def refused(cache, code, *said):
        mlx_cache.save_prompt_cache(str(file), cache)
        torpor("import", "--model", torpor.model, file, "ada").fails(code, *said)
        assert not torpor.store.exists() or torpor("ls", "--json").json == []

    def fill(cache, n=9, heads=1, dim=64):
        cache.update_and_fetch(mx.zeros((1, heads, n, dim)), mx.zeros((1, heads, n, dim)))
        return cache

    refused([fill(mlx_cache.KVCache())], "incompatible", "1 layers")
    refused([fill(mlx_cache.KVCache(), heads=2) for _ in range(2)], "incompatible", "2 KV heads in layer 0")
    refused([fill(mlx_cache.KVCache(), dim=32) for _ in range(2)], "incompatible", "32 dims")
    refused([fill(mlx_cache.KVCache()), fill(mlx_cache.KVCache(), 8)], "corruption", "9 tokens, layer 1 8")
    refused([fill(mlx_cache.ChunkedKVCache(64)) for _ in range(2)], "incompatible", "torpor.load_prompt_cache")
    bounded = [fill(fill(mlx_cache.RotatingKVCache(8, keep=4), 16), 1) for _ in range(2)]
    refused(bounded, "incompatible", "max_kv_size")
    refused([mlx_cache.KVCache() for _ in range(2)], "corruption", "holds")
    torpor("import", "--model", torpor.model, ROOT / "tests/goldens/prompt_cache/old.safetensors", "ada").fails("incompatible", "layer")

    mlx_cache.save_prompt_cache(str(file), [fill(mlx_cache.KVCache()) for _ in range(2)])
    torpor("import", file, "ada").fails("invalid", "--model")
    torpor("import", "--model", tmp_path / "none", file, "ada").fails("not_found")
    shutil.copy(torpor.model / "model.safetensors", tmp_path / "weights.safetensors")
    torpor("import", tmp_path / "weights.safetensors", "ada").fails("invalid", "neither an export")
    torpor("import", "--model", torpor.model, file, "ada").ok()
    torpor("import", "--model", torpor.model, file, "ada").fails("invalid", "already")
    assert torpor("export", "--format", "gguf", "ada", tmp_path / "x").code == 2
    torpor("export", "ada", tmp_path / "own.safetensors").ok()
    torpor("import", "--model", torpor.model, tmp_path / "own.safetensors", "bob").fails("invalid", "leave out --model")
    torpor("import", tmp_path / "own.safetensors", "bob").ok()
