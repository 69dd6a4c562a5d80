"""How Torpor's engine computes, and whom it tells what it goes on without, set from Python."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import BUILD, Torpor

import torpor


def test_settings_say_how_rows_are_computed_and_the_environment_is_only_their_default(tiny_model, tmp_path, words, monkeypatch):
    def say(name, **settings):
        with torpor.Engine(tiny_model, tmp_path / name, **settings) as engine:
            engine.agent("ada").turn(words(300), raw=True, max_tokens=8)
        return Torpor(tmp_path / name, tiny_model)("show", "ada", "--json").ok().json["numerics"]

    monkeypatch.delenv("TORPOR_BACKEND", raising=False)
    plain = say("plain")
    assert plain.startswith("f32") and say("kernels", backend="kernels", activations="f32") == plain
    rounded = say("int16", activations="int16")
    assert rounded == plain.replace("f32", "int16")
    others = say("mlx", backend="mlx")
    assert len({plain, rounded, others}) == 3
    monkeypatch.setenv("TORPOR_BACKEND", "mlx")
    assert say("by the environment") == others and say("over it", backend="kernels") == plain


# What Highway asks of a CPU beside AVX-512 itself before it takes VNNI for granted.
VNNI = {"avx512_vnni", "avx512vbmi", "avx512_vbmi2", "avx512_bitalg", "avx512_vpopcntdq", "vaes", "vpclmulqdq"}


def test_quantized_weights_meet_16_bits_unless_told_otherwise_where_the_cpu_has_vnni(real, tiny, words):
    cpu = Path("/proc/cpuinfo")
    flags = re.findall("^flags.*", cpu.read_text(), re.MULTILINE) if cpu.exists() else []
    vnni = VNNI <= set(" ".join(flags).split())

    def activations(torpor, agent, *options):
        torpor.run(agent, "The keeper", "--raw", *options, max_tokens=1).ok()
        return torpor("show", agent, "--json").ok().json["numerics"].split("/")[0]

    assert activations(real, "ada") == ("int16" if vnni else "f32")
    assert activations(real, "bob", "--cpu-target", "portable") == "f32" == activations(real, "eve", "--activations", "f32")
    assert activations(tiny, "tom") == "f32"


def test_an_agent_that_wakes_on_another_kind_of_cpu_says_so_and_shares_no_rows_it_may_not(tiny, words):
    def turn(agent, *options):
        return tiny.run(agent, words(600), "--raw", *options, max_tokens=1).ok()

    def reused(result):
        return result.json["tokens"]["cached"]

    turn("ada", "--cpu-target", "portable")
    assert reused(turn("bob", "--cpu-target", "portable")) >= 512, "of the same kind they are shared"
    assert reused(turn("eve")) == 0
    assert reused(turn("kim")) >= 512
    woken = tiny.run("ada", " on", "--raw", max_tokens=1).ok()
    assert "computed as 'f32/kernels/l16'" in woken.err and woken.json["tokens"]["prefilled"] <= 3, woken.err
    assert tiny("show", "ada", "--json").json["numerics"] == tiny("show", "eve", "--json").json["numerics"], "of new rows"


def test_settings_that_can_not_be_are_told(tiny_model, tmp_path):
    for wrong, name in (({"backend": "cuda"}, "cuda"), ({"activations": "int4"}, "int4"), ({"cpu_target": "mmx"}, "mmx"),
                        ({"threads": 1000}, "1000"), ({"threads": -1}, "-1")):
        with pytest.raises(torpor.InvalidArgumentError, match=name):
            torpor.Engine(tiny_model, tmp_path / "store", **wrong)


def python(script, *args):
    return subprocess.run([sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(BUILD / "python")})


def test_threads_and_instruction_set_are_the_processs(tiny_model, tmp_path):
    script = ("import sys, torpor\n"
              "def answer(**settings):\n"
              "    with torpor.Engine(sys.argv[1], sys.argv[2], **settings) as engine:\n"
              "        return engine.turn('hello', raw=True, max_tokens=8).text\n"
              "print(answer(threads=3, cpu_target='portable') == answer(threads=3) == answer())\n"
              "for other in ({'threads': 2}, {'cpu_target': 'sse4'}):\n"
              "    try:\n"
              "        answer(**other)\n"
              "    except torpor.InvalidArgumentError:\n"
              "        print('refused')\n")
    ended = python(script, tiny_model, tmp_path / "store")
    assert (ended.returncode, ended.stdout) == (0, "True\nrefused\nrefused\n"), ended.stderr


@pytest.fixture
def told():
    """What a log handler has heard."""
    told = []
    torpor.set_log_handler(lambda level, sentence: told.append((level, sentence)))
    yield told
    torpor.set_log_handler(None)


def spoil_the_sidecar(store):
    (store / "ada.json").unlink()
    (store / "ada.json").mkdir()


def test_a_sidecar_that_can_not_be_written_is_told_to_the_log_handler(tiny_model, tmp_path, told):
    with torpor.Engine(tiny_model, tmp_path / "store") as engine:
        ada = engine.agent("ada")
        ada.turn("hello", raw=True, max_tokens=1)
        assert told == []
        spoil_the_sidecar(tmp_path / "store")
        ada.turn("hello", raw=True, max_tokens=1)
        [(level, sentence)] = told
        assert level == "warning" and sentence.startswith("The sidecar of agent 'ada' could not be written: ")
        torpor.set_log_handler(None)
        ada.turn("hello", raw=True, max_tokens=1)
        assert len(told) == 1


def test_what_a_log_handler_raises_harms_no_turn(tiny_model, tmp_path, monkeypatch):
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: unraisable.append(args.exc_type))

    def handler(level, sentence):
        with pytest.raises(torpor.InvalidArgumentError):
            torpor.set_log_handler(None)
        raise ZeroDivisionError

    torpor.set_log_handler(handler)
    with torpor.Engine(tiny_model, tmp_path / "store") as engine:
        ada = engine.agent("ada")
        ada.turn("hello", raw=True, max_tokens=1)
        spoil_the_sidecar(tmp_path / "store")
        assert ada.turn("hello", raw=True, max_tokens=1).save_error is None
    torpor.set_log_handler(None)
    assert unraisable == [ZeroDivisionError]


def test_a_process_with_a_log_handler_ends(tiny_model, tmp_path):
    script = ("import sys, torpor\n"
              "torpor.set_log_handler(print)\n"
              "engine = torpor.Engine(sys.argv[1], sys.argv[2])\n"
              "engine.agent('ada').turn('hello', raw=True, max_tokens=1, save='behind')\n")
    (tmp_path / "store" / "ada.json").mkdir(parents=True)
    for _ in range(3):
        ended = python(script, tiny_model, tmp_path / "store")
        assert (ended.returncode, ended.stderr) == (0, "")
