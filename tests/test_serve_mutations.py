"""Bodies that no client means: each is answered, by an error in its dialect's form or properly.

TORPOR_MUTATIONS=N sets how many are sent (300; `make load` sends 10,000).
"""

import copy
import http.client
import json
import os
import random

import pytest

from conftest import Torpor, make_tiny_model
from serving import Answer, Server

MUTATIONS = int(os.environ.get("TORPOR_MUTATIONS", 300))
USER = [{"role": "user", "content": "Who keeps the lamp?"}]
READ = {"type": "object", "required": ["path"],
        "properties": {"path": {"type": "string"}, "lines": {"type": "integer"}}}
CALL = {"name": "read", "arguments": '{"path": "a"}'}
TOOL = {"name": "read", "description": "Reads a file.", "parameters": READ}
BODIES = {
    "/v1/chat/completions": {
        "model": "tiny", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["X"], "logprobs": True,
        "top_logprobs": 2, "logit_bias": {"5": 1}, "stream_options": {"include_usage": True},
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": READ}},
        "chat_template_kwargs": {"enable_thinking": False},
        "messages": [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}, *USER,
                     {"role": "assistant", "content": None, "tool_calls": [
                         {"id": "c1", "type": "function", "function": CALL}]},
                     {"role": "tool", "tool_call_id": "c1", "content": "hello"}]},
    "/v1/completions": {"model": "tiny", "prompt": "Once", "max_tokens": 2, "logprobs": 2, "stop": "X"},
    "/v1/responses": {
        "model": "tiny", "max_output_tokens": 2, "instructions": "Be brief.", "store": True,
        "reasoning": {"effort": "low"},
        "include": ["message.output_text.logprobs"], "top_logprobs": 1,
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi."}]},
                  {"type": "function_call", "call_id": "c1", "name": "read", "arguments": "{}"},
                  {"type": "function_call_output", "call_id": "c1", "output": "hello"}]},
    "/v1/messages": {
        "model": "tiny", "max_tokens": 2,
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "stop_sequences": ["X"], "thinking": {"type": "adaptive"}, "metadata": {"user_id": "{\"session_id\": \"s\"}"},
        "tools": [{"name": "read", "description": "Reads.", "input_schema": READ}], "tool_choice": {"type": "auto"},
        "messages": [*USER,
                     {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": "x"},
                                                       {"type": "tool_use", "id": "t1", "name": "read",
                                                        "input": {"path": "a"}}]},
                     {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "hello"}]}]},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": USER, "tools": [{"name": "read", "input_schema": READ}]},
    "/api/chat": {"model": "tiny", "messages": USER, "tools": [{"type": "function", "function": TOOL}], "think": False,
                  "options": {"num_predict": 2, "repeat_penalty": 1.1, "repeat_last_n": 8, "stop": ["X"]},
                  "format": "json"},
    "/api/generate": {"model": "tiny", "prompt": "Hi.", "system": "Be brief.", "options": {"num_predict": 2},
                      "raw": False},
    "/api/show": {"model": "tiny"},
    "/torpor/v1/agents": {"agent": "zoe", "prompt": "Hi.", "system": "Be brief.", "max_tokens": 2, "temperature": 0.5,
                          "seed": 1},
    "/torpor/v1/agents/ada/turn": {"prompt": "Hi.", "max_tokens": 2, "top_p": 0.5},
    "/torpor/v1/agents/ada/fork": {"as": "bea", "at_token": 3},
    "/torpor/v1/agents/ada/why": {"messages": USER},
}
ODD = [None, True, False, 0, -1, 1, 2**31, -2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, "", " ", "x", "\0", "\ud83d",
       "é" * 300, "<|im_end|>", "{}", "[", [], {}, [[]], [None], {"": None}, {"type": None}, {"$ref": "#"},
       {"type": "object"}, "../../etc", "x" * 20000]


