"""What tests/test_ray.py runs with Ray's Python: a cluster of one head and three nodes, whose replicas share a bucket.

    .sdks/ray/bin/python tests/ray_fleet.py MODEL DIRECTORY BUCKET

Agents have turns all the time. Meanwhile two replicas become four, two of these and then a node with all of its
replicas are killed, and one replica is left. Prints what was acknowledged as JSON: agent to [prompt, answer] each.
"""

import collections
import concurrent.futures
import http.client
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import ray
from ray import serve
from ray.cluster_utils import Cluster

import torpor.ray
from fleet_turns import body_of, path_of, prompt_of

MODEL, DIRECTORY, BUCKET = sys.argv[1:]
AGENTS = [f"agent-{number}" for number in range(int(os.environ.get("TORPOR_RAY_AGENTS", 100)))]
CLIENTS, SEED, PATIENCE, LEASE = 16, 18, 240.0, 8


class Node(torpor.ray.Worker):
    """A replica with the store of its node, whose answers name its process."""

    def __init__(self, model, **settings):
        node = ray.get_runtime_context().get_node_id()
        super().__init__(model, store=str(Path(DIRECTORY) / node), **settings)

    def __serve_build_asgi_app__(self):
        application = super().__serve_build_asgi_app__()

        async def named(scope, receive, send):
            async def say(message):
                if message["type"] == "http.response.start":
                    node = ray.get_runtime_context().get_node_id()
                    who = [(b"x-process", str(os.getpid()).encode()), (b"x-node", node.encode())]
                    message = {**message, "headers": [*message["headers"], *who]}
                await send(message)

            await application(scope, receive, say)

        return named


def scaling():
    def wanted(requests, held):
        config = SimpleNamespace(target_ongoing_requests=8)
        return torpor.ray.replicas_wanted(SimpleNamespace(
            total_num_requests=requests, aggregated_metrics={"kv_held": held}, config=config, policy_state={},
            capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=6))[0]

    assert [wanted(requests, {}) for requests in (0, 8, 9, 100)] == [1, 1, 2, 6]
    assert wanted(1, {"a": 0.6, "b": 0.1}) == 1 and wanted(1, {"a": 0.9, "b": 0.9}) == 3


class Clients:
    """Turns of all agents, each asked for until it is answered."""

    def __init__(self, port):
        self.port, self.lock = port, threading.Lock()
        self.acknowledged = {agent: [] for agent in AGENTS}
        self.met = collections.defaultdict(set)  # replicas' processes, by agent
        self.nodes = {}                          # of each process
        self.statuses, self.slowest = collections.Counter(), 0.0
        self.moved = 0

    def attempt(self, agent, number):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=90)
        headers = {"x-torpor-agent": agent, "idempotency-key": f"{agent}-{number}", "content-type": "application/json"}
        try:
            connection.request("POST", path_of(agent, number), json.dumps(body_of(agent, number, SEED)), headers)
            answer = connection.getresponse()
            return answer.status, answer.getheader("x-process"), answer.getheader("x-node"), answer.read()
        finally:
            connection.close()

    def turn(self, agent):
        number, began = len(self.acknowledged[agent]), time.monotonic()
        while True:
            try:
                status, process, node, body = self.attempt(agent, number)
            except (OSError, http.client.HTTPException) as error:
                status, body = type(error).__name__, b""
            with self.lock:
                self.statuses[status] += 1
            if status in (200, 201):
                break
            assert status not in (400, 404, 413), f"{agent}: turn {number}: {status} {body!r}"
            assert time.monotonic() < began + PATIENCE, f"{agent}: turn {number} is not answered: {status} {body!r}"
            time.sleep(random.uniform(0.1, 0.4))
        with self.lock:
            self.acknowledged[agent].append((prompt_of(agent, number, SEED), json.loads(body)["text"]))
            self.met[agent].add(process)
            self.nodes[process] = node
            self.slowest = max(self.slowest, time.monotonic() - began)

    def all(self, meanwhile=None):
        """A turn of each agent; after a quarter of them `meanwhile` happens. The processes that answered the rest."""
        self.met.clear()
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            turns = [pool.submit(self.turn, agent) for agent in AGENTS]
            if meanwhile is not None:
                while sum(turn.done() for turn in turns) < len(turns) // 4:
                    time.sleep(0.02)
                meanwhile()
            for turn in turns:
                turn.result()
        return {process for met in self.met.values() for process in met}


def main():
    scaling()
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    torpor.ray.Worker = Node
    small = {"object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    nodes = [cluster.add_node(num_cpus=2, object_store_memory=80 << 20) for _ in range(3)]
    cluster.wait_for_nodes()
    ray.init(cluster.address, log_to_driver=False)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})  # nodes share addresses

    def scale(replicas):
        app = torpor.ray.app({"model": MODEL, "authenticate": False, "min_replicas": replicas,
                              "max_replicas": replicas, "threads": 1, "drain_timeout": 5, "memory_budget": "1GB",
                              "remote": BUCKET, "lease": LEASE})
        app._bound_deployment._version = "1"  # else serve.run takes it for other code, and replaces all replicas
        serve.run(app, name="torpor")

    def running():
        return serve.status().applications["torpor"].deployments["torpor"].replica_states.get("RUNNING", 0)

    def until(replicas):
        deadline = time.monotonic() + 240
        while running() != replicas:
            assert time.monotonic() < deadline, serve.status()
            time.sleep(0.2)

    clients = Clients(port)

    def tell(what):
        slowest, clients.slowest = clients.slowest, 0.0
        print(f"{what}; slowest turn {slowest:.1f} s; {dict(clients.statuses)}", file=sys.stderr, flush=True)
        clients.statuses.clear()

    scale(2)
    until(2)
    first = clients.all()
    met = {agent: set(processes) for agent, processes in clients.met.items()}
    assert clients.all() == first and len(first) == 2, "not two replicas"
    assert dict(clients.met) == met, "an agent met another replica though none came or went"
    tell("two replicas")

    clients.all(lambda: scale(4))
    until(4)
    processes = clients.all()
    assert len(processes) == 4 and len({clients.nodes[process] for process in processes}) > 1, processes
    tell("four replicas")

    killed = sorted(processes)[:2]
    clients.all(lambda: [os.kill(int(process), signal.SIGKILL) for process in killed])
    until(4)
    processes = clients.all()
    assert len(processes) == 4 and not processes & set(killed)
    tell("two replicas were killed")

    node = collections.Counter(clients.nodes[process] for process in processes).most_common(1)[0][0]
    [lost] = [one for one in nodes if one.node_id == node]
    clients.all(lambda: cluster.remove_node(lost, allow_graceful=False))
    until(4)
    processes = clients.all()
    assert len(processes) == 4 and node not in {clients.nodes[process] for process in processes}
    tell("a node was killed")

    clients.all(lambda: scale(1))
    until(1)
    assert len(clients.all()) == 1
    tell("one replica is left")
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(clients.acknowledged))


if __name__ == "__main__":
    main()
