"""`torpor remote push`, `pull`, `verify`, `gc`, `archive`: agents of one machine's store in another's, by a bucket."""

import json
import os
import shutil
import subprocess
import threading
import time

import pytest

import s3
from conftest import BIN, ROOT
from test_remote import SECRETS, hides, proxy, remote, server  # noqa: F401: two of them are fixtures

GOLDEN = ROOT / "tests" / "goldens" / "store-v3" / "store"


@pytest.fixture
def bucket(server, request):
    """A prefix of the test's own."""
    return f"s3://{s3.BUCKET}/{request.node.name}"


@pytest.fixture
def here(tmp_path):
    return shutil.copytree(GOLDEN, tmp_path / "here")


@pytest.fixture
def there(tmp_path):
    return tmp_path / "there"


def call(server, command, url, *args, store=None, port=None, env=None):
    where = [] if store is None else ["--store", store]
    return remote(command, url, *args, *where, env=env or server.env(port))


def keys(server, url, prefix=""):
    objects = call(server, "ls", url, "--json").ok().json["objects"]
    return [one["key"] for one in objects if one["key"].startswith(prefix)]


def files(store):
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*.safetensors")}


def test_an_agent_is_the_same_where_it_is_pulled_and_goes_back(server, bucket, here, there):
    pushed = call(server, "push", bucket, "many", "--json", store=here).ok().json
    assert pushed["objects_sent"] > 0 and pushed["objects_there"] == 0
    assert json.loads(call(server, "push", bucket, "many", "--json", store=here).ok().out)["objects_sent"] == 0
    pulled = call(server, "pull", bucket, "many", "--json", store=there).ok().json
    assert pulled["damaged"] == [] and pulled["objects_read"] == pushed["objects_sent"]
    got = files(there)
    assert got and all(files(here)[name] == data for name, data in got.items())
    assert call(server, "pull", bucket, "many", "--json", store=there).ok().json["objects_read"] == 0
    report = call(server, "verify", bucket, "--json").ok().json
    assert report["ok"] and report["agents"] == 1
    call(server, "pull", bucket, "nobody", store=there).fails("not_found", "nobody")
    call(server, "push", bucket, "nobody", store=here).fails("not_found", "nobody")


def test_rows_that_two_agents_share_travel_once(server, bucket, here, there):
    first = call(server, "push", bucket, "many", "--json", store=here).ok().json
    shutil.copytree(here, there)
    second = call(server, "push", bucket, "fork", "--json", store=there).ok().json
    shared = second["objects_there"]
    assert shared > 0 and len(keys(server, bucket, "segments/")) == len({
        name for name in files(here) if name.startswith("segments/")} & {
        key.rsplit(".", 2)[0] + ".safetensors" for key in keys(server, bucket, "segments/")})
    assert second["requests"]["bytes_sent"] < first["requests"]["bytes_sent"]


def test_a_flipped_byte_in_any_object_is_found_at_a_pull_and_told(server, bucket, proxy, here, there):
    call(server, "push", bucket, "many", store=here).ok()
    prefix = f"/{s3.BUCKET}/{bucket.rsplit('/', 1)[1]}/"
    for n, key in enumerate(keys(server, bucket)):
        if key == "sweep":
            continue
        status, _, good = proxy.ask("GET", prefix + key)
        assert status == 200
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 1
        proxy.ask("PUT", prefix + key, body=bytes(bad))
        result = call(server, "pull", bucket, "many", "--json", store=there / str(n))
        if key.startswith("agents/") or (key.startswith("parts/") and result.err):  # the part with the first ids
            result.fails("corruption", key)
            assert not (there / str(n) / "many.safetensors").exists()
        else:
            assert result.code == 4 and [one["key"] for one in result.json["damaged"]] == [key]
            assert key in result.json["damaged"][0]["problem"]
        assert not call(server, "verify", bucket, "--json").json["ok"]
        proxy.ask("PUT", prefix + key, body=good)
    assert call(server, "verify", bucket, "--json").ok().json["ok"]


def test_a_damaged_save_is_replaced_by_force_alone(server, bucket, proxy, here):
    call(server, "push", bucket, "many", store=here).ok()
    save = next(key for key in keys(server, bucket, "agents/") if not key.endswith("/head"))
    proxy.ask("PUT", f"/{s3.BUCKET}/{bucket.rsplit('/', 1)[1]}/{save}", body=b"what is no save")
    call(server, "push", bucket, "many", store=here).fails("corruption", save)
    call(server, "push", bucket, "many", "--force", store=here).ok()
    assert call(server, "verify", bucket, "--json").ok().json["ok"]


