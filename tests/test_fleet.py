"""Two servers behind HAProxy or Envoy, as deploy/ has them (`make fleet`)."""

import contextlib
import http.client
import http.server
import os
import signal
import subprocess
import threading
import time

import pytest

from conftest import Torpor
from s3 import free_port
from serving import Server
from test_deploy import DEPLOY, ENVOY, envoy_config, haproxy_env, needs_haproxy, pod_proxy

pytestmark = [pytest.mark.skipif(not os.environ.get("TORPOR_FLEET"), reason="make fleet runs it"), needs_haproxy]


def until(holds, seconds=20):
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if found := holds():
                return found
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0.05)


@contextlib.contextmanager
def running(command, env):
    process = subprocess.Popen(list(map(str, command)), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


class Fleet:
    """Two servers, with one file of keys and a store each, behind a balancer."""

    def __init__(self, kind, directory, model, stack):
        self.directory, self.model, self.stack = directory, model, stack
        self.ports, self.port = [free_port(), free_port()], free_port()
        self.workers = [None, None]
        for number in (0, 1):
            self.start(number)
        if kind == "haproxy":
            command = ["haproxy", "-db", "-f", DEPLOY / "haproxy.cfg"]
        else:
            command = [ENVOY, "--log-level", "error", "--use-dynamic-base-id", "--concurrency", "1",
                       "-c", envoy_config(directory, self.port, self.ports)]
        workers = {f"TORPOR_WORKER_{number}": f"127.0.0.1:{port}" for number, port in enumerate(self.ports)}
        stack.enter_context(running(command, haproxy_env(TORPOR_BIND=f"127.0.0.1:{self.port}", **workers)))
        until(lambda: self.ask("GET", "/health").status == 200)

    def start(self, number):
        torpor = Torpor(self.directory / f"store-{number}", self.model)
        server = Server(torpor, self.directory, "--port", self.ports[number], host=False)
        self.workers[number] = self.stack.enter_context(server)

    def ask(self, method, path, body=None, **headers):
        """Through the balancer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.workers[0].ask(method, path, body, key=self.workers[0].key, headers=named, connection=connection)

    def chat(self, agent, **more):
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, **more}
        return self.ask("POST", "/v1/chat/completions", body, x_torpor_agent=agent)

    def held(self, number):
        """The agents that a worker has."""
        worker = self.workers[number]
        return {one["agent"] for one in worker.ask("GET", "/torpor/v1/agents").json()["agents"]}


@pytest.mark.parametrize("kind", ["haproxy", "envoy"])
def test_an_agent_meets_one_worker_until_that_one_is_gone(kind, tmp_path, tiny_model):
    agents = {f"agent-{number}" for number in range(16)}
    with contextlib.ExitStack() as stack:
        fleet = Fleet(kind, tmp_path, tiny_model, stack)
        for agent in sorted(agents) * 2:
            assert fleet.chat(agent).status == 200
        for agent in agents:  # by its path as by its header
            answer = fleet.ask("POST", f"/torpor/v1/agents/{agent}/turn", {"prompt": "and", "max_tokens": 2})
            assert answer.status == 200, answer.text
        assert fleet.ask("GET", "/v1/models?torpor-worker=127.0.0.1:1").status == 200, "no such worker: any will do"
        first, second = fleet.held(0), fleet.held(1)
        assert first and second and first | second == agents and not first & second

        # Its worker drains: the turn under way ends, and the next one goes to the other.
        mine, said = min(first), []
        long = {"max_tokens": 1500, "stream": True, "logit_bias": {"2": -100}}
        reader = threading.Thread(target=lambda: said.append(fleet.chat(mine, **long)))
        reader.start()
        until(lambda: fleet.workers[0].metric("torpor_turns_running") == 1)
        fleet.workers[0].signal(signal.SIGTERM)
        until(lambda: fleet.chat(mine).status == 200 and mine in fleet.held(1))
        reader.join()
        assert said[0].status == 200 and said[0].text.rstrip().endswith("[DONE]")
        fleet.workers[0].process.wait(60)

        # It comes back, and so do its agents.
        fleet.start(0)
        until(lambda: fleet.chat(mine).status == 200
              and fleet.workers[0].metric('torpor_turns_total{reason="length"}'))

        # It is killed: the next turns of its agents go to the other at once. Nobody else moves.
        fleet.workers[0].signal(signal.SIGKILL)
        fleet.workers[0].process.wait()
        for agent in agents:
            assert fleet.chat(agent).status == 200
        assert fleet.held(1) == agents


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """A worker that has no agent: the other one has it. Says its port where it is asked as the other one."""

    def do_POST(self):
        mine, others = self.server.server_port, self.server.other
        first = "torpor-worker" not in self.path
        self.send_response(307 if first else 200)
        if first:
            self.send_header("location", f"http://127.0.0.1:{others}{self.path}")
        body = b"" if first else str(mine).encode()
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):  # /health
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def test_a_client_that_is_sent_on_comes_back_to_haproxy_which_knows_the_worker(tmp_path):
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)) for _ in (0, 1)]
        ports = [worker.server_port for worker in workers]
        for worker, other in zip(workers, reversed(ports)):
            worker.other = other
            threading.Thread(target=worker.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
            stack.callback(worker.shutdown)
        port = free_port()
        addresses = {f"TORPOR_WORKER_{number}": f"127.0.0.1:{one}" for number, one in enumerate(ports)}
        env = haproxy_env(TORPOR_BIND=f"127.0.0.1:{port}", **addresses)
        stack.enter_context(running(["haproxy", "-db", "-f", DEPLOY / "haproxy.cfg"], env))

        def ask(path):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("POST", path, b"{}", {"x-torpor-agent": "ada"})
            answer = connection.getresponse()
            return answer.status, answer.getheader("location"), answer.read()

        until(lambda: ask("/v1/messages")[0] == 307)
        for path in ("/v1/messages", "/v1/messages?beta=true"):
            status, location, _ = ask(path)
            assert status == 307 and location.startswith(path) and location[len(path)] in "?&"
            other = int(location.rpartition(":")[2])
            assert other in ports and ask(location) == (200, None, str(other).encode())


def test_a_pods_metrics_need_no_key_and_all_else_does(tmp_path, tiny):
    with Server(tiny, tmp_path) as server:
        port = free_port()
        env = haproxy_env(TORPOR_BIND=f"127.0.0.1:{port}", TORPOR_SERVER=f"127.0.0.1:{server.port}",
                          TORPOR_METRICS_KEY=server.key)
        with running(["haproxy", "-db", "-f", pod_proxy(tmp_path)], env):
            def ask(path, key=""):
                return server.ask("GET", path, key=key, connection=http.client.HTTPConnection("127.0.0.1", port))

            until(lambda: ask("/health").status == 200)
            assert "torpor_turns_running 0" in ask("/metrics").text
            assert ask("/v1/models").status == 401 and ask("/v1/models", server.key).status == 200
