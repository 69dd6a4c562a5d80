"""Torpor beside llama.cpp at its best, and mlx-lm: the same models, the same machine, alternating runs.

    bench/peers/prepare [MODEL...]
    .venv/bin/python bench/peers/compare.py [--model MODEL]... [--quick] [--gguf] [--weights TYPE]... [--runs 5]

A round runs each case once with Torpor, then once with every setting of llama.cpp: weights in Q4_0, Q4_K_M and Q8_0 (and as the
GGUF came), with flash attention off and on, its repacking on. So whatever else the machine does meets all of them. A round that
others disturbed by more than a tenth is tried again, up to twice --runs (bench/peers/pairs.py).

Per figure the table has the medians of Torpor and of llama.cpp's best setting whose weights take no more bits each than Torpor's, the
ratio of the medians, the lowest and highest ratio of one round, and beside them the best of all settings, whatever its bits.
The smallest ratio comes first. --quick leaves out Q8_0 and the longest prompts and depths, and takes three rounds: under 30
minutes for the three small models on 2 cores.

--gguf gives both the same file: .models/MODEL.gguf, as it came. --weights leaves out llama.cpp's other types. With
Q4_0 alone a run takes a third of the time.

Each round goes to bench/out/compare-MODEL.json as soon as it is there. A run that was interrupted goes on where it stopped;
--fresh begins anew, as does another Torpor or another machine. The ratios are drawn to bench/out/compare-MODEL.png.
mlx-lm comes last, on a few tokens, because its speed on an x86 CPU allows no more; Torpor is measured on as few beside it.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import gguf

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "bench"))
from machine import cpu_name  # noqa: E402
from pairs import Others, by_key, least_disturbed, plot, summary  # noqa: E402

OUT = ROOT / "bench" / "out"
LLAMA = OUT / "llama-cpp" / "build" / "bin"
GGUF = OUT / "gguf"
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
    """What one round runs. `kv`: the cache's format on both sides, f16 or 8 bits."""
    name: str
    measures: list[Measure]
    torpor: list
    llama: list  # of llama-bench, or of llama-batched-bench where `batched`
    kv: str = "f16"
    batched: bool = False
    slow: bool = False  # left out by --quick


def prefill(tokens, target=None, slow=False):
    return Case(f"prefill {tokens:,}", [Measure(("prefill", tokens), f"prefill {tokens:,}", target)],
                ["--prefill", tokens, "--depth", 0, "--decode", 0], ["-p", tokens, "-n", 0], slow=slow)


def decode(depth, target=None, kv="f16", temperature=0, slow=False):
    """llama-bench goes on with random tokens and never samples."""
    name = f"decode {DECODE} at depth {depth:,}" + (", KV of 8 bits" if kv != "f16" else "")
    name += f", temperature {temperature}" if temperature else ""
    return Case(name, [Measure(("decode", depth), name, target)],
                ["--prefill", 1, "--depth", depth, "--decode", DECODE, "--temperature", temperature],
                ["-p", 0, "-n", DECODE, "-d", depth], kv=kv, slow=slow)


def agents(counts, depth, targets, shared=False):
    """Sequences that decode at once, all with the same `depth` tokens; llama.cpp's common prompt is one too where `shared`."""
    what = f"with {depth:,} tokens in common" if shared else f"at depth {depth:,}"
    return Case(f"several {what}", [Measure(("agents", n), f"{n} decode at once {what}", targets.get(n)) for n in counts],
                ["--prefill", 1, "--depth", depth, "--decode", DECODE, "--agents", ",".join(map(str, counts))],
                ["-npp", depth, "-ntg", DECODE, "-npl", ",".join(map(str, counts)), *(["-pps"] if shared else [])], batched=True)


@dataclass
class Model:
    """`directory` is Torpor's in .models; .models/`name`.gguf is what llama.cpp's files are made from."""
    name: str
    title: str
    directory: str
    cases: list[Case]
    on_gguf: bool = False  # Torpor too runs .models/`name`.gguf

    @property
    def path(self):
        return self.gguf if self.on_gguf else ROOT / ".models" / self.directory

    @property
    def gguf(self):
        return ROOT / ".models" / f"{self.name}.gguf"

    @property
    def weights(self):
        """Their file."""
        return self.gguf if self.on_gguf else self.path / "model.safetensors"

    def of_gguf(self):
        """The same on its GGUF file."""
        cases = [prefill(512, 1.5), decode(0, 1.3), decode(4096, slow=True)]
        return replace(self, title=f"{self.title}'s GGUF file", cases=cases, on_gguf=True)

    @property
    def results(self):
        """Name of what is kept of its runs."""
        return f"compare-{self.name}" + ("-gguf" if self.on_gguf else "")