def test_an_upload_that_conflicts_with_another_is_sent_again(server, bucket, proxy, here):
    conflicts = []

    def fault(method, path, headers):
        if method == "PUT" and "/segments/" in path and path not in conflicts:
            conflicts.append(path)
            return 409, b"<Error><Code>ConditionalRequestConflict</Code><Message>under way</Message></Error>"
        return None

    proxy.fault = fault
    sent = call(server, "push", bucket, "many", "--json", store=here, port=proxy.port).ok().json
    assert conflicts and sent["objects_sent"] >= len(conflicts)
    assert call(server, "verify", bucket, "--json").ok().json["ok"]


def test_archived_agents_keep_their_ids_and_gc_removes_what_nobody_needs(server, bucket, here, there):
    call(server, "push", bucket, "many", "one", store=here).ok()
    assert call(server, "archive", bucket, "--idle-days", 1, "--json").ok().json["agents"] == []
    dropped = call(server, "archive", bucket, "many", "--json").ok().json["agents"][0]["dropped"]
    assert dropped > 0 and len(keys(server, bucket, "segments/")) >= dropped
    swept = call(server, "gc", bucket, "--json").ok().json
    assert swept["objects_removed"] >= dropped and keys(server, bucket, "segments/") == []
    assert call(server, "verify", bucket, "--json").ok().json["unneeded"] == 0
    pulled = call(server, "pull", bucket, "many", "one", store=there).ok()
    assert "computes them again" in pulled.out
    assert keys(server, bucket, "nodes/") == []  # no lease is left
    call(server, "archive", bucket, "nobody").fails("not_found", "nobody")


def test_a_gc_that_was_killed_is_no_hindrance_for_long(server, bucket, proxy, here):
    call(server, "push", bucket, "many", "one", store=here).ok()
    call(server, "archive", bucket, "many").ok()
    begun, killed = threading.Event(), threading.Event()

    def fault(method, path, headers):
        if method == "GET" and begun.is_set() and "list-type" in path and "agents%2F" in path:
            killed.wait(30)
        elif method == "PUT" and path.endswith("/sweep"):
            begun.set()

    proxy.fault = fault
    first = subprocess.Popen([BIN, "remote", "gc", bucket], env={**os.environ, **server.env(proxy.port)})
    try:
        assert begun.wait(30)
        while proxy.ask("GET", f"/{s3.BUCKET}/{bucket.rsplit('/', 1)[1]}/sweep")[0] != 200:
            time.sleep(0.02)
        call(server, "gc", bucket).fails("busy", "under way")  # it renews its lease
    finally:
        first.kill()
        first.wait()
        killed.set()
    began = time.monotonic()
    assert call(server, "gc", bucket, "--json").ok().json["objects_removed"] > 0
    assert time.monotonic() - began < 9 and keys(server, bucket, "nodes/") == []


def test_changes_that_the_other_side_lacks_are_not_dropped(server, bucket, here, there):
    call(server, "push", bucket, "many", store=here).ok()
    shutil.copytree(GOLDEN, there)
    shutil.copy(here / "many.safetensors", there)
    text = call(server, "pull", bucket, "many", store=there).ok()
    assert "brought 0 objects" in text.out


def test_a_store_that_ignores_conditions_gets_no_agent(server, bucket, proxy, here):
    proxy.fault = s3.without_conditions
    call(server, "push", bucket, "many", store=here, port=proxy.port).fails("invalid", "can't keep agents")
    assert keys(server, bucket) == []


def test_credentials_are_in_no_error_log_or_file_of_a_push_and_a_pull(server, bucket, proxy, here, there):
    env = {**s3.environment(proxy.port), **SECRETS}
    hides(call(server, "push", bucket, "many", "--verbose", store=here, env=env).ok())
    hides(call(server, "pull", bucket, "many", "--verbose", store=there, env=env).ok())
    told = " and ".join(SECRETS.values())
    for verb in ("GET", "PUT"):
        proxy.fault = lambda method, path, headers: (
            (403, f"<Error><Code>No</Code><Message>You sent {told}.</Message></Error>".encode())
            if method == verb else None)
        for command in ("push", "pull", "verify"):
            hides(call(server, command, bucket, *(["many"] if command != "verify" else []), "--verbose", store=here,
                       env=env))
    proxy.fault = lambda method, path, headers: None
    prefix = f"/{s3.BUCKET}/{bucket.rsplit('/', 1)[1]}/"
    kept = [path.read_bytes() for store in (here, there) for path in store.rglob("*") if path.is_file()]
    kept += [proxy.ask("GET", prefix + key)[2] for key in keys(server, bucket)]
    assert all(secret.encode() not in data for data in kept for secret in SECRETS.values())
