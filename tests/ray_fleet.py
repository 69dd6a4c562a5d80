"""What tests/test_ray.py runs with Ray's Python: agents on two replicas, one of which is killed.

    .sdks/ray/bin/python tests/ray_fleet.py MODEL STORE
"""

import http.client
import json
import os
import signal
import socket
import sys
import time
from types import SimpleNamespace

import ray
from ray import serve

import torpor.ray

MODEL, STORE = sys.argv[1:]
AGENTS = [f"agent-{number}" for number in range(12)]


class Named(torpor.ray.Worker):
    """A replica whose answers name its process."""

    def __serve_build_asgi_app__(self):
        application = super().__serve_build_asgi_app__()

        async def named(scope, receive, send):
            async def say(message):
                if message["type"] == "http.response.start":
                    pid = str(os.getpid()).encode()
                    message = {**message, "headers": [*message["headers"], (b"x-process", pid)]}
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


def main():
    scaling()
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]

    def chat(agent):
        """Status, process, tokens that were not computed."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"x-torpor-agent": agent})
        answer = connection.getresponse()
        said = json.loads(answer.read())
        cached = said["usage"]["prompt_tokens_details"]["cached_tokens"] if answer.status == 200 else 0
        return answer.status, answer.getheader("x-process"), cached

    torpor.ray.Worker = Named
    ray.init(num_cpus=3, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(torpor.ray.app({"model": MODEL, "store": STORE, "authenticate": False, "min_replicas": 2, "threads": 1,
                              "drain_timeout": 5, "memory_budget": "1GB"}), name="torpor")
    first = {agent: chat(agent) for agent in AGENTS}
    again = {agent: chat(agent) for agent in AGENTS}
    assert all(status == 200 for status, _, _ in [*first.values(), *again.values()]), (first, again)
    assert all(again[agent][1] == first[agent][1] and again[agent][2] > 0 for agent in AGENTS), (first, again)
    processes = {process for _, process, _ in first.values()}
    assert len(processes) == 2, "all on one replica"
    print("one agent met one replica", flush=True)

    killed = min(processes)
    os.kill(int(killed), signal.SIGKILL)
    deadline = time.monotonic() + 120
    for agent in AGENTS:
        while True:
            status, process, cached = chat(agent)
            if status == 200:
                break
            assert time.monotonic() < deadline, f"{agent}: {status}"
            time.sleep(0.2)
        assert process != killed and cached > 0, "it goes on from what the killed one saved"
    print("a killed replica's agents went on", flush=True)
    serve.shutdown()
    ray.shutdown()


main()
