"""What is not the store's is neither followed, nor waited for, nor replaced, nor removed."""

import os
import subprocess

import pytest


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
