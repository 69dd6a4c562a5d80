"""Many connections, streams that hardly move and turns at once; kill -9 under load; clients that are cut and ask again.

`make load` runs it at full size (TORPOR_LOAD=1: ten minutes, 1,000 connections, 100 kills) and looks at the memory.
Else it takes seconds.
"""

import contextlib
import hashlib
import http.client
import itertools
import json
import os
import random
import re
import select
import signal
import socket
import threading
import time

import pytest

from conftest import MODEL, Torpor
from serving import Server

FULL = os.environ.get("TORPOR_LOAD") == "1"
CONNECTIONS, STREAMS, TALKERS, TURNS = (1000, 200, 20, None) if FULL else (100, 10, 8, 40)
SECONDS = float(os.environ.get("TORPOR_LOAD_SECONDS", 600))
KILLS = int(os.environ.get("TORPOR_LOAD_KILLS", 100)) if FULL else 3
AGENTS = "/torpor/v1/agents"


class Talker(threading.Thread):
    """Turns of one agent after another, whole and streamed, until told to stop. `told` maps each agent to the tokens
    that it held by the last answer that was told; `failed` keeps what went wrong."""

    def __init__(self, server, name, turns=None, max_tokens=8):
        super().__init__(daemon=True)
        self.server, self.name_of, self.turns, self.max_tokens = server, name, turns, max_tokens
        self.told, self.failed, self.answers = {}, [], 0
        self.stop = threading.Event()
        self.random = random.Random(name)

    def run(self):
        generation, agent = 0, None
        while not self.stop.is_set() and self.answers != self.turns:
            if agent is None:
                generation += 1
                agent = f"{self.name_of}-{generation}"
                path, body = AGENTS, {"agent": agent}
            else:
                path, body = f"{AGENTS}/{agent}/turn", {}
            body |= {"prompt": f"Turn {self.answers} of {self.random.randrange(10**6)}.", "max_tokens": self.max_tokens,
                     "stream": self.random.random() < 0.5}
            answer, begun = None, time.monotonic()
            try:
                answer = self.server.ask("POST", path, body)
                result = answer.events()[-1] if body["stream"] else answer.json()
                held = result["tokens"]["context"]
            except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError) as error:
                if not self.stop.is_set():
                    self.failed.append((error, agent, f"after {time.monotonic() - begun:.0f} s",
                                        answer and (answer.status, answer.text[:500])))
                return
            self.told[agent] = held
            self.answers += 1
            if held > 3000:
                agent = None


