"""Where chaos.py's processes are: all on this machine's loopback, or each in a network namespace of its own."""

import asyncio
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import s3
from conftest import ROOT
from fault_relay import Relay, ask

KEY = "sk-fleet-of-the-tests"


def keys_file(directory):
    """A file with KEY, whose agents the command line sees."""
    path = Path(directory) / "api-keys"
    path.write_text(f"local:fleet:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
    return path


class Loopback:
    """Clients pick a worker themselves, by consistent hashing and health, and reach it through a relay of its own."""

    def __init__(self, run):
        self.run, self.fronts = run, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def host(self, name, side):
        """The address of "bucket", "balancer", "worker-N" or "clients"; those are where relays are, too."""
        return "127.0.0.1"

    def inside(self, name, command):
        return list(map(str, command))

    async def start_bucket_side(self, port):
        """Where relays find the bucket."""
        return "127.0.0.1", port

    async def start_front(self, workers):
        for worker in workers:
            relay = Relay(("127.0.0.1", worker.port), f"{self.run.options.seed} {worker.number} front",
                          lose=self.run.options.lose)
            self.fronts.append(await relay.start())

    def advertised(self, worker):
        return f"http://127.0.0.1:{self.fronts[worker.number].port}"

    def pick(self, agent, tries):
        """The worker that a client asks, and the port where it does."""
        score = lambda worker: hashlib.sha256(f"{agent} {worker.number}".encode()).digest()
        ranked = sorted(self.run.workers, key=lambda worker: (not worker.up, score(worker)))
        worker = ranked[tries % 2]
        return worker, self.fronts[worker.number].port

    def sent_on(self, location, path):
        """Worker, port and path of a 307."""
        port = int(location.split("/")[2].rpartition(":")[2])
        return next(one for one in self.run.workers if self.fronts[one.number].port == port), port, path

    def answered_by(self, answer, worker):
        return worker

    async def is_healthy(self, worker):
        return (await ask(self.fronts[worker.number].port, "GET", "/health", timeout=1.0)).status == 200

    @contextlib.asynccontextmanager
    async def parted(self, worker, side, how):
        relay = worker.bucket if side == "back" else self.fronts[worker.number]
        async with relay.one_fault:
            relay.set(how)
            yield
            relay.set("open")


def call(*words):
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, words))}: {done.stderr.strip()}")


