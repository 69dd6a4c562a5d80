"""`torpor serve`: starts, answers, keeps strangers out, drains."""

import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import time

import pytest

from conftest import BIN, MODEL, ROOT, Torpor
from serving import Server, UnixConnection


@pytest.fixture(scope="module")
def served(tmp_path_factory, tiny_model):
    """One server for the tests that leave nothing behind."""
    directory = tmp_path_factory.mktemp("served")
    with Server(Torpor(directory / "store", tiny_model), directory) as server:
        yield server
        assert server.stop() == 0


def test_the_start_says_where_and_with_which_key(tiny, tmp_path):
    with Server(tiny, tmp_path) as server:
        url = f"http://127.0.0.1:{server.port}"
        assert f"export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY=$(cat '{server.keys}.local')" in server.greeting
        assert f"export ANTHROPIC_BASE_URL={url} ANTHROPIC_AUTH_TOKEN=" in server.greeting
        for file in (server.keys, server.keys.with_name("api-keys.local")):
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert server.greeting.count(server.key) == 1  # for the browser, behind '#'
        assert f"{url}/#key={server.key}\n" in server.greeting
        first = server.key
        assert server.stop() == 0
    with Server(tiny, tmp_path) as again:
        assert again.key == first
        assert again.ask("GET", "/v1/models").status == 200


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_curl_line_of_the_start_answers(served):
    [line] = [line for line in served.greeting.splitlines() if "curl" in line]
    answer = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"]


def test_ps_tells_what_a_server_does(served, tiny):
    at = ("--server", f"http://127.0.0.1:{served.port}", "--api-key-file", served.keys)
    assert f"127.0.0.1:{served.port}: " in tiny("ps", *at).ok().out
    assert tiny("ps", *at).ok().out.endswith("tiny, 0 turns run, 0 wait\n")
    printed = tiny("ps", *at, "--json").ok().json
    assert (printed["server"], printed["turns"], printed["others"]) == (at[1], [], 0)
    assert tiny("ps", "--server", f"localhost:{served.port}/", *at[2:]).ok()


def test_ps_lists_a_turn_under_way(real_server):
    server = real_server
    connection = server.connection()
    response = server.send(connection, "POST", "/v1/chat/completions", long_turn(stream=True),
                           headers={"x-torpor-agent": "ada"}).getresponse()
    response.readline()
    out = real_server.torpor("ps", "--server", f"http://127.0.0.1:{server.port}", "--api-key-file", server.keys).ok().out
    connection.close()
    response.close()
    assert "1 turns run, 0 wait" in out and re.search(r"^ada +(reading|answering) ", out, re.MULTILINE)
    while server.metric("torpor_turns_running") != 0:
        pass