MODELS = {model.name: model for model in [
    Model("smollm2-135m", "SmolLM2-135M", "smollm2-135m", [
        prefill(512, 1.6), prefill(2048, 1.6), prefill(8192, slow=True), decode(0, 1.4), decode(0, temperature=0.7), decode(4096, 2.7), decode(4096, 3.0, "q8"),
        agents((1, 2, 4, 8), 128, {}), agents((8,), 4096, {8: 2.0}, shared=True)]),
    Model("qwen2.5-coder-0.5b", "Qwen2.5-Coder-0.5B", "qwen2.5-coder-0.5b-4bit", [
        prefill(512, 1.7), prefill(2048, slow=True), prefill(8192, slow=True), decode(0, 1.25), decode(0, temperature=0.7), decode(4096), decode(16384, slow=True)]),
    Model("gemma3-270m", "Gemma 3 270M", "gemma3-270m-4bit", [
        prefill(512, 1.6), prefill(2048, slow=True), decode(0, 1.3), decode(0, temperature=0.7), decode(4096)]),
    Model("qwen2.5-coder-1.5b", "Qwen2.5-Coder-1.5B", "qwen2.5-coder-1.5b-4bit", [
        prefill(512, 1.7), prefill(2048, slow=True), decode(0, 1.25), decode(0, temperature=0.7), decode(4096, slow=True)]),
]}
QUICK_MODELS = list(MODELS)[:3]
AS_IT_CAME = "as it came"
TYPES = (AS_IT_CAME, "Q4_0", "Q4_K_M", "Q8_0")


@dataclass(frozen=True)
class Setting:
    """llama.cpp's: weights of a type, flash attention on or off. The name of Torpor's own is "torpor"."""
    weights: str
    path: Path
    flash: bool

    @property
    def name(self):
        return f"{self.weights} -fa {int(self.flash)}"



@functools.cache
def bits_each(path):
    """How many bits a weight takes, scales included: of a GGUF, or of MLX's safetensors."""
    if path.suffix == ".gguf":
        tensors = gguf.GGUFReader(path).tensors
        return 8 * sum(int(tensor.n_bytes) for tensor in tensors) / sum(int(tensor.n_elements) for tensor in tensors)
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    quantization = json.loads((path.parent / "config.json").read_text())["quantization"]
    weights = 0
    for name, tensor in header.items():
        module, _, kind = name.rpartition(".")
        if kind == "scales":  # one of each group
            weights += math.prod(tensor["shape"]) * quantization.get(module, quantization)["group_size"]
        elif kind != "biases" and f"{module}.scales" not in header:
            weights += math.prod(tensor["shape"])
    return 8 * sum(end - begin for begin, end in (tensor["data_offsets"] for tensor in header.values())) / weights


def settings(model, types):
    if model.on_gguf:
        return [Setting(AS_IT_CAME, model.gguf, flash) for flash in (False, True)]
    files = {kind: model.gguf if kind == AS_IT_CAME else GGUF / f"{model.name}-{kind}.gguf" for kind in types}
    return [Setting(kind, path, flash) for kind, path in files.items() for flash in (False, True)]


def run(command):
    """Standard output, the process's largest resident set in bytes, and the share of all cores that others used."""
    with tempfile.TemporaryFile() as errors:
        others = Others()
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=errors)
        try:
            out = process.stdout.read().decode()
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
    return out, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), share


def run_torpor(torpor, model, case_arguments, kv="f16"):
    """{key: tokens/s}, peak memory and others' share."""
    cache = ["--kv-dtype", "f16"] if kv == "f16" else ["--kv-bits", 8]
    out, peak, share = run([torpor, "bench", "--model", model.path, *cache, "--durability", "none", "--runs", 1, "--json", *case_arguments])
    report = json.loads(out)
    found = {("prefill", row["tokens"]): row["tokens_per_s"] for row in report["prefill"]}
    found |= {("decode", row["depth"]): row["tokens_per_s"] for row in report["decode"] if row["agents"] == 1}
    found |= {("agents", row["agents"]): row["tokens_per_s"] for row in report["decode"]}
    return found, peak, share


def run_llama_cpp(setting, threads, case):
    """The same of llama.cpp; nothing where it does not serve the case, as a quantized V cache without flash attention."""
    cache = [] if case.kv == "f16" else ["-ctk", "q8_0", "-ctv", "q8_0"]
    flash = "on" if setting.flash else "off"
    common = ["-m", setting.path, "-t", threads, "-ngl", 0, "-fa", flash, *cache, *case.llama]
    if cache and not setting.flash:
        return {}, 0, 0.0
    if case.batched:
        tokens = sum(int(word) for word in case.llama[1:4:2])  # of one sequence
        longest = max(map(int, case.llama[5].split(",")))
        out, peak, share = run([LLAMA / "llama-batched-bench", "-c", longest * tokens, "--output-format", "jsonl", *common])
        rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        return {("agents", row["pl"]): row["speed_tg"] for row in rows}, peak, share
    out, peak, share = run([LLAMA / "llama-bench", "-r", 1, "-o", "json", *common])
    found = {("decode", row["n_depth"]) if row["n_gen"] else ("prefill", row["n_prompt"]): row["avg_ts"] for row in json.loads(out)}
    return found, peak, share


