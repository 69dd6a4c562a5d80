"""An agent's first token after a wake from the bucket, from the local disk and by computing it again; what a turn asks.

    sudo .venv/bin/python bench/remote_wake.py [--model .models/smollm2-135m] [--tokens 1024,2048,4096,8000,16000]

Runs in a network namespace of its own, so root is needed. Its loopback has each rate of --rates (`tc tbf`, Gb/s).
There is a gofakes3 (scripts/fetch-sdks gofakes3), and a `torpor serve --remote` that makes --again agents of each size
and goes: their first tokens are those that are computed. Then for each run one with an empty store. Of each agent
there: the first token of a turn when all comes from the bucket; the same after it slept, its files at hand. Medians.
The rate is that of all bytes of the agent over the whole wake; --plot draws the figures. A model's window is taken to
be as long as the longest agent needs: what it says beyond its own is nonsense, computed as fast.

Then, without a limit, requests and bytes that turns of --turns tokens send to the bucket, and what a second server
sends for an agent with the same system prompt.
"""

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]
os.environ.setdefault("TORPOR_BIN", str(ROOT / "build" / "torpor"))
import s3  # noqa: E402
from conftest import Torpor  # noqa: E402
from machine import cpu_name  # noqa: E402
from serving import Server  # noqa: E402

AGENTS = "/torpor/v1/agents"
TEXT = (ROOT / "examples" / "lighthouse-log.txt").read_text()
CHARACTERS = 3.85  # a token of TEXT


