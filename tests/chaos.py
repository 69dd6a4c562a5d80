"""Servers that share a bucket, faults from a seed, and what must hold after them (docs/fleet.md, "Chaos").

    tests/chaos.py --agents 1000 --turns 20000 --kills 200 --seed 7

Workers reach the bucket through relays of their own: fault_relay.py. Where the processes are and who places requests
is fleet_network.py's: `--network namespaces` has HAProxy, and needs root. Faults come by count of acknowledged turns,
so a seed's run has the same ones however fast the machine is; which requests they meet is the machine's."""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import s3
from conftest import Torpor, held_ids, make_tiny_model
from fault_relay import Relay, ask
from fleet_network import KEY, NETWORKS, keys_file
from fleet_turns import body_of, compare_transcript, messages, path_of, prompt_of

PATIENCE = 300.0  # seconds of a client
GONE = 8  # serve's exit code after its lease has run out


@dataclasses.dataclass
class Options:
    agents: int = 1000
    turns: int = 20000
    workers: int = 4
    kills: int = 200
    pauses: int = 20      # SIGSTOP, for one lease and a half
    partitions: int = 40  # half of them worker and bucket, half worker and clients
    restarts: int = 10    # of the bucket
    sweeps: int = 20      # torpor remote gc beside the workers; every other one is killed
    clients: int = 96     # turns under way
    lease: float = 10.0
    refuse: float = 0.01
    lose: float = 0.005
    slow: float = 0.02
    logits: int = 50      # agents whose next logits are compared
    seed: int = 1
    store: str = "versitygw"
    network: str = "loopback"
    gbits: float = 1.0    # namespaces: of each link
    delay: float = 10.0   # namespaces: milliseconds between workers and bucket, each way
    seconds: float = 0.0  # no new turn after so many; 0: all turns
    slowest: int = 0      # recoveries whose requests are printed


def said_of(answer):
    """The sentence of an error."""
    if answer.status < 400 or not (answer.header(b"content-type") or "").startswith("application/json"):
        return ""
    return f" ({json.loads(answer.body)['error']['message'][:120]})"


class Worker:
    """One server, started again whenever it ends, and the relay between it and the bucket."""

    def __init__(self, run, number):
        self.run, self.number = run, number
        self.store = run.directory / f"store-{number}"
        self.log = run.directory / f"worker-{number}.log"
        self.port, self.process = s3.free_port(), None
        self.ends = collections.Counter()
        self.up = self.closing = self.paused = self.disk_lost = False

    async def start(self):
        self.bucket = await self.run.relay(f"{self.number} bucket")
        self.keeper = asyncio.create_task(self.keep())
        self.prober = asyncio.create_task(self.probe())

    async def keep(self):
        name, network = f"worker-{self.number}", self.run.network
        command = network.inside(name, Torpor(self.store, self.run.model).command(
            "serve", "--model", self.run.model, "--api-key-file", self.run.key_file, "--host",
            network.host(name, "front"), "--port", self.port, "--remote", self.run.url, "--lease",
            self.run.options.lease, "--advertise", network.advertised(self), "--queue", 1024,
            "--remote-tail", ("turn", "sleep")[self.number % 2], "--durability", "rename", "--threads", 1,
            "--log", self.log))
        env = {**os.environ, **s3.environment(self.bucket.port, *self.run.keys, network.host("clients", "back"))}
        while not self.closing:
            with open(self.log.with_suffix(".err"), "ab") as errors:
                self.process = await asyncio.create_subprocess_exec(*command, env=env, stderr=errors,
                                                                    stdout=asyncio.subprocess.DEVNULL)
            code = await self.process.wait()
            self.ends[code] += 1
            if self.disk_lost:
                shutil.rmtree(self.store, ignore_errors=True)
                self.disk_lost = False
            await asyncio.sleep(0.2)

    async def probe(self):
        """As a balancer asks: down after two failures."""
        failed = 0
        while not self.closing:
            try:
                healthy = await self.run.network.is_healthy(self)
            except (OSError, TimeoutError):
                healthy = False
            failed = 0 if healthy else failed + 1
            self.up = healthy or self.up and failed < 2
            await asyncio.sleep(0.3)

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError, AttributeError):
            self.process.send_signal(number)

    async def stop(self):
        self.closing = True
        self.signal(signal.SIGTERM)
        await asyncio.wait_for(self.keeper, 60)
        await self.prober


