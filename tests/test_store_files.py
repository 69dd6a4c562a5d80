"""What is on disk: the format as other programs see it, and what a turn writes."""

import json
import stat
import subprocess
import time

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from conftest import EXIT


def row_bytes(torpor):
    """Of one token over all layers of a segment."""
    tensors = load_file(torpor.segments()[0])
    return sum(tensor.nbytes for name, tensor in tensors.items() if name != "tokens") // 256


def test_hugging_face_opens_every_file(ada):
    files = [path for path in ada.files() if path.suffix == ".safetensors"]
    assert len(files) == 3  # two segments and the agent
    for path in ada.segments():
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():
                assert file.get_tensor(name).shape == ((256,) if name == "tokens" else (1, 1, 256, 64))
    agent = load_file(ada.agent_file("ada"))
    assert set(agent) == {"rows", "messages", "tokens"}
    assert agent["tokens"].dtype == "int32" and agent["tokens"].shape == (608,)
    assert agent["rows"].dtype == "uint8" and agent["rows"].size == (608 - 2 * 256) * row_bytes(ada)
    said = json.loads(agent["messages"].tobytes())
    assert [message["role"] for message in said] == ["user", "assistant"] and said[1]["ids"][1] == 608


def test_modes(ada):
    for path in ada.store.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), f"{path}: {mode:o}"


def test_a_short_agent_is_one_file(tiny):
    tiny.run("a", "Once").ok()
    assert tiny.segments() == []
    assert set(load_file(tiny.agent_file("a"))) == {"rows", "messages", "tokens"}


def test_a_turn_that_seals_nothing_writes_its_own_rows_and_at_most_32_others(tiny, words):
    first = tiny.run("a", words(150), "--raw").ok().json
    row = first["bytes"]["written"] / first["tokens"]["context"]  # a little more, for headers count too
    later = tiny.run("a", " more", "--raw").ok().json
    new = later["tokens"]["context"] - later["tokens"]["cached"]
    assert new + 32 < first["tokens"]["context"] < 256 > later["tokens"]["context"]
    headers = 6000
    assert later["bytes"]["written"] <= (new + 32) * row + headers


def test_a_turn_that_seals_nothing_leaves_earlier_rows_where_they_are(tiny, words):
    tiny.run("a", words(100), "--raw").ok()
    parts = tiny.store / "parts"
    assert list(parts.iterdir()) == []
    tiny.run("a", words(20), "--raw").ok()
    [first] = parts.iterdir()
    assert load_file(tiny.agent_file("a"))["tokens"].size < 100 <= load_file(first)["tokens"].size
    before = first.stat()
    tiny.run("a", words(20), "--raw").ok()
    assert first.stat() == before
    held = tiny("show", "a", "--json").ok().json["cache_size"]
    assert tiny.run("a", " more", "--raw").ok().json["tokens"]["cached"] == held
    tiny("verify").ok()
    tiny("rm", "a").ok()
    assert list(parts.iterdir()) == []


@pytest.mark.parametrize("n", [1, 300])
def test_an_export_has_exactly_the_layers_the_messages_and_the_tokens(tiny, words, tmp_path, n):
    turn = tiny.run("a", words(n), "--raw").ok().json
    tiny("export", "a", tmp_path / "a.safetensors").ok()
    tensors = load_file(tmp_path / "a.safetensors")
    assert len(json.loads(tensors.pop("messages").tobytes())) == 2
    assert set(tensors) == {"tokens", *(f"layer_{i}_{kind}" for i in range(2) for kind in ("keys", "values"))}
    for name, tensor in tensors.items():
        context = turn["tokens"]["context"]
        assert tensor.shape == ((context,) if name == "tokens" else (1, 1, context, 64))
    assert (tmp_path / "a.json").exists()


def test_an_import_goes_on_like_the_original(ada, tiny, tmp_path):
    ada("export", "ada", tmp_path / "ada.safetensors").ok()
    tiny("import", tmp_path / "ada.safetensors", "ada").ok()
    theirs, ours = (torpor.run("ada", " and then", "--raw").ok().json for torpor in (ada, tiny))
    assert ours["text"] == theirs["text"] and ours["tokens"] == theirs["tokens"]
    before = tiny.state()
    tiny("import", tmp_path / "ada.safetensors", "ada").fails("invalid", "ada")
    tiny("import", tiny.model / "model.safetensors", "other").fails("invalid")
    tiny("import", tmp_path / "none.safetensors", "other").fails("not_found")
    assert tiny.state() == before


