"""Torpor's engine from Python: what the command line does, and what only a program can do (threads, interrupts, streams)."""

import os
import signal
import subprocess
import sys
import threading

import mlx.core as mx
import pytest

from conftest import BUILD, MODEL, Torpor, make_tiny_model

import torpor

ENDLESS = 100_000  # tokens: until something ends the turn, or the context is full


@pytest.fixture
def engine(tiny_model, tmp_path):
    with torpor.Engine(tiny_model, tmp_path / "store") as engine:
        yield engine


def status(engine, agent_id):
    return next(status for status in engine.agents() if status.agent_id == agent_id)


def test_the_same_words_as_the_command_line(tmp_path):
    real = Torpor(tmp_path / "cli", MODEL)
    with torpor.Engine(MODEL, tmp_path / "python") as engine:
        for prompt in ("My name is Ada.", "What is my name?"):
            theirs = real.run("ada", prompt, max_tokens=12).ok().json
            ours = engine.agent("ada").turn(prompt, max_tokens=12)
            assert (ours.text, ours.finish_reason) == (theirs["text"], theirs["finish_reason"])
            for name in ("prompt", "prefilled", "generated", "context"):
                assert getattr(ours.tokens, name) == theirs["tokens"][name]
            assert ours.bytes.written == theirs["bytes"]["written"]
            assert (ours.agent, ours.model) == ("ada", str(MODEL))


def test_an_agent_goes_on_from_one_face_to_the_other(engine, tiny_model, tmp_path):
    cli = Torpor(tmp_path / "store", tiny_model)
    held = engine.agent("ada").turn("hello", raw=True, max_tokens=4).tokens.context
    engine.agent("ada").sleep()
    assert cli.run("ada", "and", "--raw").ok().json["tokens"]["cached"] == held
    result = engine.agent("ada").turn("more", raw=True, max_tokens=4)
    assert result.tokens.cached > held and result.timing_ms.wake > 0 and result.bytes.read > 0


def test_turns_of_many_threads_are_computed_together_and_say_what_they_say_alone(tiny_model, tmp_path, words):
    turns = {f"agent{i}": (words(40 + 120 * i), dict(raw=True, max_tokens=150, temperature=1.0, seed=i)) for i in range(5)}
    with torpor.Engine(tiny_model, tmp_path / "alone") as engine:
        expected = {name: (engine.agent(name).turn(prompt, **options).text, engine.agent(name).next_logits())
                    for name, (prompt, options) in turns.items()}
        alone = engine.work()
        assert alone.most_turns == 1 and alone.turns == alone.passes
    with torpor.Engine(tiny_model, tmp_path / "together", max_stall=1) as engine:
        streams = {name: engine.agent(name).stream(prompt, **options) for name, (prompt, options) in turns.items()}
        assert {name: "".join(stream) for name, stream in streams.items()} == {name: text for name, (text, _) in expected.items()}
        assert all(mx.array_equal(engine.agent(name).next_logits(), logits) for name, (_, logits) in expected.items())
        work = engine.work()
        assert work.most_turns > 1
        assert work.answer_tokens == alone.answer_tokens
    with pytest.raises(torpor.InvalidArgumentError):
        torpor.Engine(tiny_model, tmp_path / "together", max_stall=0)


def test_rows_are_read_where_they_are_not_to_be_mapped(tiny_model, tmp_path):
    prompt = "the lamp and the sea " * 60
    with torpor.Engine(tiny_model, tmp_path / "store") as engine:
        engine.agent("ada").turn(prompt, raw=True, max_tokens=4)
        engine.agent("ada").fork("eve")
    answers = []
    for agent, map_rows in (("ada", True), ("eve", False)):
        with torpor.Engine(tiny_model, tmp_path / "store", map_rows=map_rows) as engine:
            answers.append(engine.agent(agent).turn("and", raw=True, max_tokens=4).text)
            assert (engine.memory_usage().mapped_bytes > 0) == map_rows
    assert answers[0] == answers[1]
    assert Torpor(tmp_path / "store", tiny_model).run("ada", "and", "--raw", "--no-mmap").ok().json["tokens"]["cached"] > 256


