"""Agents in a bucket, by torpor.Engine, AsyncEngine and torpor.asgi. Engines with stores of their own are machines."""

import asyncio
import itertools
import json
import os
import subprocess
import sys
import time

import httpx
import mlx.core as mx
import pytest

import s3
from conftest import BUILD, Torpor

import torpor
import torpor.asgi

LEASE = 2  # seconds; a busy machine renews it in time
PREFIXES = itertools.count()
OTHER_PROCESS = """
import json, sys, torpor
arguments = json.loads(sys.argv[1])
engine = torpor.Engine(arguments["model"], arguments["store"], **arguments["settings"])
for turn in arguments["turns"]:
    result = engine.agent("ada").turn(max_tokens=6, **turn)
    print(json.dumps([result.text, result.tokens.context, engine.agent("ada").tokens]), flush=True)
sys.stdin.read()
engine.close()
"""


class Bucket:
    """A prefix of a test's own, and machines that share it."""

    def __init__(self, model, directory):
        self.model, self.directory = model, directory
        self.url = f"s3://{s3.BUCKET}/python-{next(PREFIXES)}"
        self.settings = {"remote": self.url, "lease": LEASE}

    def engine(self, name, **settings):
        return torpor.Engine(self.model, self.directory / name, **{**self.settings, **settings})

    def other_process(self, name, *turns):
        """An engine in a process of its own; `answers` are what its turns said. It ends when its input does."""
        arguments = {"model": str(self.model), "store": str(self.directory / name), "settings": self.settings,
                     "turns": turns}
        process = subprocess.Popen([sys.executable, "-c", OTHER_PROCESS, json.dumps(arguments)], text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   env={**os.environ, "PYTHONPATH": str(BUILD / "python")})
        process.answers = [json.loads(process.stdout.readline()) for _ in turns]
        return process

    def leases(self):
        listed = Torpor(self.directory / "none", self.model)("remote", "ls", self.url, "--json").ok().json
        return [one["key"] for one in listed["objects"] if one["key"].startswith("nodes/")]


@pytest.fixture(scope="module")
def server():
    with s3.gofakes3() as server:
        yield server


@pytest.fixture
def bucket(server, tiny_model, tmp_path, monkeypatch):
    for name, value in s3.environment(server.port).items():
        monkeypatch.setenv(name, value)
    return Bucket(tiny_model, tmp_path)


@pytest.fixture
def alone(tiny_model, tmp_path):
    """A machine without a bucket, which says what the others should."""
    with torpor.Engine(tiny_model, tmp_path / "alone") as engine:
        yield engine


def say(engine, prompt, **options):
    return engine.agent("ada").turn(prompt, raw=True, max_tokens=6, **options)


def test_an_agent_sleeps_in_one_process_and_goes_on_in_another_bit_for_bit(bucket, alone, words):
    expected = [say(alone, prompt) for prompt in (words(300), " More")]
    with bucket.other_process("a", {"prompt": words(300), "raw": True}) as first:
        first.stdin.close()
        assert first.wait() == 0
    (text, context, ids), = first.answers
    with bucket.engine("b") as engine:
        result = say(engine, " More")
        assert [text, result.text] == [one.text for one in expected]
        assert result.tokens.cached == context and result.tokens.context == expected[1].tokens.context
        assert engine.work().prompt_tokens == result.tokens.prefilled == expected[1].tokens.prefilled < 10
        ada = engine.agent("ada")
        assert ada.tokens[:len(ids)] == ids and ada.tokens == alone.agent("ada").tokens
        assert mx.array_equal(ada.next_logits(), alone.agent("ada").next_logits())
    assert bucket.leases() == []  # nobody waits for engines that are closed


def test_an_engine_reads_a_sealed_bucket_by_the_key_that_a_command_prints(bucket, alone):
    expected = [say(alone, prompt).text for prompt in ("Hello", " More")]
    key = {"key_command": f"echo {'5e' * 32}"}
    with bucket.engine("a", **key) as engine:
        texts = [say(engine, "Hello").text]
    with bucket.engine("b", **key) as engine:
        assert [*texts, say(engine, " More").text] == expected
    for other in ({}, {"key_command": f"echo {'5f' * 32}"}, {"key_command": "false"}):
        with pytest.raises(torpor.InvalidArgumentError, match="key"):
            bucket.engine("c", **other)


