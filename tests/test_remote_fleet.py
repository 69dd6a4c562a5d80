"""Agents in a bucket: one machine puts an agent to sleep, another wakes it. Machines are stores of their own."""

import contextlib
import http.client
import itertools
import os
import signal
import subprocess
import threading
import time

import pytest
from safetensors.numpy import load_file

import s3
from conftest import Torpor, held_ids
from serving import Server

AGENTS = "/torpor/v1/agents"
LEASE = 3  # seconds: a busy machine renews it in time
PREFIXES = itertools.count()


@pytest.fixture(scope="module")
def store():
    with s3.gofakes3() as server:
        yield server


class Fleet:
    """Machines that share one prefix of a bucket."""

    def __init__(self, directory, model, port):
        self.directory, self.model = directory, model
        self.url = f"s3://{s3.BUCKET}/fleet-{next(PREFIXES)}"
        self.env = s3.environment(port)
        self.remote = ["--remote", self.url, "--lease", str(LEASE)]

    def machine(self, name):
        return Torpor(self.directory / name, self.model)

    def run(self, name, agent, prompt, *args):
        return self.machine(name).run(agent, prompt, "--raw", *self.remote, *args, env=self.env)

    def serve(self, name, *args):
        home = self.directory / f"{name}-server"
        home.mkdir(exist_ok=True)
        port = s3.free_port()
        return Server(self.machine(name), home, "--no-auth", "--port", port, "--advertise", f"http://127.0.0.1:{port}",
                      *self.remote, *args, env=self.env, host=False)

    def objects(self):
        listed = Torpor(self.directory / "none", self.model)("remote", "ls", self.url, "--json", env=self.env).ok()
        return [one["key"] for one in listed.json["objects"]]


@pytest.fixture
def fleet(tmp_path, tiny_model, store):
    return Fleet(tmp_path, tiny_model, store.port)


def turn(server, prompt, agent="ada", key=None, **more):
    headers = {"idempotency-key": key} if key else {}
    return server.ask("POST", f"{AGENTS}/{agent}/turn", {"prompt": prompt, "max_tokens": 6, **more}, key="", headers=headers)


def begin(server, prompt, agent="ada", key=None):
    headers = {"idempotency-key": key} if key else {}
    body = {"agent": agent, "prompt": prompt, "max_tokens": 6}
    return server.ask("POST", AGENTS, body, key="", headers=headers)


def same_rows(one, other, agent):
    """Ids, segments and the rows past the last segment of two machines' copies are equal, bit for bit."""
    assert held_ids(one.store, agent) == held_ids(other.store, agent)
    first, second = (load_file(machine.agent_file(agent)) for machine in (one, other))
    assert first["rows"].tobytes() == second["rows"].tobytes()
    assert [path.name for path in one.segments()] == [path.name for path in other.segments()]
    assert [path.read_bytes() for path in one.segments()] == [path.read_bytes() for path in other.segments()]


def test_an_agent_sleeps_on_one_machine_and_goes_on_on_another_bit_for_bit(fleet, words):
    alone = fleet.machine("alone")
    expected = [alone.run("ada", prompt, "--raw", "--logprobs", 3).ok().json for prompt in (words(600), " More", " Yet more")]
    turns = [fleet.run(name, "ada", prompt, "--logprobs", 3).ok().json
             for name, prompt in (("a", words(600)), ("b", " More"), ("a", " Yet more"))]
    for one, other in zip(turns, expected):
        for member in ("text", "logprobs", "finish_reason"):
            assert one[member] == other[member]
    # Nothing that the other machine computed is computed again.
    for before, after in itertools.pairwise(turns):
        assert after["tokens"]["cached"] == before["tokens"]["context"]
    same_rows(fleet.machine("a"), alone, "ada")
    keys = fleet.objects()
    assert sum(key.startswith("segments/") for key in keys) == len(alone.segments())  # each once
    assert not [key for key in keys if key.startswith("nodes/")]  # nobody waits for machines that have ended


def test_an_agent_that_is_awake_on_another_machine_is_refused_in_one_sentence(fleet):
    fleet.run("a", "ada", "Hello").ok()
    chat = subprocess.Popen(fleet.machine("a").command("chat", "--model", fleet.model, "--agent", "ada", "--raw", "--json",
                                                       "--max-tokens", "4", *fleet.remote),
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, **fleet.env})
    try:
        chat.stdin.write(b"Still here\n")
        chat.stdin.flush()
        assert chat.stdout.readline()
        fleet.run("b", "ada", "Hello").fails("busy", "'ada' is awake on another worker")
    finally:
        chat.stdin.close()
        chat.stdout.read()
    assert chat.wait() == 0, chat.stderr.read()
    assert fleet.run("b", "ada", "Hello").ok().json["tokens"]["cached"] > 0


