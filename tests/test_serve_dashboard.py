"""The dashboard: its files, who may see what, and the routes whose data it shows."""

import hashlib
import re
import signal
import time

import pytest

from conftest import ROOT, Torpor
from serving import Server

FILES = ["/", "/dashboard/app.js", "/dashboard/style.css", "/dashboard/icon.svg"]
DATA = ["/torpor/v1/now", "/torpor/v1/requests", "/torpor/v1/memory", "/torpor/v1/agents/ada/map"]
SOURCE = ROOT / "src" / "server" / "dashboard"


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_model):
    directory = tmp_path_factory.mktemp("dashboard")
    with Server(Torpor(directory / "store", tiny_model), directory) as server:
        lines = server.keys.read_text()
        server.keys.write_text(lines + f"acme:first:{hashlib.sha256(b'sk-acme').hexdigest()}\n")
        server.signal(signal.SIGHUP)
        while server.ask("GET", "/v1/models", key="sk-acme").status != 200:
            time.sleep(0.01)
        assert server.chat("my secret word", agent="ada").status == 200
        yield server
        assert server.stop() == 0


@pytest.mark.parametrize("path", FILES)
def test_a_file_of_the_page_is_the_source_s_and_needs_no_key(server, path):
    answer = server.ask("GET", path, key="")
    assert answer.status == 200
    assert answer.bytes == (SOURCE / (path.rsplit("/", 1)[1] or "index.html")).read_bytes()
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = server.ask("GET", path, key="", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status, again.bytes) == (304, b"")


def test_other_files_and_methods_are_refused(server):
    for path in ("/dashboard/", "/dashboard/embed.cmake", "/dashboard/..%2fapp.js", "/dashboard/app.js/"):
        assert server.ask("GET", path, key="").status == 404, path
    assert server.ask("POST", "/", {}, key="").status == 405


