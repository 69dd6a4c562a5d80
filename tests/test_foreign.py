"""What is not the store's is neither followed, nor waited for, nor replaced, nor removed."""

import json
import os
import shutil
import subprocess

import pytest

import torpor


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize("name", ["ada.json", "bob.safetensors"])
def test_nobody_waits_for_a_pipe_in_the_store(ada, name):
    pipe(ada.store / name)
    assert [agent["agent"] for agent in ada("ls", "--json", timeout=20).ok().json] == ["ada"]
    ada("verify", timeout=20).ok()
    ada("gc", timeout=20).ok()
    assert ada("show", "ada", "--json", timeout=20).ok().json["cache_size"] == 608
    ada.run("ada", " more", "--raw", timeout=60).ok()
    ada("du", timeout=20).ok()


def test_an_agent_that_is_a_pipe_is_an_error_at_once(ada):
    pipe(ada.agent_file("ada"))
    ada("show", "ada", timeout=20).fails("not_found", "ada")
    ada("verify", "ada", timeout=20).fails("not_found", "ada")


@pytest.mark.parametrize("diverted", ["segments", "segments/00", "parts"])
def test_gc_follows_no_symbolic_link(ada, tmp_path, diverted):
    victim = tmp_path / "victim"
    (victim / "00").mkdir(parents=True)
    for name in (".torpor-tmp-1-1", ".tmp-1-1", "00" + "a" * 30 + ".safetensors", "00/00" + "a" * 30 + ".safetensors"):
        (victim / name).write_text("somebody's")
    if (ada.store / diverted).exists():
        (ada.store / diverted).rename(tmp_path / "elsewhere")
    (ada.store / diverted).symlink_to(victim)
    before = sorted(victim.rglob("*"))
    ada("gc")
    assert sorted(victim.rglob("*")) == before


def test_a_save_goes_through_no_symbolic_link(tiny, words, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    tiny.store.mkdir()
    for diverted in (".locks", "segments"):
        (tiny.store / diverted).symlink_to(victim)
        tiny.run("ada", words(300), "--raw", "--json").fails("io", "symbolic link", answered=diverted == "segments")
        (tiny.store / diverted).unlink()
    assert list(victim.iterdir()) == []
    tiny.run("ada", words(300), "--raw").ok()


def test_an_export_may_go_to_another_file_systems_root(ada, tmp_path):
    """All roots of one kind of file system have one inode number."""
    roots = [tmp_path / "store-disk", tmp_path / "other-disk"]
    mounted = []
    try:
        for root in roots:
            root.mkdir()
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(root)], capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"can't mount a file system here: {done.stderr.strip()}")
            mounted.append(root)
        assert roots[0].stat().st_ino == roots[1].stat().st_ino
        for path in ada.files():
            there = roots[0] / path.relative_to(ada.store)
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(path.read_bytes())
        ada.store = roots[0]
        ada("export", "ada", roots[1] / "ada.safetensors").ok()
        ada("export", "ada", roots[0] / "eve.safetensors").fails("invalid", "into the store itself")
    finally:
        for root in mounted:
            subprocess.run(["umount", str(root)], check=True)


# ---- which directory is a store, and what in it is Torpor's

@pytest.fixture
def model_directory(tiny, tiny_model, tmp_path):
    """A copy of the model, taken for a store."""
    shutil.copytree(tiny_model, tmp_path / "copy")
    (tmp_path / "copy" / ".tmp-1-1").write_text("somebody's")
    tiny.store = tmp_path / "copy"
    return tiny


@pytest.mark.parametrize("command", [["ls"], ["du"], ["gc"], ["verify"], ["verify", "model"], ["show", "model"], ["rm", "model"],
                                     ["rm", "--force", "model"], ["rename", "model", "m"], ["fork", "model", "m"], ["limits"],
                                     ["limits", "--min-free", "1MB"]])
