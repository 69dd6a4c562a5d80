"""Agents that sleep and wake, beside llama-server's slots: the same model, contexts and machine, alternating runs.

    bench/peers/prepare
    .venv/bin/python bench/peers/agents.py [--build build] [--runs 5]

Per context: the first save (Torpor at --durability rename; llama-server's slot save flushes nothing either), the save of a turn
of 64 tokens on top of it (llama-server writes the slot whole), waking and restoring. Torpor's rows are random bytes of the
model's shape in a process of their own (bench/agents_bench.cc), and every checksum is checked; llama-server's times are those
that it reports itself. Then the time to the first token of a sleeping agent with 4,096 tokens and 8 new ones: `torpor run`'s
own figure, from waking to the token, against restore and completion as a client sees them; no process start in either.
A pair that others disturbed by more than a tenth is tried again, up to twice --runs (bench/peers/pairs.py). Numbers go to
bench/out/agents.json, the ratios as a plot to bench/out/agents.png.
"""

import argparse
import json
import os
import random
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from compare import MODELS, OUT, ROOT, cpu_name
from pairs import Others, by_key, least_disturbed, plot, summary

MODEL = MODELS["smollm2-135m"]
LLAMA_SERVER = OUT / "llama-cpp" / "build" / "bin" / "llama-server"
CONTEXTS = (1024, 4096, 8000)  # 8,000 and a turn fit the model's 8,192
TURN = 64
NEW = " and then they went out to"  # with the token that begins a text, 8 tokens
FIRST_SAVE, TURN_SAVE, WAKE, FIRST_TOKEN = "first save", f"save of {TURN} more", "wake", "asleep to first token"
TARGETS = {FIRST_SAVE: 2, TURN_SAVE: 10, WAKE: 2, FIRST_TOKEN: 2}  # llama-server's time over Torpor's


class LlamaServer:
    def __init__(self, directory, threads, gguf=MODEL.gguf, options=("-c", "8192", "-np", "1")):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.directory = directory
        self.log = open(directory / "llama-server.log", "w+")
        self.process = subprocess.Popen(
            [LLAMA_SERVER, "-m", gguf, *map(str, options), "-t", str(threads), "--host", "127.0.0.1", "--port", str(self.port),
             "--slot-save-path", str(directory) + "/", "--no-webui"], stdout=self.log, stderr=subprocess.STDOUT)
        for _ in range(600):
            try:
                if self.get("/health")["status"] == "ok":
                    return
            except OSError:
                time.sleep(0.1)
        self.stop()
        sys.exit(f"llama-server did not start:\n{Path(self.log.name).read_text()}")

    def get(self, path):
        return json.load(urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}"))

    def post(self, path, body):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request))

    def read(self, tokens):
        """The slot then holds these tokens; what it held already is not computed again."""
        return self.post("/completion", {"prompt": tokens, "n_predict": 1, "cache_prompt": True, "temperature": 0})

    def slot(self, action, name="slot.bin"):
        return self.post(f"/slots/0?action={action}", {"filename": name})

    def cpu_seconds(self):
        """Used since it started; 0 where that is not told."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self):
        self.process.terminate()
        self.process.wait()


class Watch:
    """The share of all cores that went to neither this process, its finished children, nor the servers."""

    def __init__(self, *servers):
        self.servers, self.others = servers, Others()
        self.before = self.own()

    def own(self):
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in usage) + sum(one.cpu_seconds() for one in self.servers)

    def share(self):
        return self.others.share(self.own() - self.before)


def torpor_bench(build, *arguments):
    return json.loads(subprocess.run([build / "bench" / "agents_bench", *map(str, arguments)], check=True, stdout=subprocess.PIPE).stdout)


def measure_context(build, server, directory, n, runs):
    """Pairs of milliseconds by measure, and what Torpor said in each attempt. The server's slot holds `n` tokens."""
    own = []

    def attempt():
        (directory / "slot.bin").unlink(missing_ok=True)
        watch = Watch(server)
        with tempfile.TemporaryDirectory(dir=directory) as store:
            saved = torpor_bench(build, "save", store, n, "rename")
            first = server.slot("save")["timings"]["save_ms"]
            whole = server.slot("save")["timings"]["save_ms"]  # whatever was added, it writes the slot whole
            woken = torpor_bench(build, "wake", store)
            server.slot("erase")
            restore = server.slot("restore")["timings"]["restore_ms"]
        own.append(saved | woken)
        return {FIRST_SAVE: (saved["save_ms"], first), TURN_SAVE: (saved["turn_ms"], whole),
                WAKE: (woken["wake_ms"], restore)}, watch.share()

    return by_key(least_disturbed(attempt, runs)), own


