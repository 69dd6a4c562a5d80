"""`torpor launch`: clients' configuration, shown to a program that stands in for each client."""

import json
import os
import shutil
import subprocess
import tomllib

import pytest

from conftest import BIN, Result, Torpor
from serving import Server

RECORDER = """#!/bin/sh
# Says what a client was started with.
exec python3 -c 'import json, os, sys; json.dump({"args": sys.argv[1:], "env": dict(os.environ)}, open(os.environ["RECORD"], "w"))' "$@"
"""
CLIENTS = ["claude", "codex", "opencode", "pi"]


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_model):
    directory = tmp_path_factory.mktemp("launched")
    with Server(Torpor(directory / "store", tiny_model), directory) as server:
        server.url = f"http://127.0.0.1:{server.port}"
        yield server


@pytest.fixture
def home(tmp_path):
    """A user's home, whose files no client's start may change; PATH leads to the stand-ins."""
    (tmp_path / "bin").mkdir()
    for name in CLIENTS:
        path = tmp_path / "bin" / name
        path.write_text(RECORDER)
        path.chmod(0o755)
    for name in (".claude/settings.json", ".codex/config.toml", ".config/opencode/opencode.json", ".pi/agent/models.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("the user's own")
    return tmp_path


def environment(home, **more):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ANTHROPIC_", "TORPOR_API"))}
    return {**kept, "HOME": str(home), "PATH": f"{home}/bin:{os.environ['PATH']}", "RECORD": str(home / "record"), **more}


def launch(server, home, client, *args, env=None):
    command = [BIN, "launch", client, "--server", server.url, "--api-key-file", server.keys, *args]
    return Result(subprocess.run(list(map(str, command)), capture_output=True, env=environment(home, **(env or {})), timeout=300))


def started(server, home, client, *args, env=None):
    launch(server, home, client, *args, env=env).ok()
    for name in (".claude/settings.json", ".codex/config.toml", ".config/opencode/opencode.json", ".pi/agent/models.json"):
        assert (home / name).read_text() == "the user's own"
    record = json.loads((home / "record").read_text())
    return record["args"], record["env"]


def context_of(server):
    return server.ask("GET", "/v1/models").json()["data"][0]["context_length"]


def test_claude_gets_address_key_model_and_window(server, home):
    args, env = started(server, home, "claude", "--", "-p", "Hi.", "--model", "x", env={"ANTHROPIC_API_KEY": "sk-own"})
    assert args == ["-p", "Hi.", "--model", "x"]
    assert (env["ANTHROPIC_BASE_URL"], env["ANTHROPIC_AUTH_TOKEN"]) == (server.url, server.key)
    assert "ANTHROPIC_API_KEY" not in env
    for name in ("ANTHROPIC_MODEL", "ANTHROPIC_DEFAULT_HAIKU_MODEL", "ANTHROPIC_DEFAULT_SONNET_MODEL",
                 "ANTHROPIC_DEFAULT_OPUS_MODEL"):
        assert env[name] == "tiny"
    for name in ("CLAUDE_CODE_MAX_CONTEXT_TOKENS", "CLAUDE_CODE_AUTO_COMPACT_WINDOW"):
        assert env[name] == str(context_of(server))


def test_codex_gets_its_provider_by_options(server, home):
    args, env = started(server, home, "codex", "--", "exec", "Hi.")
    assert args[-2:] == ["exec", "Hi."] and args[:-2:2] == ["-c"] * 4
    config = tomllib.loads("\n".join(args[1:-2:2]))
    provider = config["model_providers"]["torpor"]
    assert (config["model"], config["model_provider"], config["model_context_window"]) == ("tiny", "torpor", context_of(server))
    assert (provider["base_url"], provider["wire_api"]) == (f"{server.url}/v1", "responses")
    assert env[provider["env_key"]] == server.key and server.key not in " ".join(args)


def test_opencode_gets_its_provider_over_what_the_user_has_set(server, home):
    own = {"theme": "dark", "provider": {"other": {"name": "Other"}}, "model": "other/x"}
    args, env = started(server, home, "opencode", env={"OPENCODE_CONFIG_CONTENT": json.dumps(own)})
    config = json.loads(env["OPENCODE_CONFIG_CONTENT"])
    assert args == [] and config["model"] == "torpor/tiny"
    assert config["theme"] == "dark" and config["provider"]["other"] == {"name": "Other"}
    provider = config["provider"]["torpor"]
    assert provider["options"] == {"baseURL": f"{server.url}/v1", "apiKey": "{env:TORPOR_API_KEY}"}
    limit = provider["models"]["tiny"]["limit"]
    assert limit["context"] == context_of(server) > limit["output"] > 0
    assert env["TORPOR_API_KEY"] == server.key and server.key not in env["OPENCODE_CONFIG_CONTENT"]


def test_pi_gets_its_provider_from_an_extension(server, home):
    args, env = started(server, home, "pi", "--", "-p", "Hi.")
    assert args[0] == "--extension" and args[2:] == ["--provider", "torpor", "--model", "tiny", "-p", "Hi."]
    provider = json.loads(env["TORPOR_PI_PROVIDER"])
    assert (provider["baseUrl"], provider["api"]) == (f"{server.url}/v1", "openai-completions")
    assert [(model["id"], model["contextWindow"]) for model in provider["models"]] == [("tiny", context_of(server))]
    assert provider["models"][0]["compat"]["sendSessionAffinityHeaders"] is True
    assert env["TORPOR_API_KEY"] == server.key
    text = open(args[1]).read()
    assert args[1].startswith(f"{home}/.cache/torpor/") and server.key not in text
    if node := shutil.which("node"):  # what pi would be told
        module = home / "extension.mjs"
        module.write_text(text)
        told = subprocess.run([node, "--input-type=module", "-e", f"import register from '{module}';"
                               "register({ registerProvider: (...told) => console.log(JSON.stringify(told)) });"],
                              capture_output=True, text=True, check=True, env=env).stdout
        assert json.loads(told) == ["torpor", {**provider, "apiKey": server.key}]


@pytest.mark.parametrize("client", CLIENTS)
def test_print_shows_a_script_that_does_the_same_and_no_key(server, home, client):
    script = launch(server, home, client, "--print", "--", "it's", "a b").ok().out
    assert not (home / "record").exists() and server.key not in script
    subprocess.run(["sh", "-c", script], check=True, env=environment(home))
    shown = json.loads((home / "record").read_text())
    args, env = started(server, home, client, "--", "it's", "a b")
    assert shown["args"] == args
    assert {name: value for name, value in shown["env"].items() if name not in ("_", "PWD", "OLDPWD", "SHLVL")} \
        == {name: value for name, value in env.items() if name not in ("_", "PWD", "OLDPWD", "SHLVL")}


def test_what_can_not_be_started_is_one_sentence(server, home, tmp_path):
    for client, package in zip(CLIENTS, ["@anthropic-ai/claude-code", "@openai/codex", "opencode-ai", "pi-coding-agent"]):
        (home / "bin" / client).unlink()
        launch(server, home, client, env={"PATH": f"{home}/bin"}).fails("not_found", f"'{client}'", "npm install -g", package)
        assert launch(server, home, client, "--print").ok()
    launch(server, home, "claude", "--print", "--model", "other").fails("not_found", "'other'", "tiny")
    assert launch(server, home, "emacs").code == 2
    assert not (home / "record").exists()


def test_a_server_without_keys_is_launched_at(home, tmp_path, tiny):
    with Server(tiny, tmp_path / "open", "--no-auth") as server:
        server.url = f"http://127.0.0.1:{server.port}"
        _, env = started(server, home, "claude")
        assert env["ANTHROPIC_AUTH_TOKEN"] == "none"
