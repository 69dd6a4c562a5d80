"""Tests through the command line and the Python module. Three things they need:

- the program: $TORPOR_BIN, else build/torpor, and the module built beside it;
- the real model, .models/smollm2-135m (`make model`);
- a tiny model with random weights and the real one's tokenizer, made here: what does not depend on the weights' meaning
  runs on it, in milliseconds.
"""

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import xxhash
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(os.environ.get("TORPOR_BIN", ROOT / "build" / "torpor")).resolve()
BUILD = BIN.parent
MODEL = ROOT / ".models" / "smollm2-135m"
sys.path.insert(0, str(BUILD / "python"))
# The user's own has nothing to do with these tests.
CACHE = tempfile.TemporaryDirectory(prefix="torpor-cache-")
os.environ["TORPOR_CACHE"] = CACHE.name
# A shell that starts the tests in the background has SIGINT ignored, and programs leave an ignored signal so.
signal.signal(signal.SIGINT, signal.default_int_handler)

EXIT = {"usage": 2, "not_found": 3, "corruption": 4, "incompatible": 5, "invalid": 6, "io": 7, "busy": 8, "exhausted": 9}


def pytest_configure():
    if not BIN.exists():
        pytest.exit(f"{BIN} is not there; run `make build`, or set TORPOR_BIN", returncode=1)
    if not MODEL.is_dir():
        pytest.exit(f"{MODEL} is not there; run `make model`", returncode=1)


class Result:
    def __init__(self, process):
        self.code = process.returncode
        self.out = process.stdout.decode(errors="replace")  # bytes: what is said may hold a lone CR
        self.err = process.stderr.decode(errors="replace")

    @property
    def json(self):
        assert self.out.count("\n") == 1, f"not one line: {self.out!r}"
        return json.loads(self.out)

    def ok(self):
        assert self.code == 0, f"exit {self.code}: {self.err}"
        return self

    def fails(self, name, *words, answered=False):
        """The exit code of `name`, one sentence on standard error that holds every word, and no answer unless `answered`."""
        assert self.code == EXIT[name], f"exit {self.code}, not {EXIT[name]}: {self.err}"
        assert self.err.startswith("torpor: ") and self.err.endswith(".\n") and self.err.count("\n") == 1, self.err
        for word in words:
            assert word in self.err, f"{word!r} is not in {self.err!r}"
        assert bool(self.out) == answered
        return self


class Torpor:
    """The command line on one store and one model."""

    def __init__(self, store, model):
        self.store = Path(store)
        self.model = Path(model)

    def command(self, *args):
        return [str(BIN), *map(str, args), "--store", str(self.store)]

    def __call__(self, *args, stdin="", env=None, timeout=300):
        return Result(subprocess.run(self.command(*args), input=stdin.encode(), capture_output=True, timeout=timeout,
                                     env={**os.environ, **(env or {})}))

    def run(self, agent, prompt, *args, max_tokens=8, **kwargs):
        return self("run", "--model", self.model, "--agent", agent, "--prompt", prompt, "--max-tokens", max_tokens,
                    "--json", *args, **kwargs)

    def chat(self, agent, lines, *args, max_tokens=8):
        """The turns of one process, as JSON objects."""
        result = self("chat", "--model", self.model, "--agent", agent, "--max-tokens", max_tokens, "--json", *args,
                      stdin="".join(line + "\n" for line in lines)).ok()
        return [json.loads(line) for line in result.out.split("\n") if line]

    def files(self):
        return sorted(path for path in self.store.rglob("*") if path.is_file())

    def agent_file(self, agent):
        return self.store / f"{agent}.safetensors"

    def segments(self):
        return sorted(self.store.glob("segments/*/*.safetensors"))

    def state(self):
        """Every file on disk: name, mode, bytes. Lock files are empty, and not part of what is kept."""
        return {str(path.relative_to(self.store)): (path.stat().st_mode, hashlib.sha256(path.read_bytes()).hexdigest())
                for path in self.files() if ".locks" not in path.parts}

    def copy(self, to):
        shutil.copytree(self.store, to, symlinks=True)
        return Torpor(to, self.model)


def read_to_the_end(leader):
    """All that processes write to a pseudo-terminal whose other side this process has closed."""
    said = b""
    try:
        while part := os.read(leader, 4096):
            said += part
    except OSError:
        pass  # the end, where nobody has the other side any more
    return said


def held_ids(store, agent):
    """An agent's ids, from its file and its parts (docs/format.md)."""
    with safe_open(store / f"{agent}.safetensors", framework="numpy") as file:
        ids, metadata = file.get_tensor("tokens").tolist(), file.metadata()
    for part in reversed(list(filter(None, metadata.get("parts", "").split(",")))):
        name, _, tokens, _ = part.split(":")
        ids = load_file(store / "parts" / f"{metadata['uid']}-{name}.safetensors")["tokens"].tolist()[:int(tokens)] + ids
    return ids


def xxh3(data):
    """The checksum of the store's files."""
    return xxhash.xxh3_128(data).hexdigest()


