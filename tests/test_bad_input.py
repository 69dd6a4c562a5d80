"""Every bad input has its own exit code and one sentence, and leaves the disk as it was."""

import json
import os
import shutil
import subprocess
import time

import pytest

from conftest import EXIT, MODEL, Torpor, make_tiny_model


@pytest.fixture
def unchanged(ada):
    before = ada.state()
    yield ada
    assert ada.state() == before


@pytest.mark.parametrize("command", [["show", "nobody"], ["rm", "nobody"], ["export", "nobody", "out.safetensors"],
                                     ["verify", "nobody"]])
def test_unknown_agent(unchanged, command, tmp_path):
    if command[0] == "export":
        command = [*command[:2], tmp_path / "out.safetensors"]
    unchanged(*command).fails("not_found", "nobody")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_missing_store_is_not_made(tiny):
    tiny("show", "ada").fails("not_found", "ada")
    assert not tiny.store.exists()


@pytest.mark.parametrize("agent", ["../x", "", "a" * 300, "a/b", ".hidden", "a b", "ä"])
def test_bad_agent_id(unchanged, agent):
    unchanged.run(agent, "Hello").fails("invalid")
    unchanged("show", agent).fails("invalid")
    unchanged("rm", agent).fails("invalid")
    unchanged("export", agent, "/dev/null").fails("invalid")


@pytest.mark.parametrize("arguments", [
    [], ["frobnicate"], ["run"], ["run", "--model", "m", "--agent", "a"],
    ["run", "--model", "m", "--agent", "a", "--prompt", "p", "--prompt-file", "f"],
    ["run", "--model", "m", "--agent", "a", "--prompt", "p", "--max-tokens", "0"],
    ["run", "--model", "m", "--agent", "a", "--prompt", "p", "--max-tokens", "many"],
    ["run", "--model", "m", "--agent", "a", "--prompt", "p", "--top-p", "0"],
    ["run", "--model", "m", "--agent", "a", "--prompt", "p", "--kv-dtype", "f8"],
    ["run", "--model", "m", "--agent", "a", "--prompt", "p", "--kv-bits", "3"],
    ["run", "--model", "m", "--agent", "a", "--prompt", "p", "--kv-group", "64"],
    ["show"], ["show", "a", "b"], ["ls", "--frobnicate"]])
def test_usage(unchanged, arguments):
    unchanged(*arguments).fails("usage", "--help")


def test_missing_model(unchanged):
    unchanged.model = "someone/some-model"
    for agent in ("ada", "new"):
        unchanged.run(agent, "Hello").fails("not_found", "`hf download someone/some-model` (or torpor pull)")
    unchanged.model = "/no/such/directory"
    unchanged.run("ada", "Hello").fails("not_found", "/no/such/directory")


def test_unsupported_model(unchanged, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config.update(model_type="mamba", architectures=["MambaForCausalLM"])
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    unchanged.model = tmp_path / "other"
    unchanged.run("ada", "Hello").fails("invalid", "unsupported", "mamba")


def bump_weight(config, weights):
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] += 1


@pytest.mark.parametrize("field, change", [
    ("weights", bump_weight),
    ("config", lambda config, weights: config.update(rms_norm_eps=1e-6)),
    ("rope", lambda config, weights: config.update(rope_theta=500000.0))])
def test_another_model_under_an_agent(unchanged, tmp_path, field, change):
    unchanged.model = make_tiny_model(tmp_path / "changed", change)
    unchanged.run("ada", "Hello").fails("incompatible", field)


def test_another_chat_template_or_tokenizer_makes_no_row_unusable(ada, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "other")
    for path in (tmp_path / "other").iterdir():
        if path.name in ("chat_template.jinja", "tokenizer_config.json"):
            path.write_text(path.read_text().replace("<|im_start|>' + ", "<|im_start|>a ' + ").replace("assistant", "helper"))
    before = ada("show", "ada", "--json").ok().json
    ada.model = tmp_path / "other"
    turn = ada.run("ada", "Hello").ok()
    # Every row is used, and the turn says once that the template changed.
    assert turn.json["tokens"]["cached"] == before["cache_size"]
    assert len(turn.json["notices"]) == 1 and "chat template" in turn.json["notices"][0]
    assert "chat template" in turn.err
    after = ada("show", "ada", "--json").ok().json
    assert after["segments"][:len(before["segments"])] == before["segments"]
    assert after["identity"] == before["identity"] and after["chat_template"] != before["chat_template"]
    assert "notices" not in ada.run("ada", "Hello").ok().json
    # What another agent says first is found by its ids, whichever template made them.
    ada("verify").ok()