def test_what_a_killed_server_has_answered_goes_on_elsewhere_and_a_retry_is_not_run_again(fleet, words):
    alone = fleet.machine("alone")
    prompts = [words(300), "And then?", "The end."]
    with Server(alone, fleet.directory, "--no-auth") as server:
        expected = [begin(server, prompts[0]).json(), *(turn(server, prompt).json() for prompt in prompts[1:])]
    with fleet.serve("a") as one:
        first = begin(one, prompts[0], key="turn-1").json()
        second = turn(one, prompts[1], key="turn-2").json()
        one.signal(signal.SIGKILL)
    with fleet.serve("b") as other:
        began = time.monotonic()
        again = turn(other, prompts[1], key="turn-2")
        assert again.status == 200 and time.monotonic() - began < 2 * LEASE + 5
        assert again.json()["repeated"] is True and again.json()["text"] == second["text"]
        assert turn(other, prompts[0], key="turn-1").status == 400  # over long ago
        assert turn(other, "Something else", key="turn-2").status == 400
        third = turn(other, prompts[2], key="turn-3").json()
        assert third["tokens"]["cached"] == second["tokens"]["context"]
        assert other.stop() == 0
    assert [one["text"] for one in (first, second, third)] == [one["text"] for one in expected]
    same_rows(fleet.machine("b"), alone, "ada")


def test_a_server_that_is_started_again_after_a_kill_waits_for_no_lease_and_nobody_else_does(fleet):
    """With leases of an hour whoever waits for one never answers."""
    fleet.remote[-1] = "3600"
    with fleet.serve("b") as other:
        with fleet.serve("a") as killed:
            for agent in ("ada", "bea"):
                assert begin(killed, "Hello", agent).status == 201
            killed.signal(signal.SIGKILL)
        with fleet.serve("a") as again:
            assert turn(again, " you", "ada").json()["tokens"]["cached"] > 0
            assert turn(other, " you", "bea").json()["tokens"]["cached"] > 0
            assert sum(key.startswith("nodes/") for key in fleet.objects()) == 2
            assert again.stop() == 0
    assert not list((fleet.machine("a").store / ".locks").glob(".worker-*"))


def test_agents_of_a_killed_server_that_answers_before_it_commits_are_its_successors_first(fleet):
    fleet.remote[-1] = "3600"
    fleet.env = {**fleet.env, "TORPOR_ACK": "local"}
    with fleet.serve("a") as killed:
        begin(killed, "Hello")
        said = turn(killed, " you").json()
        killed.signal(signal.SIGKILL)
    with fleet.serve("a") as again:
        assert [key for key in fleet.objects() if key.startswith("nodes/")][1:]  # to others it may live
        assert turn(again, " there").json()["tokens"]["cached"] >= said["tokens"]["context"]


def test_a_tail_goes_to_the_bucket_when_its_agent_sleeps_and_its_ids_before(fleet, words):
    with fleet.serve("a", "--remote-tail", "sleep") as server:
        said = begin(server, words(300)).json()["tokens"]["context"]

        def held(name):
            machine = fleet.machine(name)
            machine("remote", "pull", fleet.url, "ada", env=fleet.env).ok()
            assert len(held_ids(machine.store, "ada")) == said
            return "rows" in load_file(machine.agent_file("ada"))

        assert not held("before")
        assert server.ask("POST", f"{AGENTS}/ada/sleep", {}, key="").status == 200
        assert held("after")


def test_a_turn_that_is_over_locally_does_not_wait_for_the_bucket_and_a_drain_does(fleet, store):
    slow, heads = [0.0], []

    def fault(method, path, headers):
        if method == "PUT" and path.endswith("/head"):
            time.sleep(slow[0])
            heads.append(time.monotonic())

    with s3.Proxy(store.port, fault=fault) as proxy:
        env, fleet.env = fleet.env, {**s3.environment(proxy.port), "TORPOR_ACK": "local"}
        with fleet.serve("a") as server:
            begin(server, "Hello")
            slow[0], said = 2.0, len(heads)
            answer = turn(server, " you", key="mine").json()
            assert len(heads) == said, "the bucket has it before it is told"
            assert server.stop() == 0
        fleet.env = env
    again = fleet.run("b", "ada", " there").ok().json
    assert again["tokens"]["cached"] == answer["tokens"]["context"]


def test_a_worker_that_was_paused_for_longer_than_its_lease_answers_nothing_any_more(fleet):
    with fleet.serve("a") as paused, fleet.serve("b") as other:
        begin(paused, "Hello")
        paused.signal(signal.SIGSTOP)
        taken = turn(other, "Are you there?", key="theirs")
        assert taken.status == 200
        paused.signal(signal.SIGCONT)
        try:
            assert turn(paused, "I am back", key="mine").status in (307, 409, 423, 503)
        except OSError:
            pass  # it has ended already
        assert paused.process.wait(60) == 8
        after = turn(other, "And now?").json()
        assert after["tokens"]["cached"] == taken.json()["tokens"]["context"]


def test_a_worker_that_is_cut_off_ends_with_its_lease_whatever_its_turns_wait_for(tmp_path, tiny_model, store):
    cut, over = threading.Event(), threading.Event()

    def hold(method, path, headers):
        if cut.is_set():
            over.wait(300)

    with s3.Proxy(store.port, hold) as proxy:
        fleet = Fleet(tmp_path, tiny_model, proxy.port)
        with fleet.serve("a", "--drain-timeout", 3600) as server:
            assert begin(server, "Hello").status == 201
            cut.set()
            with contextlib.suppress(OSError, http.client.HTTPException):
                assert turn(server, "Are you there?").status in (409, 423, 503)
            assert server.process.wait(100) == 8
        over.set()