def places(value, path=()):
    """Each place of a JSON value, as the keys that lead there."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def odd(rng):
    """One of ODD, of its own: others may be put into it."""
    return copy.deepcopy(rng.choice(ODD))


def mutated(rng, body, limit):
    """The bytes of a body that differs from `body` in one to three places, or is no JSON."""
    body = json.loads(json.dumps(body))
    body["stream"] = rng.random() < 0.4
    for _ in range(rng.randrange(1, 4)):
        path = rng.choice(list(places(body)))
        if not path:
            body["extra"] = odd(rng)
            continue
        holder = body
        for key in path[:-1]:
            holder = holder[key]
        act = rng.randrange(4)
        if act == 0:
            del holder[path[-1]]
        elif act == 1 and isinstance(holder, dict):
            holder[rng.choice(["", "type", "content", "x" * 300])] = holder.pop(path[-1])
        elif act == 2 and isinstance(holder, list):
            holder.insert(path[-1], odd(rng))
        else:
            holder[path[-1]] = odd(rng)
    for bound in ("max_tokens", "max_output_tokens", "max_completion_tokens"):
        if isinstance(body.get(bound), (int, float)) and body[bound] > limit:
            body[bound] = limit
    text = json.dumps(body).encode()
    if rng.random() < 0.15:  # no JSON any more
        at = rng.randrange(len(text))
        text = text[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(3))) + text[at + rng.randrange(3):]
    return text


def check_error(path, answer):
    """The error has the form that the path's dialect gives it, and one sentence."""
    body = answer.json()
    if path.startswith("/v1/messages"):
        assert body["type"] == "error" and set(body["error"]) == {"type", "message"}
        message = body["error"]["message"]
    elif path.startswith("/v1/"):
        assert set(body["error"]) == {"message", "type", "param", "code"}
        message = body["error"]["message"]
    elif path.startswith("/api/"):
        assert set(body) == {"error"}
        message = body["error"]
    else:
        assert body["error"]["code"].startswith("k")
        message = body["error"]["message"]
    assert isinstance(message, str) and message and "\n" not in message.strip(), message
    assert "nlohmann" not in message and "exception" not in message, message


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mutations")
    # What bounds answers that lost their bound.
    model = make_tiny_model(directory / "tiny", lambda config, _: config.update(max_position_embeddings=512))
    with Server(Torpor(directory / "store", model), directory, "--log", directory / "log") as server:
        yield server
        assert server.stop() == 0


def test_mutated_bodies_get_an_answer_or_an_error_of_the_dialect(server):
    rng = random.Random(15)
    connection = server.connection()
    seen = {}
    server.ask("POST", "/torpor/v1/agents", {"agent": "ada", "prompt": "Hi.", "max_tokens": 2})
    for i in range(MUTATIONS):
        path = rng.choice(list(BODIES))
        body = mutated(rng, BODIES[path], 4)
        try:
            server.send(connection, "POST", path, body)
            answer = Answer(connection.getresponse())
        except (OSError, http.client.HTTPException) as error:
            pytest.fail(f"mutation {i}, POST {path} {body!r}: {error!r}")
        seen[answer.status // 100] = seen.get(answer.status // 100, 0) + 1
        told = f"mutation {i}, POST {path} {body[:2000]!r}: {answer.status} {answer.text[:500]}"
        assert answer.status in (200, 201, 400, 404, 409, 413), told
        if answer.status >= 400:
            check_error(path, answer)
            assert path.startswith("/torpor/") or answer.headers["x-should-retry"] == "false", told
        if i % 100 == 0:
            server.ask("DELETE", "/torpor/v1/agents/bea"), server.ask("DELETE", "/torpor/v1/agents/zoe")
    assert seen[2] > MUTATIONS // 20 and seen[4] > MUTATIONS // 20
    assert server.chat("Hi.").status == 200 and server.metric("torpor_turns_running") == 0