class Rounds:
    """What has been measured of a model: per case a list of rounds, each {"share", "tok_s": {who: {key: tokens/s}}, "peak"}."""

    def __init__(self, model, torpor, threads, fresh):
        self.path = OUT / f"{model.results}.json"
        self.of = {"machine": f"{os.cpu_count()} cores, {cpu_name()}", "threads": threads,
                   "torpor": hashlib.sha256(torpor.read_bytes()).hexdigest(), "weights": model.weights.stat().st_size}
        self.cases = {}
        if not fresh and self.path.exists():
            found = json.loads(self.path.read_text())
            if found.get("of") == self.of:
                self.cases = found["cases"]

    def add(self, case, measured):
        self.cases.setdefault(case.name, []).append(measured)
        OUT.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"of": self.of, "cases": self.cases}, indent=1))

    def best(self, case, runs):
        """The least disturbed ones."""
        return sorted(self.cases.get(case.name, []), key=lambda one: one["share"])[:runs]


def text_key(key):
    return " ".join(map(str, key))


def measure(model, case, torpor, threads, rounds, runs, types):
    """Runs rounds of one case until enough of them were quiet."""
    def enough():
        done = rounds.cases.get(case.name, [])
        return len(done) >= 2 * runs or sum(one["share"] <= 0.1 for one in done) >= runs

    while not enough():
        ours, peak, share = run_torpor(torpor, model, case.torpor, case.kv)
        everyone, shares = {"torpor": ours}, [share]
        peaks = {"torpor": peak}
        for setting in settings(model, types):
            found, peak, share = run_llama_cpp(setting, threads, case)
            if found:
                everyone[setting.name], peaks[setting.name] = found, peak
                shares.append(share)
        tok_s = {who: {text_key(m.key): found[m.key] for m in case.measures} for who, found in everyone.items()}
        rounds.add(case, {"share": max(shares), "tok_s": tok_s, "peak": peaks})
        first = text_key(case.measures[0].key)
        print(f"{case.name}: " + ", ".join(f"{who} {found[first]:.4g}" for who, found in tok_s.items()) + f"; others {max(shares):.0%}",
              file=sys.stderr, flush=True)


@dataclass
class Row:
    label: str
    ours: float
    theirs: float
    setting: str
    low: float
    high: float
    runs: int
    share: float
    target: float | None
    any_theirs: float  # the best of all settings, whatever its bits
    any_setting: str

    @property
    def ratio(self):
        return self.ours / self.theirs


def rows(model, cases, rounds, runs, types):
    """Smallest ratio first."""
    found = []
    for case in cases:
        best = rounds.best(case, runs)
        for m in case.measures if best else []:
            key = text_key(m.key)
            ours = [one["tok_s"]["torpor"][key] for one in best]
            medians = {s: statistics.median(one["tok_s"][s.name][key] for one in best)
                       for s in settings(model, types) if all(s.name in one["tok_s"] for one in best)}
            light = {s: median for s, median in medians.items() if bits_each(s.path) <= 1.005 * bits_each(model.weights)} or medians
            setting, anybody = max(light, key=light.get), max(medians, key=medians.get)
            ratios = [a / one["tok_s"][setting.name][key] for a, one in zip(ours, best)]
            found.append(Row(m.label, statistics.median(ours), light[setting], setting.name, min(ratios), max(ratios), len(best),
                             max(one["share"] for one in best), m.target, medians[anybody], anybody.name))
    return sorted(found, key=lambda row: row.ratio)


def report(model, found, types):
    """A Markdown table."""
    def size(path):
        return f"{path.stat().st_size / 1e6:.0f} MB, {bits_each(path):.2f} bits a weight"

    files = {s.weights: s.path for s in settings(model, types)}
    print(f"\n{os.cpu_count()} cores, {cpu_name()}; {model.title}: Torpor {size(model.weights)}; llama.cpp "
          + ", ".join(f"{kind} {size(path)}" for kind, path in files.items()) + "; KV f16 where nothing else is said; medians\n")
    print("| | Torpor | llama.cpp, no more bits | ratio | lowest, highest | target | llama.cpp, any | rounds | others at most |")
    print("|---|---:|---|---:|---:|---:|---|---:|---:|")
    for row in found:
        print(f"| {row.label} | {row.ours:.1f} tok/s | {row.theirs:.1f} tok/s ({row.setting}) | {row.ratio:.2f} | {row.low:.2f}, {row.high:.2f} "
              f"| {row.target or ''} | {row.any_theirs:.1f} tok/s ({row.any_setting}) | {row.runs} | {row.share:.0%} |")


