"""What a newcomer asks the program: is this machine fit (`doctor`), and which model may I run (`setup`)?"""

import json
import os
import shlex
import shutil
import struct

import pytest

from conftest import EXIT, MODEL, Torpor
from test_models_command import caches, put_in_hub  # noqa: F401


def checks(result):
    return {check["name"]: check for check in result.json["checks"]}


def test_the_doctor_tells_of_everything_and_leaves_nothing_behind(tiny):
    tiny.run("ada", "Hello").ok()
    before = tiny.state()
    found = checks(tiny("doctor", "--json").ok())
    assert list(found) == ["cpu", "threads", "memory", "mlx", "disk", "store"]
    assert tiny.state() == before
    version = dict(line.split(" ", 1) for line in tiny("--version").ok().out.splitlines() if " " in line)
    assert found["mlx"]["version"] == found["mlx"]["built_with"] == version["MLX"]
    assert found["cpu"]["target"] == tiny("--version").ok().out.split("CPU target ")[1].split("\n")[0]
    assert found["memory"]["available"] <= found["memory"]["physical"] and found["memory"]["bytes_per_s"] > 1e8
    disk = found["disk"]
    assert disk["directory"] == str(tiny.store) and disk["writable"] and disk["locks"]
    assert min(disk["write_bytes_per_s"], disk["read_bytes_per_s"], disk["flush_ms"]) > 0
    assert (found["store"]["agents"], found["store"]["damaged"]) == (1, 0)
    lines = tiny("doctor").ok().out.splitlines()
    assert [line.split()[1] for line in lines if "->" not in line] == list(found)


def test_the_doctor_makes_no_store(tmp_path):
    torpor = Torpor(tmp_path / "not" / "there", MODEL)
    found = checks(torpor("doctor", "--json").ok())
    assert found["disk"]["directory"] == str(tmp_path) and "not there yet" in found["store"]["found"]
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_sees_more_threads_than_cores(tiny):
    found = checks(tiny("doctor", "--json", env={"TORPOR_THREADS": str(len(os.sched_getaffinity(0)) + 1)}).ok())
    assert found["threads"]["state"] == "note" and "unset TORPOR_THREADS" in found["threads"]["advice"]


@pytest.mark.parametrize("check, setting", [("cpu", "TORPOR_CPU_TARGET"), ("threads", "TORPOR_THREADS"),
                                            ("mlx", "TORPOR_BACKEND")])
def test_the_doctor_finds_a_setting_that_is_wrong_and_looks_at_all_else(tiny, check, setting):
    result = tiny("doctor", "--json", env={setting: "some"})
    found = checks(result)
    assert result.code == EXIT["invalid"] and "not 'some'" in found[check]["found"] and len(found) == 6
    assert found["disk"]["state"] != "fails" and "not there yet" in found["store"]["found"]


def test_the_doctor_finds_a_damaged_agent(tiny):
    tiny.run("ada", "Hello").ok()
    tiny.agent_file("ada").write_bytes(b"x" * 100)
    result = tiny("doctor", "--json")
    assert result.code == EXIT["corruption"]
    store = checks(result)["store"]
    assert (store["state"], store["damaged"]) == ("fails", 1) and "torpor verify" in store["advice"]


def test_the_doctor_says_that_a_directory_is_no_store_or_can_not_be_written(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    result = Torpor(tmp_path, MODEL)("doctor", "--json")
    assert result.code == EXIT["invalid"] and "no store" in checks(result)["store"]["found"]
    result = Torpor("/proc/agents", MODEL)("doctor", "--json")
    assert result.code == EXIT["io"] and checks(result)["disk"]["state"] == "fails"


def test_setup_says_what_fits_and_its_command_runs(caches, tiny_model):  # noqa: F811
    put_in_hub(caches, "org/tiny", tiny_model)
    studio = caches.studio / "org" / "it's big"
    shutil.copytree(tiny_model, studio)
    # Only its header says how large it is.
    (studio / "model.safetensors").rename(studio / "model-1.safetensors")
    header = json.dumps({"more.weight": {"dtype": "F32", "shape": [1 << 18, 1 << 20], "data_offsets": [0, 1 << 40]}})
    with open(studio / "model-2.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header.encode())
        file.truncate(8 + len(header) + (1 << 40))
    put_in_hub(caches, "org/other", tiny_model).joinpath("config.json").write_text('{"model_type": "xlnet"}')
    said = caches("setup", "--json", env=caches.env).ok().json
    [fits], [large] = said["fits"], said["too_large"]
    assert (fits["model"], large["model"], said["not_run"]) == ("org/tiny", str(studio), 1)
    assert fits["tokens"] == json.loads((tiny_model / "config.json").read_text())["max_position_embeddings"]
    text = caches("setup", env=caches.env).ok().out
    assert fits["command"] in text and "it's big" in text.split("need more memory")[1]
    program, *arguments = shlex.split(fits["command"])
    assert program == "torpor"
    caches(*arguments, "--max-tokens", 2, stdin="Hello\n", env=caches.env).ok()
    assert sorted(os.listdir(caches.hub)) == ["models--org--other", "models--org--tiny"]


def test_a_models_name_is_one_word_of_the_shell(caches, tiny_model):  # noqa: F811
    shutil.copytree(tiny_model, caches.studio / "org" / "it's $(big)")
    [fits] = caches("setup", "--json", env=caches.env).ok().json["fits"]
    assert shlex.split(fits["command"])[3] == fits["model"]


def test_setup_without_models_says_how_to_fetch_one(caches):  # noqa: F811
    assert " ORG/NAME" in caches("setup", env=caches.env).ok().out
