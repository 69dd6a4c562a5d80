"""`torpor chat --server`, and what other processes hear of an agent that a server has."""

import json
import os
import pty
import signal
import subprocess

import pytest

from conftest import MODEL, Torpor, read_to_the_end
from serving import Server


@pytest.fixture
def server(tiny, tmp_path):
    with Server(tiny, tmp_path) as server:
        server.torpor = tiny
        yield server


def at(server):
    return "--server", f"http://127.0.0.1:{server.port}", "--api-key-file", server.keys


def chat(torpor, agent, lines, *args, **kwargs):
    return torpor("chat", "--agent", agent, "--max-tokens", 6, "--json", *args, stdin="".join(f"{line}\n" for line in lines),
                  **kwargs)


def objects(result):
    """What chat printed, without what depends on the machine or on who computes."""
    found = [json.loads(line) for line in result.ok().out.splitlines()]
    for one in found:
        for name in ("timing_ms", "bytes", "model", "model_bytes", "mapped_bytes"):
            one.pop(name, None)
        for agent in one.get("agents", []):
            agent.pop("model", None)
    return found


SCRIPT = ["One", "/turns", "Two", "/fork eve", "Three", "/agents", "/undo", "/turns", "/agent ada", "/rename bob", "/pin", "Four",
          "/rewind 0", "Five", "/turns", "/agent new", "/system Be quick.", "Six", "/turns", "/unpin", "//agent", "/agents",
          "/sleep", "/memory", "/exit", "never said"]


def test_a_chat_with_a_server_is_the_one_that_it_would_be_alone(server, tiny_model, tmp_path):
    alone = Torpor(tmp_path / "alone", tiny_model)
    options = ("--system", "Be brief.", "--temperature", 0.9, "--top-p", 0.8, "--seed", 3, "--top-k", 40, "--min-p", 0.001,
               "--repetition-penalty", 1.2, "--penalty-context", 9, "--presence-penalty", 0.5, "--frequency-penalty", 0.25,
               "--logit-bias", '{"5": 3}', "--stop", "~~", "--stop", "@@")
    theirs = objects(chat(server.torpor, "ada", SCRIPT, *options, *at(server)))
    mine = objects(chat(alone, "ada", SCRIPT, *options, "--model", tiny_model))
    assert len(theirs) == 14
    for one, other in zip(theirs, mine, strict=True):
        if "kv_bytes" in one:  # the server's memory is its own affair
            assert one.keys() == other.keys() and {agent["agent"] for agent in one["agents"]} <= {"eve", "bob", "new"}
        else:
            assert one == other
    assert server.stop() == 0
    kept = [{agent["agent"]: (agent["cache_size"], agent["pinned"]) for agent in torpor("ls", "--json").ok().json}
            for torpor in (server.torpor, alone)]
    assert kept[0] == kept[1] and set(kept[0]) == {"bob", "eve", "new"}


def test_the_key_is_that_of_the_environment_or_of_the_first_start(server, tmp_path):
    url = at(server)[:2]
    lost = {"XDG_CONFIG_HOME": str(tmp_path / "nowhere")}
    assert objects(chat(server.torpor, "ada", ["One"], *url, env={**lost, "TORPOR_API_KEY": server.key}))
    chat(server.torpor, "ada", ["One"], *url, env=lost).fails("invalid", "takes no key of", "api-keys.local")
    chat(server.torpor, "ada", ["One"], *at(server), env={"TORPOR_API_KEY": "sk-other"}).fails("invalid", "TORPOR_API_KEY")


def test_what_a_server_refuses_is_said_as_chat_says_it(server):
    def fails(name, *words, lines=("One",), agent="ada", args=(), answered=False):
        chat(server.torpor, agent, lines, *at(server), *args).fails(name, *words, answered=answered)

    fails("invalid", "'/x'", agent="/x")
    fails("not_found", "'other'", args=("--model", "other"))
    fails("not_found", "'ada'", lines=["/undo"])
    assert chat(server.torpor, "ada", ["One"], *at(server)).ok()
    fails("invalid", "system", args=("--system", "Another."))
    fails("invalid", "99999", lines=["Two", "/rewind 99999"], answered=True)
    fails("invalid", "eve", lines=["/fork eve", "/agent ada", "/fork eve"])
    fails("invalid", "has begun already", lines=["/system Be brief."])
    server.process.kill()
    server.process.wait()
    fails("not_found", "no server answers")