def measure_mlx_lm(torpor, model, runs):
    script = Path(__file__).with_name("mlx_lm_bench.py")

    def attempt():
        ours, our_peak, our_share = run_torpor(torpor, model, ["--prefill", MLX_LM_PREFILL, "--depth", 0, "--decode", MLX_LM_DECODE])
        out, _, their_share = run([sys.executable, script, model.path, MLX_LM_PREFILL, MLX_LM_DECODE])
        theirs = json.loads(out)
        return {"prefill": (ours["prefill", MLX_LM_PREFILL], theirs["prefill"]), "decode": (ours["decode", 0], theirs["decode"]),
                "peak": (our_peak, theirs["peak_bytes"])}, max(our_share, their_share)

    return by_key(least_disturbed(attempt, runs))


def report_mlx_lm(mlx_lm):
    print(f"\n{len(mlx_lm['prefill'])} alternating runs; mlx-lm in f32, on its CPU backend\n")
    print("| | Torpor | mlx-lm | ratio | lowest, highest |\n|---|---:|---:|---:|---:|")
    for key, label in (("prefill", f"prefill {MLX_LM_PREFILL}"), ("decode", f"decode {MLX_LM_DECODE} after it")):
        ours, theirs, ratio, low, high = summary(mlx_lm[key])
        print(f"| {label} | {ours:.1f} tok/s | {theirs:.2f} tok/s | {ratio:.0f} | {low:.0f}, {high:.0f} |")
    ours, theirs, ratio, low, high = summary(mlx_lm["peak"])
    print(f"| peak memory | {ours / 1e6:.0f} MB | {theirs / 1e6:.0f} MB | {ratio:.2f} | {low:.2f}, {high:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, action="append", help="may be given several times; all without it")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--gguf", action="store_true", help="both on the very GGUF file, as it came")
    parser.add_argument("--fresh", action="store_true", help="forget what an interrupted run measured")
    parser.add_argument("--torpor", type=Path, default=ROOT / "build" / "torpor")
    parser.add_argument("--runs", type=int, help="rounds; 5, or 3 with --quick")
    parser.add_argument("--case", action="append", help="only cases whose name has this in it")
    parser.add_argument("--mlx-lm-runs", type=int, default=3, help="pairs with mlx-lm on SmolLM2; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="llama.cpp's threads")
    parser.add_argument("--weights", choices=TYPES, action="append",
                        help="llama.cpp's; may be given several times; all without it")
    arguments = parser.parse_args()
    types = arguments.weights or [kind for kind in TYPES if not (arguments.quick and kind == "Q8_0")]
    torpor, runs = arguments.torpor.resolve(), arguments.runs or (3 if arguments.quick else 5)
    models = [MODELS[name] for name in arguments.model or (QUICK_MODELS if arguments.quick else MODELS)]
    if arguments.gguf:
        models = [model.of_gguf() for model in models]
    for model in models:
        for needed in (torpor, LLAMA / "llama-batched-bench", model.path, *(s.path for s in settings(model, types))):
            if not needed.exists():
                sys.exit(f"{needed} is not there; run `make build` and `bench/peers/prepare {model.name}`")

    for model in models:
        cases = [case for case in model.cases if not (arguments.quick and case.slow)
                 and (not arguments.case or any(part in case.name for part in arguments.case))]
        rounds = Rounds(model, torpor, arguments.threads, arguments.fresh)
        try:
            for case in cases:
                measure(model, case, torpor, arguments.threads, rounds, runs, types)
        except KeyboardInterrupt:
            print("interrupted: the rounds so far", file=sys.stderr)
        found = rows(model, cases, rounds, runs, types)
        if found:
            report(model, found, types)
            png = OUT / f"{model.results}.png"
            plot([(row.label, row.ratio, row.low, row.high, row.target or 1) for row in found], png,
                 f"{model.title}; {os.cpu_count()} cores, {cpu_name()}", "speed relative to llama.cpp's best of no more bits (tokens/s)")
            print(f"\nPlot: {png.relative_to(ROOT)}", flush=True)
    if not arguments.gguf and arguments.mlx_lm_runs and MODELS["smollm2-135m"] in models:
        mlx_lm = measure_mlx_lm(torpor, MODELS["smollm2-135m"], arguments.mlx_lm_runs)
        if mlx_lm:
            report_mlx_lm(mlx_lm)


if __name__ == "__main__":
    main()
