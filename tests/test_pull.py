"""`torpor pull`, from a server that answers as the Hugging Face Hub does. What it leaves is read by huggingface_hub."""

import fcntl
import hashlib
import http.server
import json
import os
import re
import resource
import shlex
import subprocess
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest

from conftest import BIN, EXIT, MODEL, Torpor
from s3 import free_port

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BIG = bytes(range(256)) * 8192  # 2 MiB


def git_digest(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """A repository. `requests` has (path, token, range) of each."""

    def __init__(self, files, name="org/tiny"):
        self.name = name
        self.files, self.requests, self.cut, self.wrong, self.token, self.ranges = files, [], {}, set(), "", True
        self.before_bytes = lambda: None
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def large(self, name):
        return name.endswith((".safetensors", ".gguf"))

    def describe(self):
        return {"sha": COMMIT, "siblings": [
            {"rfilename": name, "size": len(data), "blobId": git_digest(b"pointer"), "lfs": {
                "sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 7}}
            if self.large(name) else {"rfilename": name, "size": len(data), "blobId": git_digest(data)}
            for name, data in self.files.items()]}

    def answer(self, request):
        token, span = request.headers.get("Authorization"), request.headers.get("Range")
        self.requests.append((request.path, token, span))
        if self.token and not request.path.startswith("/cdn/") and token != f"Bearer {self.token}":
            return self.send(request, 401, b"")
        if request.path in [f"/api/models/{self.name}/revision/{revision}?blobs=true" for revision in ("main", "v1")]:
            return self.send(request, 200, json.dumps(self.describe()).encode())
        if match := re.fullmatch(f"/{self.name}/resolve/{COMMIT}/(.+)", request.path):
            name = match[1]
            if self.large(name):  # as the hub does: to another host
                place = f"http://localhost:{self.server.server_port}/cdn/{name}?key=s3cret"
                return self.send(request, 302, b"", [("Location", place)])
        elif match := re.fullmatch(r"/cdn/(.+)\?key=s3cret", request.path):
            name = match[1]
        else:
            return self.send(request, 404, b"")
        self.before_bytes()
        data = self.files[name]
        if name in self.wrong:
            data = data[:-1] + b"?"
        if span and self.ranges:
            first = int(re.fullmatch(r"bytes=(\d+)-", span)[1])
            span = f"bytes {first}-{len(data) - 1}/{len(data)}"
            return self.send(request, 206, data[first:], [("Content-Range", span)])
        return self.send(request, 200, data, cut=self.cut.pop(name, None))

    def send(self, request, status, body, headers=(), cut=None):
        request.send_response(status)
        for name, value in [*headers, ("Content-Length", str(len(body)))]:
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body[:cut])
        if cut is not None:
            request.close_connection = True

    def fetched(self):
        """Names of the files whose bytes were asked for."""
        names = [path.split("?")[0].split("/cdn/")[-1].split(COMMIT + "/")[-1] for path, _, _ in self.requests
                 if "/cdn/" in path or ("/resolve/" in path and not self.large(path))]
        return sorted(names)


@pytest.fixture
def hub(tiny_model, tmp_path):
    files = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    hub = Hub({**files, "README.md": b"# Tiny", "pytorch_model.bin": b"old", "original/model.safetensors": b"twice",
               "m.gguf": BIG, "q/p-00001-of-00002.gguf": b"one", "q/p-00002-of-00002.gguf": b"two"})
    hub.needed = files
    hub.torpor = Torpor(tmp_path / "store", MODEL)
    hub.cache = tmp_path / "hf" / "hub"
    hub.repo = hub.cache / "models--org--tiny"
    unset = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE",
             "HF_HUB_OFFLINE")
    hub.env = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "NO_PROXY": "*", **dict.fromkeys(unset, "")}
    hub.pull = lambda *args, **env: hub.torpor("pull", *args, env={**hub.env, **env}, timeout=60)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def blob(hub, name):
    return hub.repo / "blobs" / hashlib.sha256(hub.files[name]).hexdigest()


