#!/usr/bin/env python3
"""A SIMULATION of a fleet: workers with memory and disk, and a bucket, under many agents' turns.

No model runs, and no server.

    bench/fleet_sim.py --agents 500 --hours 4
    bench/fleet_sim.py --trace traces/ --set workers=8 --set memory_bytes=32e9
    bench/fleet_sim.py --settings measured.json --event 3600:kill:0 --event 7200:join --json

Prints where turns found their agents (memory, disk, bucket), time to the first token, bytes and requests, their price,
and how many agents a machine carried. Figures come from bench/fleet_sim.json, each with its source. --settings FILE has
others, of a real fleet's measurement say; --set NAME=VALUE goes before both.

What is simulated: consistent hashing; one queue and so many slots for each worker; prompts read one after the other;
links and disks that serve one transfer after the other; the least recently used evicted; requests of docs/format.md, "A
bucket", without faults. What is not: slower prompts at depth, answers that slow each other, overlap of waking and
reading, segments shared beyond one prefix of each session, a sweep's requests.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

import fleet_model
import fleet_trace

SETTINGS = Path(__file__).with_name("fleet_sim.json")
MONTH = 30 * 86400
TIERS = ("memory", "disk", "bucket", "computed", "new")


def load_settings(path=None, changes=()):
    """(values, sources) of bench/fleet_sim.json, under those of a file and of NAME=VALUE."""
    base = json.loads(SETTINGS.read_text())
    values = {name: entry["value"] for name, entry in base.items()}
    sources = {name: entry["source"] for name, entry in base.items()}
    more = json.loads(Path(path).read_text()) if path else {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"'{change}' is not of the form NAME=VALUE")
        more[name] = {"value": json.loads(value), "source": "--set"}
    for name, entry in more.items():
        if name not in values:
            raise ValueError(f"there is no setting '{name}'; {SETTINGS.name} has them all")
        known = isinstance(entry, dict)
        value = entry["value"] if known else entry
        if isinstance(value, str) or value < 0:
            raise ValueError(f"the setting '{name}' is {value!r}, and not a number from 0 on")
        values[name], sources[name] = value, entry.get("source", str(path)) if known else str(path)
    return argparse.Namespace(**values), sources


def report(fleet):
    """What a run came to, as JSON has it."""
    ended, numbers = max(fleet.now, 1e-9), fleet.set
    count = len(fleet.turns)
    tiers = {}
    for tier in TIERS:
        waits = [turn[1] for turn in fleet.turns if turn[0] == tier]
        tiers[tier] = {"turns": len(waits), "share": len(waits) / count if count else 0,
                       **{f"ttft_p{p}": fleet_trace.quantile(waits, p / 100) for p in (50, 95, 99)}}
    waits = [turn[1] for turn in fleet.turns]
    tiers_of_workers = [tier for worker in fleet.workers for tier in (worker.memory, worker.disk)]
    for tier in [fleet.bucket, fleet.sessions, *tiers_of_workers]:
        tier.tick(ended)
    alive = sum((ended if worker.dead is None else worker.dead) for worker in fleet.workers)
    leases = int(alive / (numbers.lease_ttl_s / 3)) if numbers.lease_ttl_s else 0
    puts, gets = fleet.puts + 2 * leases, fleet.gets  # a renewal, and a list of all leases, which is priced as a put
    dollars = {"put": puts * numbers.put_price, "get": gets * numbers.get_price,
               "storage": fleet.bucket.area / 1e9 / MONTH * numbers.storage_price_gb_month,
               "workers": alive / 3600 * numbers.worker_price_hour}
    dollars["total"] = sum(dollars.values())
    machines = len(fleet.workers)
    mean_live = (fleet.live_area + fleet.live * (ended - fleet.live_since)) / ended
    memory = sum(worker.memory.area for worker in fleet.workers) / ended
    return {
        "simulation": True, "seconds": ended, "turns": count, "tiers": tiers,
        "ttft": {f"p{p}": fleet_trace.quantile(waits, p / 100) for p in (50, 95, 99)},
        "tokens": {"prompt": sum(turn[5] for turn in fleet.turns), "computed": sum(turn[3] for turn in fleet.turns),
                   "reused": sum(turn[4] for turn in fleet.turns)},
        "bytes": {"uploaded": fleet.up_bytes, "downloaded": fleet.down_bytes, "disk_read": fleet.disk_read,
                  "disk_written": fleet.disk_written, "bucket": fleet.bucket.level, "memory_mean": memory,
                  "memory_if_none_slept": fleet.sessions.area / ended},
        "requests": {"put": puts, "get": gets, "of_leases": 2 * leases,
                     "put_per_turn": fleet.puts / count if count else 0, "get_per_turn": gets / count if count else 0},
        "dollars": {**dollars, "per_1000_turns": 1000 * dollars["total"] / count if count else 0},
        "agents": {"at_once_mean": mean_live, "at_once_peak": fleet.live_peak,
                   "per_machine_mean": mean_live / machines, "per_machine_peak": fleet.live_peak / machines,
                   "moved": fleet.moved, "forwarded": fleet.forwarded, "retried": fleet.retried,
                   "taken_over": fleet.takeovers},
        "busy": {"compute": [worker.compute.busy / ended for worker in fleet.workers],
                 "up": [worker.up.busy / ended for worker in fleet.workers],
                 "down": [worker.down.busy / ended for worker in fleet.workers]},
    }


def table(report):
    seconds = lambda value: "" if value is None else f"{value:.2f}"
    print("SIMULATION: no model ran, and no server; figures of bench/fleet_sim.json and of the trace.\n")
    agents, size = report["agents"], report["bytes"]
    print(f"{report['turns']:,} turns in {report['seconds'] / 3600:.2f} h; agents at a time "
          f"{agents['at_once_mean']:.0f} on average, {agents['at_once_peak']} at most; "
          f"per machine {agents['per_machine_mean']:.1f} and {agents['per_machine_peak']:.1f}\n")
    print("| woke from | turns | share | first token p50, s | p95 | p99 |\n|---|---:|---:|---:|---:|---:|")
    for name, tier in report["tiers"].items():
        waits = " | ".join(seconds(tier[f"ttft_p{p}"]) for p in (50, 95, 99))
        print(f"| {name} | {tier['turns']:,} | {tier['share']:.1%} | {waits} |")
    print(f"| all | {report['turns']:,} | | {' | '.join(seconds(value) for value in report['ttft'].values())} |\n")
    asked, cost, tokens = report["requests"], report["dollars"], report["tokens"]
    print(f"tokens: {tokens['prompt']:,} in prompts, {tokens['reused'] / tokens['prompt']:.1%} reused")
    print(f"bytes: {size['uploaded'] / 1e9:.1f} GB up, {size['downloaded'] / 1e9:.1f} GB down, "
          f"{size['disk_read'] / 1e9:.1f} GB read from disks; {size['bucket'] / 1e9:.1f} GB in the bucket at the end")
    print(f"memory: {size['memory_mean'] / 1e9:.1f} GB on average; "
          f"{size['memory_if_none_slept'] / 1e9:.1f} GB if none slept")
    print(f"requests: {asked['put']:,} writes and {asked['get']:,} reads, leases included; "
          f"{asked['put_per_turn']:.1f} and {asked['get_per_turn']:.1f} a turn, without them")
    print(f"dollars: {cost['total']:.2f} (writes {cost['put']:.2f}, reads {cost['get']:.2f}, "
          f"storage {cost['storage']:.2f}, machines {cost['workers']:.2f}); "
          f"{cost['per_1000_turns']:.4f} for 1,000 turns")
    print("busy, the mean and the busiest worker: " + ", ".join(
        f"{what} {sum(shares) / len(shares):.0%} and {max(shares):.0%}" for what, shares in report["busy"].items()))
    print(f"moved {agents['moved']} times, forwarded {agents['forwarded']}, taken over {agents['taken_over']}, "
          f"asked again {agents['retried']}")


def add_event(fleet, event):
    parts = re.fullmatch(r"(\d+(?:\.\d+)?):(?:(join)|(drain|kill):(\d+))", event)
    if not parts:
        raise ValueError(f"'{event}' is no event; write SECONDS:join, SECONDS:drain:W or SECONDS:kill:W")
    at, joins, leaves, worker = parts.groups()
    if joins:
        fleet.later(float(at), fleet.join)
    elif int(worker) >= len(fleet.workers):
        raise ValueError(f"there is no worker {worker} to {leaves}; they are 0 to {len(fleet.workers) - 1} at first")
    else:
        fleet.later(float(at), {"drain": fleet.drain, "kill": fleet.kill}[leaves], int(worker))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", help="a directory, a .jsonl or a .csv file; else sessions are made up")
    parser.add_argument("--shape", choices=sorted(fleet_trace.SHAPES), default="coding", help="of what is made up")
    parser.add_argument("--agents", type=int, default=200, help="how many sessions are made up")
    parser.add_argument("--hours", type=float, default=1, help="within which they begin")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1, help="factor of all lengths in tokens")
    parser.add_argument("--settings", help="a JSON file of settings: NAME to a number, or to a value and its source")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--event", action="append", default=[], metavar="SECONDS:join|drain:W|kill:W")
    parser.add_argument("--describe", action="store_true", help="print the trace's statistics, and simulate nothing")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        settings, sources = load_settings(arguments.settings, arguments.set)
        if not 0 < arguments.hours < math.inf:
            raise ValueError(f"--hours {arguments.hours} is no time; give a number above 0")
        sessions = fleet_trace.read(arguments.trace) if arguments.trace else fleet_trace.generate(
            fleet_trace.SHAPES[arguments.shape], arguments.agents, arguments.hours * 3600, arguments.seed)
        if arguments.scale != 1:
            fleet_trace.scale(sessions, arguments.scale)
        if arguments.describe:
            print(json.dumps(fleet_trace.describe(sessions), indent=2))
            return
        fleet = fleet_model.Fleet(sessions, settings)
        for event in arguments.event:
            add_event(fleet, event)
        result = report(fleet.run())
        if not result["turns"]:
            raise ValueError("there is no turn to simulate; name a trace that has some, or more --agents")
    except (ValueError, KeyError, OSError) as error:
        sys.exit(f"fleet_sim: {error}")
    result["settings"] = {name: {"value": value, "source": sources[name]} for name, value in vars(settings).items()}
    print(json.dumps(result)) if arguments.json else table(result)


if __name__ == "__main__":
    main()
