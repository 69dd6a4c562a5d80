"""torpor.ray on a Ray of its own (`make ray`; Ray takes a minute on two cores)."""

import os
import shutil
import subprocess

import pytest

from conftest import BUILD, ROOT

PYTHON = ROOT / ".sdks" / "ray" / "bin" / "python"
pytestmark = pytest.mark.skipif(not os.environ.get("TORPOR_RAY"), reason="make ray runs it")


def ray(directory, *args, header="x-torpor-agent"):
    package = directory / "package"
    shutil.copytree(BUILD / "python" / "torpor", package / "torpor", dirs_exist_ok=True)
    return subprocess.run([PYTHON, *map(str, args)], capture_output=True, text=True, timeout=500, cwd=directory, env={
        **os.environ, "PYTHONPATH": str(package), "HOME": str(directory), "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_SESSION_ID_HEADER_KEY": header})


def test_an_agent_meets_one_replica_and_goes_on_when_that_is_killed(tmp_path, tiny_model):
    said = ray(tmp_path, ROOT / "tests" / "ray_fleet.py", tiny_model, tmp_path / "store")
    assert said.returncode == 0, said.stdout + said.stderr[-4000:]
    told = [line for line in said.stdout.splitlines() if "(raylet)" not in line]  # Ray tells of the one that was killed
    assert told == ["one agent met one replica", "a killed replica's agents went on"]


def test_another_header_is_refused(tmp_path):
    said = ray(tmp_path, "-c", "import torpor.ray; torpor.ray.app({'model': 'm'})", header="x-session-id")
    assert said.returncode and "RAY_SERVE_SESSION_ID_HEADER_KEY=x-torpor-agent" in said.stderr