def test_pieces_make_the_text(engine):
    ada, bob = engine.agent("ada"), engine.agent("bob")
    pieces = []
    whole = ada.turn("hello", raw=True, max_tokens=16, on_text=pieces.append)
    stream = bob.stream("hello", raw=True, max_tokens=16)
    assert list(stream) == pieces and "".join(pieces) == whole.text == stream.result.text
    assert len(pieces) > 1 and list(stream) == []


def test_a_stop_string_ends_the_answer(engine):
    text = engine.agent("ada").turn("hello", raw=True, max_tokens=16).text
    stop = text[5:8]
    for given in (stop, ["never", stop]):
        result = engine.turn("hello", raw=True, max_tokens=16, stop=given)
        assert result.text == text[:text.index(stop)] and result.finish_reason == "stop"


def test_sampling_is_seeded(engine):
    texts = [engine.turn("hello", raw=True, max_tokens=8, temperature=1.5, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("when", ["while it waits", "in on_text", "in the prefill"])
def test_ctrl_c_leaves_the_agent_as_it_was(engine, words, when):
    ada = engine.agent("ada")
    ada.turn("hello", raw=True, max_tokens=4)
    before, held = ada.next_logits(), status(engine, "ada").tokens
    begun = threading.Event()
    if when != "in on_text":
        threading.Thread(target=lambda: begun.wait() and ctrl_c()).start()
    with pytest.raises(KeyboardInterrupt):
        if when == "in the prefill":
            begun.set()
            ada.turn(words(3000), raw=True, max_tokens=ENDLESS)
        else:
            ada.turn("more", raw=True, max_tokens=ENDLESS, on_text=lambda _: ctrl_c() if when == "in on_text" else begun.set())
    assert status(engine, "ada").tokens == held and mx.array_equal(ada.next_logits(), before)
    assert ada.turn("more", raw=True, max_tokens=2).tokens.cached == held


def test_on_text_may_call_the_engine_but_not_wait_for_its_own_turn(engine):
    ada, bob = engine.agent("ada"), engine.agent("bob")
    bob.turn("I am bob", raw=True, max_tokens=2)
    refused = [lambda: ada.turn("more", raw=True), lambda: ada.stream("more", raw=True), lambda: ada.fork("eve"), lambda: bob.fork("ada"),
               lambda: ada.rewind(1), lambda: ada.rename("eve"), lambda: bob.rename("ada"), ada.remove, ada.pin, ada.save, ada.sleep,
               ada.next_logits, engine.save_all]
    heard = []

    def on_text(piece):
        heard.append(piece)
        if len(heard) > 1:
            return
        for call in refused:
            with pytest.raises(torpor.InvalidArgumentError, match="own|ada"):
                call()
        assert engine.memory_usage().agents and not ada.prefetch()
        assert status(engine, "ada").in_turn and not status(engine, "bob").in_turn
        nested = []
        assert bob.turn(" and", raw=True, max_tokens=6, on_text=nested.append).text == "".join(nested)
        assert engine.turn("nameless", raw=True, max_tokens=2).tokens.generated == 2
        bob.fork("eve").rewind(1)
        bob.sleep()

    text = ada.turn("hello", raw=True, max_tokens=16, on_text=on_text).text
    assert text == "".join(heard) and ada.id == "ada" and bob.id == "bob"
    assert {s.agent_id: s.awake for s in engine.agents()} == {"ada": True, "bob": False, "eve": True}
    ada.rewind(1)


def test_a_forked_process_is_told_at_once(engine):
    ada = engine.agent("ada")
    ada.turn("hello", raw=True, max_tokens=2)
    stream = engine.agent("bob").stream("hello", raw=True, max_tokens=ENDLESS)
    next(stream)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # whoever waits for the engine's thread waits for ever
        for code, call in enumerate([lambda: ada.turn("more", raw=True), ada.save, engine.agents, engine.memory_usage, lambda: next(stream),
                                     lambda: stream.result, engine.close], 1):
            try:
                call()
                os._exit(code)
            except torpor.InvalidArgumentError as error:
                if "fork" not in str(error):
                    os._exit(100 + code)
        stream.close()
        del stream
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    stream.close()
    assert ada.turn(" more", raw=True, max_tokens=2).tokens.generated == 2


@pytest.mark.skipif(sys.platform != "linux", reason="the C library has no default size of stacks")
def test_a_thread_that_the_system_refuses_is_told(tiny_model, tmp_path):
    script = ("import ctypes, sys, torpor\n"
              "engine = torpor.Engine(sys.argv[1], sys.argv[2])\n"
              "ada = engine.agent('ada')\n"
              "ada.turn('hello', raw=True, max_tokens=2)\n"
              "ada.sleep()\n"
              "libc, attributes = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"
              "libc.pthread_attr_init(attributes)\n"
              "libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(1 << 47))  # no such stack can be had\n"
              "assert libc.pthread_setattr_default_np(attributes) == 0\n"
              "for call in (lambda: torpor.Engine(sys.argv[1], sys.argv[2]), ada.prefetch, lambda: ada.turn('more', raw=True)):\n"
              "    try:\n"
              "        print('began', call())\n"
              "    except Exception as error:\n"
              "        print(type(error).__name__)\n")
    ended = subprocess.run([sys.executable, "-c", script, tiny_model, tmp_path / "store"], capture_output=True, text=True,
                           env={**os.environ, "PYTHONPATH": str(BUILD / "python")}, timeout=300)
    assert (ended.returncode, ended.stdout) == (0, "ResourceExhaustedError\nbegan False\nResourceExhaustedError\n"), ended.stderr


def test_what_on_text_raises_undoes_the_turn(engine):
    with pytest.raises(ZeroDivisionError):
        engine.agent("ada").turn("hello", raw=True, max_tokens=ENDLESS, on_text=lambda _: 1 / 0)
    assert engine.agents() == []


def test_a_process_that_ends_in_a_turn_ends(tiny_model, tmp_path):
    script = ("import sys, torpor\n"
              "engine = torpor.Engine(sys.argv[1], sys.argv[2])\n"
              f"stream = engine.agent('ada').stream('hello', raw=True, max_tokens={ENDLESS})\n"
              "print(len(next(stream)) > 0)\n")
    ended = subprocess.run([sys.executable, "-c", script, tiny_model, tmp_path / "store"], capture_output=True, text=True,
                           env={**os.environ, "PYTHONPATH": str(BUILD / "python")}, timeout=300)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "True\n", "")


def test_the_life_of_an_agent(engine, tmp_path):
    ada = engine.agent("ada")
    held = ada.turn("hello", raw=True, max_tokens=4).tokens.context
    bob = ada.fork("bob", 3)
    assert [(s.agent_id, s.tokens, s.awake) for s in engine.agents()] == [("ada", held, True), ("bob", 3, True)]
    assert bob.id == "bob" and bob.turn(" again", raw=True, max_tokens=4).tokens.cached == 3
    ada.rewind(4)
    ada.pin()
    engine.save_all()
    assert status(engine, "ada") == torpor.AgentStatus("ada", engine.agents()[0].model, 4, True, True, False,
                                                      status(engine, "ada").memory_bytes, status(engine, "ada").disk_bytes)
    assert {memory.agent: memory.tokens for memory in engine.memory_usage().agents}["ada"] == 4
    ada.sleep()
    asleep = status(engine, "ada")
    assert (asleep.awake, asleep.pinned, asleep.tokens, asleep.memory_bytes) == (False, True, 4, 0) and asleep.disk_bytes > 0
    assert ada.prefetch() and not engine.agent("nobody").prefetch()
    assert ada.turn("on", raw=True, max_tokens=1, save="no").tokens.cached == 4
    assert status(engine, "ada").unsaved and ada.save().bytes_written > 0 and not status(engine, "ada").unsaved
    ada.rename("eve")
    assert ada.id == "eve" and {s.agent_id for s in engine.agents()} == {"bob", "eve"}
    ada.remove()
    assert [s.agent_id for s in engine.agents()] == ["bob"] and not (tmp_path / "store" / "eve.safetensors").exists()


def test_over_the_budget_the_least_recently_used_sleeps(tiny_model, tmp_path):
    with torpor.Engine(tiny_model, tmp_path / "store") as engine:
        engine.agent("ada").turn("hello", raw=True, max_tokens=2)
        one = engine.memory_usage().kv_bytes
    with torpor.Engine(tiny_model, tmp_path / "store", memory_budget=2 * one) as engine:
        for name in ("ada", "bob", "eve"):
            engine.agent(name).turn(f"I am {name}", raw=True, max_tokens=2)
        assert {s.agent_id: s.awake for s in engine.agents()} == {"ada": False, "bob": True, "eve": True}
        usage = engine.memory_usage()
        assert usage.kv_bytes <= usage.budget == 2 * one and usage.model_bytes > 0
        engine.agent("bob").pin()
        engine.agent("eve").pin()
        with pytest.raises(torpor.ResourceExhaustedError, match="pinned"):
            engine.agent("ada").turn("hello", raw=True, max_tokens=2)


def test_agents_that_are_awake_keep_nobody_from_being_loaded_ahead(engine):
    for name in "abcde":
        engine.agent(name).turn("hello", raw=True, max_tokens=1)
    engine.agent("e").sleep()
    for name in "abcd":
        engine.agent(name).prefetch()
        engine.agent(name).turn(" more", raw=True, max_tokens=1)
    assert engine.agent("e").prefetch()


WHILE_A_SAVE_WAITS = """
import os, sys, threading, time
import torpor
model, store, mark = sys.argv[1:]
engine = torpor.Engine(model, store)
bob = engine.agent("bob")
bob.turn("hello", raw=True, max_tokens=2, save="no")
ada, eve, ann = (engine.agent(name) for name in ("ada", "eve", "ann"))
for agent in (ada, eve, ann):
    agent.turn("hello", raw=True, max_tokens=2, save="no")
waiting = [lambda: ada.turn(" more", raw=True, max_tokens=2), eve.save, lambda: ann.fork("joe"), ann.sleep]
for wait in waiting:
    threading.Thread(target=wait, daemon=True).start()
    while not os.path.exists(mark):
        time.sleep(0.01)
    assert bob.turn(" more", raw=True, max_tokens=20, save="no").tokens.generated == 20
    assert len(engine.agents()) >= 4
for _ in range(3):
    bob.turn(" more", raw=True, max_tokens=4, save="no")
print("answered", flush=True)
os._exit(0)
"""


def test_other_agents_turns_go_on_while_a_caller_waits_for_the_disk(tiny_model, tmp_path, slow_disk):
    with torpor.Engine(tiny_model, tmp_path / "store") as engine:  # a new store is flushed, too
        engine.agent("bob").turn("hello", raw=True, max_tokens=2)
    ended = subprocess.run([sys.executable, "-c", WHILE_A_SAVE_WAITS, tiny_model, tmp_path / "store", tmp_path / "mark"],
                           capture_output=True, text=True, timeout=100, env=slow_disk(600, tmp_path / "mark"))
    assert (ended.returncode, ended.stdout) == (0, "answered\n"), ended.stderr


def test_a_save_is_no_use_of_an_agent(tiny_model, tmp_path):
    with torpor.Engine(tiny_model, tmp_path / "store") as engine:
        engine.agent("ada").turn("hello", raw=True, max_tokens=2)
        one = engine.memory_usage().kv_bytes
    with torpor.Engine(tiny_model, tmp_path / "other", memory_budget=2 * one) as engine:
        for name in ("bob", "ada"):
            engine.agent(name).turn(f"I am {name}", raw=True, max_tokens=2, save="no")
        engine.agent("bob").save()
        engine.save_all()
        engine.agent("eve").turn("I am eve", raw=True, max_tokens=2)
        assert {s.agent_id: s.awake for s in engine.agents()} == {"ada": True, "bob": False, "eve": True}


def test_a_prompt_without_an_agent_leaves_none(engine, words):
    first = engine.turn(words(300), raw=True, max_tokens=2)
    again = engine.stream(words(300), raw=True, max_tokens=2)
    assert "".join(again) == first.text and again.result.tokens.cached == 299 and engine.agents() == []


@pytest.mark.parametrize("save", ["wait", "behind", "no"])
def test_when_a_turn_is_saved(tiny_model, tmp_path, save):
    with torpor.Engine(tiny_model, tmp_path / "store", durability="rename") as engine:
        written = engine.agent("ada").turn("hello", raw=True, max_tokens=4, save=save).bytes.written
    with torpor.Engine(tiny_model, tmp_path / "store") as engine:
        assert [s.agent_id for s in engine.agents()] == ([] if save == "no" else ["ada"])
    assert (written > 0) == (save == "wait")


def test_a_save_that_fails_is_told_with_the_answer(tiny_model, tmp_path):
    with torpor.Engine(tiny_model, tmp_path / "store", min_free=1 << 60) as engine:
        result = engine.agent("ada").turn("hello", raw=True, max_tokens=4)
        assert result.tokens.generated == 4 and isinstance(result.save_error, torpor.ResourceExhaustedError)
        assert status(engine, "ada").unsaved
        with pytest.raises(torpor.ResourceExhaustedError):
            engine.save_all()


def test_prompts_without_an_agent_saved_behind_each_leave_their_segments(tiny_model, tmp_path, words):
    with torpor.Engine(tiny_model, tmp_path / "store") as engine:
        prompts = [f"{i * 'another '}{words(600)}" for i in range(8)]  # each begins with other words
        for prompt in prompts:
            engine.turn(prompt, raw=True, max_tokens=4, save="behind")
    segments = Torpor(tmp_path / "store", tiny_model).segments()
    assert len(segments) >= 2 * len(prompts)


def test_a_save_behind_that_fails_is_told_when_the_engine_closes(tiny_model, tmp_path):
    for how in ("close", "with", "an error of its own"):
        engine = torpor.Engine(tiny_model, tmp_path / "store", min_free=1 << 60)
        assert engine.agent("ada").turn("hello", raw=True, max_tokens=4, save="behind").save_error is None
        if how == "an error of its own":
            with pytest.raises(ValueError) as raised, engine:
                raise ValueError("mine")
            assert "bytes are free" in raised.value.__notes__[0]
        else:
            with pytest.raises(torpor.ResourceExhaustedError):
                if how == "close":
                    engine.close()
                else:
                    with engine:
                        pass
        engine.close()  # is free by now: told once, and no lock is left
        torpor.Engine(tiny_model, tmp_path / "store").close()


def test_what_fork_rewind_and_pin_changed_survives_the_process(tiny_model, tmp_path):
    script = ("import os, sys, torpor\n"
              "ada = torpor.Engine(sys.argv[1], sys.argv[2]).agent('ada')\n"
              "ada.turn('hello there', raw=True, max_tokens=4)\n"
              "ada.fork('bob', 2)\n"
              "ada.rewind(3)\n"
              "ada.pin()\n"
              "os.kill(os.getpid(), 9)\n")
    subprocess.run([sys.executable, "-c", script, tiny_model, tmp_path / "store"], timeout=300,
                   env={**os.environ, "PYTHONPATH": str(BUILD / "python")})
    with torpor.Engine(tiny_model, tmp_path / "store") as engine:
        assert [(s.agent_id, s.tokens, s.pinned) for s in engine.agents()] == [("ada", 3, True), ("bob", 2, False)]


def test_damage_is_told(engine, words, tmp_path):
    ada = engine.agent("ada")
    assert ada.turn(words(600), raw=True, max_tokens=2).damage is None
    ada.sleep()
    path = next((tmp_path / "store" / "segments").glob("*/*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    result = ada.turn(" and", raw=True, max_tokens=2)
    assert path.name in result.damage and result.tokens.cached < 600


def test_kv_formats(tiny_model, tmp_path):
    with torpor.Engine(tiny_model, tmp_path / "store", kv_format="q8 group 32 f16") as engine:
        assert engine.agent("ada").turn("hello", raw=True, max_tokens=4).tokens.generated == 4
    assert torpor.CachePersistence(tmp_path / "store").list_cached_agents()[0]["identity"]["kv"] == "q8 group 32 f16"
    with torpor.Engine(tiny_model, tmp_path / "store") as engine:
        assert engine.agent("ada").turn("on", raw=True, max_tokens=4).tokens.cached > 0
    with torpor.Engine(tiny_model, tmp_path / "store", kv_format="f32") as engine, pytest.raises(torpor.IncompatibleError, match="kv"):
        engine.agent("ada").turn("on", raw=True)


def test_keys_and_values_of_other_bits(tiny_model, tmp_path):
    with torpor.Engine(tiny_model, tmp_path / "store", kv_format="q8,4 group 32 f16") as engine:
        said = engine.agent("ada").turn("hello", raw=True, max_tokens=4).text
    listed = torpor.CachePersistence(tmp_path / "store").list_cached_agents()
    assert listed[0]["identity"]["kv"] == "q8,4 group 32 f16 rotated"
    # It goes on under the short name, under its own, and under none.
    for name in ("q8,4 group 32 f16", "q8,4 group 32 f16 rotated", None):
        with torpor.Engine(tiny_model, tmp_path / "store", kv_format=name) as engine:
            engine.agent("ada").rewind(0)
            assert engine.agent("ada").turn("hello", raw=True, max_tokens=4).text == said
    for other in ("q4 group 32 f16", "q4,8 group 32 f16", "q8,4 group 64 f16"):
        with torpor.Engine(tiny_model, tmp_path / "store", kv_format=other) as engine:
            with pytest.raises(torpor.IncompatibleError, match="kv"):
                engine.agent("ada").turn("on", raw=True)


def test_errors_are_of_their_classes(engine, tiny_model, tmp_path):
    ada = engine.agent("ada", system="Be brief.")
    ada.turn("hello", max_tokens=2)
    with pytest.raises(torpor.InvalidArgumentError, match="system"):
        engine.agent("ada", system="Be long.").turn("hello")
    with pytest.raises(torpor.InvalidArgumentError, match="bob"):
        ada.fork("bob"), ada.fork("bob")
    with pytest.raises(torpor.InvalidArgumentError, match="rewound"):
        ada.rewind(ENDLESS)
    with pytest.raises(torpor.InvalidArgumentError):
        engine.agent("../ada")
    with pytest.raises(torpor.InvalidArgumentError, match="soon"):
        ada.turn("hello", save="soon")
    with pytest.raises(torpor.InvalidArgumentError, match="empty"):
        ada.turn("")
    with pytest.raises(torpor.InvalidArgumentError, match="max_tokens"):
        ada.turn("hello", max_tokens=0)
    with pytest.raises(TypeError, match="maxtokens"):
        ada.turn("hello", maxtokens=2)
    for act in ("sleep", "save", "remove", "rewind"):
        with pytest.raises(torpor.NotFoundError, match="nobody"):
            nobody = engine.agent("nobody")
            nobody.rewind(0) if act == "rewind" else nobody.fork("eve") if act == "sleep" else getattr(nobody, act)()
    with pytest.raises(torpor.NotFoundError):
        torpor.Engine(tmp_path / "no-model", tmp_path / "store")
    with pytest.raises(torpor.InvalidArgumentError, match="q7"):
        torpor.Engine(tiny_model, tmp_path / "store", kv_format="q7")
    with torpor.Engine(tiny_model, tmp_path / "store") as other, pytest.raises(torpor.BusyError, match="ada"):
        other.agent("ada").turn("hello")
    ada.sleep()
    different = make_tiny_model(tmp_path / "different", lambda config, weights: config.update(rms_norm_eps=1e-6))
    with torpor.Engine(different, tmp_path / "store") as other, pytest.raises(torpor.IncompatibleError, match="config"):
        other.agent("ada").turn("hello")


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.0}])
def test_a_model_that_computes_no_number_says_nothing_and_leaves_nothing(tmp_path, sampling):
    def spoil(config, weights):
        weights["model.norm.weight"][0] = float("nan")

    spoilt = make_tiny_model(tmp_path / "spoilt", spoil)
    with torpor.Engine(spoilt, tmp_path / "store") as engine:
        with pytest.raises(torpor.InternalError, match="no number"):
            engine.agent("ada").turn("hello", raw=True, **sampling)
        assert engine.agents() == []
    assert not list((tmp_path / "store").glob("*.safetensors"))
    cli = Torpor(tmp_path / "store", spoilt).run("ada", "hello", "--raw")
    assert (cli.code, cli.out) == (11, "") and "no number" in cli.err


def test_a_closed_engine_says_so_and_lets_its_agents_go(tiny_model, tmp_path):
    engine = torpor.Engine(tiny_model, tmp_path / "store")
    ada = engine.agent("ada")
    ada.turn("hello", raw=True, max_tokens=2)
    engine.close()
    engine.close()
    with pytest.raises(torpor.InvalidArgumentError, match="closed"):
        ada.turn("hello")
    with torpor.Engine(tiny_model, tmp_path / "store") as other:
        other.agent("ada").turn(" on", raw=True, max_tokens=2)


def test_eight_threads_keep_their_agents_apart(engine):
    def talk(name):
        agent = engine.agent(name)
        return [agent.turn(f"I am {name.removesuffix('-alone')} {i}", raw=True, max_tokens=4).text for i in range(4)]

    names = [f"agent{i}" for i in range(8)]
    together = {}

    def work(name):
        together[name] = talk(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == {name: talk(f"{name}-alone") for name in names}
    assert len({tuple(texts) for texts in together.values()}) == 8