def forge(source, target, metadata=(), tensors=(), shift=0):
    """Writes one of Torpor's files anew, with other metadata, other bytes of its tensors, and checksums that fit. A tensor's bytes
    may change in number where its shape is a list. The data begins `shift` bytes behind a multiple of 64."""
    data = source.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    fields = header.pop("__metadata__") | dict(metadata)
    contents, digests = b"", []
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][::-1]):
        first, end = entry["data_offsets"]
        bytes_of = dict(tensors).get(name, data[start + first:start + end])
        if len(entry["shape"]) == 1:
            entry["shape"] = [len(bytes_of) * entry["shape"][0] // (end - first)]
        entry["data_offsets"] = [len(contents), len(contents) + len(bytes_of)]
        contents += bytes_of
        digests.append(xxh3(bytes_of))
    fields |= {"checksum": "0" * 32, "checksums": ",".join(digests)}
    text = json.dumps({"__metadata__": fields, **header}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % 64 + shift)
    text = struct.pack("<Q", len(text)) + text
    target.write_bytes(text.replace(b"0" * 32, xxh3(text).encode(), 1) + contents)
    return target


def preload(directory, source):
    """The environment of a program that has these C functions in place of the system's. Skips where that can't be had."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    (directory / "preload.c").write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", directory / "preload.so", directory / "preload.c"], check=True)
    return {"LD_PRELOAD": str(directory / "preload.so")}


def make_tiny_model(directory, change=None):
    """Llama with two layers and random f16 weights. `change(config, weights)` may alter it."""
    directory.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
                 "generation_config.json"):
        if (MODEL / name).exists():
            shutil.copy(MODEL / name, directory / name)
    hidden, inner, heads, kv_heads, head_dim, layers = 128, 256, 2, 1, 64, 2
    vocab = json.loads((MODEL / "config.json").read_text())["vocab_size"]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "vocab_size": vocab, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096,
        "tie_word_embeddings": False, "torch_dtype": "float16", "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "eos_token_id": 2, "bos_token_id": 1}
    random = np.random.default_rng(7)
    # A small embedding and a head of its own: what comes next depends on the context, not on the last token alone.
    weights = {"model.embed_tokens.weight": random.normal(0, 0.3, (vocab, hidden)), "model.norm.weight": np.ones(hidden),
               "lm_head.weight": random.normal(0, 1, (vocab, hidden))}
    for i in range(layers):
        for name, shape in {"self_attn.q_proj": (heads * head_dim, hidden), "self_attn.k_proj": (kv_heads * head_dim, hidden),
                            "self_attn.v_proj": (kv_heads * head_dim, hidden), "self_attn.o_proj": (hidden, heads * head_dim),
                            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
                            "mlp.down_proj": (hidden, inner)}.items():
            weights[f"model.layers.{i}.{name}.weight"] = random.normal(0, shape[1] ** -0.5, shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{i}.{name}.weight"] = np.ones(hidden)
    weights = {name: value.astype(np.float16) for name, value in weights.items()}
    if change:
        change(config, weights)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors", metadata={"format": "mlx"})
    return directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="session")
def words(tokenizer):
    """words(n): one line of exactly n tokens, cut from the demo's document; words(m) begins words(n) for m < n."""
    text = " ".join((ROOT / "examples" / "lighthouse-log.txt").read_text().split())
    ids = tokenizer.encode(text).ids

    def cut(n):
        repeated = ids * (n // len(ids) + 1)
        piece = tokenizer.decode(repeated[:n], skip_special_tokens=False)
        assert len(tokenizer.encode(piece).ids) == n
        return piece

    return cut


@pytest.fixture(scope="session")
def slow_disk(tmp_path_factory):
    """slow_disk(seconds, mark): the environment of a process whose every flush makes the file `mark`, then takes so long."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler or not os.path.exists("/proc/self"):
        pytest.skip("needs Linux and a C compiler")
    directory = tmp_path_factory.mktemp("slow-disk")
    (directory / "slow.c").write_text(
        "#include <fcntl.h>\n#include <stdlib.h>\n#include <unistd.h>\n"
        "int fsync(int fd) { close(creat(getenv(\"SLOW_MARK\"), 0600)); usleep(atoi(getenv(\"SLOW_MS\")) * 1000); return 0; }\n")
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", directory / "slow.so", directory / "slow.c"], check=True)
    return lambda seconds, mark: {**os.environ, "LD_PRELOAD": str(directory / "slow.so"), "PYTHONPATH": str(BUILD / "python"),
                                  "SLOW_MS": str(int(seconds * 1000)), "SLOW_MARK": str(mark)}


@pytest.fixture
def tiny(tmp_path, tiny_model):
    return Torpor(tmp_path / "store", tiny_model)


@pytest.fixture
def real(tmp_path):
    return Torpor(tmp_path / "store", MODEL)


@pytest.fixture(scope="session")
def tiny_ada_source(tmp_path_factory, tiny_model, words):
    """A store with one agent, `ada`, of two segments and a tail."""
    torpor = Torpor(tmp_path_factory.mktemp("ada") / "store", tiny_model)
    torpor.run("ada", words(600), "--raw").ok()
    return torpor


@pytest.fixture
def ada(tiny_ada_source, tmp_path):
    """A copy of it that the test may spoil."""
    return tiny_ada_source.copy(tmp_path / "ada-store")