def test_what_a_killed_process_has_answered_goes_on_elsewhere_and_a_key_is_not_run_again(bucket, alone, words):
    prompts = [words(300), " And then?", " The end."]
    expected = [say(alone, prompt) for prompt in prompts]
    turns = [{"prompt": prompt, "raw": True, "key": f"turn-{n}"} for n, prompt in enumerate(prompts[:2], 1)]
    with bucket.other_process("a", *turns) as killed:
        killed.kill()
    with bucket.engine("b") as engine:
        began = time.monotonic()
        again = say(engine, prompts[1], key="turn-2")
        assert time.monotonic() - began < 3 * LEASE + 5
        assert again.repeated and again.text == killed.answers[1][0] and engine.work().passes == 0
        for prompt, key in ((prompts[0], "turn-1"), (" Something else", "turn-2")):
            with pytest.raises(torpor.InvalidArgumentError, match="turn"):
                say(engine, prompt, key=key)
        third = say(engine, prompts[2], key="turn-3")
        assert not third.repeated and third.tokens.cached == killed.answers[1][1]
        assert [text for text, *_ in killed.answers] + [third.text] == [one.text for one in expected]
        assert engine.agent("ada").tokens == alone.agent("ada").tokens


def test_a_tail_that_the_bucket_does_not_have_yet_is_computed_again_and_one_that_slept_is_read(bucket, alone, words):
    prompts = [words(300), " And then?", " The end.", " Or not."]
    expected = [say(alone, prompt) for prompt in prompts]
    bucket.settings["remote_tail"] = "sleep"
    with bucket.other_process("a", *({"prompt": prompt, "raw": True} for prompt in prompts[:2])) as killed:
        killed.kill()
    with bucket.engine("b") as engine:
        third = say(engine, prompts[2])
        assert third.tokens.cached == 256 and third.tokens.context == expected[2].tokens.context
    with bucket.engine("c", remote_tail="turn") as engine:
        fourth = say(engine, prompts[3])
        assert fourth.tokens.cached == third.tokens.context
        assert [text for text, *_ in killed.answers] + [third.text, fourth.text] == [one.text for one in expected]
        ada = engine.agent("ada")
        assert ada.tokens == alone.agent("ada").tokens
        assert mx.array_equal(ada.next_logits(), alone.agent("ada").next_logits())


def test_turns_that_are_over_locally_are_in_the_bucket_once_their_engine_is_closed(bucket, alone):
    prompts = ["Hello", *(f" more {number}" for number in range(6))]
    expected = [say(alone, prompt) for prompt in prompts]
    with bucket.engine("a", ack="local", remote_tail="sleep") as engine:
        told = [say(engine, prompt, key=prompt) for prompt in prompts]
    with bucket.engine("b") as engine:
        assert say(engine, prompts[-1], key=prompts[-1]).repeated
        with pytest.raises(torpor.InvalidArgumentError, match="turn"):
            say(engine, prompts[2], key=prompts[2])
        assert [one.text for one in told] == [one.text for one in expected]
        assert engine.agent("ada").tokens == alone.agent("ada").tokens


def test_a_key_that_is_not_the_last_turns_is_refused_whatever_has_come_after(bucket):
    with bucket.engine("a") as engine:
        for change in (lambda: say(engine, " without a key"), lambda: engine.agent("ada").rewind(3)):
            asked = say(engine, "Hello", key="mine")
            engine.agent("ada").pin(False)  # which is no change
            assert say(engine, "Hello", key="mine").text == asked.text
            change()
            with pytest.raises(torpor.InvalidArgumentError, match="the agent has changed since"):
                say(engine, "Hello", key="mine")
            engine.agent("ada").remove()


def test_a_turn_that_can_not_be_saved_is_no_turn_for_who_asks_the_bucket(bucket):
    with bucket.engine("a") as engine:
        before = say(engine, "Hello").tokens.context
        engine.agent("ada").sleep()
    with bucket.engine("b", min_free="1000TB") as engine:
        with pytest.raises(torpor.ResourceExhaustedError):
            say(engine, " you")
    with bucket.engine("a") as engine:
        assert say(engine, " there").tokens.cached == before


def test_who_has_the_agent_is_told_until_it_sleeps_there_or_that_engine_is_closed(bucket):
    address = "http://one.example:8080"
    with bucket.engine("a", advertise=address) as one, bucket.engine("b") as other:
        held = say(one, "Hello").tokens.context
        with pytest.raises(torpor.BusyError, match=f"'ada' is awake on another worker, at {address};") as busy:
            say(other, " you")
        assert (busy.value.agent, busy.value.field, busy.value.found) == ("ada", "owner", address)
        one.agent("ada").sleep()
        second = say(other, " you")
        assert second.tokens.cached == held
        with pytest.raises(torpor.BusyError, match="is awake on another worker;") as busy:
            say(one, " there")
        assert busy.value.found is None
        other.close()
        began = time.monotonic()
        assert say(one, " there").tokens.cached == second.tokens.context
        assert time.monotonic() - began < LEASE


