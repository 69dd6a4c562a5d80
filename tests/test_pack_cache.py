"""Packed weights and digests are kept for the next start (docs/models.md, "What is kept for the next start")."""

import json
import os
import shutil
import subprocess
import time

import pytest

from conftest import Torpor


@pytest.fixture
def kept(tiny, tmp_path):
    """A model of its own, and an empty cache."""
    model = tmp_path / "model"
    shutil.copytree(tiny.model, model)
    cache = tmp_path / "cache"
    torpor = Torpor(tmp_path / "store", model)
    torpor.cache = cache
    torpor.answer = lambda *args, **env: torpor(
        "run", "--model", model, "--prompt", "Who keeps the lamp?", "--max-tokens", 8, "--temperature", 0, *args,
        env={"TORPOR_CACHE": str(cache), **env})
    return torpor


def packed(kept):
    return sorted((kept.cache / "packed").glob("*.weights"))


def test_the_second_start_finds_what_the_first_one_packed(kept):
    first = kept.answer().ok().out
    [file] = packed(kept)
    before = file.stat()
    again = kept.answer("--verbose").ok()
    assert again.out == first and again.err == ""
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_packed_weights_that_are_damaged_are_told_and_made_anew(kept):
    first = kept.answer().ok().out
    [file] = packed(kept)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    second = kept.answer("--verbose").ok()
    assert second.out == first and "are not used: it is damaged" in second.err
    kept.answer().ok()
    third = kept.answer("--verbose").ok()
    assert third.out == first and third.err == ""


@pytest.mark.parametrize("how", ["--no-pack-cache", "TORPOR_PACK_CACHE"])
def test_none_are_kept_where_that_is_asked_for(kept, how):
    kept.answer(*([how] if how.startswith("-") else []), **({how: "0"} if how.startswith("T") else {})).ok()
    assert packed(kept) == []
    kept.answer(TORPOR_PACK_CACHE="yes").fails("invalid", "TORPOR_PACK_CACHE", "0 or 1")


def test_a_cache_that_can_not_be_written_costs_no_answer(kept):
    kept.cache.write_text("no directory")
    assert kept.answer().ok().out == kept.answer("--no-pack-cache").ok().out


def test_two_processes_may_pack_at_once(kept):
    env = {**os.environ, "TORPOR_CACHE": str(kept.cache)}
    command = kept.command("run", "--model", kept.model, "--prompt", "Who?", "--max-tokens", 4, "--temperature", 0)
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = {process.communicate(timeout=300)[0] for process in both}
    assert len(answers) == 1 and len(packed(kept)) == 1
    assert [path.name for path in (kept.cache / "packed").iterdir()] == [packed(kept)[0].name]


def test_du_counts_them_and_gc_removes_those_of_models_that_are_gone(kept):
    kept.answer().ok()
    [file] = packed(kept)
    env = {"TORPOR_CACHE": str(kept.cache)}
    usage = kept("du", "--json", env=env).ok().json
    assert (usage["packed_files"], usage["packed_bytes"]) == (1, file.stat().st_size)
    assert "packed weights" in kept("du", env=env).ok().out
    assert kept("gc", "--json", env=env).ok().json["packed_files_removed"] == 0
    shutil.rmtree(kept.model)
    would = kept("gc", "--json", "--dry-run", env=env).ok().json
    assert would["packed_bytes_freed"] == usage["packed_bytes"] and file.exists()
    assert "models that are gone" in kept("gc", env=env).ok().out
    assert not file.exists()


def test_weights_changed_in_place_are_another_models_whatever_their_times_say(kept):
    weights = kept.model / "model.safetensors"
    time.sleep(3.2)  # younger files are not remembered, and so would be read in any case
    kept.run("ada", "Who keeps the lamp?", env={"TORPOR_CACHE": str(kept.cache)}).ok()
    assert list((kept.cache / "digests").glob("*.json"))
    times = weights.stat()
    with open(weights, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    kept.run("ada", "And who else?", env={"TORPOR_CACHE": str(kept.cache)}).fails("incompatible", "weights")


def test_verify_reads_a_model_and_what_is_kept_of_it(kept):
    env = {"TORPOR_CACHE": str(kept.cache)}
    assert "nothing is known" in kept("verify", "--model", kept.model, env=env).ok().out
    time.sleep(3.2)
    kept.answer().ok()
    report = kept("verify", "--model", kept.model, "--json", env=env).ok().json
    assert (report["ok"], report["weights_known"], report["packed"]) == (True, True, True)
    [file] = packed(kept)
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    found = kept("verify", "--model", kept.model, "--json", env=env)
    assert found.code == 4 and [str(file) in problem for problem in found.json["problems"]] == [True]
    [note] = (kept.cache / "digests").glob("*.json")
    file.unlink()
    text = note.read_text()
    digest = json.loads(text)["digest"]
    note.write_text(text.replace(digest, digest[::-1]))
    assert "are not what they were" in kept("verify", "--model", kept.model, env=env).out
