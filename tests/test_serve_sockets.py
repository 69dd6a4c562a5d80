"""Heads that no client means, and sockets that dribble: nobody else waits for them, and none of them harms the server.

TORPOR_MUTATIONS=N sets how many heads are sent (300; `make load` sends 10,000).
"""

import contextlib
import json
import os
import random
import re
import socket

import pytest

from conftest import Torpor
from serving import Server

MUTATIONS = int(os.environ.get("TORPOR_MUTATIONS", 300))
BODY = json.dumps({"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "Hi."}]})


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_model):
    directory = tmp_path_factory.mktemp("sockets")
    with Server(Torpor(directory / "store", tiny_model), directory, "--log", directory / "log", "--max-connections", 64) as server:
        yield server
        assert server.stop() == 0


@contextlib.contextmanager
def opened(server, count=1):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=120)) for _ in range(count)]


def head(server, path="/v1/chat/completions", body=BODY, **more):
    headers = {"Host": f"127.0.0.1:{server.port}", "Authorization": f"Bearer {server.key}", "Content-Type": "application/json",
               "Content-Length": str(len(body)), "Connection": "close", **{name.replace("_", "-"): value for name, value in more.items()}}
    return f"POST {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items() if value is not None) + "\r\n"


def heard(connection):
    """All that the server says until it closes."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            said += part
    return said


def asked(server, text):
    with opened(server) as [connection]:
        connection.sendall(text if isinstance(text, bytes) else text.encode())
        return heard(connection)


def statuses(said):
    return [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d+)", said, re.MULTILINE)]


WORDS = [b"", b" ", b"\t", b"\0", b"\x7f", b"\xff", b"\r\n ", b"\n", b"\r", b":", b",", b"chunked", b"identity", b"-1", b"0", b"99999999999999999999",
         b"close", b"keep-alive", b"upgrade", b"100-continue", b"x" * 300, b"\xc3\xa9", b"%00", b"../", b"\"", b"{}", b"HTTP/9.9", b"bytes=0-"]
NAMES = [b"Host", b"Authorization", b"X-Api-Key", b"Content-Length", b"Transfer-Encoding", b"Content-Encoding", b"Expect", b"Upgrade",
         b"Connection", b"Origin", b"Range", b"Accept", b"If-None-Match", b"Idempotency-Key", b"X-Torpor-Agent", b"X-Session-Id",
         b"Anthropic-Version", b"X" * 300]


def mutated(rng, text):
    lines = text.split(b"\r\n")
    for _ in range(rng.randrange(1, 4)):
        at, act = rng.randrange(len(lines)), rng.randrange(6)
        if act == 0:
            lines.insert(at, rng.choice(NAMES) + b": " + rng.choice(WORDS))
        elif act == 1:
            lines.insert(at, rng.choice(lines))
        elif act == 2 and len(lines) > 1:
            del lines[at]
        elif act == 3:
            lines[at] = lines[at].split(b" ")[0] + b" " + rng.choice(WORDS)
        else:
            middle = rng.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:middle] + rng.choice(WORDS) + lines[at][middle + (act == 5):]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def test_mutated_heads_get_an_answer_or_the_connection_is_closed(server):
    rng = random.Random(15)
    seen = set()
    for i in range(MUTATIONS):
        path, body = rng.choice([("/v1/chat/completions", BODY), ("/v1/models", ""), ("/torpor/v1/agents", ""), ("/api/show", '{"model": "tiny"}')])
        whole = head(server, path, body).removesuffix("\r\n\r\n").encode()
        if not body:
            whole = whole.replace(b"POST", b"GET", 1)
        text = mutated(rng, whole) + body.encode()
        with opened(server) as [connection]:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError, OSError):
                connection.sendall(text)
                connection.shutdown(socket.SHUT_WR)  # a head that has no end, or wants a body that never comes, ends here
            said = heard(connection)
        told = f"head {i}, {text!r}: {said[:500]!r}"
        final = [status for status in statuses(said) if status != 100]  # which "Expect: 100-continue" asks for
        assert all(200 <= status < 500 for status in final), told
        assert b"500" not in said[:20] and said[:5] in (b"", b"HTTP/"), told
        seen |= set(final)
    assert 400 in seen
    assert server.chat("Hi.").status == 200 and server.metric("torpor_turns_running") == 0


def test_what_a_head_gets_wrong_is_told(server):
    assert statuses(asked(server, head(server) + BODY)) == [200]
    for wrong, status in (({"Host": None}, 403), ({"Host": "evil.example"}, 403), ({"Origin": "http://evil.example"}, 403),
                          ({"Authorization": None}, 401), ({"Authorization": "Basic eDp5"}, 401), ({"Authorization": "Bearer "}, 401),
                          ({"Authorization": f"Bearer {server.key}x"}, 401), ({"X_Big": "x" * 65_536}, 431),
                          ({f"X_{i}": "x" for i in range(120)}, 431), ({"Content_Length": "-1"}, 400), ({"Content_Length": "1e3"}, 400),
                          ({"Content_Length": "99999999999", "Expect": "100-continue"}, 413), ({"Transfer_Encoding": "gzip"}, 400)):
        assert statuses(asked(server, head(server, **wrong) + BODY)) == [status], wrong
    for dialect, path in (("openai", "/v1/chat/completions"), ("anthropic", "/v1/messages"), ("ollama", "/api/chat")):
        said = json.loads(asked(server, head(server, path, Authorization=None) + BODY).split(b"\r\n\r\n", 1)[1])
        assert isinstance(said["error"], str) if dialect == "ollama" else said["error"]["message"]
        assert ("type" in said) == (dialect == "anthropic")


@pytest.mark.parametrize("framing", ["Content-Length: 4\r\nTransfer-Encoding: chunked", "Content-Length: 4\r\nContent-Length: 90",
                                     "Transfer-Encoding: chunked, identity", "Transfer-Encoding: xchunked\r\nContent-Length: 4"])
def test_no_second_request_hides_in_a_body_whose_length_is_said_twice(server, framing):
    hidden = f"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    start = f"POST /api/show HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {server.key}\r\n{framing}\r\n\r\n"
    with opened(server) as [connection]:
        connection.sendall(f"{start}0\r\n\r\n{hidden}".encode())
        connection.shutdown(socket.SHUT_WR)
        said = heard(connection)
    # One that is chunked by all readings ends where the next request begins; of all others none is answered after it.
    assert len(statuses(said)) <= (2 if "4\r\nTransfer-Encoding: chunked" in framing else 1), said
    assert 500 not in statuses(said)


def test_sockets_that_dribble_keep_nobody_waiting_and_are_answered_in_the_end(server):
    text = (head(server) + BODY).encode()
    with opened(server, 48) as slow:
        sent = [0] * len(slow)
        for step in range(6):  # a few bytes at a time: in the first line, the headers, the body
            for i, connection in enumerate(slow):
                upto = min(len(text) - 1, (step + 1) * (7 + 9 * i))
                connection.sendall(text[sent[i]:upto])
                sent[i] = upto
            assert server.chat("Hi.").status == 200
            assert server.ask("GET", "/health", key="").json()["ready"] is True
        assert server.metric("torpor_turns_running") == 0
        for i, connection in enumerate(slow[:8]):
            connection.sendall(text[sent[i]:])
            assert statuses(heard(connection)) == [200]
    assert server.chat("Hi.").status == 200


def test_sockets_that_say_nothing_fill_the_server_until_they_go(server):
    with opened(server, 64) as idle:
        for connection in idle:  # each has been taken, and is held
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            connection.sendall(b"GET /heal")
        with opened(server) as [one_more]:
            said = heard(one_more)
        assert statuses(said) == [503] and b"retry-after: 1" in said
        idle[0].close()
        while statuses(asked(server, head(server) + BODY)) != [200]:
            pass  # until the server has seen it go
    assert server.chat("Hi.").status == 200