def measure_first_token(build, server, directory, tokens, runs):
    """Pairs of milliseconds from asleep to the first token: 4,096 tokens held, 8 new ones."""
    n = 4096
    torpor = [build / "torpor", "run", "--model", MODEL.path, "--store", directory / "first-token", "--agent", "a", "--raw", "--json",
              "--kv-dtype", "f16", "--max-tokens", "1", "--prompt-file", "-"]

    def run(prompt, *more):
        return json.loads(subprocess.run([*torpor, *more], input=prompt.encode(), check=True, stdout=subprocess.PIPE).stdout)

    text = " ".join((ROOT / "examples" / "lighthouse-log.txt").read_text().split())
    held = run((text + " ") * 3)["tokens"]["context"]
    if held < n:
        sys.exit(f"the text has {held} tokens, fewer than {n}")
    subprocess.run([build / "torpor", "rewind", "a", str(n), "--store", directory / "first-token"], check=True, stdout=subprocess.DEVNULL)
    server.read(tokens[:n])
    server.slot("save")

    def attempt():
        watch = Watch(server)
        turn = run(NEW, "--no-save")
        if turn["tokens"]["cached"] != n:
            sys.exit(f"expected {n} tokens to be reused: {turn['tokens']}")
        server.slot("erase")
        start = time.monotonic()
        server.slot("restore")
        server.read(tokens[:n] + tokens[-turn["tokens"]["prefilled"]:])
        elapsed = (time.monotonic() - start) * 1000
        return {FIRST_TOKEN: (turn["timing_ms"]["ttft"], elapsed)}, watch.share()

    return by_key(least_disturbed(attempt, runs))


def remark(measure, own):
    """What else is to be said of a measure: medians of what Torpor's side reported."""
    def median(value):
        return statistics.median(map(value, own))
    return {
        FIRST_SAVE: lambda: f"{own[0]['first_bytes'] / 1e6:.1f} MB",
        TURN_SAVE: lambda: f"{median(lambda one: one['turn_bytes'] / one['first_bytes']):.1%} of the agent's bytes (target: 4%)",
        WAKE: lambda: f"{median(lambda one: one['memcpy_ms'] / one['wake_ms']):.0%} of a parallel memcpy's rate (60%); "
                      f"peak memory {median(lambda one: one['peak_bytes'] / one['kv_bytes']):.2f}x the cache's (1.1)",
        FIRST_TOKEN: lambda: "4,096 tokens held, 8 new",
    }[measure]()


def row(measure, n, pairs, own):
    """Prints one row of the table; gives what is plotted."""
    ours, theirs, ratio, low, high = summary(pairs, less_is_better=True)
    label = f"{measure}, {n:,}"
    print(f"| {label} | {ours:.2f} ms | {theirs:.2f} ms | {ratio:.1f} | {low:.1f}, {high:.1f} | {len(pairs)} "
          f"| {max(share for *_, share in pairs):.0%} | {TARGETS[measure]} | {remark(measure, own)} |", flush=True)
    return label, ratio, low, high, TARGETS[measure]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="llama-server's threads")
    arguments = parser.parse_args()
    build = arguments.build.resolve()
    for needed in (build / "torpor", build / "bench" / "agents_bench", LLAMA_SERVER, MODEL.gguf):
        if not needed.exists():
            sys.exit(f"{needed} is not there; run `make build` and bench/peers/prepare")
    ids = random.Random(1)
    tokens = [ids.randrange(1000, 40000) for _ in range(CONTEXTS[-1] + TURN)]

    results, forks, bars = {}, [], []
    machine = f"{os.cpu_count()} cores, {cpu_name()}"
    print(f"\n{machine}; SmolLM2-135M, KV f16; medians of alternating runs\n")
    print("| | Torpor | llama-server | ratio | lowest, highest | runs | others at most | target | |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory(prefix="torpor-bench-") as name:
        directory = Path(name)
        server = LlamaServer(directory, arguments.threads)
        try:
            for n in CONTEXTS:
                server.read(tokens[:n])
                pairs, own = measure_context(build, server, directory, n, arguments.runs)
                results[n] = {"pairs": pairs, "torpor": own}
                bars += [row(measure, n, values, own) for measure, values in pairs.items()]
                fork, clone = (statistics.median(one[key] for one in own) for key in ("fork_ms", "fork_awake_ms"))
                forks.append(f"Fork of an agent of {n + TURN:,} tokens: asleep {fork:.2f} ms, a file of {own[0]['fork_bytes']:,} bytes, none "
                             f"of a tensor's rows; awake {clone * 1000:.0f} us.")
            pairs = measure_first_token(build, server, directory, tokens, arguments.runs)
            results[FIRST_TOKEN] = {"pairs": pairs}
            bars += [row(FIRST_TOKEN, 4096, values, []) for values in pairs.values()]
        finally:
            server.stop()
        with tempfile.TemporaryDirectory(dir=directory) as store:
            talk = torpor_bench(build, "conversation", store, 8192)
    results["conversation"] = talk
    print("\n" + "\n".join(forks))
    print(f"50 turns to {talk['tokens']:,} tokens, each saved: {talk['written'] / talk['bytes']:.2f} times the agent's final bytes written.")
    (OUT / "agents.json").write_text(json.dumps({"machine": machine, "pairs": "ms of torpor, ms of llama-server, share of the cores that others used",
                                                 **results}, indent=1))
    plot(bars, OUT / "agents.png", f"SmolLM2-135M, KV f16; {machine}", "llama-server's time over Torpor's", "llama-server", log=True)
    print(f"\nPlot: {(OUT / 'agents.png').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