def test_a_directory_that_is_no_store_is_refused_and_keeps_its_files(model_directory, command):
    before = model_directory.state()
    model_directory(*command).fails("invalid", "no store", str(model_directory.store))
    assert model_directory.state() == before


def test_a_store_among_other_files_leaves_them_alone(model_directory):
    before = model_directory.state()
    model_directory.run("config", "Hello").ok()
    assert [agent["agent"] for agent in model_directory("ls", "--json").ok().json] == ["config"]
    model_directory.run("model", "Hello").fails("invalid", "somebody else's")
    model_directory("fork", "config", "model").fails("invalid", "somebody else's")
    model_directory("rm", "model").fails("invalid", "--force")
    model_directory("show", "model").fails("not_found", "model")
    model_directory("gc").ok()
    model_directory("rm", "config").ok()
    model_directory("gc").ok()
    after = model_directory.state()
    assert json.loads((model_directory.store / "torpor.json").read_text()) == {"torpor_store": 3}
    del after["torpor.json"]
    assert {name: state for name, state in after.items() if name != ".tmp-1-1"} == {
        name: state for name, state in before.items() if name != ".tmp-1-1"}
    model_directory("rm", "--force", "model").ok()
    assert not (model_directory.store / "model.safetensors").exists()


def test_python_is_told_too(model_directory):
    store = torpor.CachePersistence(model_directory.store)
    for call in (store.list_cached_agents, store.get_cache_disk_usage, lambda: store.delete_agent_cache("model")):
        with pytest.raises(torpor.InvalidArgumentError, match="no store"):
            call()
    assert (model_directory.store / "model.safetensors").exists()


def test_an_old_store_goes_on_and_is_marked_by_the_next_save(ada):
    marker = ada.store / "torpor.json"
    marker.unlink()
    for command in (["ls"], ["show", "ada"], ["verify"], ["gc"], ["du"]):
        ada(*command).ok()
        assert not marker.exists()
    ada("fork", "ada", "eve").ok()
    assert marker.exists()


def test_a_newer_store_is_refused_and_a_damaged_marker_told(ada):
    marker = ada.store / "torpor.json"
    marker.write_text('{"torpor_store": 4}')
    for command in (["ls"], ["gc"], ["show", "ada"], ["rm", "ada"]):
        ada(*command).fails("incompatible", "version 4", "newer Torpor")
    ada.run("ada", "Hello").fails("incompatible", "version 4")
    for text in ("{", "nonsense", '{"torpor_store": 3, "limits": {"disk_budget": -5}}'):
        marker.write_text(text)
        ada("ls").fails("corruption", "torpor.json")
        ada.run("ada", "Hello").fails("corruption", "torpor.json")
    for text in ("", "\0" * 24):  # what a power cut leaves of one that was not flushed
        marker.write_text(text)
        ada("ls").ok()
        ada.run("ada", "Hello").ok()
        assert json.loads(marker.read_text()) == {"torpor_store": 3}


def test_limits_that_the_store_keeps_bind_every_command(ada, words):
    assert ada("limits", "--json").ok().json == {"disk_budget": 0, "min_free": 0}
    used = ada("du", "--json").ok().json["total_bytes"]
    assert ada("limits", "--disk-budget", used + 1000, "--json").ok().json == {"disk_budget": used + 1000, "min_free": 0}
    assert "no bound" in ada("limits").ok().out
    ada("fork", "ada", "eve").fails("exhausted", "torpor limits")
    ada.run("bob", words(900), "--raw").fails("exhausted", "budget", answered=True)
    ada.run("bob", words(900), "--raw", "--disk-budget", "1GB").ok()  # an option counts for its command
    ada("limits", "--disk-budget", "1GB", "--min-free", "1kB").ok()
    ada("fork", "ada", "eve").ok()
    assert ada("limits", "--disk-budget", 0, "--json").ok().json == {"disk_budget": 0, "min_free": 1000}
    ada("limits", "--disk-budget", "much").fails("usage")
