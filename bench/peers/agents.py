"""Agents that sleep and wake, beside llama-server's slots: the same model, contexts and machine, alternating runs.

    bench/peers/prepare
    .venv/bin/python bench/peers/agents.py [--build build] [--runs 5]

Per context: the first save (Torpor at --durability rename; llama-server's slot save flushes nothing either), the save of a turn
of 64 tokens on top of it (llama-server writes the slot whole), waking and restoring. Torpor's rows are random bytes of the
model's shape in a process of their own (bench/agents_bench.cc), and every checksum is checked; llama-server's times are those
that it reports itself. Then the time to the first token of a sleeping agent with 4,096 tokens and 8 new ones: `torpor run`'s
own figure, from waking to the token, against restore and completion as a client sees them. Printed are medians, and lowest and
highest ratio of a pair. Numbers go to bench/out/agents.json, the ratios as a plot to bench/out/agents.png.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from compare import GGUF, MODEL, OUT, ROOT, cpu_name

LLAMA_SERVER = OUT / "llama-cpp" / "build" / "bin" / "llama-server"
CONTEXTS = (1024, 4096, 8000)
TURN = 64


class LlamaServer:
    def __init__(self, directory, threads):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = open(directory / "llama-server.log", "w+")
        self.process = subprocess.Popen(
            [LLAMA_SERVER, "-m", GGUF, "-c", "8192", "-np", "1", "-t", str(threads), "--host", "127.0.0.1", "--port", str(self.port),
             "--slot-save-path", str(directory) + "/", "--no-webui"], stdout=self.log, stderr=subprocess.STDOUT)
        for _ in range(600):
            try:
                if self.get("/health")["status"] == "ok":
                    return
            except OSError:
                time.sleep(0.1)
        sys.exit(f"llama-server did not start: {self.log.name}")

    def get(self, path):
        return json.load(urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}"))

    def post(self, path, body):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request))

    def read(self, tokens):
        """The slot then holds these tokens; what it held already is not computed again."""
        return self.post("/completion", {"prompt": tokens, "n_predict": 1, "cache_prompt": True, "temperature": 0})

    def slot(self, action, name):
        return self.post(f"/slots/0?action={action}", {"filename": name})

    def stop(self):
        self.process.terminate()
        self.process.wait()


def torpor_bench(build, *arguments):
    return json.loads(subprocess.run([build / "bench" / "agents_bench", *map(str, arguments)], check=True, capture_output=True).stdout)


def measure_context(build, server, directory, tokens, n, runs):
    """Pairs of (torpor, llama.cpp) by measure, and Torpor's own figures."""
    server.read(tokens[:n])
    pairs = {"first save": [], f"save of {TURN} more": [], "wake": []}
    own = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory(dir=directory) as store:
            saved = torpor_bench(build, "save", store, n, "rename")
            their_save = server.slot("save", "slot.bin")["timings"]["save_ms"]
            pairs["first save"].append((saved["save_ms"], their_save))
            # Whatever was added, llama-server writes the slot whole.
            their_turn = server.slot("save", "slot.bin")["timings"]["save_ms"]
            pairs[f"save of {TURN} more"].append((saved["turn_ms"], their_turn))
            woken = torpor_bench(build, "wake", store)
            server.slot("erase", "slot.bin")
            their_restore = server.slot("restore", "slot.bin")["timings"]["restore_ms"]
            pairs["wake"].append((woken["wake_ms"], their_restore))
            own.append((saved, woken))
    return pairs, own


def measure_first_token(build, server, directory, tokens, runs):
    """Pairs of milliseconds from asleep to the first token: 4,096 tokens held, 8 new ones."""
    n, store = 4096, directory / "ttft-store"
    torpor = [build / "torpor", "run", "--model", MODEL, "--store", store, "--agent", "a", "--raw", "--json", "--kv-dtype", "f16"]
    text = " ".join((ROOT / "examples" / "lighthouse-log.txt").read_text().split())
    def run(prompt, *more):
        return json.loads(subprocess.run([*torpor, "--prompt-file", "-", *more], input=prompt.encode(), check=True,
                                         capture_output=True).stdout)
    held = run((text + " ") * 3, "--max-tokens", "1")["tokens"]["context"]
    if held < n:
        sys.exit(f"the text has {held} tokens, fewer than {n}")
    subprocess.run([build / "torpor", "rewind", "a", str(n), "--store", store], check=True)
    server.read(tokens[:n])
    server.slot("save", "ttft.bin")
    pairs = []
    for _ in range(runs):
        turn = run(" and then they went out to", "--max-tokens", "1", "--no-save")
        if turn["tokens"]["cached"] != n:
            sys.exit(f"expected {n} tokens to be reused: {turn['tokens']}")
        server.slot("erase", "ttft.bin")
        start = time.monotonic()
        server.slot("restore", "ttft.bin")
        server.read(tokens[:n] + tokens[-turn["tokens"]["prefilled"]:])
        pairs.append((turn["timing_ms"]["ttft"], (time.monotonic() - start) * 1000))
    return pairs, turn["tokens"]["prefilled"]