def test_a_pulled_model_runs_and_is_huggingface_hubs_own(hub):
    done = hub.pull("org/tiny", "--json").ok().json
    total = sum(map(len, hub.needed.values()))
    assert (done["model"], done["revision"], done["bytes"], done["downloaded"]) == ("org/tiny", COMMIT, total, total)
    assert hub.fetched() == sorted(hub.needed)
    path = huggingface_hub.snapshot_download("org/tiny", cache_dir=hub.cache, local_files_only=True)
    assert path == done["snapshot"]
    assert {file.name: file.read_bytes() for file in Path(path).iterdir()} == hub.needed
    [repo] = huggingface_hub.scan_cache_dir(hub.cache).repos
    assert (repo.repo_id, list(repo.refs), repo.nb_files) == ("org/tiny", ["main"], len(hub.needed))
    assert not huggingface_hub.scan_cache_dir(hub.cache).warnings
    hub.torpor("run", "--model", "org/tiny", "--prompt", "Hello", "--max-tokens", 2, env=hub.env).ok()


def test_what_is_there_is_not_fetched_again(hub):
    hub.pull("org/tiny").ok()
    hub.requests.clear()
    said = hub.pull("org/tiny").ok().out
    assert hub.fetched() == [] and "0 B came now" in said and "torpor chat --model org/tiny" in said


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub):
    hub.cut["m.gguf"] = 1 << 20
    hub.pull("org/tiny:m.gguf").ok()
    [(_, _, first), (_, _, second)] = [request for request in hub.requests if request[0].startswith("/cdn/")]
    assert first is None and 0 < int(second[len("bytes="):-1]) <= 1 << 20
    assert blob(hub, "m.gguf").read_bytes() == BIG


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
def test_a_disk_that_is_full_for_a_moment_leaves_no_wrong_bytes(hub):
    bound = (len(BIG) // 2 + 1001, resource.RLIM_INFINITY)  # of a file: in the midst of a write
    process = subprocess.Popen([BIN, "pull", "org/tiny:m.gguf"], env={**os.environ, **hub.env}, stderr=subprocess.PIPE,
                               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, bound))
    unbounded = 2 * (resource.RLIM_INFINITY,)

    def let_it():
        if len(hub.fetched()) > 1:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unbounded)

    hub.before_bytes = let_it
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == EXIT["io"] and "can't write" in said, said
    assert not blob(hub, "m.gguf").exists()
    hub.before_bytes = lambda: None
    hub.pull("org/tiny:m.gguf").ok()
    assert blob(hub, "m.gguf").read_bytes() == BIG