def test_the_policy_lets_nothing_in_from_elsewhere_or_from_the_page_itself(server):
    for path in FILES:
        policy = dict(rule.strip().split(" ", 1) for rule in
                      server.ask("GET", path, key="").headers["content-security-policy"].split(";"))
        assert policy.pop("default-src") == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
        assert set(policy.values()) == {"'self'", "'none'"}
    page = (SOURCE / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", page)
    code = (SOURCE / "app.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", code)
    for name in ("index.html", "app.js", "style.css", "icon.svg"):
        text = (SOURCE / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.[a-z]|@import|url\(", text), name


def test_what_the_page_names_is_served(server):
    for path in re.findall(r'(?:href|src)="(/[^"]+)"', (SOURCE / "index.html").read_text()):
        assert server.ask("GET", path, key="").status == 200, path
    known = server.ask("GET", "/torpor/v1/openapi.json").json()["paths"]
    code = (SOURCE / "app.js").read_text()
    for path in re.findall(r"'(/torpor/v1/\w+)'", code):
        assert path in known, path
    for action in set(re.findall(r"agentPath\([\w.]+, '(\w+)'", code) + re.findall(r"act\([\w.]+, '(\w+)'", code)):
        assert "/torpor/v1/agents/{agent}/" + action in known, action


@pytest.mark.parametrize("path", DATA)
def test_data_needs_a_key_and_this_origin(server, path):
    assert server.ask("GET", path, key="").status == 401
    assert server.ask("GET", path).status == 200
    assert server.ask("GET", path, headers={"origin": "https://evil.example"}).status == 403


def test_requests_tell_what_was_cached_and_why_not_without_any_text(server):
    first = [{"role": "user", "content": "my secret word"}]
    parted = [*first, {"role": "assistant", "content": "hidden"}, {"role": "user", "content": "more of it"}]
    body = {"model": "tiny", "max_tokens": 3, "messages": parted}
    assert server.ask("POST", "/v1/chat/completions", body, headers={"x-torpor-agent": "ada"}).status == 200
    whole = server.ask("GET", "/torpor/v1/requests").text
    last, before = server.ask("GET", "/torpor/v1/requests").json()["requests"][:2]
    assert (last["agent"], last["state"], last["reason"], last["generated_tokens"]) == ("ada", "ended", "length", 3)
    assert last["missed"] == "message 1" and before["missed"] == ""
    assert last["prompt_tokens"] > last["cached_tokens"] > 0 == before["cached_tokens"]
    assert last["id"] > before["id"] and min(last["waited_ms"], last["read_ms"], last["answered_ms"]) >= 0
    for word in ("secret", "hidden", "more of it"):
        assert word not in whole


def test_a_turn_of_torpor_s_own_and_one_that_fails_are_told_too(server):
    assert server.ask("POST", "/torpor/v1/agents", {"agent": "bea", "prompt": "Hi.", "max_tokens": 2}).status == 201
    assert server.ask("POST", "/torpor/v1/agents/bea/turn", {"prompt": "Hi.", "max_tokens": 0}).status == 400
    failed, made = server.ask("GET", "/torpor/v1/requests").json()["requests"][:2]
    assert (made["agent"], made["reason"], made["generated_tokens"]) == ("bea", "length", 2)
    assert (failed["agent"], failed["reason"], failed["generated_tokens"]) == ("bea", "error", 0)
    assert server.ask("DELETE", "/torpor/v1/agents/bea").status == 204


def test_the_ring_is_bounded_and_newest_first(server):
    for _ in range(2):
        server.chat("Hi.", max_tokens=1)
    ids = [request["id"] for request in server.ask("GET", "/torpor/v1/requests").json()["requests"]]
    assert ids == sorted(ids, reverse=True) and len(ids) <= 512


def test_a_tenant_sees_its_own_turns_agents_and_maps(server):
    server.chat("Hi there.", agent="zoe", key="sk-acme")
    theirs = server.ask("GET", "/torpor/v1/requests", key="sk-acme").json()["requests"]
    assert {request["agent"] for request in theirs} == {"zoe"}
    assert "zoe" not in server.ask("GET", "/torpor/v1/requests").text
    for path, member in [("/torpor/v1/memory", "agents"), ("/torpor/v1/agents", "agents")]:
        assert [agent["agent"] for agent in server.ask("GET", path, key="sk-acme").json()[member]] == ["zoe"]
    assert server.ask("GET", "/torpor/v1/agents/ada/map", key="sk-acme").status == 404
    for path in ("/torpor/v1/now", "/torpor/v1/memory", "/torpor/v1/agents/zoe/map"):
        text = server.ask("GET", path, key="sk-acme").text
        assert "t.acme" not in text, path
        assert not re.search("(?<![0-9a-f])ada(?![0-9a-f])", text), path  # segments have hexadecimal names


def test_a_map_shows_messages_segments_and_branches(server, words):
    server.chat(words(400), agent="long", max_tokens=2)
    server.ask("POST", "/torpor/v1/agents/long/fork", {"as": "fork"})
    server.chat("Hi there.", agent="zoe", key="sk-acme")
    map = server.ask("GET", "/torpor/v1/agents/long/map").json()
    assert [message["message"]["role"] for message in map["messages"]][-2:] == ["user", "assistant"]
    assert all(message["begin"] < message["end"] <= map["tokens"] for message in map["messages"])
    assert len(map["segments"]) == map["tokens"] // map["segment_tokens"] >= 1
    assert all(segment["shared_with"] == ["fork"] for segment in map["segments"])
    [branch] = [branch for branch in map["branches"] if branch["agent"] == "fork"]
    assert branch["common_tokens"] == len(map["segments"]) * map["segment_tokens"]


def test_now_tells_a_turn_while_it_runs(real, tmp_path):
    with Server(real, tmp_path) as server:
        connection = server.connection()
        response = server.send(connection, "POST", "/torpor/v1/agents",
                               {"agent": "ada", "prompt": "Tell a story.", "max_tokens": 400, "stream": True}).getresponse()
        while not response.readline().startswith(b"event: text"):
            pass
        now = server.ask("GET", "/torpor/v1/now").json()
        [turn] = now["turns"]
        assert (turn["agent"], turn["state"], now["others"]) == ("ada", "answering", 0)
        assert turn["done"] == turn["total"] > 0 and now["work"]["prompt_tokens"] >= turn["total"]
        connection.close()
        response.close()
        while server.ask("GET", "/torpor/v1/now").json()["turns"]:
            pass
        [ended] = server.ask("GET", "/torpor/v1/requests").json()["requests"]
        assert ended["reason"] == "cancelled"