def test_ps_says_in_a_sentence_why_it_can_tell_nothing(served, tiny, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        tiny("ps", "--server", f"http://127.0.0.1:{free.getsockname()[1]}").fails("not_found", "no server answers")
    at = ("--server", f"http://127.0.0.1:{served.port}")
    tiny("ps", *at, "--api-key-file", tmp_path / "keys").fails("invalid", "--api-key-file")
    for wrong in ("https://127.0.0.1:1", "http://", "http://host:port", "http://a/b:1"):
        tiny("ps", "--server", wrong).fails("invalid", "http://HOST:PORT")


def test_answers_both_dialects_end_to_end(served):
    models = served.ask("GET", "/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["tiny"]
    whole = served.chat("Who keeps the lamp?").json()
    assert whole["usage"]["completion_tokens"] == 4
    streamed = served.chat("Who keeps the lamp?", stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.headers["x-accel-buffering"] == "no"
    text = "".join(choice["delta"].get("content") or "" for event in streamed.events() for choice in event["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    message = served.ask("POST", "/v1/messages", {
        "model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "Who keeps the lamp?"}]}).json()
    assert "".join(block["text"] for block in message["content"]) == text


def test_samplers_stop_strings_and_logprobs_count(served):
    def choice(**more):
        return served.chat("Who keeps the lamp?", max_tokens=8, temperature=1, **more).json()["choices"][0]

    first = choice(seed=3, logprobs=True, top_logprobs=2)
    text, tokens = first["message"]["content"], first["logprobs"]["content"]
    assert len(tokens) == 8 and all(len(token["top_logprobs"]) == 2 for token in tokens)
    assert choice(seed=3)["message"]["content"] == text != choice(seed=4)["message"]["content"]
    greedy = served.chat("Who keeps the lamp?", max_tokens=8, temperature=0).json()["choices"][0]["message"]["content"]
    assert choice(seed=3, top_k=1)["message"]["content"] == greedy
    cut = choice(seed=3, stop=[text[1]])
    assert cut["message"]["content"] == text[:text.index(text[1])] and cut["finish_reason"] == "stop"
    streamed = served.chat("Who keeps the lamp?", max_tokens=8, temperature=1, seed=3, logprobs=True, top_logprobs=2,
                           stream=True)
    told = [event["choices"][0]["logprobs"] for event in streamed.events() if event["choices"][0]["logprobs"]]
    assert [token for part in told for token in part["content"]] == tokens
    message = served.ask("POST", "/v1/messages", {
        "model": "tiny", "max_tokens": 8, "temperature": 1, "top_k": 1, "stop_sequences": [greedy[1]],
        "messages": [{"role": "user", "content": "Who keeps the lamp?"}]}).json()
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", greedy[1])


def test_an_answer_is_held_to_its_format(served):
    schema = {"type": "object", "properties": {"lamp": {"enum": ["lit", "out"]}}, "required": ["lamp"],
              "additionalProperties": False}
    for kind, more in [("json_schema", {"json_schema": {"name": "lamp", "schema": schema, "strict": True}}),
                       ("grammar", {"grammar": 'start: "{\\"lamp\\": \\"" ("lit" | "out") "\\"}"'})]:
        for seed in range(3):
            choice = served.chat("Is it lit?", max_tokens=200, temperature=1.2, seed=seed,
                                 response_format={"type": kind, **more}).json()["choices"][0]
            assert choice["finish_reason"] == "length" or json.loads(choice["message"]["content"])["lamp"] in ("lit", "out")
    refused = served.chat("Is it lit?", response_format={"type": "json_schema", "json_schema": {
        "name": "x", "schema": {"type": "array", "uniqueItems": True}}})
    assert refused.status == 400 and "uniqueItems" in refused.json()["error"]["message"]


def test_health_asks_for_no_key_and_metrics_does(served):
    assert served.ask("GET", "/health", key="").json()["ready"] is True
    assert served.ask("GET", "/metrics", key="").status == 401
    assert served.metric("torpor_kv_bytes") is not None
    assert served.metric("torpor_kv_held_ratio") == 0  # without a budget
    assert served.metric("torpor_connections") >= 1


@pytest.mark.parametrize("key", ["", "sk-torpor-wrong"])
def test_nobody_is_let_in_without_a_key(served, key):
    for method, path in [("GET", "/v1/models"), ("POST", "/v1/messages"), ("GET", "/torpor/v1/agents"),
                         ("GET", "/api/tags")]:
        assert served.ask(method, path, key=key).status == 401, path


def test_a_page_of_a_strangers_is_kept_out(served):
    assert served.ask("GET", "/v1/models", headers={"host": "evil.example"}).status == 403
    assert served.ask("GET", "/v1/models", headers={"origin": "https://evil.example"}).status == 403


def test_without_keys_only_loopback_is_served(tiny, tmp_path):
    tiny("serve", "--model", tiny.model, "--no-auth", "--host", "0.0.0.0").fails("invalid", "loopback")
    with Server(tiny, tmp_path, "--no-auth") as server:
        assert server.ask("GET", "/v1/models").status == 200
        assert not server.keys.exists()


def test_a_unix_socket_is_served_beside_or_without_tcp(tiny, tmp_path):
    path = tmp_path / "torpor.sock"
    with Server(tiny, tmp_path, "--socket", path, "--host", "", host=False) as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert server.ask("GET", "/v1/models", connection=UnixConnection(path)).status == 200
        assert server.ask("GET", "/v1/models", connection=UnixConnection(path), key="").status == 401
        assert server.stop() == 0
    assert not path.exists()


def test_sighup_reads_keys_and_log_anew(tiny, tmp_path):
    log = tmp_path / "access.log"
    with Server(tiny, tmp_path, "--log", log) as server:
        assert server.ask("GET", "/v1/models").status == 200
        log.rename(tmp_path / "access.log.1")
        server.keys.write_text(f"local:second:{hashlib.sha256(b'sk-second').hexdigest()}\n")
        server.signal(signal.SIGHUP)
        while server.ask("GET", "/v1/models", key="sk-second").status != 200:
            time.sleep(0.01)
        assert server.ask("GET", "/v1/models").status == 401
        assert log.exists()
        server.keys.write_text("nonsense\n")  # a mistake leaves what was there
        server.signal(signal.SIGHUP)
        while "stays" not in log.read_text():
            time.sleep(0.01)
        assert server.ask("GET", "/v1/models", key="sk-second").status == 200


def test_sighup_reads_the_configuration_anew_and_says_what_needs_a_restart(tiny, tmp_path):
    config, log = tmp_path / "torpor.toml", tmp_path / "access.log"
    second, keys = tmp_path / "second.log", tmp_path / "other-keys"
    config.write_text(f'log = "{log}"\nqueue = 8\nallow-host = ["one.example"]\n')
    with Server(tiny, tmp_path, "--config", config) as server:
        def status(host, key=None):
            return server.ask("GET", "/v1/models", headers={"host": host}, key=key).status

        assert (status("one.example"), status("two.example")) == (200, 403)
        config.write_text(f'log = "{log}"\nqeue = 9\n')  # a mistake leaves what was there
        server.signal(signal.SIGHUP)
        while "line 2" not in log.read_text():
            time.sleep(0.01)
        assert status("one.example") == 200
        config.write_text(f'log = "{second}"\nqueue = 9\nallow-host = ["two.example"]\nmax-stall = 100\n')
        server.signal(signal.SIGHUP)
        while not second.exists() or "restart" not in second.read_text():
            time.sleep(0.01)
        [left] = [json.loads(line)["message"] for line in second.read_text().splitlines() if "restart" in line]
        assert left.endswith(": max-stall, queue")
        assert (status("one.example"), status("two.example")) == (403, 200)
        # The command line goes before the file.
        keys.write_text(f"local:second:{hashlib.sha256(b'sk-second').hexdigest()}\n")
        config.write_text(f'log = "{second}"\napi-key-file = "{keys}"\n')
        before = second.read_text().count("anew")
        server.signal(signal.SIGHUP)
        while second.read_text().count("anew") == before:
            time.sleep(0.01)
        assert (status("localhost"), status("localhost", key="sk-second")) == (200, 401)


def test_the_log_has_a_line_for_each_request_and_no_text(tiny, tmp_path):
    log = tmp_path / "access.log"
    with Server(tiny, tmp_path, "--log", log) as server:
        request_id = server.chat("the secret word").headers["x-request-id"]
        assert server.stop() == 0
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        line = next(line for line in lines if line.get("id") == request_id)
        assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/chat/completions", 200)
        assert line["tenant"] == "local"
        assert "secret" not in log.read_text() and server.key not in log.read_text()


LONG_STORY = "Write a long story about a lighthouse."
LONG_START = "Once upon a time, in a lighthouse far away, there lived"  # of a text that goes on for long


def long_turn(text=LONG_STORY, **more):
    """Of the real model: the context's end alone ends it, after seconds, unless somebody does."""
    return {"model": "smollm2-135m", "max_tokens": 8000, "temperature": 0, "logit_bias": {"2": -100},
            "messages": [{"role": "user", "content": text}], **more}


def test_sigterm_lets_turns_end_and_takes_no_new_ones(real, tmp_path):
    with Server(real, tmp_path) as server:
        connection = server.connection()
        response = server.send(connection, "POST", "/v1/chat/completions", long_turn(stream=True, max_tokens=60),
                               headers={"x-torpor-agent": "ada"}).getresponse()
        assert response.readline().startswith(b"data: ")
        server.signal(signal.SIGTERM)
        while True:  # nobody listens any more
            try:
                socket.create_connection(("127.0.0.1", server.port)).close()
            except ConnectionResetError:  # still in the queue when the listener was closed
                continue
            except ConnectionRefusedError:
                break
        assert "data: [DONE]" in response.read().decode()  # the turn under way ends
        assert server.process.wait(120) == 0
    assert [agent["agent"] for agent in real("ls", "--json").ok().json] == ["ada"]


def test_a_turn_that_outlasts_the_drain_is_cut_and_leaves_its_agent_as_it_was(real, tmp_path):
    with Server(real, tmp_path, "--drain-timeout", "0") as server:
        chat = ("POST", "/v1/chat/completions")
        assert server.ask(*chat, long_turn("Hi.", max_tokens=4), headers={"x-torpor-agent": "ada"}).status == 200
        before = server.ask("GET", "/torpor/v1/agents/ada").json()["tokens"]
        connection = server.connection()
        response = server.send(connection, *chat, long_turn(stream=True), headers={"x-torpor-agent": "ada"}).getresponse()
        response.readline()
        assert server.stop() == 0
        with pytest.raises(http.client.IncompleteRead):
            response.read()
    assert [agent["cache_size"] for agent in real("ls", "--json").ok().json] == [before]


SHAPES = {
    "chat": ("/v1/chat/completions", lambda text: long_turn(text)),
    "completions": ("/v1/completions", lambda text: {"model": "smollm2-135m", "max_tokens": 8000, "prompt": text}),
    "responses": ("/v1/responses", lambda text: {"model": "smollm2-135m", "max_output_tokens": 8000, "input": text}),
    "messages": ("/v1/messages", lambda text: long_turn(text, logit_bias=None)),
    "agents": ("/torpor/v1/agents", lambda text: {"agent": "ada", "max_tokens": 8000, "prompt": text}),
    "ollama": ("/api/chat", lambda text: {"model": "smollm2-135m", "messages": [{"role": "user", "content": text}]}),
}


@pytest.fixture(scope="module")
def real_server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("real-served")
    torpor = Torpor(directory / "store", MODEL)
    with Server(torpor, directory) as server:
        server.torpor = torpor
        yield server
        assert server.stop() == 0


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_client_that_goes_takes_its_turn_back_in_each_shape(real_server, words, shape, stream):
    server = real_server
    path, body = SHAPES[shape]
    cancelled = server.metric('torpor_turns_total{reason="cancelled"}') or 0
    story = LONG_START if shape == "completions" else LONG_STORY
    for text in (words(1500), story):
        connection = server.connection()
        server.send(connection, "POST", path, {**body(text), "stream": stream}, headers={"x-torpor-agent": "ada"})
        while server.metric("torpor_turns_running") != 1:
            pass
        if stream and text == story:
            connection.getresponse().readline()  # in the midst of the answer
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        while server.metric("torpor_turns_running") != 0:
            pass
    assert server.metric('torpor_turns_total{reason="cancelled"}') == cancelled + 2
    assert server.ask("GET", "/torpor/v1/agents").json()["agents"] == []


def test_answers_that_were_told_survive_kill_9(tiny, tmp_path):
    def tries(server, n):
        key = {"idempotency-key": f"try-{n}"}
        body = {"messages": [{"role": "user", "content": f"Say {n}."}], "max_tokens": 4, "stream": n % 2 == 1, "temperature": 1}
        return server.ask("POST", "/v1/chat/completions", body, headers=key).bytes

    def respond(server, text, **more):
        return server.ask("POST", "/v1/responses", {"input": text, "max_output_tokens": 4, **more})

    told, last = [], None
    for n in range(4):
        with Server(tiny, tmp_path) as server:
            assert [tries(server, i) for i in range(n)] == told
            more = {"previous_response_id": last} if last else {}
            response = respond(server, "And?", **more)
            assert response.status == 200, response.text
            last = response.json()["id"]
            told.append(tries(server, n))
            server.process.kill()
            server.process.wait()
    with Server(tiny, tmp_path) as server:
        items = server.ask("GET", f"/v1/responses/{last}").json()
        assert items["id"] == last and items["previous_response_id"]
        usage = tiny("du", "--json").ok().json
        assert usage["records"] == 8 and usage["record_bytes"] > sum(map(len, told))
        assert server.ask("DELETE", f"/v1/responses/{last}").status == 200
        assert respond(server, "And?", previous_response_id=last).status == 404
        assert tiny("du", "--json").ok().json["records"] == 7
        assert server.stop() == 0
    tiny("verify").ok()


def test_an_answer_that_expires_is_removed_though_nobody_asks_anything(tiny, tmp_path):
    with Server(tiny, tmp_path) as server:
        goes, stays = [server.ask("POST", "/v1/responses", {"input": "Hi.", "max_output_tokens": 2}).json()["id"]
                       for _ in range(2)]
        files = sorted((tiny.store / "records").iterdir(), key=lambda file: goes in file.read_text(errors="replace"))
        assert server.stop() == 0
    soon = files[1].with_suffix(f".{int(time.time()) + 3}")
    files[1].rename(soon)
    with Server(tiny, tmp_path) as server:
        assert server.ask("GET", f"/v1/responses/{goes}").status == 200
        deadline = time.monotonic() + 60
        while soon.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert server.ask("GET", f"/v1/responses/{goes}").status == 404
        assert server.ask("GET", f"/v1/responses/{stays}").status == 200 and files[0].exists()


def test_a_full_queue_says_when_to_come_again(real, tmp_path):
    with Server(real, tmp_path, "--queue", "1") as server:
        connection = server.connection()
        response = server.send(connection, "POST", "/v1/chat/completions", long_turn(stream=True)).getresponse()
        response.readline()
        refused = server.chat("Hello?")
        assert refused.status == 429 and int(refused.headers["retry-after"]) <= 120
        overloaded = server.ask("POST", "/v1/messages", {**long_turn("Hello?"), "stream": True})
        assert overloaded.status == 529 and int(overloaded.headers["retry-after"]) <= 120
        assert overloaded.json()["error"]["type"] == "overloaded_error"
        assert server.ask("POST", "/torpor/v1/agents", {"agent": "ada", "prompt": "Hello?"}).status == 429
        assert server.ask("POST", "/torpor/v1/agents/ada/turn", {"prompt": "Hello?"}).status == 429
        assert server.ask("GET", "/torpor/v1/agents").status == 200
        assert server.ask("GET", "/health", key="").status == 200
        connection.close()


def test_options_come_from_command_line_environment_and_file_in_this_order(tiny, tmp_path):
    config = tmp_path / "torpor.toml"
    config.write_text('# a comment\nport = 1\nsocket = "none/such"\nallow-host = ["a.example", "b.example"]\n'
                      'metrics-alias = "vllm"\nkv-bits = 4\nkv-group = 32\nmemory-budget = "64MB"\n')
    with Server(tiny, tmp_path, "--config", config, "--kv-dtype", "f32",
                env={"TORPOR_SOCKET": str(tmp_path / "socket"), "TORPOR_KV_BITS": "8,4"}) as server:
        assert (tmp_path / "socket").is_socket()
        assert server.port > 1
        for host, status in [("a.example", 200), ("b.example", 200), ("c.example", 403)]:
            assert server.ask("GET", "/v1/models", headers={"host": host}).status == status
        assert server.metric("vllm:num_requests_running") == 0
        assert server.chat("Who keeps the lamp?", agent="ada").status == 200
        server.ask("POST", "/torpor/v1/agents/ada/pin", {"pinned": True})
        assert 0 < server.metric("torpor_kv_held_ratio") == server.metric("vllm:kv_cache_usage_perc") < 1
        assert server.stop() == 0
    assert tiny("show", "ada", "--json").ok().json["identity"]["kv"] == "q8,4 group 32 f32 rotated"


@pytest.mark.parametrize("text, words_of_it", [
    ("prot = 1\n", ["line 1", "'prot'"]), ("\nport = [\n", ["line"]), ("model = { a = 1 }\n", ["line 1", "'model'"]),
    ("port = 99999\n", ["port"]), ('config = "x"\n', ["line 1", "'config'"])])
def test_a_mistake_in_the_file_is_named(tiny, tmp_path, text, words_of_it):
    config = tmp_path / "torpor.toml"
    config.write_text(text)
    tiny("serve", "--model", tiny.model, "--config", config).fails("invalid", str(config), *words_of_it)


def test_a_port_in_use_and_a_missing_model_are_told_in_a_sentence(served, tiny, tmp_path):
    keys = ("--api-key-file", tmp_path / "keys")
    tiny("serve", "--model", tiny.model, "--port", served.port, *keys).fails("invalid", f"127.0.0.1:{served.port}")
    tiny("serve", *keys).fails("invalid", "no model")
    tiny("serve", "--model", tmp_path / "absent", *keys).fails("not_found", "absent")


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_commands_of_the_document_work(tiny_model, tmp_path):
    home, tools = tmp_path / "home", tmp_path / "tools"
    home.mkdir()
    shutil.copytree(tiny_model, tmp_path / "smollm2-135m")
    tools.mkdir()
    # An error ends the script.
    (tools / "curl").write_text(f'#!/bin/sh\nexec {shutil.which("curl")} --fail-with-body "$@"\n')
    (tools / "curl").chmod(0o755)
    (tools / "torpor").symlink_to(BIN)
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/server.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3 and sum(block.count("curl ") for block in blocks) >= 12
    keys = home / ".config" / "torpor"
    with Server(Torpor(tmp_path / "store", tmp_path / "smollm2-135m"), keys) as server:
        script = "set -e\n" + "".join(re.sub(r"^  ", "", block, flags=re.MULTILINE) for block in blocks)
        script = script.replace("8080", str(server.port))
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True,
                              env={**os.environ, "HOME": str(home), "PATH": f"{tools}:{os.environ['PATH']}"})
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        server.signal(signal.SIGHUP)
        while server.ask("GET", "/v1/models", key="sk-acme-4f1d").status != 200:
            time.sleep(0.01)
