"""Torpor beside llama.cpp and mlx-lm: the same weights, the same machine, alternating runs.

    bench/peers/prepare [qwen2.5-coder-0.5b] [gemma3-270m]
    .venv/bin/python bench/peers/compare.py [--model smollm2-135m] [--torpor build/torpor] [--runs 5]

Each case runs once with Torpor, then once with llama.cpp, and so on, so that whatever else the machine does meets both. A pair
that others disturbed by more than a tenth is tried again, up to twice --runs (bench/peers/pairs.py).
Torpor warms up with a run of the same size; so does llama.cpp, but for the prompts that take it long. Printed are the
medians over the pairs, the ratio of the medians, and the lowest and highest ratio of one pair. mlx-lm comes last, on a few
tokens, because its speed on an x86 CPU allows no more; Torpor is measured on as few beside it. Ctrl-C ends a case early;
its complete pairs count.

All numbers go to bench/out/compare.json as soon as they are there, the ratios as a plot to bench/out/compare.png; those of
another model than SmolLM2 to compare-MODEL.json and .png.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "bench"))
from machine import cpu_name  # noqa: E402
from pairs import Others, by_key, least_disturbed, plot, summary  # noqa: E402

OUT = ROOT / "bench" / "out"
LLAMA_BENCH = OUT / "llama-cpp" / "build" / "bin" / "llama-bench"
DECODE = 64
MLX_LM_PREFILL, MLX_LM_DECODE = 32, 8


@dataclass
class Measure:
    """One row of the report. `key` finds it in what the two programs print."""
    key: tuple
    label: str
    target: float | None = None  # the least ratio that Torpor aims at


@dataclass
class Case:
    """Command lines, and what is read off what they print. llama.cpp's KV is f16; Torpor is told so."""
    torpor: list
    llama: list
    measures: list[Measure]


def short(prefill, decode):
    return Case(["--prefill", "512", "--depth", "0", "--decode", DECODE], ["-p", "512", "-n", DECODE],
                [Measure(("prefill", 512), "prefill 512", prefill), Measure(("decode", 0), f"decode {DECODE} at depth 0", decode)])


LONG = [
    Case(["--prefill", "1", "--depth", "4096", "--decode", DECODE], ["-p", 0, "-n", DECODE, "-d", "4096"],
         [Measure(("decode", 4096), f"decode {DECODE} at depth 4,096", 3.0)]),
    Case(["--prefill", "2048,4096", "--depth", "0", "--decode", 0], ["-p", "2048,4096", "-n", 0, "--no-warmup"],
         [Measure(("prefill", 2048), "prefill 2,048", 2.0), Measure(("prefill", 4096), "prefill 4,096, a cold prompt", 2.0)]),
]


@dataclass
class Model:
    """`name` is that of .models/NAME and .models/NAME.gguf."""
    name: str
    title: str
    weights: str  # in the directory, and in the GGUF
    cases: list[Case]

    @property
    def directory(self):
        return ROOT / ".models" / self.name

    @property
    def gguf(self):
        return ROOT / ".models" / f"{self.name}.gguf"


MODELS = {model.name: model for model in [
    Model("smollm2-135m", "SmolLM2-135M", "the same weights of 4 bits", [short(2.0, 1.5), *LONG]),
    Model("qwen2.5-coder-0.5b", "Qwen2.5-Coder-0.5B", "weights of 8 bits, llama.cpp's as Q4_K_M", [short(1.5, 1.2)]),
    Model("gemma3-270m", "Gemma 3 270M", "weights of 8 bits, llama.cpp's as Q4_K_M", [short(1.5, 1.2)]),
]}
PEAK = "peak"  # memory of the last case's processes


def run(command):
    """Standard output, the process's largest resident set in bytes, and the share of all cores that others used."""
    with tempfile.TemporaryFile() as errors:
        others = Others()
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=errors)
        try:
            out = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            process.kill()
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stdout.close()
        if process.returncode != 0:
            errors.seek(0)
            sys.exit(f"{' '.join(map(str, command))} failed with {process.returncode}:\n{errors.read().decode(errors='replace')}")
    share = others.share(usage.ru_utime + usage.ru_stime)
    return json.loads(out), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), share


def run_torpor(torpor, model, arguments):
    report, peak, share = run([torpor, "bench", "--model", model.directory, "--kv-dtype", "f16", "--durability", "none", "--runs", 1, "--json",
                        *arguments])
    found = {("prefill", row["tokens"]): row["tokens_per_s"] for row in report["prefill"]}
    found |= {("decode", row["depth"]): row["tokens_per_s"] for row in report["decode"]}
    return found, peak, share


def run_llama_cpp(model, threads, arguments):
    report, peak, share = run([LLAMA_BENCH, "-m", model.gguf, "-t", threads, "-ngl", 0, "-r", 1, "-o", "json", *arguments])
    found = {}
    for row in report:
        key = ("decode", row["n_depth"]) if row["n_gen"] else ("prefill", row["n_prompt"])
        found[key] = row["avg_ts"]
    return found, peak, share