def row(label, pairs, more=""):
    ours, theirs = (statistics.median(side) for side in zip(*pairs))
    ratios = [b / a for a, b in pairs]
    print(f"| {label} | {ours:.2f} ms | {theirs:.2f} ms | {theirs / ours:.1f} | {min(ratios):.1f}, {max(ratios):.1f} | {more} |", flush=True)
    return label, theirs / ours, min(ratios), max(ratios)


def plot(bars, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(bars) + 1.2), layout="constrained")
    for i, (label, ratio, low, high) in enumerate(bars):
        axes.barh(i, ratio, color="#3b6ea8", height=0.6)
        axes.plot([low, high], [i, i], color="black", lw=1.2)
        axes.text(max(ratio, high) * 1.05, i, f"{ratio:.1f}x", va="center")
    axes.axvline(1, color="gray", lw=0.8, ls=":")
    axes.set_xscale("log")
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars])
    axes.invert_yaxis()
    axes.set_xlabel("llama-server's time over Torpor's")
    axes.set_title(f"SmolLM2-135M, KV f16; {os.cpu_count()} cores, {cpu_name()}", fontsize=10)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    build = arguments.build.resolve()
    for needed in (build / "torpor", build / "bench" / "agents_bench", LLAMA_SERVER, GGUF):
        if not needed.exists():
            sys.exit(f"{needed} is not there; run `make build` and bench/peers/prepare")
    tokens = [random.Random(1).randrange(1000, 40000) for _ in range(CONTEXTS[-1] + 64)]
    random.Random(1).shuffle(tokens)

    results, bars = {}, []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        server = LlamaServer(directory, os.cpu_count())
        try:
            print(f"\n{os.cpu_count()} cores, {cpu_name()}; SmolLM2-135M, KV f16; medians of {arguments.runs} alternating runs\n")
            print("| | Torpor | llama-server | ratio | lowest, highest | |\n|---|---:|---:|---:|---:|---|")
            for n in CONTEXTS:
                pairs, own = measure_context(build, server, directory, tokens, n, arguments.runs)
                results[n] = {"pairs": pairs, "torpor": own}
                middle = lambda f: statistics.median(f(saved, woken) for saved, woken in own)
                remarks = {
                    "first save": f"{own[0][0]['bytes'] / 1e6:.1f} MB",
                    f"save of {TURN} more": f"{middle(lambda s, w: s['turn_bytes'] / s['bytes']):.1%} of the agent's bytes",
                    "wake": f"{middle(lambda s, w: w['memcpy_ms'] / w['wake_ms']):.0%} of a parallel memcpy's rate; peak memory "
                            f"{middle(lambda s, w: w['peak_bytes'] / w['kv_bytes']):.2f}x the cache's",
                }
                for measure, values in pairs.items():
                    bars.append(row(f"{measure}, {n:,}", values, remarks[measure]))
                print(f"| fork, {n:,} | {middle(lambda s, w: s['fork_ms']):.2f} ms | | | | asleep; {own[0][0]['fork_bytes']:,} bytes, no tensor; "
                      f"awake {middle(lambda s, w: s['fork_awake_ms']) * 1000:.0f} us |")
            pairs, new = measure_first_token(build, server, directory, tokens, arguments.runs)
            results["first token"] = pairs
            bars.append(row("asleep to first token, 4,096", pairs, f"{new} new tokens"))
            with tempfile.TemporaryDirectory(dir=directory) as store:
                talk = torpor_bench(build, "conversation", store, 8192)
            print(f"\n50 turns to {talk['tokens']:,} tokens, each saved: {talk['written'] / talk['bytes']:.2f} times the agent's final bytes written")
        finally:
            server.stop()
    OUT.joinpath("agents.json").write_text(json.dumps(results, indent=1))
    plot(bars, OUT / "agents.png")
    print(f"\nPlot: {(OUT / 'agents.png').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