class Namespaces:
    """A namespace for the bucket, for HAProxy and for each worker. Clients and relays are in the one around them.

    Two bridges, "back" to the bucket and "front" to the clients. `tc tbf` limits each link at both ends. toxiproxy
    delays what goes between relays and bucket. HAProxy places requests, as deploy/haproxy.cfg has it. A partition takes
    a worker's link down: packets are lost, and TCP sends them again."""

    NETS = {"front": "10.77.1", "back": "10.77.2"}
    PORT = 8080

    def __init__(self, run):
        self.run, self.numbers, self.processes = run, {"clients": 1, "bucket": 2, "balancer": 3}, []
        self.numbers.update({f"worker-{number}": 10 + number for number in range(run.options.workers)})

    def host(self, name, side):
        return f"{self.NETS[side]}.{self.numbers[name]}"

    def __enter__(self):
        Path("/run/netns").mkdir(exist_ok=True)
        call("mount", "-t", "tmpfs", "none", "/run/netns")  # of this mount namespace: all goes with it
        call("ip", "link", "set", "lo", "up")
        for side, net in self.NETS.items():
            call("ip", "link", "add", side, "type", "bridge")
            call("ip", "address", "add", f"{net}.1/24", "dev", side)
            call("ip", "link", "set", side, "up")
        for name in self.numbers:
            if name == "clients":
                continue
            call("ip", "netns", "add", name)
            call("ip", "-n", name, "link", "set", "lo", "up")
            for side in {"bucket": ["back"], "balancer": ["front"]}.get(name, ["front", "back"]):
                self.link(name, side)
        return self

    def link(self, name, side):
        outer = f"{name}-{side}"
        call("ip", "link", "add", outer, "type", "veth", "peer", "name", side, "netns", name)
        call("ip", "link", "set", outer, "master", side)
        call("ip", "link", "set", outer, "up")
        call("ip", "-n", name, "address", "add", f"{self.host(name, side)}/24", "dev", side)
        call("ip", "-n", name, "link", "set", side, "up")
        limit = ["root", "tbf", "rate", f"{self.run.options.gbits:g}gbit", "burst", "256kb", "latency", "50ms"]
        call("tc", "qdisc", "add", "dev", outer, *limit)
        call("tc", "-n", name, "qdisc", "add", "dev", side, *limit)

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def inside(self, name, command):
        return ["ip", "netns", "exec", name, *map(str, command)]

    def spawn(self, command, env=None):
        with open(self.run.directory / "network.log", "ab") as log:
            self.processes.append(subprocess.Popen(list(map(str, command)), env={**os.environ, **(env or {})},
                                                   stdout=log, stderr=log))

    async def start_bucket_side(self, port):
        listen, control = s3.free_port(), s3.free_port()
        config = self.run.directory / "toxiproxy.json"
        config.write_text(json.dumps([{"name": "bucket", "listen": f"127.0.0.1:{listen}", "enabled": True,
                                       "upstream": f"{self.host('bucket', 'back')}:{port}"}]))
        self.spawn([s3.program("toxiproxy"), "-port", control, "-config", config], {"LOG_LEVEL": "error"})
        for stream in ("upstream", "downstream"):
            toxic = {"type": "latency", "stream": stream,
                     "attributes": {"latency": int(self.run.options.delay), "jitter": int(self.run.options.delay / 3)}}
            await asyncio.to_thread(self.control, f"http://127.0.0.1:{control}/proxies/bucket/toxics", toxic)
        return "127.0.0.1", listen

    @staticmethod
    def control(url, body):
        for tries in range(100):
            try:
                urllib.request.urlopen(url, json.dumps(body).encode(), timeout=5).close()
                return
            except urllib.error.URLError as error:
                if tries == 99 or isinstance(error, urllib.error.HTTPError):
                    raise
            time.sleep(0.1)

    async def start_front(self, workers):
        text = (ROOT / "deploy" / "haproxy.cfg").read_text()
        for line in ('  use-server worker-1 if { var(txn.worker) -m str "${TORPOR_WORKER_1}" }\n',
                     '  server worker-1 "${TORPOR_WORKER_1}"'):
            assert text.count(line) == 1
            more = [line.rstrip("\n").replace("worker-1", f"worker-{number}").replace("WORKER_1", f"WORKER_{number}")
                    for number in range(2, len(workers))]
            text = text.replace(line, "\n".join([line.rstrip("\n"), *more]) + "\n")
        text += "  http-after-response set-header x-worker %s\n"
        config = self.run.directory / "haproxy.cfg"
        config.write_text(text)
        env = {f"TORPOR_WORKER_{worker.number}": self.address(worker) for worker in workers}
        here = f"{self.host('balancer', 'front')}:{self.PORT}"
        self.spawn(self.inside("balancer", ["haproxy", "-db", "-f", config]), {"TORPOR_BIND": here, **env})
        host, port = here.split(":")
        options = self.run.options
        self.front = await Relay((host, int(port)), f"{options.seed} front", lose=options.lose).start()

    def address(self, worker):
        return f"{self.host(f'worker-{worker.number}', 'front')}:{worker.port}"

    def advertised(self, worker):
        return f"http://{self.address(worker)}"

    def pick(self, agent, tries):
        return self.run.last_at.get(agent), self.front.port

    def sent_on(self, location, path):
        worker = next(one for one in self.run.workers if location.endswith(f"torpor-worker={self.address(one)}"))
        return worker, self.front.port, location

    def answered_by(self, answer, worker):
        name = answer.header(b"x-worker") or ""
        return self.run.workers[int(name.removeprefix("worker-"))] if name.startswith("worker-") else worker

    async def is_healthy(self, worker):
        """Whether HAProxy thinks so."""
        answer = await ask(self.front.port, "GET", f"/health?torpor-worker={self.address(worker)}", timeout=1.0)
        return answer.status == 200 and self.answered_by(answer, None) is worker

    @contextlib.asynccontextmanager
    async def parted(self, worker, side, how):
        async with worker.bucket.one_fault if side == "back" else contextlib.nullcontext():
            if how == "cut" and side == "back":
                worker.bucket.set(how)
                yield
                worker.bucket.set("open")
                return
            outer = f"worker-{worker.number}-{side}"
            await asyncio.to_thread(call, "ip", "link", "set", outer, "down")
            yield
            await asyncio.to_thread(call, "ip", "link", "set", outer, "up")


NETWORKS = {"loopback": Loopback, "namespaces": Namespaces}