def measure_llama_cpp(torpor, model, runs, threads):
    """Per key a list of (torpor, llama.cpp, others' share), one of each run."""
    results = {}
    for case in model.cases:
        def attempt():
            ours, our_peak, our_share = run_torpor(torpor, model, case.torpor)
            theirs, their_peak, their_share = run_llama_cpp(model, threads, case.llama)
            pairs = {measure.key: (ours[measure.key], theirs[measure.key]) for measure in case.measures}
            if case is model.cases[-1]:
                pairs[PEAK] = (our_peak, their_peak)
            return pairs, max(our_share, their_share)
        by_key(least_disturbed(attempt, runs), results)
    return results


def measure_mlx_lm(torpor, model, runs):
    script = Path(__file__).with_name("mlx_lm_bench.py")

    def attempt():
        ours, our_peak, our_share = run_torpor(torpor, model, ["--prefill", MLX_LM_PREFILL, "--depth", 0, "--decode", MLX_LM_DECODE])
        theirs, _, their_share = run([sys.executable, script, model.directory, MLX_LM_PREFILL, MLX_LM_DECODE])
        return {"prefill": (ours["prefill", MLX_LM_PREFILL], theirs["prefill"]), "decode": (ours["decode", 0], theirs["decode"]),
                "peak": (our_peak, theirs["peak_bytes"])}, max(our_share, their_share)

    return by_key(least_disturbed(attempt, runs))


def report(model, results):
    """A Markdown table, and the rows that are plotted."""
    print(f"\n{os.cpu_count()} cores, {cpu_name()}; {model.title}, {model.weights}, KV f16; medians of alternating runs\n")
    bars = []
    if results:
        print("| | Torpor | llama.cpp | ratio | lowest, highest | runs | others at most | target |\n|---|---:|---:|---:|---:|---:|---:|---:|")
    for measure in (measure for case in model.cases for measure in case.measures if measure.key in results):
        ours, theirs, ratio, low, high = summary(results[measure.key])
        bars.append((measure.label, ratio, low, high, measure.target))
        print(f"| {measure.label} | {ours:.1f} tok/s | {theirs:.1f} tok/s | {ratio:.2f} | {low:.2f}, {high:.2f} "
              f"| {len(results[measure.key])} | {max(share for *_, share in results[measure.key]):.0%} | {measure.target} |")
    if PEAK in results:
        ours, theirs, ratio, low, high = summary(results[PEAK])
        print(f"| peak memory, {model.cases[-1].measures[-1].label} | {ours / 1e6:.0f} MB | {theirs / 1e6:.0f} MB | {ratio:.2f} | {low:.2f}, {high:.2f} "
              f"| {len(results[PEAK])} | | |")
    return bars


def report_mlx_lm(mlx_lm):
    print(f"\n{len(mlx_lm['prefill'])} alternating runs; mlx-lm in f32, on its CPU backend\n")
    print("| | Torpor | mlx-lm | ratio | lowest, highest |\n|---|---:|---:|---:|---:|")
    for key, label in (("prefill", f"prefill {MLX_LM_PREFILL}"), ("decode", f"decode {MLX_LM_DECODE} after it")):
        ours, theirs, ratio, low, high = summary(mlx_lm[key])
        print(f"| {label} | {ours:.1f} tok/s | {theirs:.2f} tok/s | {ratio:.0f} | {low:.0f}, {high:.0f} |")
    ours, theirs, ratio, low, high = summary(mlx_lm["peak"])
    print(f"| peak memory | {ours / 1e6:.0f} MB | {theirs / 1e6:.0f} MB | {ratio:.2f} | {low:.2f}, {high:.2f} |")


def output(model, kind):
    return OUT / (f"compare.{kind}" if model is next(iter(MODELS.values())) else f"compare-{model.name}.{kind}")


def save(model, results, mlx_lm):
    output(model, "json").write_text(json.dumps({
        "machine": f"{os.cpu_count()} cores, {cpu_name()}", "pairs": "torpor, peer, share of the cores that others used",
        "llama_cpp": {" ".join(map(str, key)): pairs for key, pairs in results.items()}, "mlx_lm": mlx_lm}, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default=next(iter(MODELS)))
    parser.add_argument("--torpor", type=Path, default=ROOT / "build" / "torpor")
    parser.add_argument("--runs", type=int, default=5, help="pairs with llama.cpp")
    parser.add_argument("--mlx-lm-runs", type=int, default=5, help="pairs with mlx-lm; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="llama.cpp's threads")
    arguments = parser.parse_args()
    model = MODELS[arguments.model]
    for needed in (arguments.torpor, LLAMA_BENCH, model.directory, model.gguf):
        if not needed.exists():
            sys.exit(f"{needed} is not there; run `make build` and `bench/peers/prepare {model.name}`")

    results = measure_llama_cpp(arguments.torpor.resolve(), model, arguments.runs, arguments.threads)
    save(model, results, {})
    bars = report(model, results)
    if bars:
        plot(bars, output(model, "png"), f"{model.title}, KV f16; {os.cpu_count()} cores, {cpu_name()}",
             "speed relative to llama.cpp (tokens/s over tokens/s)")
        print(f"\nPlot: {output(model, 'png').relative_to(ROOT)}", flush=True)
    if arguments.mlx_lm_runs:
        mlx_lm = measure_mlx_lm(arguments.torpor.resolve(), model, arguments.mlx_lm_runs)
        save(model, results, mlx_lm)
        if mlx_lm:
            report_mlx_lm(mlx_lm)


if __name__ == "__main__":
    main()