def test_a_server_that_is_asked_for_an_agent_of_another_one_says_where_it_is(fleet):
    with fleet.serve("a") as one, fleet.serve("b") as other:
        assert begin(one, "Hello").status == 201
        for ask in (lambda: turn(other, "Hello?"), lambda: other.chat("Hello?", agent="ada", key="")):
            moved = ask()
            assert moved.status == 307 and "another worker" in moved.text
            assert moved.headers["location"].startswith(f"http://127.0.0.1:{one.port}/")
            assert moved.headers["x-torpor-agent"] == "ada"
        assert moved.headers["location"].endswith("/v1/chat/completions")
        # Once it sleeps there, it is free.
        assert one.ask("POST", f"{AGENTS}/ada/sleep", key="").status == 200
        assert turn(other, "Hello?").json()["tokens"]["cached"] > 0


def test_forks_renamed_and_removed_agents_are_so_for_everybody(fleet, words):
    with fleet.serve("a") as one:
        assert begin(one, words(300)).status == 201
        assert one.ask("POST", f"{AGENTS}/ada/fork", {"as": "bea"}, key="").status == 201
        assert one.ask("POST", f"{AGENTS}/bea/rename", {"to": "eva"}, key="").status == 200
        assert one.ask("DELETE", f"{AGENTS}/ada", key="").status == 204
        assert one.stop() == 0
    assert fleet.run("b", "eva", " More").ok().json["tokens"]["cached"] > 256
    for name in ("ada", "bea"):
        assert fleet.run("b", name, "Hello").ok().json["tokens"]["cached"] == 0
    # The copy on the first machine gives way.
    assert fleet.run("a", "ada", " again").ok().json["tokens"]["context"] < 100


def test_what_was_said_to_a_copy_without_the_bucket_is_not_lost_in_silence(fleet):
    fleet.run("a", "ada", "Hello").ok()
    fleet.run("b", "ada", " you").ok()
    fleet.machine("a").run("ada", " there", "--raw").ok()
    before = fleet.machine("a").state()
    fleet.run("a", "ada", " again").fails("incompatible", "was changed without the bucket")
    assert fleet.machine("a").state() == before
    assert fleet.run("b", "ada", " again").ok()  # nobody waits for it


def test_a_store_that_is_full_drops_copies_that_the_bucket_has_and_nothing_else(fleet, words):
    agents = [f"agent{number}" for number in range(4)]

    def turn(agent, *args):
        return fleet.run("a", agent, words(900)[agents.index(agent):], *args)

    machine = fleet.machine("a")
    machine.run("local", words(20), "--raw").ok()
    first = turn(agents[0]).ok()
    used = machine("du", "--json").ok().json["total_bytes"]
    machine("limits", "--disk-budget", used * 5 // 2).ok()
    for agent in agents[1:]:
        turn(agent).ok()
    kept = {path.stem for path in machine.store.glob("*.safetensors")}
    assert "local" in kept and len(kept) == 3 and agents[0] not in kept
    # What was dropped is read again, in place of another one; a store without the bucket has nothing to drop.
    assert fleet.run("a", agents[0], " More").ok().json["tokens"]["cached"] == first.json["tokens"]["context"]
    machine.run("another", words(900)[9:], "--raw").fails("exhausted", "budget", answered=True)


def test_an_agent_of_before_there_was_a_bucket_goes_there_with_its_next_turn(fleet):
    old = fleet.machine("a").run("ada", "Hello", "--raw").ok().json
    assert fleet.run("a", "ada", " you").ok().json["tokens"]["cached"] == old["tokens"]["context"]
    assert fleet.run("b", "ada", " there").ok().json["tokens"]["cached"] > old["tokens"]["context"]


def test_a_bucket_that_gives_no_answer_at_first_is_asked_again(fleet, store):
    begun = time.monotonic()
    with s3.Proxy(store.port, lose=lambda *_: time.monotonic() < begun + 3) as proxy:
        late = Fleet(fleet.directory, fleet.model, proxy.port)
        late.remote[-1] = "2"  # a try of the first requests takes less than 2 seconds
        told = late.run("a", "ada", "Hello", "--verbose").ok()
    assert told.err.count("the bucket is asked again") == 1


def test_a_bucket_that_can_not_be_used_is_refused_before_anything_is_computed(fleet, store):
    closed = Fleet(fleet.directory, fleet.model, s3.free_port())
    closed.remote[-1] = "1"
    closed.run("a", "ada", "Hello").fails("io", "can't be reached")
    with s3.Proxy(store.port, fault=s3.without_conditions) as proxy:
        Fleet(fleet.directory, fleet.model, proxy.port).run("a", "ada", "Hello").fails("invalid", "conditional")
    assert not fleet.machine("a").agent_file("ada").exists()
