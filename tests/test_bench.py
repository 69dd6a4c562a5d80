"""`torpor bench`: the shape of what it prints, and what it refuses. Its numbers are docs/benchmarks.md's business."""

import json
import os
import pty
import re
import subprocess
import xml.etree.ElementTree

import pytest

from conftest import BIN, read_to_the_end

AGENTS_BENCH = BIN.parent / "bench" / "agents_bench"


def bench(torpor, *args, **kwargs):
    return torpor("bench", "--model", torpor.model, *args, **kwargs)


def test_json_has_every_measurement(tiny, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    report = bench(tiny, "--prefill", "300,8", "--decode", 2, "--depth", "0,20", "--agents", "1,3", "--runs", 2, "--durability", "none",
                   "--json", env={"TMPDIR": str(scratch)}).ok().json
    assert list(report) == ["prefill", "decode", "wake", "save", "peak_bytes", "limits"]
    limits = report["limits"]
    assert list(limits) == ["memory_bytes_per_s", "write_bytes_per_s", "flush_ms", "prefill", "decode", "save"]
    assert limits["memory_bytes_per_s"] > 1e8 and limits["write_bytes_per_s"] > 1e5
    for part in ("prefill", "decode", "save"):
        assert list(limits[part]) == ["by", "share"] and limits[part]["by"] in ("bandwidth", "arithmetic", "disk")
    assert limits["prefill"]["share"] > 0 and limits["save"] == {"by": "arithmetic", "share": 0}, "--durability none waits for no disk"
    weights = tiny.model.joinpath("model.safetensors").stat().st_size
    [decoded] = [row["tokens_per_s"] for row in report["decode"] if (row["depth"], row["agents"]) == (0, 1)]
    assert limits["decode"]["share"] == pytest.approx(decoded * weights / limits["memory_bytes_per_s"], rel=0.2)
    assert [row.pop("tokens") for row in report["prefill"]] == [300, 8]
    assert [(row["depth"], row["agents"]) for row in report["decode"]] == [(0, 1), (0, 3), (20, 1), (20, 3)]
    for row in report["prefill"] + report["decode"]:
        assert list(row)[-1] == "tokens_per_s" and row["tokens_per_s"] > 0
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


def test_a_run_is_a_table_a_drawing_and_a_file_that_a_later_one_is_compared_with(tiny, tmp_path):
    args = "--prefill", 8, "--decode", 2, "--depth", 0, "--agents", "1,2", "--temperature", 0.7, "--runs", 1
    saved, drawn = tmp_path / "run.json", tmp_path / "run.svg"
    out = bench(tiny, *args, "--save", saved).ok().out
    assert [line.split()[0] for line in out.splitlines()] == ["TOKENS", "prefill", "decode", "by", "wake", "save", "peak", "limits"]
    assert re.fullmatch(r"limits   prefill: \w+ \(\d+% of [\d.]+ .B/s\); decode: \w+ \(\d+% of [\d.]+ .B/s\); "
                        r"save: \w+ \(\d+% of its time is the disk's\)", out.splitlines()[-1])
    assert "\u2588" not in out, "no terminal"

    run = json.loads(saved.read_text())
    run["decode"].pop()
    saved.write_text(json.dumps(run))
    leader, follower = pty.openpty()
    process = subprocess.Popen(tiny.command("bench", "--model", tiny.model, *args, "--compare", saved, "--save", tmp_path / "again.json",
                                            "--plot", drawn), stdout=follower, stderr=subprocess.DEVNULL)
    os.close(follower)
    lines = read_to_the_end(leader).decode().splitlines()
    os.close(leader)
    assert process.wait(60) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert lines[0].split() == ["TOKENS", "MEDIAN", "SIZE", "RATIO"]
    for kind, line in zip(("prefill", "decode", "wake", "save"), [lines[1], lines[2], lines[4], lines[5]], strict=True):
        new, old = again[kind][0], run[kind][0]
        ratio = new["tokens_per_s"] / old["tokens_per_s"] if "tokens_per_s" in old else old["ms"] / new["ms"]
        assert new["ratio"] == pytest.approx(ratio, rel=0.02)
        bar = line.split()[-1]
        assert set(bar) <= set("\u2588\u2589\u258a\u258b\u258c\u258d\u258e\u258f") and float(line.split()[-2]) == pytest.approx(ratio, abs=0.02)
        assert kind == "decode" or bar == 24 * "\u2588", "the only one of its kind"
    assert "ratio" not in again["decode"][1], "the saved run has none"
    svg = xml.etree.ElementTree.parse(drawn).getroot()
    texts = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0].endswith("/tiny, KV cache f16") and "prefill of 8" in texts and "by 2 at 0" in texts
    speed, ratio = map(float, re.fullmatch(r"([\d.]+) tokens/s \(([\d.]+)\)", texts[texts.index("prefill of 8") + 1]).groups())
    assert speed == pytest.approx(again["prefill"][0]["tokens_per_s"], abs=0.1), "either one is rounded by itself"
    assert ratio == pytest.approx(again["prefill"][0]["ratio"], abs=0.01)
    assert len(list(svg.iter("{http://www.w3.org/2000/svg}rect"))) == 1 + 5 + 4, "the ground, five rows, four of the saved run"


@pytest.mark.parametrize("text", [
    "", "{", "[]", "{}", "null", "[" * 10000, '{"prefill": 1, "decode": [], "wake": [], "save": []}', "\xff",
    *('{"prefill": [%s], "decode": [], "wake": [], "save": []}' % row for row in (
        "1", "{}", '{"tokens": 8}', '{"tokens": 8, "tokens_per_s": 0}', '{"tokens": -1, "tokens_per_s": 1}', '{"tokens": 1.5, "tokens_per_s": 1}',
        '{"tokens": 1e300, "tokens_per_s": 1}', '{"tokens": 8, "tokens_per_s": "1"}', '{"tokens": 8, "tokens_per_s": 1e999}'))])
def test_a_file_that_is_no_saved_run_is_refused(tiny, tmp_path, text):
    (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
    bench(tiny, "--compare", tmp_path / "run.json").fails("invalid", "run.json", "no run that torpor bench saved")


def test_files_that_can_not_be_written_or_read_are_refused_before_anything_is_measured(tiny, tmp_path):
    bench(tiny, "--plot", tmp_path / "run.png").fails("invalid", "SVG", "run.png")
    bench(tiny, "--save", tmp_path / "nowhere" / "run.json").fails("io", "run.json")
    bench(tiny, "--compare", tmp_path / "run.json").fails("not_found", "run.json")


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