def test_a_turn_writes_in_proportion_to_its_tokens(tiny, words):
    first = tiny.run("a", words(2000), "--raw").ok().json
    before = {path: path.stat() for path in tiny.segments()}
    assert len(before) == 2008 // 256
    size = tiny("show", "a", "--json").ok().json["bytes"]
    assert first["bytes"]["written"] >= size
    second = tiny.run("a", words(12), "--raw").ok().json  # and 8 answered: 20 new tokens
    assert second["tokens"]["context"] == 2028
    assert second["bytes"]["written"] < size / 4
    for path, old in before.items():
        new = path.stat()
        assert (new.st_ino, new.st_mtime_ns) == (old.st_ino, old.st_mtime_ns)


def test_agents_with_the_same_beginning_share_segments(tiny, words):
    tiny.run("a", words(1000) + " The bell rang.", "--raw").ok()
    first = set(tiny.segments())
    turn = tiny.run("b", words(1000) + " Nobody came to the door.", "--raw").ok().json
    assert len(first) == 3 and set(tiny.segments()) == first
    shown = [tiny("show", agent, "--json").ok().json["segments"] for agent in "ab"]
    assert shown[0] == shown[1] and len(shown[0]) == 3
    assert turn["bytes"]["written"] < tiny("show", "b", "--json").ok().json["bytes"] / 2
    # Removing one leaves the other whole.
    tiny("rm", "a").ok()
    tiny("verify").ok()
    tiny("gc").ok()
    tiny("verify", "b").ok()
    tiny("rm", "b").ok()
    tiny("gc").ok()
    assert tiny("du", "--json").ok().json["total_bytes"] == 0


def test_the_listings(ada):
    rows = ada("ls").ok().out.splitlines()
    assert rows[0].split() == ["AGENT", "TOKENS", "OWN", "SHARED", "STATE", "AGE", "MODEL"] and rows[1].split()[:2] == ["ada", "608"]
    [listed] = ada("ls", "--json").ok().json
    assert [listed.pop(only) for only in ("own_bytes", "shared_bytes", "missing_files", "server")] == [
        listed["bytes"], 0, 0, None]
    shown = ada("show", "ada", "--json").ok().json
    assert listed.items() <= shown.items()
    assert shown["cache_size"] == 608 and len(shown["segments"]) == 2 and shown["identity"]["architecture"] == "llama"
    usage = ada("du", "--json").ok().json
    assert usage["agents"] == 1 and usage["segments"] == 2 and usage["orphan_segments"] == 0
    assert usage["total_bytes"] >= usage["agent_bytes"] + usage["segment_bytes"]
    assert ada("verify", "--json").ok().json == {
        "ok": True, "agents": [{"agent": "ada", "readable": True, "intact_tokens": 608, "problems": []}], "teams": []}


def test_show_prints_the_conversation(tiny):
    turn = tiny.run("a", "Who keeps the lamp?").ok().json
    shown = tiny("show", "a").ok().out
    assert f"[user] exchange 1, tokens 0 to {turn['tokens']['context']}\nWho keeps the lamp?\n" in shown
    assert f"[assistant]\n{turn['text']}" in shown


def test_an_empty_store(tiny):
    for command in ("ls", "du", "verify", "gc"):
        tiny(command).ok()
    assert tiny("ls", "--json").ok().json == []
    assert not tiny.store.exists()


@pytest.mark.parametrize("spoil", [
    lambda sidecar: sidecar.unlink(),
    lambda sidecar: sidecar.write_text("{"),
    lambda sidecar: sidecar.write_text(sidecar.read_text().replace("608", "609")),
    lambda sidecar: sidecar.write_bytes(b"\xff\xfe"),
], ids=["deleted", "cut", "edited", "not-utf8"])
def test_a_spoilt_sidecar_is_rebuilt(ada, spoil):
    sidecar = ada.store / "ada.json"

    def read():  # without what tells a file from its copy
        return {key: value for key, value in json.loads(sidecar.read_text()).items()
                if key not in ("agent_file", "sidecar_checksum")}

    good = read()
    time.sleep(0.02)
    spoil(sidecar)
    [listed] = ada("ls", "--json").ok().json
    assert listed["cache_size"] == 608 and not listed["damaged"]
    assert read() == good
    ada("verify").ok()
    assert ada.run("ada", " more", "--raw").ok().json["tokens"]["cached"] == 608


def test_store_commands_start_fast(ada):
    def once():
        start = time.monotonic()
        ada("ls").ok()
        return time.monotonic() - start

    assert sorted(once() for _ in range(5))[2] < 0.5
    assert EXIT["usage"] == 2


def test_a_garbage_collection_that_waits_for_the_disk_keeps_no_save_waiting(ada, slow_disk, tmp_path):
    collecting = subprocess.Popen(ada.command("gc"), env=slow_disk(60, tmp_path / "mark"))
    try:
        while not (tmp_path / "mark").exists():
            assert collecting.poll() is None
            time.sleep(0.01)
        ada.run("eve", "Hello").ok()
        ada.run("bob", "Hello", "--disk-budget", 1 << 30).ok()
        assert collecting.poll() is None
    finally:
        collecting.kill()
        collecting.wait()