def test_a_bucket_that_can_not_be_used_is_refused_before_a_model_is_loaded(bucket, server, monkeypatch):
    def refused(kind, sentence, **settings):
        with pytest.raises(kind, match=sentence) as told:
            torpor.Engine("no such model", bucket.directory / "a", **{**bucket.settings, **settings})
        assert str(told.value).count("\n") == 0 and "test-secret" not in str(told.value)

    for lease in (0, 0.5, 3601, float("nan"), -1):
        refused(torpor.InvalidArgumentError, "lease must be from 1 to 3600 seconds", lease=lease)
    refused(torpor.InvalidArgumentError, "lease must be a number", lease="10")
    refused(torpor.InvalidArgumentError, "remote must be a text", remote=7)
    refused(torpor.InvalidArgumentError, "no remote_tail 'never'", remote_tail="never")
    refused(torpor.InvalidArgumentError, "no ack 'never'", ack="never")
    for url in ("", "file:///tmp/x", "http://one.example/x"):
        refused(torpor.InvalidArgumentError, "s3://", remote=url)
    refused(torpor.NotFoundError, "bucket", remote="s3://no-such-bucket/x")
    with s3.Proxy(server.port, fault=s3.without_conditions) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        refused(torpor.InvalidArgumentError, "conditional")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3.free_port()}")
    refused(torpor.IoError, "can't be reached", lease=1)


def test_a_model_that_can_not_be_loaded_leaves_no_lease(bucket):
    with pytest.raises(torpor.NotFoundError, match="no-such-model"):
        torpor.Engine(bucket.directory / "no-such-model", bucket.directory / "a", **bucket.settings)
    assert bucket.leases() == []


def test_an_asynchronous_engine_takes_the_same_bucket(bucket):
    async def turn(name, prompt):
        async with torpor.AsyncEngine(bucket.model, bucket.directory / name, **bucket.settings) as engine:
            return await engine.agent("ada").turn(prompt, raw=True, max_tokens=6, key=prompt)

    first, second = (asyncio.run(turn(name, prompt)) for name, prompt in (("a", "Hello"), ("b", " you")))
    assert second.tokens.cached == first.tokens.context
    assert asyncio.run(turn("a", " you")).repeated


def client(app):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost")


def test_an_application_has_a_bucket_or_its_engines_and_says_where_an_agent_is(bucket):
    async def ask():
        one = torpor.asgi.application(bucket.model, store=bucket.directory / "a", authenticate=False,
                                      advertise="http://one.example:8080", **bucket.settings)
        engine = await asyncio.to_thread(bucket.engine, "b")
        other = torpor.asgi.application(engine, authenticate=False)
        body = {"agent": "ada", "prompt": "Hello", "max_tokens": 4}
        async with client(one) as first, client(other) as second:
            begun = await first.post("/torpor/v1/agents", json=body)
            assert begun.status_code == 201
            moved = await second.post("/torpor/v1/agents/ada/turn", json={"prompt": "And?", "max_tokens": 4})
            assert moved.status_code == 307
            assert moved.headers["location"] == "http://one.example:8080/torpor/v1/agents/ada/turn"
            await one.aclose()
            # What only the bucket has is there for whoever asks about it, too.
            shown = await second.get("/torpor/v1/agents/ada")
            assert shown.status_code == 200 and shown.json()["tokens"] == begun.json()["tokens"]["context"]
            asked = await second.post("/torpor/v1/agents/ada/turn", json={"prompt": "And?", "max_tokens": 4})
            assert asked.json()["tokens"]["cached"] == begun.json()["tokens"]["context"]
            await other.aclose()
        await asyncio.to_thread(engine.close)

    asyncio.run(ask())
    assert bucket.leases() == []


def test_an_engine_that_has_lost_its_lease_answers_nothing_and_its_server_is_not_healthy(bucket, server, monkeypatch):
    async def ask(engine):
        app = torpor.asgi.application(engine, authenticate=False)
        async with client(app) as asking:
            assert (await asking.get("/health")).status_code == 200
            proxy.fault = lambda method, path, headers: (
                (503, b"<Error><Code>SlowDown</Code></Error>") if method == "PUT" and "/nodes/" in path else None)
            end = time.monotonic() + 30
            while (await asking.get("/health")).status_code == 200:
                assert time.monotonic() < end
                await asyncio.sleep(0.02)
            refused = await asking.post("/torpor/v1/agents/ada/turn", json={"prompt": "And?", "max_tokens": 4})
            assert refused.status_code == 503
        await app.aclose()

    with s3.Proxy(server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        with bucket.engine("a", lease=1) as engine:
            say(engine, "Hello")
            asyncio.run(ask(engine))
            for agent in ("ada", "bob"):
                with pytest.raises(torpor.BusyError, match="lease has run out"):
                    engine.agent(agent).turn(" you", raw=True, max_tokens=4)
