"""torpor.ray on a Ray of its own: replicas on three nodes that share a bucket (`make ray`, minutes on two cores)."""

import json
import os
import shutil
import subprocess

import pytest

import s3
from conftest import BUILD, ROOT, Torpor, held_ids
from fleet_turns import body_of, compare_transcript, messages, path_of
from serving import Server

PYTHON = ROOT / ".sdks" / "ray" / "bin" / "python"
SEED = 18  # ray_fleet.py's
pytestmark = pytest.mark.skipif(not os.environ.get("TORPOR_RAY"), reason="make ray runs it")


def ray(directory, *args, header="x-torpor-agent", env=None):
    package = directory / "package"
    shutil.copytree(BUILD / "python" / "torpor", package / "torpor", dirs_exist_ok=True)
    return subprocess.run([PYTHON, *map(str, args)], capture_output=True, text=True, timeout=1500, cwd=directory, env={
        **os.environ, "PYTHONPATH": f"{package}:{ROOT / 'tests'}", "HOME": str(directory), "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_SESSION_ID_HEADER_KEY": header, **(env or {})})


def test_replicas_and_a_node_die_and_no_acknowledged_turn_is_lost_doubled_or_another(tmp_path, tiny_model):
    with s3.gofakes3() as server:
        url, env = f"s3://{s3.BUCKET}/ray", s3.environment(server.port)
        said = ray(tmp_path, ROOT / "tests" / "ray_fleet.py", tiny_model, tmp_path / "stores", url, env=env)
        print(said.stderr[-6000:])
        assert said.returncode == 0, said.stdout + said.stderr[-6000:]
        acknowledged = {agent: [tuple(turn) for turn in turns]
                        for agent, turns in json.loads(said.stdout.splitlines()[-1]).items()}
        found = Torpor(tmp_path / "found", tiny_model)
        found("remote", "pull", url, *acknowledged, env=env).ok()
        found("remote", "gc", url, env=env).ok()
        assert found("remote", "verify", url, "--json", env=env).ok().json["unneeded"] == 0
    alone, wrong = Torpor(tmp_path / "alone", tiny_model), []
    with Server(alone, tmp_path, "--no-auth") as server:
        for agent, turns in acknowledged.items():
            wrong += compare_transcript(agent, turns, messages(found, agent))
            for number, (_, text) in enumerate(turns):
                answer = server.ask("POST", path_of(agent, number), body_of(agent, number, SEED), key="")
                if answer.json()["text"] != text:
                    wrong.append(f"{agent}: turn {number} has another answer than undisturbed")
    wrong += [f"{agent}: has other tokens than undisturbed" for agent in acknowledged
              if held_ids(found.store, agent) != held_ids(alone.store, agent)]
    assert not wrong, wrong[:20]


def test_another_header_is_refused(tmp_path):
    said = ray(tmp_path, "-c", "import torpor.ray; torpor.ray.app({'model': 'm'})", header="x-session-id")
    assert said.returncode and "RAY_SERVE_SESSION_ID_HEADER_KEY=x-torpor-agent" in said.stderr
