"""An old and a new build of Torpor on the figures of docs/benchmarks.md, in alternating pairs.

    .venv/bin/python bench/old_vs_new.py OLD NEW [--pairs 21] [--quick] [--json FILE]

OLD and NEW are build directories with `torpor` and `bench/agents_bench`. Each command of a pair is run by both, one
right after the other, and the one that goes first changes from pair to pair. A pair that others disturbed by more
than a tenth is tried again, up to twice --pairs (bench/peers/pairs.py). The ratio says how many times better the new
build is: tokens/s over tokens/s, or the old's milliseconds over the new's. Its 95% interval is a bootstrap of the
median of the paired ratios. The exit code is 1 when a median ratio is below 0.97 and its interval excludes 1.
--quick: 5 pairs, without 8,000 tokens and shorter decoding.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench" / "peers"))
from machine import cpu_name  # noqa: E402
from pairs import Others, by_key, least_disturbed  # noqa: E402

FLOOR = 0.97
HELD = 4096
NEW_TEXT = " and then they went out to"  # with the token that begins a text, 8 tokens


def said(*command, text=None):
    ended = subprocess.run([*map(str, command)], input=text, stdout=subprocess.PIPE, text=True)
    if ended.returncode != 0:
        sys.exit(f"{command[0]} {command[1]} ended with {ended.returncode}")
    return json.loads(ended.stdout)


class Build:
    """What one build measures; each gives {figure: number}, larger is better for those that end in tok/s."""

    def __init__(self, directory, model, store):
        self.torpor, self.agents_bench = directory / "torpor", directory / "bench" / "agents_bench"
        for needed in (self.torpor, self.agents_bench):
            if not needed.exists():
                sys.exit(f"{needed} is not there; build the targets torpor_cli and agents_bench")
        self.model, self.store = model, store

    def run(self, text, *more):
        return said(self.torpor, "run", "--model", self.model, "--store", self.store, "--agent", "a", "--raw", "--json",
                    "--kv-dtype", "f16", "--max-tokens", 1, "--prompt-file", "-", *more, text=text)

    def prepare(self):
        """An asleep agent of HELD tokens."""
        text = " ".join((ROOT / "examples" / "lighthouse-log.txt").read_text().split())
        if self.run((text + " ") * 3)["tokens"]["context"] < HELD:
            sys.exit(f"the text has fewer than {HELD} tokens")
        subprocess.run([self.torpor, "rewind", "a", str(HELD), "--store", self.store], check=True,
                       stdout=subprocess.DEVNULL)

    def compute(self, decode):
        report = said(self.torpor, "bench", "--json", "--model", self.model, "--kv-dtype", "f16", "--prefill", 512,
                      "--decode", decode, "--depth", f"0,{HELD}", "--runs", 1)
        return {f"prefill {one['tokens']:,} tok/s": one["tokens_per_s"] for one in report["prefill"]} | {
            f"decode at depth {one['depth']:,} tok/s": one["tokens_per_s"] for one in report["decode"]}

    def agent(self, tokens, durability):
        with tempfile.TemporaryDirectory(dir=self.store.parent) as store:
            saved = said(self.agents_bench, "save", store, tokens, durability)
            figures = {f"first save, {tokens:,}, {durability} ms": saved["save_ms"],
                       f"save of 64 more, {tokens:,}, {durability} ms": saved["turn_ms"]}
            if durability == "rename":
                figures[f"wake, {tokens:,} ms"] = said(self.agents_bench, "wake", store)["wake_ms"]
            return figures

    def first_token(self):
        turn = self.run(NEW_TEXT, "--no-save")
        if turn["tokens"]["cached"] != HELD:
            sys.exit(f"expected {HELD} tokens to be reused: {turn['tokens']}")
        return {f"asleep to first token, {HELD:,} ms": turn["timing_ms"]["ttft"]}


def interval(ratios, samples=10000):
    """The bootstrap's 95% interval of the median."""
    draw = random.Random(1)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(samples))
    return medians[int(samples * 0.025)], medians[int(samples * 0.975) - 1]


def cpu_seconds():
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


def compare(old, new, pairs, contexts, decode):
    works = [lambda build: build.compute(decode), lambda build: build.first_token()]
    works += [lambda build, n=n, d=d: build.agent(n, d) for n in contexts for d in ("rename", "full")]
    turn = 0

    def attempt():
        nonlocal turn
        turn += 1
        others, before = Others(), cpu_seconds()
        figures = {}
        for work in works:
            one = {build: work(build) for build in ((old, new) if turn % 2 else (new, old))}
            figures |= {key: (value, one[new][key]) for key, value in one[old].items()}
        return figures, others.share(cpu_seconds() - before)

    return by_key(least_disturbed(attempt, pairs))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--model", type=Path, default=ROOT / ".models" / "smollm2-135m")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="where all pairs are written to")
    arguments = parser.parse_args()
    pairs = arguments.pairs or (5 if arguments.quick else 21)
    slower = []
    with tempfile.TemporaryDirectory(prefix="torpor-old-new-") as directory:
        builds = [Build(path.resolve(), arguments.model.resolve(), Path(directory) / name / "store")
                  for name, path in (("old", arguments.old), ("new", arguments.new))]
        for build in builds:
            build.store.parent.mkdir()
            build.prepare()
        contexts, decode = ((1024, HELD), 32) if arguments.quick else ((1024, HELD, 8000), 64)
        results = compare(*builds, pairs, contexts, decode)
    print(f"\n{os.cpu_count()} cores, {cpu_name()}; {arguments.model.name}, KV f16; alternating pairs\n")
    print("| | old | new | new is better by | 95% interval | pairs | others at most | |")
    print("|---|---:|---:|---:|---:|---:|---:|---|")
    for key, values in results.items():
        ratios = [new / old if key.endswith("tok/s") else old / new for old, new, _ in values]
        ratio, (low, high) = statistics.median(ratios), interval(ratios)
        worse = ratio < FLOOR and high < 1
        slower += [key] * worse
        figure, unit = key.rsplit(" ", 1)
        old, new = (statistics.median(side) for side in list(zip(*values))[:2])
        print(f"| {figure} | {old:.4g} {unit} | {new:.4g} {unit} | {ratio:.3f} | {low:.3f}, {high:.3f} | {len(values)} "
              f"| {max(share for *_, share in values):.0%} | {'slower' if worse else ''} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