@pytest.mark.parametrize("ranges", [True, False])
def test_the_next_process_goes_on_with_what_a_killed_one_left(hub, ranges):
    hub.ranges = ranges
    (hub.repo / "blobs").mkdir(parents=True)
    Path(f"{blob(hub, 'm.gguf')}.incomplete").write_bytes(BIG[:1000])
    done = hub.pull("org/tiny:m.gguf", "--json").ok().json
    assert done["downloaded"] == len(BIG) - (1000 if ranges else 0)
    assert blob(hub, "m.gguf").read_bytes() == BIG and not list(hub.repo.glob("blobs/*.incomplete"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_other_bytes_than_the_hub_announces_are_refused_and_removed(hub, name):
    hub.wrong.add(name)
    hub.pull("org/tiny").fails("corruption", f"'{name}'", "try again")
    assert not (hub.repo / "refs").exists() and not list(hub.repo.glob("blobs/*.incomplete"))
    hub.wrong.clear()
    hub.pull("org/tiny").ok()


def test_rotten_bytes_of_an_earlier_try_do_not_last(hub):
    (hub.repo / "blobs").mkdir(parents=True)
    Path(f"{blob(hub, 'm.gguf')}.incomplete").write_bytes(b"x" * 1000)
    hub.pull("org/tiny:m.gguf").fails("corruption", "m.gguf")
    hub.pull("org/tiny:m.gguf").ok()


def test_a_gguf_file_comes_with_its_pieces_and_runs_by_its_name(hub):
    hub.pull("org/tiny:q/p-00001-of-00002.gguf").ok()
    assert hub.fetched() == ["q/p-00001-of-00002.gguf", "q/p-00002-of-00002.gguf"]
    snapshot = hub.repo / "snapshots" / COMMIT
    assert (snapshot / "q" / "p-00002-of-00002.gguf").read_bytes() == b"two"
    hub.pull("org/tiny:no.gguf").fails("not_found", "no.gguf")


def test_a_repository_of_gguf_files_alone_names_them(hub):
    for name in list(hub.files):
        if not name.endswith(".gguf"):
            del hub.files[name]
    hub.pull("org/tiny").fails("invalid", "m.gguf", "org/tiny:m.gguf")


def test_the_token_goes_to_the_hub_and_nowhere_else(hub, tmp_path):
    hub.token = "hf_secret"
    hub.pull("org/tiny").fails("not_found", "HF_TOKEN")
    hub.requests.clear()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("hf_secret\n")
    hub.pull("org/tiny").ok()
    assert {token for path, token, _ in hub.requests if not path.startswith("/cdn/")} == {"Bearer hf_secret"}
    assert {token for path, token, _ in hub.requests if path.startswith("/cdn/")} == {None}
    result = hub.pull("org/tiny", HF_TOKEN="hf_other")
    assert "hf_other" not in result.err and result.fails("not_found")


def test_without_a_network_it_is_one_sentence(hub):
    nowhere = hub.pull("org/tiny", HF_ENDPOINT=f"http://127.0.0.1:{free_port()}")
    nowhere.fails("io", "127.0.0.1 can't be reached", "check the network")
    hub.pull("org/tiny", HF_HUB_OFFLINE="1").fails("io", "HF_HUB_OFFLINE")
    hub.pull("org/tiny", HF_ENDPOINT="ftp://user:word@host").fails("invalid", "HF_ENDPOINT")
    hub.pull("org/tiny", HF_ENDPOINT=hub.url + "/elsewhere").fails("not_found", "org/tiny")


def test_what_is_no_text_is_told_in_a_sentence_and_no_token_is_told(hub, tmp_path):
    odd = os.fsdecode(b"\xff")
    hub.pull("org/tiny", HF_HOME=str(tmp_path / odd)).fails("invalid", "cache", "UTF-8")
    hub.pull(f"org/{odd}").fails("invalid", "name", "UTF-8")
    hub.pull("org/tiny", "--revision", odd).fails("invalid", "revision", "UTF-8")
    for token in (f"hf_secret{odd}", "hf_secret\a"):
        assert "secret" not in hub.pull("org/tiny", HF_TOKEN=token).fails("invalid", "HF_TOKEN", "copy it").err
    assert hub.requests == []
    hub.pull("org/tiny", HF_TOKEN=" hf_pasted\n").ok()  # as huggingface_hub takes it
    assert ("Bearer hf_pasted") in {token for _, token, _ in hub.requests}


@pytest.mark.parametrize("name", ["tiny", "org/../tiny", "a/b/c", "org/", "../../etc", "org/ti ny", "-x/y:"])
def test_what_is_no_name_of_the_hub_is_refused(hub, name):
    assert hub.pull("--", name).code in (2, 6) and hub.requests == [] and not hub.cache.exists()


def test_a_listing_that_leads_out_of_the_cache_writes_nothing_there(hub):
    hub.files["../../../../evil.json"] = b"{}"
    hub.files["/tmp/evil.json"] = b"{}"
    hub.pull("org/tiny").ok()
    assert not [path for path in hub.cache.parent.parent.rglob("evil.json")]


def test_revisions_have_refs_of_their_own_and_run_by_the_command_that_is_told(hub):
    told = shlex.split(hub.pull("org/tiny", "--revision", "v1").ok().out.splitlines()[-1])
    assert told[0] == "torpor"
    hub.torpor(*told[1:], "--max-tokens", 2, stdin="Hello\n", env=hub.env).ok()
    assert (hub.repo / "refs" / "v1").read_text() == COMMIT and not (hub.repo / "refs" / "main").exists()
    hub.pull("org/tiny", "--revision", "v2").fails("not_found", "v2")
    hub.pull("org/tiny", "--revision", "../x").fails("invalid", "branch")


def test_two_processes_fetch_a_file_once(hub):
    lock = hub.cache / ".locks" / "models--org--tiny" / f"{blob(hub, 'm.gguf').name}.lock"
    lock.parent.mkdir(parents=True)
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as huggingface_hub locks
        process = subprocess.Popen([BIN, "pull", "org/tiny:m.gguf"], env={**os.environ, **hub.env},
                                   stdout=subprocess.DEVNULL)
        while not (hub.repo / "blobs").is_dir():
            time.sleep(0.01)
        blob(hub, "m.gguf").write_bytes(BIG)
    assert process.wait(30) == 0 and hub.fetched() == []
