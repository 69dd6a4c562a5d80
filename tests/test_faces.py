"""What the faces add to the library: hints, versions, what is shown of files, and whose metadata is whose."""

import json
import os
import re
import shutil
import subprocess

import mlx.core as mx
import mlx_lm.models.cache as mlx_cache
import numpy as np
import pytest
import xxhash

from conftest import BIN, ROOT, Result, Torpor, make_tiny_model, preload

import torpor

ESCAPES = "\x1b[31mred\x1b]0;title\x07 \x9b2J \u202egnp.exe \x7f"
SHOWN = "\\u001b[31mred\\u001b]0;title\\u0007 \\u009b2J \\u202egnp.exe \\u007f"


def cache_of(n):
    cache = mlx_cache.KVCache()
    cache.update_and_fetch(mx.ones((1, 2, n, 16)), mx.zeros((1, 2, n, 16)))
    return [cache]


@pytest.fixture
def python_store(tmp_path):
    return torpor.CachePersistence(tmp_path / "store")


@pytest.fixture
def cli(tmp_path):
    return Torpor(tmp_path / "store", "no-model")


# ---- Torpor's own metadata and the caller's

def test_metadata_with_names_of_the_record_is_the_callers_own(python_store, cli):
    theirs = {"messages": "hi", "message_ends": "x", "history_tokens": "no number", "shortest_cut": "-1", "pinned": "true"}
    python_store.save_agent_cache("ada", cache_of(300), theirs)
    shown = cli("show", "ada", "--json").ok().json
    assert shown["pinned"] is False and shown["messages"] == []
    assert {key: shown["user"][key] for key in theirs} == theirs
    cli("fork", "ada", "eve").ok()
    cli("fork", "ada", "cut", "--at", 256).ok()
    cli("rename", "eve", "bob").ok()
    for agent in ("ada", "bob", "cut"):
        assert python_store.load_agent_cache(agent)[1] == theirs
    cli("pin", "bob").ok()
    assert [agent["pinned"] for agent in cli("ls", "--json").ok().json] == [False, True, False]
    assert python_store.load_agent_cache("bob")[1] == theirs


def test_metadata_can_not_be_torpors_own(python_store, cli):
    for key in ("torpor.pinned", "torpor.", "torpor.messages"):
        with pytest.raises(torpor.InvalidArgumentError, match="torpor"):
            python_store.save_agent_cache("ada", cache_of(3), {key: "true"})
        with pytest.raises(torpor.InvalidArgumentError, match="torpor") as refused:
            python_store._store.save("ada", [], [], b"", [], "m", [(key, "true")], [], "none")
        assert refused.value.field == key and refused.value.agent == "ada"
    cli("show", "ada").fails("not_found")


def test_the_engines_record_is_no_metadata_of_the_callers(tiny, tmp_path):
    tiny.run("ada", "One").ok()
    tiny("pin", "ada").ok()
    shown = tiny("show", "ada", "--json").ok().json
    assert shown["user"] == {} and shown["record"]["pinned"] == "true" and shown["pinned"]
    assert [message["role"] for message in shown["messages"]][-2:] == ["user", "assistant"]


# ---- errors

def test_errors_carry_what_they_are_about(tiny, tiny_model, tmp_path):
    with torpor.Engine(tiny_model, tmp_path / "store") as engine:
        engine.agent("ada").turn("One", max_tokens=2)
    with torpor.Engine(tiny_model, tmp_path / "store", kv_format="f32") as engine:
        with pytest.raises(torpor.IncompatibleError) as failed:
            engine.agent("ada").turn("Two", max_tokens=2)
    error = failed.value
    assert (error.agent, error.field, error.expected, error.found, error.path) == ("ada", "kv", "f32", "f16", None)
    assert "f32" in str(error) and "f16" in str(error)
    tiny.run("ada", "Two", "--kv-dtype", "f32").fails("incompatible", "kv", "f16", "f32")
    with pytest.raises(torpor.NotFoundError) as missing:
        torpor.CachePersistence(tmp_path / "store").load_agent_cache("eve")
    assert missing.value.agent == "eve" and missing.value.path == str(tmp_path / "store") and missing.value.field is None


