"""Torpor's server beside llama-server: the same model, prompts and machine, alternating runs.

    bench/peers/prepare
    .venv/bin/python bench/peers/serve.py [--model MODEL] [--torpor build/torpor] [--case CASE]... [--runs 5]

Both stream /v1/completions to clients in this process. llama-server has Q4_0 weights (its fastest type of no more bits), flash
attention, its prompt cache, and a slot for each agent (-np). The cases:

- decode: 1, 2, 4, 8 agents with a short prompt each; tokens of all answers per second, from the requests to the last token.
- arrival: a prompt of some 2,000 tokens while three other agents decode; the time to its first token, and the longest time that
  one of the three waited for its next token.
- herd: ten agents with a common beginning of some 4,000 tokens, all at once; until each has its first token.
- return: an agent of some 4,000 tokens after a restart of the server; until the first token of its next turn. llama-server
  computes it again; beside it the same with its slot saved before and restored by hand.

No prompt is asked twice, so that nothing is found in a cache but what the case is about. Medians of runs; a run that others disturbed
by more than a tenth is tried again, up to twice --runs (bench/peers/pairs.py). Numbers go to bench/out/serve-MODEL.json, the ratios as
a plot to bench/out/serve-MODEL.png.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from agents import LLAMA_SERVER, LlamaServer, Watch
from compare import GGUF, MODELS, OUT, ROOT, cpu_name
from pairs import by_key, least_disturbed, plot, summary

END = {"smollm2-135m": (0, 2), "qwen2.5-coder-0.5b": (151643, 151645)}  # tokens that end an answer; here none does
COUNTS = (1, 2, 4, 8)
ANSWER = 96
TEXT = " ".join((ROOT / "examples" / "lighthouse-log.txt").read_text().split())
CHARACTERS = 3.85  # of TEXT, a token
FRESH = itertools.count(int(time.time()) % 10**6 * 1000)


def words(n_tokens):
    """A text of about so many tokens that no prompt before has begun with."""
    text = TEXT * (1 + n_tokens * 5 // len(TEXT))
    return f"Log {next(FRESH)}: " + text[:int(n_tokens * CHARACTERS)]


@dataclass
class Stream(threading.Thread):
    """One streamed answer: when its events came, and what it said of its tokens."""
    server: object
    prompt: str
    max_tokens: int
    agent: str = ""  # Torpor's
    times: list = field(default_factory=list)
    usage: dict = field(default_factory=dict)
    begun: threading.Event = field(default_factory=threading.Event)
    stop: threading.Event = field(default_factory=threading.Event)
    error: str = ""

    def __post_init__(self):
        super().__init__(daemon=True)

    __hash__ = threading.Thread.__hash__

    def run(self):
        try:
            self.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.error = repr(error)
        self.begun.set()

    def read(self):
        body = {"model": self.server.model, "prompt": self.prompt, "max_tokens": self.max_tokens, "temperature": 0, "stream": True,
                "stream_options": {"include_usage": True}, "logit_bias": {str(token): -100 for token in END[self.server.model]}}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=600)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json", **self.server.headers, **({"x-torpor-agent": self.agent} if self.agent else {})})
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(response.read().decode())
            for line in response:
                if self.stop.is_set():
                    return
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                self.usage = event.get("usage") or self.usage
                if event["choices"] and event["choices"][0].get("text"):
                    self.times.append(time.monotonic())
                    self.begun.set()


def ask(server, prompts, max_tokens, agent=""):
    """All at once, until each has ended: the streams and the time at which they were sent."""
    streams = [Stream(server, prompt, max_tokens, agent) for prompt in prompts]
    start = time.monotonic()
    for stream in streams:
        stream.start()
    for stream in streams:
        stream.join()
        if stream.error or not stream.times:
            sys.exit(f"{server.name}: {stream.error or 'an answer without text'}")
    return streams, start


class Torpor:
    name = "torpor"

    def __init__(self, torpor, model, directory):
        self.model = model.name
        self.store, self.keys, self.log = directory / "store", directory / "keys", directory / "torpor.log"
        self.command = [torpor, "--store", self.store, "serve", "--model", model.path, "--port", "0", "--kv-dtype", "f16", "--log", self.log,
                        "--api-key-file", self.keys]
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        address = ""
        for line in self.process.stdout:
            address = address or line.partition("http://127.0.0.1:")[2].strip()
            if "Dashboard" in line:
                break
        if not address:
            sys.exit("torpor serve did not start")
        self.port = int(address.split("/")[0])
        self.headers = {"authorization": f"Bearer {self.keys.with_name('keys.local').read_text().strip()}"}

    def cpu_seconds(self):
        return LlamaServer.cpu_seconds(self)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()

    def restart(self):
        self.stop()
        self.start()


class Llama(LlamaServer):
    """llama-server with a slot for each of `agents`, each of `context` tokens."""
    name = "llama-server"
    headers = {}

    def __init__(self, model, directory, threads, agents, context):
        self.model = model.name
        self.made = (GGUF / f"{model.name}-Q4_0.gguf", directory, threads, ["-c", agents * context, "-np", agents, "-fa", "on"])
        super().__init__(directory, threads, self.made[0], self.made[3])

    def restart(self):
        self.stop()
        gguf, directory, threads, options = self.made
        super().__init__(directory, threads, gguf, options)


@contextlib.contextmanager
def both(torpor, model, threads, agents, context):
    with tempfile.TemporaryDirectory(prefix="torpor-bench-") as name:
        ours = Torpor(torpor, model, Path(name))
        try:
            theirs = Llama(model, Path(name), threads, agents, context)
            try:
                yield ours, theirs
            finally:
                theirs.stop()
        finally:
            ours.stop()


def measured(servers, one_side):
    """An attempt for least_disturbed: `one_side(server)` gives {label: value}."""
    def attempt():
        watch = Watch(*servers)
        ours, theirs = (one_side(server) for server in servers)
        return {label: (ours[label], theirs[label]) for label in ours}, watch.share()

    return attempt


# ---- the cases: what one run of a server gives, {label: tokens/s or seconds}

def first_token(server, prompts, max_tokens, agent=""):
    """Until the last of the answers has begun."""
    streams, start = ask(server, prompts, max_tokens, agent)
    return max(stream.times[0] for stream in streams) - start


def decode(server):
    rates = {}
    for n in COUNTS:
        streams, start = ask(server, [words(12) for _ in range(n)], ANSWER)
        end = max(stream.times[-1] for stream in streams)
        rates[f"{n} decode at once"] = sum(stream.usage["completion_tokens"] for stream in streams) / (end - start)
    return rates


def arrival(server):
    talkers = [Stream(server, words(12), 1500) for _ in range(3)]
    for stream in talkers:
        stream.start()
    for stream in talkers:
        stream.begun.wait()
    time.sleep(0.5)
    streams, start = ask(server, [words(2000)], 8)
    end = streams[0].times[-1]
    while any(stream.is_alive() and stream.times[-1] < end for stream in talkers):
        time.sleep(0.01)
    for stream in talkers:
        if not stream.is_alive():
            sys.exit(f"{server.name}: an answer beside ended too soon {stream.error}")
        stream.stop.set()
    for stream in talkers:
        stream.join()
    gaps = [after - before for stream in talkers for before, after in itertools.pairwise(stream.times)
            if after > start and before < end]
    return {"2,000 tokens arrive: first token": streams[0].times[0] - start, "longest gap of three that decode": max(gaps)}


def herd(server):
    common = words(4000)
    return {"ten of one prompt: last first token": first_token(server, [f"{common} Agent {i} says:" for i in range(10)], 2)}


def comes_back(server):
    prompt, agent = words(4000), f"agent-{next(FRESH)}"
    ask(server, [prompt], 8, agent)
    by_hand = isinstance(server, Llama)
    if by_hand:
        server.slot("save")
    server.restart()
    ask(server, ["Hello."], 2)  # the first request of a process
    back = first_token(server, [prompt + " And then"], 2, agent)
    start = time.monotonic()
    if by_hand:
        server.slot("erase")
        start = time.monotonic()
        server.slot("restore")
    restored = time.monotonic() - start
    return {"back after a restart": back,
            "back, slot restored by hand": restored + first_token(server, [prompt + " But then"], 2, agent)}


@dataclass
class Case:
    one_side: object
    agents: int   # llama-server's slots
    context: int  # tokens of each


CASES = {"decode": Case(decode, max(COUNTS), 512), "arrival": Case(arrival, 4, 4096), "herd": Case(herd, 10, 4608),
         "return": Case(comes_back, 1, 8192)}
TARGETS = {"1 decode at once": 1.4, "2 decode at once": 2.4, "4 decode at once": 2.8, "8 decode at once": 2.6,
           "2,000 tokens arrive: first token": 1 / 0.7, "ten of one prompt: last first token": 5, "back after a restart": 20}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(END), default="smollm2-135m")
    parser.add_argument("--torpor", type=Path, default=ROOT / "build" / "torpor")
    parser.add_argument("--case", choices=CASES, action="append", help="may be given several times; all without it")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="llama-server's threads")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # not without the servers
    torpor, model = arguments.torpor.resolve(), MODELS[arguments.model]
    for needed in (torpor, LLAMA_SERVER, model.path, GGUF / f"{model.name}-Q4_0.gguf"):
        if not needed.exists():
            sys.exit(f"{needed} is not there; run `make build` and `bench/peers/prepare {model.name}`")

    found = {}
    for name in arguments.case or CASES:
        case = CASES[name]
        with both(torpor, model, arguments.threads, case.agents, case.context) as servers:
            by_key(least_disturbed(measured(servers, case.one_side), arguments.runs), found)
    machine = f"{os.cpu_count()} cores, {cpu_name()}"
    bars = []
    print(f"\n{machine}; {model.title}, KV f16, llama-server with Q4_0; medians of alternating runs\n")
    print("| | Torpor | llama-server | better by | lowest, highest | runs | others at most | target |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for label, pairs in found.items():
        rate = label.endswith("at once")
        ours, theirs, ratio, low, high = summary(pairs, less_is_better=not rate)
        unit, scale, digits = ("tok/s", 1, 1) if rate else ("ms", 1000, 0)
        print(f"| {label} | {ours * scale:,.{digits}f} {unit} | {theirs * scale:,.{digits}f} {unit} | {ratio:.2f} | {low:.2f}, {high:.2f} | {len(pairs)} "
              f"| {max(share for *_, share in pairs):.0%} | {TARGETS.get(label, 1):.2g} |")
        bars.append((label, ratio, low, high, TARGETS.get(label, 1)))
    one = found.get("1 decode at once")
    for n in COUNTS[1:] if one else ():
        alone, together = (statistics.median(ours for ours, *_ in found[key]) for key in ("1 decode at once", f"{n} decode at once"))
        print(f"\nTorpor's {n} agents: {together / alone:.2f} times the tokens/s of one.", end="")
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"serve-{model.name}.json").write_text(json.dumps({"machine": machine, "pairs": "Torpor, llama-server, others' share", **found}, indent=1))
    plot(bars, OUT / f"serve-{model.name}.png", f"{model.title}; {machine}", "times better than llama-server", "llama-server", log=True)
    print(f"\n\nPlot: {(OUT / f'serve-{model.name}.png').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