def text_of(tokens, name):
    text = TEXT * (1 + tokens * 5 // len(TEXT))
    return f"Log {name}: " + text[:int(tokens * CHARACTERS)]


class Fleet:
    def __init__(self, where, model, port):
        self.where, self.model, self.url = Path(where), model, f"s3://{s3.BUCKET}/wake"
        self.env = s3.environment(port)

    def server(self, name):
        home = self.where / name
        home.mkdir(exist_ok=True)
        return Server(Torpor(home / "store", self.model), home, "--no-auth", "--remote", self.url, "--lease", "5",
                      env=self.env)


    def size(self, store, agent):
        """Bytes of the agent's rows, ids and messages."""
        return Torpor(store, self.model)("show", agent, "--json").ok().json["bytes"]


def first_token(server, path, body):
    """Seconds to the first piece of the answer, and the turn's result."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    start = time.perf_counter()
    server.send(connection, "POST", path, {**body, "max_tokens": 8, "temperature": 0, "stream": True})
    answer = connection.getresponse()
    if answer.status >= 300:
        sys.exit(answer.read().decode())
    first, last = None, b""
    while line := answer.readline():
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            if first is None and b"text" in line:
                first = time.perf_counter() - start
            last = line
    connection.close()
    return first, json.loads(last[6:])


def stop(server):
    if server.stop() != 0:
        sys.exit("the server did not end well: " + "".join(server.log[-3:]))


def with_window(model, tokens, where):
    """The model, or one whose window has as many tokens."""
    config = json.loads((model / "config.json").read_text())
    if config["max_position_embeddings"] >= tokens:
        return model
    other = Path(where) / model.name
    other.mkdir()
    for file in model.iterdir():
        (other / file.name).symlink_to(file)
    (other / "config.json").unlink()
    (other / "config.json").write_text(json.dumps({**config, "max_position_embeddings": tokens}))
    return other


def limit(rate):
    done = subprocess.run(["tc", "qdisc", "replace", "dev", "lo", "root", "tbf", "rate", f"{rate}gbit", "burst", "2mb",
                           "latency", "50ms"], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit("tc: " + done.stderr)


def wakes(options, where, model):
    rows = []
    with s3.gofakes3() as store:
        fleet = Fleet(where, model, store.port)
        made = {tokens: [] for tokens in options.tokens}
        with fleet.server("maker") as maker:
            first_token(maker, AGENTS, {"agent": "warm", "prompt": "Hello"})
            for tokens in options.tokens:
                for number in range(options.again):
                    agent, text = f"a{tokens}" + f"-{number}" * (number > 0), text_of(tokens, f"{tokens} {number}")
                    made[tokens].append(first_token(maker, AGENTS, {"agent": agent, "prompt": text})[0])
            stop(maker)
        for rate in options.rates:
            limit(rate)
            found = {tokens: [] for tokens in options.tokens}
            for run in range(options.runs):
                with fleet.server(f"waker-{rate}-{run}") as server:
                    for tokens in options.tokens:
                        on = {"prompt": "And then?"}
                        bucket, _ = first_token(server, f"{AGENTS}/a{tokens}/turn", on)
                        server.ask("POST", f"{AGENTS}/a{tokens}/sleep", {})
                        disk, _ = first_token(server, f"{AGENTS}/a{tokens}/turn", on)
                        size = fleet.size(fleet.where / f"waker-{rate}-{run}" / "store", f"a{tokens}")
                        found[tokens].append((bucket, disk, size))
                    stop(server)
            for tokens, figures in found.items():
                bucket, disk, size = (statistics.median(column) for column in zip(*figures))
                again = statistics.median(made[tokens])
                rows.append({"rate_gbps": rate, "tokens": tokens, "bucket_s": bucket, "disk_s": disk, "again_s": again,
                             "share": size * 8 / bucket / (rate * 1e9)})
                print(f"| {rate} Gb/s | {tokens} | {size / 1e6:.0f} MB | {bucket * 1e3:.0f} ms | {disk * 1e3:.0f} ms | "
                      f"{again * 1e3:.0f} ms | {rows[-1]['share']:.0%} | {again / bucket:.1f}x |", flush=True)
        subprocess.run(["tc", "qdisc", "del", "dev", "lo", "root"])
    return rows


def asked(options, where, model):
    """Requests and bytes to the bucket: of turns, and of a second server's agent that begins alike."""
    seen = []

    def count(method, path, headers):
        name = path.split("?")[0].split("/wake/")[-1]
        lists_leases = "nodes" in path.partition("?")[2]
        if name != "sweep" and not name.startswith("nodes/") and not lists_leases:  # which go by time
            seen.append((method, name, int(headers.get("content-length", 0))))

    def sent():
        puts = [one for one in seen if one[0] == "PUT"]
        others = [one for one in seen if one[0] != "PUT"]
        segments = sum(name.startswith("segments/") for _, name, _ in puts)
        seen.clear()
        return len(puts), len(others), sum(size for _, _, size in puts), segments

    with s3.gofakes3() as store, s3.Proxy(store.port, count) as proxy:
        fleet = Fleet(where, model, proxy.port)
        common = text_of(1100, "common")
        with fleet.server("first") as server:
            server.ask("POST", AGENTS, {"agent": "ada", "prompt": common, "max_tokens": 1})
            rows = [("a new agent, 1,100 tokens", *sent())]
            for tokens in options.turns:
                server.ask("POST", f"{AGENTS}/ada/turn", {"prompt": text_of(tokens - 40, tokens), "max_tokens": 32})
                rows.append((f"a turn of {tokens} tokens", *sent()))
            stop(server)
        seen.clear()
        with fleet.server("second") as server:
            seen.clear()
            server.ask("POST", AGENTS, {"agent": "bob", "prompt": common + " I am Bob.", "max_tokens": 1})
            rows.append(("another server's agent that begins alike", *sent()))
            stop(server)
    print("\n| what | PUT | other requests | bytes sent | segments |\n|---|---:|---:|---:|---:|")
    for name, puts, others, size, segments in rows:
        print(f"| {name} | {puts} | {others} | {size / 1e6:.2f} MB | {segments} |")
    return rows


def plot(rows, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rates = sorted({row["rate_gbps"] for row in rows})
    figure, axes = pyplot.subplots(1, len(rates), figsize=(5 * len(rates), 4), sharey=True, squeeze=False,
                                   layout="constrained")
    for axis, rate in zip(axes[0], rates):
        these = sorted((row for row in rows if row["rate_gbps"] == rate), key=lambda row: row["tokens"])
        for name, label in (("again_s", "computed again"), ("bucket_s", "from the bucket"),
                            ("disk_s", "from the local disk")):
            axis.plot([row["tokens"] for row in these], [row[name] * 1e3 for row in these], marker="o", label=label)
        axis.set(xscale="log", yscale="log", title=f"{rate} Gb/s", xlabel="tokens", ylabel="ms to the first token")
        axis.legend()
    figure.savefig(path, dpi=150)


def main():
    def numbers(text):
        return [int(one) for one in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / ".models" / "smollm2-135m")
    parser.add_argument("--tokens", type=numbers, default=[1024, 2048, 4096, 8000, 16000])
    parser.add_argument("--rates", type=numbers, default=[1, 10])
    parser.add_argument("--turns", type=numbers, default=[100, 741, 3000])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--again", type=int, default=1, help="agents of each size that are computed (1)")
    parser.add_argument("--part", choices=["wakes", "turns"], help="one of both (both)")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--rows", type=Path, help="a JSON file that rows are added to; all of it is drawn")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        if os.geteuid() != 0:
            sys.exit("A network namespace needs root; run this with sudo.")
        return subprocess.run(["unshare", "-n", sys.executable, *sys.argv, "--inside"]).returncode
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    model = options.model.resolve()
    print(f"{os.cpu_count()} cores, {cpu_name()}; {model.name}\n")
    rows = []
    with tempfile.TemporaryDirectory() as where:
        if options.part != "turns":
            print(f"first token of a turn, medians of {options.runs}, of {options.again} computed\n\n"
                  "| link | tokens | agent | from the bucket | from the local disk | computed again | of the link | "
                  "sooner |\n|---|---:|---:|---:|---:|---:|---:|---:|")
            rows = wakes(options, where, with_window(model, max(options.tokens) + 1000, where))
    with tempfile.TemporaryDirectory() as where:
        if options.part != "wakes":
            asked(options, where, model)
    if options.rows:
        rows = [*(json.loads(options.rows.read_text()) if options.rows.exists() else []), *rows]
        options.rows.write_text(json.dumps(rows))
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