def test_the_command_line_hints_at_its_own_options(tiny, tiny_model, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (bare / name).unlink(missing_ok=True)
    Torpor(tiny.store, bare).run("ada", "Hello").fails("invalid", "no chat template", "(--raw does).")
    with pytest.raises(torpor.InvalidArgumentError) as failed:
        torpor.Engine(bare, tmp_path / "other").agent("ada").turn("Hello")
    assert "--" not in str(failed.value)
    tiny.run("ada", "Hello", "--disk-budget", 100).fails("exhausted", "torpor rm", answered=True)
    tiny("ls", "--cpu-target", "avx2").fails("usage")
    tiny.run("ada", "Hello", env={"TORPOR_CPU_TARGET": "mmx"}).fails("invalid", "mmx", "--cpu-target")


def test_without_a_home_directory_the_command_line_names_its_option(tmp_path):
    nobody = preload(tmp_path, "int getpwuid_r(unsigned u, void* e, char* b, unsigned long n, void** found) { *found = 0; return 0; }")
    env = {"PATH": os.environ["PATH"], **nobody}
    Result(subprocess.run([BIN, "ls"], capture_output=True, env=env)).fails("invalid", "home", "--store", "TORPOR_STORE")


def test_what_the_system_refuses_is_no_defect_of_torpors(tiny, tmp_path):
    """A process that may start no thread."""
    no_threads = preload(tmp_path, "int pthread_create(void* t, const void* a, void* f, void* x) { return 11; /* EAGAIN */ }")
    result = tiny.run("ada", "Hello", env=no_threads)
    result.fails("exhausted")
    assert "defect" not in result.err


# ---- what is shown of files

def test_control_sequences_of_files_are_shown_and_not_obeyed(tiny, python_store, cli):
    tiny.run("ada", ESCAPES).ok()
    python_store._store.save("eve", [], [], b"", [], ESCAPES, [("mlx_lm.cache", "{}")], [], "none")
    for result in (tiny("show", "ada"), tiny("ls"), tiny("show", "eve"), tiny("show", "ada", "--json"), tiny("ls", "--json")):
        assert not set(result.ok().out) & set("\x1b\x07\x9b\x7f\u202e")
    assert SHOWN in tiny("show", "ada").ok().out
    assert SHOWN in tiny("ls").ok().out
    [question] = [m["content"] for m in tiny("show", "ada", "--json").ok().json["messages"] if m["role"] == "user"]
    assert question == ESCAPES
    assert [agent["model"] for agent in tiny("ls", "--json").ok().json][-1] == ESCAPES


def test_a_sentence_about_a_file_is_printable(tmp_path):
    result = Result(subprocess.run([BIN, "--store", tmp_path / "s", "import", tmp_path / "no\x1b[31mfile", "ada"], capture_output=True))
    result.fails("not_found", "no\\u001b[31mfile")


def with_messages(path, messages):
    """Puts `messages` into an agent file that has none, as a program that writes valid files could (docs/format.md)."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:8 + size]), content[8 + size:]
    metadata, tokens = header["__metadata__"], header.pop("tokens")
    begin = tokens["data_offsets"][0]
    header["messages"] = {"dtype": "U8", "shape": [len(messages)], "data_offsets": [begin, begin + len(messages)]}
    header["tokens"] = {**tokens, "data_offsets": [offset + len(messages) for offset in tokens["data_offsets"]]}
    *others, last = metadata["checksums"].split(",")
    metadata["checksums"] = ",".join([*others, xxhash.xxh3_128(messages).hexdigest(), last])
    metadata["checksum"] = "0" * 32
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    begin_of_file = len(text).to_bytes(8, "little") + text
    checksum = xxhash.xxh3_128(begin_of_file).hexdigest().encode()
    path.write_bytes(begin_of_file.replace(b"0" * 32, checksum, 1) + data[:begin] + messages + data[begin:])


def test_messages_of_a_million_levels_are_shown(python_store, cli):
    """`show` prints what a file says, however deep."""
    python_store.save_agent_cache("ada", cache_of(3), {})
    deep = "[" * 1_000_000 + "]" * 1_000_000
    messages = '[{"role":' + deep + ',"content":"Hello","ids":[0,1]},{"role":"user","content":"Once","ids":[1,3]}]'
    with_messages(cli.store / "ada.safetensors", messages.encode())
    assert "Once" in cli("show", "ada").ok().out
    assert cli("show", "ada", "--json").ok().json["messages"][-1]["content"] == "Once"
    cli("fork", "ada", "eve").ok()
    assert "Once" in cli("show", "eve").ok().out


def test_metadata_of_a_million_levels_is_shown(python_store, cli):
    """`show` prints what a file says, however deep."""
    deep = '[{"role":' + "[" * 1_000_000 + "]" * 1_000_000 + "}]"
    python_store._store.save("ada", [], [], b"", [], "m", [("messages", deep), ("message_ends", "0")], [], "none")
    cli("show", "ada").ok()
    assert cli("show", "ada", "--json").ok().json["user"]["messages"] == deep
    cli("fork", "ada", "eve").ok()
    assert cli("show", "eve", "--json").ok().json["user"]["messages"] == deep


# ---- what Torpor goes on without

def test_a_sidecar_that_can_not_be_written_is_told_to_who_asks(tiny):
    tiny.run("ada", "One").ok()
    (tiny.store / "ada.json").unlink()
    (tiny.store / "ada.json").mkdir()
    assert tiny.run("ada", "Two").ok().err == ""
    told = tiny.run("ada", "Three", "--verbose").ok().err
    assert told.startswith("torpor: warning: The sidecar of agent 'ada' could not be written: ") and told.count("\n") == 1


# ---- versions and settings

def test_the_version_says_what_computes_and_what_is_read_and_written():
    result = Result(subprocess.run([BIN, "--version"], capture_output=True)).ok()
    header = (ROOT / "include/torpor/version.h").read_text()
    lines = result.out.splitlines()
    assert lines[0] == "torpor " + re.search(r'TORPOR_VERSION "(.+)"', header)[1]
    assert lines[1] == "MLX " + mx.__version__
    assert lines[2] in ("backend kernels", "backend mlx") and lines[3].startswith("CPU target ")
    newest = re.search(r"kNewestFormat = (\d+)", header)[1]
    assert re.fullmatch(rf"format versions: reads \d+ to {newest}, writes (\d+ to )?{newest}", lines[4]) and len(lines) == 5
    portable = Result(subprocess.run([BIN, "--version"], capture_output=True, env={**os.environ, "TORPOR_CPU_TARGET": "portable",
                                                                                   "TORPOR_BACKEND": "mlx"})).ok()
    assert portable.out.splitlines()[2] == "backend mlx" and portable.out.splitlines()[3] in ("CPU target EMU128", "CPU target SCALAR")


def test_options_say_how_rows_are_computed_and_the_environment_is_only_their_default(tiny, words):
    said = {}
    for name, options, env in (("plain", [], {}), ("one thread", ["--threads", 1], {}), ("portable", ["--cpu-target", "portable"], {}),
                               ("mlx", ["--backend", "mlx"], {}), ("over the environment", ["--backend", "kernels"], {"TORPOR_BACKEND": "mlx"}),
                               ("read", ["--no-mmap"], {})):
        said[name] = tiny.run(name.replace(" ", "-"), words(300), "--raw", *options, env=env).ok().json["text"]
    assert said["one thread"] == said["over the environment"] == said["read"] == said["plain"]
    tiny.run("ada", "Hello", "--threads", 0).fails("usage")
    tiny.run("ada", "Hello", env={"TORPOR_THREADS": "many"}).fails("invalid", "TORPOR_THREADS")
    tiny.run("ada", "Hello", "--threads", 2, env={"TORPOR_THREADS": "many"}).ok()


@pytest.fixture(scope="module")
def normed_model(tmp_path_factory):
    """Qwen 3's norms of heads, beside those of layers."""
    def change(config, weights):
        config.update(architectures=["Qwen3ForCausalLM"], model_type="qwen3")
        for i in range(config["num_hidden_layers"]):
            for name in ("q_norm", "k_norm"):
                norm = np.linspace(0.5, 1.5, config["head_dim"])
                weights[f"model.layers.{i}.self_attn.{name}.weight"] = norm.astype(np.float16)

    return make_tiny_model(tmp_path_factory.mktemp("normed") / "tiny", change)


@pytest.mark.parametrize("options", [[], ["--kv-bits", 8], ["--kv-bits", 4]], ids=["f16", "8", "4"])
def test_targets_that_multiply_and_add_in_one_have_the_same_bits_and_so_have_the_others(normed_model, tmp_path, words,
                                                                                         options):
    for kind, targets in (("l16-fma", ("avx2", "avx512", "amx", "neon")), ("l16", ("portable", "sse4"))):
        found = set()
        for target in targets:
            torpor = Torpor(tmp_path / target, normed_model)
            ended = torpor.run("ada", words(300), "--raw", "--cpu-target", target, "--temperature", 0.9, "--seed", 3,
                               *options, max_tokens=32)
            if ended.code != 0:
                assert "CPU target" in ended.err, "nothing but that this machine has none"
                continue
            torpor("export", "ada", tmp_path / f"{target}.safetensors").ok()
            assert torpor("show", "ada", "--json").ok().json["numerics"].split("/")[2] == kind
            file = (tmp_path / f"{target}.safetensors").read_bytes()
            found.add((ended.json["text"], xxhash.xxh3_128_hexdigest(file[8 + int.from_bytes(file[:8], "little"):])))
        assert len(found) <= 1 and (found or kind != "l16"), f"{kind}: {targets}; the portable one is everywhere"


def test_rows_that_are_not_mapped_are_the_same(ada):
    mapped, read = (ada.run("ada", " more", "--raw", "--no-save", *options).ok().json for options in ([], ["--no-mmap"]))
    assert read["text"] == mapped["text"] and read["tokens"] == mapped["tokens"]