class Chaos:
    def __init__(self, options, directory, model):
        self.options, self.directory, self.model = options, directory, model
        self.random = random.Random(options.seed)
        self.url = f"s3://{s3.BUCKET}/chaos"
        self.bucket, self.key_file = None, keys_file(directory)
        self.network = NETWORKS[options.network](self)
        self.bucket_port, self.keys = s3.free_port(), ("TESTKEY", "test-secret")
        names = [f"agent-{number}" for number in range(options.agents)]
        self.acknowledged = {name: [] for name in names}
        self.in_flight, self.last_at = {}, {}       # agent: worker
        self.hit = {}                               # agent: (kind of the last fault that met it, when)
        self.met = []                               # (when, kind, workers) of each fault
        self.recoveries = []                        # (seconds, kind, what the agent asked)
        self.statuses, self.wrong, self.faults = collections.Counter(), [], collections.Counter()
        self.done, self.repeated, self.planned = 0, 0, options.turns
        self.tasks, self.stopped = set(), 0.0

    def now(self):
        """Seconds, without those in which this process did not run: then the others did not, either."""
        return time.monotonic() - self.stopped

    def violated(self, sentence):
        """Told at once: a long run may be cut off."""
        self.wrong.append(sentence)
        print(f"{self.now() - self.began:.1f}: {sentence}", file=sys.stderr, flush=True)

    async def notice_stops(self):
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.1)
            if (gap := time.monotonic() - before) > 2:
                self.stopped += gap

    # ---- the bucket

    def start_bucket(self):
        root, host = self.directory / "bucket", self.network.host("bucket", "back")
        if self.options.store == "versitygw":
            (root / s3.BUCKET).mkdir(parents=True, exist_ok=True)
            command = [s3.program("versitygw"), "--port", f"{host}:{self.bucket_port}", "--quiet", "posix", root]
        else:
            command = [s3.program("gofakes3"), "-host", f"{host}:{self.bucket_port}", "-backend", "fs", "-fs.path",
                       root, "-fs.create", "-initialbucket", s3.BUCKET, "-quiet"]
        env = {"ROOT_ACCESS_KEY": self.keys[0], "ROOT_SECRET_KEY": self.keys[1]}
        self.bucket = s3.Server(self.network.inside("bucket", command), env, self.bucket_port, host)

    async def relay(self, name):
        """To the bucket, and not always."""
        options = self.options
        return await Relay(self.bucket_at, f"{options.seed} {name}", finishes=True, refuse=options.refuse,
                           lose=options.lose, slow=options.slow).start(self.network.host("clients", "back"))

    async def restart_bucket(self):
        """What it was asked before, it answers; nobody hears it."""
        relays, down = [self.sweeper, *(worker.bucket for worker in self.workers)], self.random.uniform(0.1, 0.4)
        async with contextlib.AsyncExitStack() as stack:
            for relay in relays:
                await stack.enter_async_context(relay.one_fault)
            self.meet("restart", self.workers)
            for relay in relays:
                relay.set("held")
            for relay in relays:
                await relay.idle()
            await asyncio.to_thread(self.bucket.__exit__)
            for relay in relays:
                relay.set("cut")
            await asyncio.sleep(down * self.options.lease)
            await asyncio.to_thread(self.start_bucket)
            for relay in relays:
                relay.set("open")

    async def sweep(self, is_killed):
        command = Torpor(self.directory / "swept", self.model).command("remote", "gc", self.url)
        process = await asyncio.create_subprocess_exec(
            *command, env={**os.environ, **self.sweeper_env},
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE)
        if is_killed:
            await asyncio.sleep(self.random.uniform(0.05, 1))
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        _, said = await process.communicate()
        if process.returncode not in (0, 7, GONE, -signal.SIGKILL):
            self.violated(f"gc ended with {process.returncode}: {said.decode()}")

    # ---- clients

    async def attempt(self, agent, number, tries, asked):
        """An answer to a turn, of the worker that is picked or of the one that it names."""
        headers = {"idempotency-key": f"{agent}-{number}", "content-type": "application/json", "x-api-key": KEY,
                   "x-torpor-agent": agent}
        body, path = body_of(agent, number, self.options.seed), path_of(agent, number)
        worker, port = self.network.pick(agent, tries)
        for _ in range(3):
            self.in_flight[agent] = worker
            began, came, why = self.now(), "nothing", ""
            try:
                answer = await ask(port, "POST", path, body, headers, timeout=self.options.lease * 1.75)
                came, why = answer.status, said_of(answer)
                worker = self.in_flight[agent] = self.network.answered_by(answer, worker)
                for at, kind, workers in self.met:  # who placed it knew better where it was
                    if at > began and worker in workers:
                        self.hit[agent] = kind, at
            except (OSError, TimeoutError) as error:
                came = type(error).__name__
                raise
            finally:
                self.statuses[came] += 1
                now, who = self.now(), worker.number if worker else "unknown"
                asked.append(f"{began - self.began:.1f}: worker {who} {came} after {now - began:.1f} s{why}")
            if answer.status != 307:
                return answer
            worker, port, path = self.network.sent_on(answer.header(b"location"), path)
        return answer

    async def turn(self, agent):
        number, began, tries, asked = len(self.acknowledged[agent]), self.now(), 0, []
        while True:
            answer = None
            with contextlib.suppress(OSError, TimeoutError):
                answer = await self.attempt(agent, number, tries, asked)
            if answer is not None and answer.status in (200, 201):
                break
            is_json = answer is not None and (answer.header(b"content-type") or "").startswith("application/json")
            code = json.loads(answer.body)["error"].get("code") if is_json else ""  # HAProxy's own errors are HTML
            if answer is not None and (answer.status in (400, 404, 413) or code in ("kIncompatible", "kCorruption")):
                self.violated(f"{agent}: turn {number} is refused: {answer.status} {answer.body.decode()}")
                self.in_flight.pop(agent)
                return False
            if self.now() - began > PATIENCE:
                self.violated(f"{agent}: turn {number} is not answered: {'; '.join(asked[-8:])}")
                self.in_flight.pop(agent)
                return False
            tries += 1
            await asyncio.sleep(self.random.uniform(0.05, 0.3))
        said = json.loads(answer.body)
        self.repeated += said.get("repeated", False)
        self.acknowledged[agent].append((prompt_of(agent, number, self.options.seed), said["text"]))
        self.last_at[agent] = self.in_flight.pop(agent)
        self.done += 1
        if self.done % 1000 == 0:
            print(f"{self.done} turns in {self.now() - self.began:.0f} s, {dict(self.faults)}, "
                  f"{len(self.wrong)} violations", file=sys.stderr, flush=True)
        if agent in self.hit:
            kind, at = self.hit.pop(agent)
            asked.insert(0, f"{kind} at {at - self.began:.1f} of its worker")
            # A recovery that other faults met, too, is longer.
            asked += [f"[{kind} of {' '.join(str(worker.number) for worker in workers)} at {when - self.began:.1f}]"
                      for when, kind, workers in self.met if max(at, began) < when]
            self.recoveries.append((self.now() - max(at, began), kind, asked))
        return True

    async def client(self, names):
        while self.planned > 0 and not (self.options.seconds and self.now() - self.began > self.options.seconds):
            if not names:
                return
            agent = names.pop(self.random.randrange(len(names)))
            self.planned -= 1
            if await self.turn(agent):
                names.append(agent)

    # ---- faults

    def meet(self, kind, workers):
        """Notes whom a fault meets: agents that have a turn there, or had their last one."""
        self.faults[kind] += 1
        now = self.now()
        self.met.append((now, kind, workers))
        for agent in self.acknowledged:
            if self.in_flight.get(agent, self.last_at.get(agent)) in workers:
                self.hit[agent] = (kind, now)

    async def pause(self, worker):
        worker.paused = True
        worker.signal(signal.SIGSTOP)
        await asyncio.sleep(self.options.lease * 1.5)
        worker.signal(signal.SIGCONT)
        worker.paused = False

    async def part(self, kind, worker):
        side, most = ("back", 1.6) if kind == "worker | bucket" else ("front", 0.9)
        how, leases = self.random.choice(("held", "cut")), self.random.uniform(0.2, most)
        async with self.network.parted(worker, side, how):
            self.meet(kind, [worker])
            await asyncio.sleep(leases * self.options.lease)

    def start_fault(self, kind):
        free = [worker for worker in self.workers if not worker.paused] or self.workers
        worker = self.random.choice(free)
        if kind == "kill":
            self.meet(kind, [worker])
            if self.random.random() < 0.1:
                self.faults["disk lost"] += 1
                worker.disk_lost = True
            worker.signal(signal.SIGKILL)
            return None
        if kind == "restart":
            return self.restart_bucket()
        if kind == "gc":
            self.faults[kind] += 1
            return self.sweep(self.faults[kind] % 2 == 0)
        if kind == "pause":
            self.meet(kind, [worker])
            return self.pause(worker)
        return self.part(kind, worker)

    async def disturb(self):
        options = self.options
        kinds = (["kill"] * options.kills + ["pause"] * options.pauses + ["restart"] * options.restarts
                 + ["gc"] * options.sweeps
                 + ["worker | bucket"] * (options.partitions // 2) + ["worker | clients"] * (options.partitions // 2))
        self.random.shuffle(kinds)
        for number, kind in enumerate(kinds):
            while self.done < options.turns * (number + 1) / (len(kinds) + 2):
                await asyncio.sleep(0.02)
            if (work := self.start_fault(kind)) is not None:
                self.tasks.add(asyncio.create_task(work))

    # ---- the run

    async def disturbed(self):
        await asyncio.to_thread(self.start_bucket)
        self.bucket_at = await self.network.start_bucket_side(self.bucket_port)
        self.sweeper = await self.relay("sweeper")
        self.sweeper_env = s3.environment(self.sweeper.port, *self.keys, self.network.host("clients", "back"))
        self.workers = [Worker(self, number) for number in range(self.options.workers)]
        await self.network.start_front(self.workers)
        for worker in self.workers:
            await worker.start()
        while not all(worker.up for worker in self.workers):
            await asyncio.sleep(0.05)
        self.began = self.now()
        watch = asyncio.create_task(self.notice_stops())
        names = list(self.acknowledged)
        disturber = asyncio.create_task(self.disturb())
        await asyncio.gather(*(self.client(names) for _ in range(self.options.clients)))
        disturber.cancel()
        for task in self.tasks:
            await task
        self.seconds = self.now() - self.began
        watch.cancel()
        for worker in self.workers:
            await worker.stop()

    async def undisturbed(self):
        """The same turns on one server without a bucket. Its store is the measure."""
        alone = Torpor(self.directory / "alone", self.model)
        port = s3.free_port()
        process = await asyncio.create_subprocess_exec(
            *alone.command("serve", "--model", self.model, "--no-auth", "--port", port, "--durability", "none",
                           "--log", self.directory / "alone.log"), stdout=asyncio.subprocess.PIPE)
        while b"Dashboard" not in await process.stdout.readline():
            pass
        waiting = [name for name, turns in self.acknowledged.items() if turns]

        async def client():
            while waiting:
                agent = waiting.pop()
                for number, (_, text) in enumerate(self.acknowledged[agent]):
                    body = body_of(agent, number, self.options.seed)
                    answer = await ask(port, "POST", path_of(agent, number), body, timeout=120)
                    if answer.status not in (200, 201):
                        raise AssertionError(f"the undisturbed server answers {answer.status}: {answer.body.decode()}")
                    if json.loads(answer.body)["text"] != text:
                        self.violated(f"{agent}: turn {number} has another answer than undisturbed")

        await asyncio.gather(*(client() for _ in range(16)))
        process.send_signal(signal.SIGTERM)
        await process.wait()
        return alone

    def remote(self, store, *args):
        return Torpor(store, self.model)("remote", args[0], self.url, *args[1:], "--json",
                                         timeout=1200,
                                     env=s3.environment(self.bucket_port, *self.keys,
                                                        self.network.host("bucket", "back")))

    def check(self, alone):
        """Reads the bucket into an empty store, and compares."""
        names = [name for name, turns in self.acknowledged.items() if turns]
        found = Torpor(self.directory / "found", self.model)
        for first in range(0, len(names), 250):
            pulled = self.remote(found.store, "pull", *names[first:first + 250])
            if pulled.code != 0:
                self.wrong.append(f"the bucket can't be pulled: {pulled.err or pulled.out}")
        for name in names:
            if not found.agent_file(name).exists():
                self.wrong.append(f"{name}: is not in the bucket")
                continue
            self.wrong += compare_transcript(name, self.acknowledged[name], messages(found, name))
            if held_ids(found.store, name) != held_ids(alone.store, name):
                self.wrong.append(f"{name}: has other tokens than undisturbed")
        for name in self.random.sample(names, min(self.options.logits, len(names))):
            ask_next = ("And then?", "--logprobs", 5, "--no-save")
            one, other = (store.run(name, *ask_next, max_tokens=1) for store in (found, alone))
            if one.code or other.code or one.json["logprobs"] != other.json["logprobs"]:
                self.wrong.append(f"{name}: has other logits than undisturbed {one.err}")
        swept = self.remote(found.store, "gc")
        if swept.code != 0:
            self.wrong.append(f"gc fails: {swept.err}")
        verified = self.remote(found.store, "verify")
        if verified.code != 0 or verified.json["unneeded"]:
            self.wrong.append(f"verify after gc: {verified.out} {verified.err}")
        listed = self.remote(found.store, "ls")
        if left := [one["key"] for one in listed.json["objects"] if one["key"].startswith("nodes/")]:
            self.wrong.append(f"gc leaves {len(left)} leases")
        for worker in self.workers:
            if odd := set(worker.ends) - {0, -signal.SIGKILL, GONE, 7}:
                self.wrong.append(f"worker {worker.number} ended with {odd}")
        return swept, verified

    def table(self, swept, verified):
        times = sorted(time for time, *_ in self.recoveries)
        at = lambda share: times[min(len(times) - 1, math.ceil(share * len(times)) - 1)] if times else 0.0
        counts = collections.Counter()
        for worker in self.workers:
            counts.update(worker.bucket.counts)
        ends = sum((worker.ends for worker in self.workers), collections.Counter())
        rows = [("seed", self.options.seed), ("store, network", f"{self.options.store}, {self.options.network}"),
                ("workers, agents, lease", f"{self.options.workers}, {self.options.agents}, {self.options.lease:g} s"),
                ("turns acknowledged", f"{self.done} in {self.seconds:.0f} s"),
                ("all was stopped for so long beside", f"{self.stopped:.0f} s"),
                ("of these, repeated answers", self.repeated),
                ("faults", ", ".join(f"{count} {kind}" for kind, count in sorted(self.faults.items()))),
                ("ends of workers", ", ".join(f"{count} with {code}" for code, count in sorted(ends.items()))),
                ("bucket: requests", ", ".join(f"{count} {what}" for what, count in counts.items())),
                ("answers to clients", ", ".join(f"{count} {what}" for what, count in self.statuses.most_common()))]
        for kind in sorted({kind for _, kind, _ in self.recoveries}):
            some = sorted(time for time, one, _ in self.recoveries if one == kind)
            median = some[len(some) // 2]
            rows.append((f"recovery from {kind}", f"{len(some)}: median {median:.2f} s, most {some[-1]:.2f} s"))
        p50, p99 = at(0.5), at(0.99)
        rows += [("recovery, p50 and p99", f"{p50:.2f} s, {p99:.2f} s = {p99 / self.options.lease:.2f} leases"),
                 ("removed by gc", swept.json["objects_removed"] if swept.code == 0 else "-"),
                 ("left: objects, of which unneeded", ", ".join(str(verified.json[name]) for name in
                                                              ("objects", "unneeded")) if verified.out else "-"),
                 ("violations", len(self.wrong))]
        slowest = sorted(self.recoveries, key=lambda one: -one[0])[:self.options.slowest]
        rows += [(f"recovery of {seconds:.1f} s", "; ".join(asked)) for seconds, _, asked in slowest]
        return "\n".join(f"| {name} | {value} |" for name, value in rows)


async def run(options, directory, model):
    """The violations, one sentence each, and the table."""
    chaos = Chaos(options, directory, model)
    with chaos.network:
        try:
            await chaos.disturbed()
            alone = await chaos.undisturbed()
            table = chaos.table(*chaos.check(alone))
            return chaos.wrong, table, chaos
        finally:
            for worker in getattr(chaos, "workers", []):
                worker.closing = True
                worker.signal(signal.SIGKILL)
            if chaos.bucket is not None:
                chaos.bucket.__exit__()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for field in dataclasses.fields(Options):
        kind = type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=f"({field.default})")
    parser.add_argument("--keep", type=Path, help="directory for stores and logs, kept")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = vars(parser.parse_args())
    keep = args.pop("keep")
    if args["network"] == "namespaces" and not args["inside"]:
        if os.geteuid() != 0 or not all(map(shutil.which, ("haproxy", "ip", "tc"))):
            sys.exit("Namespaces need root, haproxy, ip and tc (Debian: haproxy, iproute2); without them there is "
                     "--network loopback.")
        sys.exit(subprocess.run(["unshare", "-n", "-m", sys.executable, *sys.argv, "--inside"]).returncode)
    del args["inside"]
    with contextlib.ExitStack() as stack:
        directory = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="torpor-chaos-")))
        model = make_tiny_model(directory / "model")
        wrong, table, _ = asyncio.run(run(Options(**args), directory, model))
    print(table)
    print(*wrong[:50], sep="\n", end="\n" if wrong else "", file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