class IdleStream:
    """A long answer that hardly anybody reads: few tokens, but more bytes than all buffers on its way hold."""

    def __init__(self, server, path, number):
        body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": f"Stream {number}."}],
                           "logprobs": True, "top_logprobs": 20, "max_tokens": 400, "seed": number,
                           "stream": True}).encode()
        self.request = (f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
                        f"authorization: Bearer {server.key}\r\n\r\n").encode() + body
        self.path, self.ended, self.next_take = str(path), 0, 0
        self.open()

    def open(self):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(self.path)
        self.socket.sendall(self.request)
        self.taken = b""

    def wait(self, seconds):
        """Whether there is something to read."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return poll.poll(seconds * 1000) != []

    def take(self, size=65536):
        """Reads a little every 20 seconds, if there is anything. What has ended is opened again. Who reads nothing for
        two minutes is cut off, and a UNIX socket takes nothing more until most of what it holds was read."""
        if time.monotonic() < self.next_take:
            return
        with contextlib.suppress(BlockingIOError):
            piece = self.socket.recv(size, socket.MSG_DONTWAIT)
            self.next_take = time.monotonic() + 20
            assert piece and (self.taken or piece.startswith(b"HTTP/1.1 200 ")), piece
            self.taken = (self.taken + piece)[-size:]
            if self.taken.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                self.ended += 1
                self.socket.close()
                self.open()


def resident_bytes(process):
    with open(f"/proc/{process.pid}/status") as status:
        return int(re.search(r"VmRSS:\s+(\d+) kB", status.read())[1]) * 1024


def test_load_loses_no_turn_and_keeps_health_and_memory(tiny, tmp_path):
    path = tmp_path / "torpor.sock"
    most = CONNECTIONS + 2 * (STREAMS + TALKERS) + 20  # one that was closed counts until the server has seen its end
    with Server(tiny, tmp_path, "--queue", STREAMS + TALKERS, "--max-connections", most, "--memory-budget",
                "64MB", "--idle-timeout", "600", "--log", tmp_path / "log", "--socket", path) as server, \
            contextlib.ExitStack() as stack:
        idle = [stack.enter_context(contextlib.closing(server.connection())) for _ in range(CONNECTIONS)]
        for connection in idle:
            connection.connect()
        streams = [IdleStream(server, path, i) for i in range(STREAMS)]
        for stream in streams:
            stack.callback(lambda stream=stream: stream.socket.close())
        for stream in streams:
            while not stream.taken and not stream.wait(1):
                for other in streams:
                    other.take()
            stream.take()
        talkers = [Talker(server, f"talker{i}", TURNS and TURNS // TALKERS) for i in range(TALKERS)]
        for talker in talkers:
            talker.start()
        until = time.monotonic() + SECONDS
        health, resident, in_turn = [], [], itertools.cycle(idle)
        while any(talker.is_alive() for talker in talkers) and (not FULL or time.monotonic() < until):
            if failed := [talker.failed for talker in talkers if talker.failed]:
                asked = (f"{AGENTS}", "/torpor/v1/memory", "/torpor/v1/now", "/metrics")
                pytest.fail("\n".join([str(failed), *(server.ask("GET", path).text for path in asked)]))
            for connection in itertools.islice(in_turn, 20):
                begin = time.monotonic()
                connection.request("GET", "/health")
                answer = connection.getresponse()
                assert (answer.status, json.loads(answer.read())["ready"]) == (200, True)
                health.append(time.monotonic() - begin)
            for stream in streams:
                stream.take()
            resident.append(resident_bytes(server.process))
        for talker in talkers:
            talker.stop.set()
            talker.join()
            assert talker.failed == [] and talker.answers > 0
        held = {agent["agent"]: agent["tokens"] for agent in server.ask("GET", AGENTS).json()["agents"]}
        for talker in talkers:
            assert {agent: held.get(agent) for agent in talker.told} == talker.told
        health.sort()
        turns = sum(talker.answers for talker in talkers)
        half = resident[len(resident) // 2]
        print(f"\n{turns} turns, {sum(stream.ended for stream in streams)} idle streams to their end; /health "
              f"p50 {health[len(health) // 2] * 1000:.1f} ms, p99 {health[len(health) * 99 // 100] * 1000:.1f} ms of "
              f"{len(health)}; memory {half / 1e6:.0f} MB at half time, {resident[-1] / 1e6:.0f} MB at the end")
        stack.close()
        while server.metric("torpor_turns_running") != 0:
            pass
        assert server.stop() == 0
    tiny("verify").ok()
    assert not FULL or resident[-1] < 1.05 * half


def test_a_key_whose_clients_read_nothing_leaves_others_their_places(tiny, tmp_path):
    path = tmp_path / "torpor.sock"
    with Server(tiny, tmp_path, "--queue", "4", "--socket", path) as server, contextlib.ExitStack() as stack:
        other = "sk-other"
        with server.keys.open("a") as keys:
            keys.write(f"acme:laptop:{hashlib.sha256(other.encode()).hexdigest()}\n")
        server.signal(signal.SIGHUP)
        while server.chat("Hello?", key=other).status == 401:
            pass
        for number in range(2):  # half of the places
            stream = IdleStream(server, path, number)
            stack.callback(stream.socket.close)
            while not stream.taken:
                stream.wait(10)
                stream.take()
        refused = server.chat("Hello?")
        assert refused.status == 429 and "retry-after" in refused.headers
        assert server.chat("Hello?", key=other).status == 200


def test_every_answered_turn_survives_kill_9(tiny, tmp_path):
    rng = random.Random(3)
    told, answered = {}, 0
    for kill in range(KILLS):
        with Server(tiny, tmp_path, "--memory-budget", "2MB") as server:
            talkers = [Talker(server, f"kill{kill}-{i}", max_tokens=rng.randrange(1, 40)) for i in range(6)]
            for talker in talkers:
                talker.start()
            while not any(talker.answers for talker in talkers):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.5))
            for talker in talkers:
                talker.stop.set()  # what fails from now on fails because of the kill
            server.process.kill()
            assert server.process.wait() == -9
            for talker in talkers:
                talker.join()
                assert talker.failed == []
                told |= talker.told
                answered += talker.answers
        tiny("verify").ok()
        held = {one["agent"]: one["cache_size"] for one in tiny("ls", "--json").ok().json}
        # What was told last, or one turn more that was saved and not told.
        assert all(held[agent] >= tokens for agent, tokens in told.items())
    print(f"\n{answered} answered turns, {KILLS} kills")
    with Server(tiny, tmp_path) as server:  # and each goes on from there
        for agent in rng.sample(sorted(told), min(5, len(told))):
            answer = server.ask("POST", f"{AGENTS}/{agent}/turn", {"prompt": "And then?", "max_tokens": 2}).json()
            assert answer["tokens"]["cached"] >= told[agent], agent
        assert server.stop() == 0


@pytest.mark.skipif(not FULL, reason="reads a prompt of 4,000 tokens on the real model; `make load` runs it")
def test_a_client_that_is_cut_and_asks_again_ten_times_has_its_prompt_computed_once(tmp_path, words):
    """On the real model, which takes seconds to read the prompt; each try is cut a tenth further on."""
    torpor, tokens, tries = Torpor(tmp_path / "store", MODEL), 4000, 10
    with Server(torpor, tmp_path) as server:
        def computed():
            return server.ask("GET", "/torpor/v1/now").json()["work"]["prompt_tokens"]

        def ended():
            metrics = server.ask("GET", "/metrics").text
            return sum(map(float, re.findall(r"^torpor_turns_total{.*} (\S+)$", metrics, re.MULTILINE)))

        body = {"model": MODEL.name, "max_tokens": 2, "stream": True,
                "messages": [{"role": "user", "content": words(tokens)}]}
        for i in range(tries):
            begun, before = computed(), ended()
            connection = server.connection()
            server.send(connection, "POST", "/v1/messages", body)
            while computed() - begun < tokens // tries * 0.6 and ended() == before:
                pass
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
            while ended() == before:
                pass
        cut = server.metric('torpor_turns_total{reason="cancelled"}') or 0  # fewer where a few chunks are all
        answer = server.ask("POST", "/v1/messages", body)
        assert answer.events()[-1]["type"] == "message_stop"
        usage = answer.events()[0]["message"]["usage"]
        prompt = usage["input_tokens"] + usage["cache_read_input_tokens"]
        work = computed()
        print(f"\n{work} tokens computed for a prompt of {prompt}, cut {cut:.0f} times: {work / prompt:.3f} prefills")
        assert prompt > tokens and work <= 1.1 * prompt
        assert server.stop() == 0


def test_a_client_that_goes_at_the_first_byte_and_asks_again_has_its_prompt_computed_once(tiny, tmp_path, words):
    """Wherever the turn is when the server sees it: in the prompt, in the answer, or at its end."""
    tries = 5
    with Server(tiny, tmp_path, "--max-stall", "1") as server:
        def ended():
            metrics = server.ask("GET", "/metrics").text
            return sum(map(float, re.findall(r"^torpor_turns_total{.*} (\S+)$", metrics, re.MULTILINE)))

        body = {"model": "tiny", "max_tokens": 2, "stream": True, "messages": [{"role": "user", "content": words(1500)}]}
        for i in range(tries):
            connection = server.connection()
            server.send(connection, "POST", "/v1/messages", body)
            assert connection.sock.recv(1)
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
            while ended() == i:
                pass
        for _ in range(2):  # and once more after an answer
            usage = server.ask("POST", "/v1/messages", body).events()[0]["message"]["usage"]
        prompt = usage["input_tokens"] + usage["cache_read_input_tokens"]
        work = server.ask("GET", "/torpor/v1/now").json()["work"]["prompt_tokens"]
        # The last token of a prompt is computed again by each turn that comes to its answer.
        assert prompt > 1500 and prompt <= work <= prompt + tries + 1
        assert server.stop() == 0