def test_another_kv_dtype(unchanged):
    unchanged.run("ada", "Hello", "--kv-dtype", "f32").fails("incompatible", "kv")
    unchanged.run("ada", "Hello", "--kv-bits", "8").fails("incompatible", "kv")


def test_an_agent_awake_elsewhere(ada):
    chat = subprocess.Popen(ada.command("chat", "--model", ada.model, "--agent", "ada", "--raw", "--json", "--max-tokens", 4),
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        chat.stdin.write(" more\n")
        chat.stdin.flush()
        assert json.loads(chat.stdout.readline())["tokens"]["cached"] == 608
        before = ada.state()
        start = time.monotonic()
        ada.run("ada", "Hello").fails("busy", "ada")
        ada("rm", "ada").fails("busy", "ada")
        assert time.monotonic() - start < 2
        for reader in (["ls"], ["show", "ada"], ["verify", "ada"], ["du"]):
            ada(*reader).ok()
        assert ada.state() == before
        ada.run("another", "Hello").ok()
    finally:
        chat.communicate("/exit\n", timeout=60)
    assert chat.returncode == 0
    ada.run("ada", " more", "--raw").ok()


def test_a_store_that_is_no_directory(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    for store in (tmp_path / "file", tmp_path / "file" / "store"):
        tiny.store = store
        tiny.run("a", "Hello").fails("io", str(store))
    assert (tmp_path / "file").read_text() == ""


def mount(directory, options):
    directory.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"can't mount a file system here: {done.stderr.strip()}")


def test_a_read_only_store(ada):
    if os.getuid() != 0:
        paths = [ada.store, *(path for path in ada.store.rglob("*") if path.is_dir())]
        before = ada.state()
        try:
            for path in paths:
                path.chmod(0o500)
            ada.run("ada", "Hello").fails("io", str(ada.store))
            ada("ls").ok()
        finally:
            for path in paths:
                path.chmod(0o700)
        assert ada.state() == before
        return
    there = ada.store.parent / "read-only"  # root may write anywhere, but not to a read-only file system
    mount(there, "size=8m")
    try:
        copy = ada.copy(there / "store")
        subprocess.run(["mount", "-o", "remount,ro", str(there)], check=True)
        before = copy.state()
        copy.run("ada", "Hello").fails("io", str(copy.store))
        copy("ls").ok()
        copy("verify").ok()
        assert copy.state() == before
    finally:
        subprocess.run(["umount", str(there)], check=True)


def test_a_full_disk(ada, words):
    there = ada.store.parent / "small"
    mount(there, "size=600k")  # ada's 311 kB fit; 600 tokens more do not
    try:
        copy = ada.copy(there / "store")
        before = copy.state()
        copy.run("ada", words(1000), "--raw").fails("io", "answer is complete", answered=True)
        copy("verify", "ada").ok()
        after = copy.state()
        assert after["ada.safetensors"] == before["ada.safetensors"] and after["ada.json"] == before["ada.json"]
        copy("gc").ok()
        assert copy.state() == before
    finally:
        subprocess.run(["umount", str(there)], check=True)


def test_past_the_context_limit(unchanged):
    unchanged.run("ada", " lamp" * 3600, "--raw").fails("exhausted", "4096")
    unchanged.run("new", " lamp" * 5000, "--raw").fails("exhausted", "4096")


def test_invalid_utf8(unchanged, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"good \xff bad")
    for arguments in (["--prompt-file", tmp_path / "bad.txt"], ["--prompt", b"a\xc0\xafb".decode(errors="surrogateescape")]):
        unchanged("run", "--model", unchanged.model, "--agent", "ada", *arguments).fails("invalid", "UTF-8")


def test_unreadable_prompt_files(unchanged, tmp_path):
    run = ["run", "--model", unchanged.model, "--agent", "ada", "--prompt-file"]
    unchanged(*run, tmp_path / "none.txt").fails("not_found", "none.txt")
    unchanged(*run, tmp_path).fails("io", str(tmp_path))


def test_an_empty_prompt(unchanged):
    run = ["run", "--model", unchanged.model, "--agent", "ada", "--prompt", ""]
    unchanged(*run).fails("invalid", "empty")
    unchanged(*run, "--raw").fails("invalid", "empty")


def test_export_to_nowhere(unchanged, tmp_path):
    unchanged("export", "ada", tmp_path / "none" / "x.safetensors").fails("io")


def test_a_closed_standard_output_still_saves(tiny):
    process = subprocess.Popen(tiny.command("run", "--model", tiny.model, "--agent", "a", "--prompt", "Once",
                                            "--max-tokens", 2000), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=60) == EXIT["io"], process.stderr.read()
    tiny("verify", "a").ok()


def test_the_real_model_and_an_agent_of_another(unchanged):
    Torpor(unchanged.store, MODEL).run("ada", "Hello").fails("incompatible")