@pytest.mark.parametrize("option", [("--kv-bits", 4), ("--threads", 1), ("--raw",), ("--write-behind",), ("--logprobs", 1)])
def test_options_that_only_an_engine_of_its_own_takes_are_refused(server, option):
    result = chat(server.torpor, "ada", ["One"], *at(server), *option)
    assert result.code == 2 and option[0] in result.err and result.out == ""


def test_on_a_terminal_an_answer_that_is_stopped_is_taken_back(tmp_path):
    torpor = Torpor(tmp_path / "store", MODEL)
    with Server(torpor, tmp_path) as server:
        leader, follower = pty.openpty()
        process = subprocess.Popen(torpor.command("chat", "--agent", "ada", "--max-tokens", 8000, *at(server)), stdin=follower,
                                   stdout=follower, stderr=follower, start_new_session=True)
        os.close(follower)
        said = b""

        def hear(word):
            nonlocal said
            while word not in said:
                said += os.read(leader, 4096)
            said = said[said.index(word) + len(word):]

        hear(f"ada on http://127.0.0.1:{server.port}".encode())
        hear(b"ada is new.")
        hear(b"ada> ")
        os.write(leader, b"Write a long story about a lighthouse. Describe each of its hundred rooms.\n")
        hear(b"rooms.")
        hear(b"\r\n")
        while len(said) < 20:
            said += os.read(leader, 4096)
        process.send_signal(signal.SIGINT)
        hear(b"the answer was stopped, and the turn taken back.")
        hear(b"ada> ")
        os.write(leader, b"/agents\n")
        hear(b"AGENT")
        hear(b"ada> ")
        os.write(leader, b"\x04")
        read_to_the_end(leader)
        os.close(leader)
        assert process.wait(300) == 0
        agents = server.ask("GET", "/torpor/v1/agents").json()["agents"]
        assert agents == [] or [agent["tokens"] for agent in agents] == [0]


def test_a_process_beside_a_server_names_the_server_that_has_the_agent(server):
    server.chat("Hi.", agent="ada")
    url = f"http://127.0.0.1:{server.port}"
    for refused in (server.torpor.run("ada", "Hi."), chat(server.torpor, "ada", ["Hi."], "--model", server.torpor.model),
                    server.torpor("rm", "ada"), server.torpor("rewind", "ada", 1)):
        refused.fails("busy", "'ada'", f"torpor chat --server {url} --agent ada")
    assert f" awake in {url} " in server.torpor("ls").ok().out
    assert [agent["server"] for agent in server.torpor("ls", "--json").ok().json] == [url]
    assert objects(chat(server.torpor, "ada", ["And then?"], "--server", url, "--api-key-file", server.keys))
    server.ask("POST", "/torpor/v1/agents/ada/sleep")
    assert [agent["server"] for agent in server.torpor("ls", "--json").ok().json] == [None]
    server.torpor.run("ada", "Hi.").ok()


def test_a_server_that_was_killed_or_is_not_known_is_not_named(server, tmp_path):
    server.chat("Hi.", agent="ada")
    [note] = server.torpor.store.glob(".locks/.server-*")
    text = note.read_text()
    note.write_text("no JSON")
    server.torpor.run("ada", "Hi.").fails("busy", "awake elsewhere")
    note.write_text(text.replace("api-keys", "other-keys"))
    server.torpor.run("ada", "Hi.").fails("busy", "awake elsewhere")
    note.write_text(text)
    server.process.kill()
    server.process.wait()
    server.torpor.run("ada", "Hi.").ok()
    assert [agent["server"] for agent in server.torpor("ls", "--json").ok().json] == [None] and note.exists()
    with Server(server.torpor, tmp_path) as again:
        [now] = server.torpor.store.glob(".locks/.server-*")
        assert now != note
        assert again.stop() == 0
    assert not list(server.torpor.store.glob(".locks/.server-*"))
