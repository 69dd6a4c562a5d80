"""`torpor bench`: the shape of what it prints, and what it refuses. Its numbers are docs/benchmarks.md's business."""

import json
import subprocess

import pytest

from conftest import BIN

AGENTS_BENCH = BIN.parent / "bench" / "agents_bench"


def bench(torpor, *args, **kwargs):
    return torpor("bench", "--model", torpor.model, *args, **kwargs)


def test_json_has_every_measurement(tiny, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    report = bench(tiny, "--prefill", "300,8", "--decode", 2, "--depth", "0,20", "--agents", "1,3", "--runs", 2, "--durability", "none",
                   "--json", env={"TMPDIR": str(scratch)}).ok().json
    assert list(report) == ["prefill", "decode", "wake", "save", "peak_bytes"]
    assert [row.pop("tokens") for row in report["prefill"]] == [300, 8]
    assert [(row.pop("depth"), row.pop("agents")) for row in report["decode"]] == [(0, 1), (0, 3), (20, 1), (20, 3)]
    for row in report["prefill"] + report["decode"]:
        assert list(row) == ["tokens_per_s"] and row["tokens_per_s"] > 0
    for direction in ("wake", "save"):
        assert [row["tokens"] for row in report[direction]] == [300, 8, 20]
        for row in report[direction]:
            assert list(row) == ["tokens", "ms", "bytes"] and row["ms"] > 0
            assert row["bytes"] >= row["tokens"] * 2 * 2 * 64 * 2  # layers x (key, value) x head_dim x f16
    assert report["peak_bytes"] > tiny.model.joinpath("model.safetensors").stat().st_size
    assert not any(scratch.iterdir()), "the temporary stores are still there"
    assert not tiny.store.exists()


def test_kv_dtype_and_no_decoding(tiny):
    def size(dtype):
        report = bench(tiny, "--prefill", 40, "--decode", 0, "--runs", 1, "--kv-dtype", dtype, "--json").ok().json
        assert report["decode"] == []
        [row] = report["save"]
        return row["bytes"]

    assert size("f32") - size("f16") == pytest.approx(40 * 2 * 2 * 64 * 2, abs=256)  # the headers may differ


def test_table_for_people(tiny):
    out = bench(tiny, "--prefill", 8, "--decode", 2, "--depth", 0, "--agents", "1,2", "--temperature", 0.7, "--runs", 1).ok().out
    assert [line.split()[0] for line in out.splitlines()] == ["TOKENS", "prefill", "decode", "by", "wake", "save", "peak"]


@pytest.mark.parametrize("args, words", [
    (["--prefill", "12,"], ["--prefill", "'12,'"]),
    (["--prefill", "0"], ["--prefill"]),
    (["--prefill", ""], ["--prefill"]),
    (["--prefill", "4x"], ["--prefill"]),
    (["--prefill", "99999999999"], ["--prefill"]),
    (["--prefill", "8,8"], ["--prefill", "twice"]),
    (["--depth", "-1"], ["--depth"]),
    (["--depth", "1;2"], ["--depth"]),
    (["--agents", "0"], ["--agents"]),
])
def test_bad_lists(tiny, args, words):
    bench(tiny, *args).fails("invalid", *words)


def test_bad_options(tiny):
    bench(tiny, "--runs", 0).fails("usage", "--runs")
    bench(tiny, "--temperature", -1).fails("usage", "--temperature")
    bench(tiny, "--kv-dtype", "f8").fails("usage", "--kv-dtype")
    bench(tiny, "--prefill", 5000).fails("exhausted", "5000", "4096")
    bench(tiny, "--prefill", 8, "--depth", 0, env={"TMPDIR": "/nonexistent"}).fails("io", "TMPDIR")
    tiny.model = tiny.store.parent / "nowhere"
    bench(tiny).fails("not_found", "nowhere")


@pytest.mark.skipif(not AGENTS_BENCH.exists(), reason="the benchmarks are not built")
def test_agents_bench_says_what_the_comparison_with_llama_server_reads(tmp_path):
    def run(*args):
        return json.loads(subprocess.run([AGENTS_BENCH, *map(str, args)], check=True, stdout=subprocess.PIPE).stdout)

    row = 30 * 2 * 3 * 64 * 2  # layers x (key, value) x heads x head_dim x f16
    saved = run("save", tmp_path / "store", 600, "rename")
    assert list(saved) == ["tokens", "first_bytes", "save_ms", "turn_ms", "turn_bytes", "fork_ms", "fork_bytes", "fork_awake_ms"]
    assert saved["first_bytes"] >= 600 * row
    assert 64 * row <= saved["turn_bytes"] < 66 * row, "the new rows alone: the 88 of before stay where they are"
    assert saved["fork_bytes"] < row, "a fork at a segment's end writes no row"
    woken = run("wake", tmp_path / "store")
    assert list(woken) == ["tokens", "read_bytes", "wake_ms", "memcpy_ms", "peak_bytes", "kv_bytes"]
    assert woken["tokens"] == 664 and woken["read_bytes"] >= 664 * row
    talk = run("conversation", tmp_path / "talk", 1024)
    assert list(talk) == ["tokens", "written", "bytes"]
    assert talk["tokens"] == 1024 and talk["bytes"] >= 1024 * row
