"""A sealed bucket: who reads it without the key learns nothing, and who changes it is found out."""

import base64
import re
import secrets
import shutil
from urllib.parse import quote

import pytest

import s3
from conftest import held_ids
from test_remote import proxy, server  # noqa: F401: fixtures
from test_remote_agents import bucket, call, files, here, there  # noqa: F401: three of them are fixtures
from test_remote_fleet import Fleet, same_rows, turn

KEY, OTHER = secrets.token_hex(32), base64.b64encode(secrets.token_bytes(32)).decode()
WORD = "Zanzibar"


class Sealed:
    """The bucket at `url`, by a key command, and as who has no key sees it."""

    def __init__(self, url, server, proxy, directory):
        self.url, self.server, self.proxy, self.directory = url, server, proxy, directory

    def command(self, *printed):
        path = self.directory / f"keys-{secrets.token_hex(4)}"
        path.write_text("".join(f"{key}\n" for key in printed))
        return f"cat {path}"

    def __call__(self, command, *args, keys=(KEY,), store=None):
        return call(self.server, command, self.url, *args, "--key-command", self.command(*keys), store=store)

    @property
    def path(self):
        return f"/{s3.BUCKET}/{self.url.split('/', 3)[3]}/"

    def raw_keys(self, prefix=""):
        prefix = quote(self.path.split("/", 2)[2] + prefix, safe="")
        status, _, listed = self.proxy.ask("GET", f"/{s3.BUCKET}?list-type=2&prefix={prefix}")
        assert status == 200
        whole = re.findall(r"<Key>([^<]*)</Key>", listed.decode())
        return [key[len(self.path.split("/", 2)[2]):] for key in whole]

    def raw(self, key):
        status, _, data = self.proxy.ask("GET", self.path + key)
        assert status == 200
        return data

    def put(self, key, data):
        assert self.proxy.ask("PUT", self.path + key, body=data)[0] == 200


@pytest.fixture
def sealed(bucket, server, proxy, tmp_path):
    return Sealed(bucket, server, proxy, tmp_path)


def test_a_sealed_agent_is_the_same_where_it_is_pulled_and_its_bucket_tells_nothing(sealed, here, there):
    pushed = sealed("push", "many", "--verbose", store=here).ok()
    assert sealed("push", "many", "--json", store=here).ok().json["objects_sent"] == 0
    pulled = sealed("pull", "many", "--verbose", store=there).ok()
    got = files(there)
    assert got and all(files(here)[name] == data for name, data in got.items())
    assert sealed("verify", "--json").ok().json["ok"]
    told = sealed("ls", "--json").ok().json["objects"]
    raw = sealed.raw_keys()
    assert len(told) == len(raw) and "agents/many/head" in [one["key"] for one in told]
    hidden = [b"many", KEY.encode(), bytes.fromhex(KEY)] + [name.split("/")[-1].split(".")[0].encode() for name in got]
    for key in raw:
        data = sealed.raw(key)
        assert data.startswith(b"torpseal") == (key != "seal") and b"role" not in data and b"safetensors" not in data
        assert not [word for word in hidden if word in key.encode() or word in data]
        assert KEY not in pushed.err + pulled.err
    sizes = {one["key"]: one["bytes"] for one in told}
    assert all(sizes[f"{name.removesuffix('.safetensors')}.0.safetensors"] == len(data)
               for name, data in got.items() if "/" in name)


def test_a_flipped_byte_in_any_sealed_object_and_one_under_anothers_name_are_found(sealed, here, there):
    sealed("push", "many", store=here).ok()
    objects, kinds = sealed.raw_keys(), set()
    for n, key in enumerate(objects):
        if key in ("sweep", "seal"):
            continue
        good = sealed.raw(key)
        flipped = bytearray(good)
        flipped[(11 * n) % len(good)] ^= 1
        kind = key.split("/")[0]
        other = next((sealed.raw(one) for one in objects if one.split("/")[0] == kind and one != key), None)
        more = [] if kind in kinds else [good[:352], good[:-1], b"", b"plain", other]
        kinds.add(kind)
        for m, bad in enumerate([bytes(flipped), *more]):
            if bad is None or bad == good:
                continue
            sealed.put(key, bad)
            result = sealed("pull", "many", "--json", store=there / f"{n}-{m}")
            if kind == "agents" or (kind == "parts" and result.err):  # the part with the first ids
                result.fails("corruption")
                assert not (there / f"{n}-{m}" / "many.safetensors").exists()
            else:
                assert result.code == 4 and len(result.json["damaged"]) == 1
            assert len(sealed("verify", "--json").json["problems"]) == 1
        sealed.put(key, good)
    assert sealed("verify", "--json").ok().json["ok"]


def test_a_push_puts_good_objects_in_the_place_of_damaged_ones(sealed, here, there):
    sealed("push", "many", store=here).ok()
    shutil.copytree(here, there)
    for n, key in enumerate(sealed.raw_keys("segments/")):
        bad = bytearray(sealed.raw(key))
        bad[100] ^= 1  # in the first frame, where the checksum is
        sealed.put(key, bytes(bad) if n % 2 else bytes(bad)[: 40 * n])
    damaged = len(sealed("verify", "--json").json["problems"])
    sealed("push", "fork", store=there).ok()
    pulled = sealed("pull", "fork", "--json", store=there / "fork").ok().json
    assert pulled["damaged"] == [] and pulled["objects_read"] > 0
    assert len(sealed("verify", "--json").json["problems"]) < damaged


def test_a_wrong_key_or_none_is_one_sentence_and_drops_nothing(sealed, here, there):
    sealed("push", "many", store=here).ok()
    sealed("pull", "many", store=there).ok()
    before, raw = files(there), {key: sealed.raw(key) for key in sealed.raw_keys()}
    for command, *args in (["ls"], ["verify"], ["gc"], ["pull", "many", "--force"], ["push", "many", "--force"],
                           ["archive", "many"]):
        store = there if command in ("pull", "push") else None
        wrong = sealed(command, *args, store=store, keys=[OTHER]).fails("invalid", "another key", "--key-command")
        assert OTHER not in wrong.err and KEY not in wrong.err
        call(sealed.server, command, sealed.url, *args, store=store).fails("invalid", "is sealed", "--key-command")
    assert files(there) == before and {key: sealed.raw(key) for key in sealed.raw_keys()} == raw


def test_a_bucket_that_was_begun_without_a_key_is_not_sealed_later(sealed, here):
    call(sealed.server, "push", sealed.url, "many", store=here).ok()
    sealed("push", "one", store=here).fails("invalid", "begun without a key")
    assert "seal" not in sealed.raw_keys() and call(sealed.server, "verify", sealed.url, "--json").ok().json["ok"]


def test_a_key_is_replaced_by_a_newer_one_whose_old_objects_stay_readable(sealed, here, there):
    sealed("push", "many", store=here).ok()
    sealed("push", "one", store=here, keys=[OTHER, KEY]).ok()
    assert sealed("verify", "--json", keys=[OTHER, KEY]).ok().json["agents"] == 2
    sealed("pull", "many", "one", store=there, keys=[OTHER, KEY]).ok()
    sealed("pull", "many", store=there, keys=[OTHER]).fails("invalid", "another key")  # names are the old one's
    # Without the newer key its agent can't be read, and nothing is taken for damage.
    before = files(there)
    sealed("pull", "one", "--force", store=there, keys=[KEY]).fails("incompatible", "which the key command does not")
    assert not sealed("verify", "--json", keys=[KEY]).json["ok"] and files(there) == before
    sealed("gc", keys=[KEY]).fails("incompatible", "which the key command does not print")
    assert sealed("verify", "--json", keys=[OTHER, KEY]).ok().json["agents"] == 2


def test_archived_agents_and_gc_of_a_sealed_bucket(sealed, here, there):
    sealed("push", "many", "one", store=here).ok()
    dropped = sealed("archive", "many", "--json").ok().json["agents"][0]["dropped"]
    assert dropped > 0 and sealed("gc", "--json").ok().json["objects_removed"] >= dropped
    assert sealed.raw_keys("segments/") == [] and sealed.raw_keys("nodes/") == []
    assert sealed("verify", "--json").ok().json["unneeded"] == 0
    sealed("pull", "many", "one", store=there).ok()
    assert held_ids(there, "many") == held_ids(here, "many")


@pytest.mark.parametrize("command, words", [
    ("exit 3", "exit status 3"), ("true", "printed no key"), ("echo secret-word", "Line 1"),
    (f"echo {KEY}; echo secret-word", "Line 2"), ("yes secret-word", "more than keys")])
def test_a_key_command_that_prints_no_key_is_told_without_what_it_printed(server, bucket, command, words):
    result = call(server, "ls", bucket, "--key-command", command).fails("invalid", words, "--key-command")
    assert "secret" not in result.err and KEY not in result.err


@pytest.mark.skipif(not s3.is_here("versitygw"), reason="scripts/fetch-sdks versitygw builds it")
def test_the_files_of_a_store_over_plain_files_tell_nothing_of_a_sealed_agent(tmp_path, here, there):
    url, key = f"s3://{s3.BUCKET}/acme", ("--key-command", f"echo {KEY}")
    with s3.versitygw(tmp_path / "gateway") as store:
        call(store, "push", url, "many", *key, store=here).ok()
        call(store, "pull", url, "many", *key, store=there).ok()
        assert call(store, "verify", url, "--json", *key).ok().json["ok"]
    kept = [path for path in (tmp_path / "gateway").rglob("*") if path.is_file()]
    assert len(kept) > 5 and files(there) and all(files(here)[name] == data for name, data in files(there).items())
    for path in kept:
        assert "many" not in str(path) and b"many" not in path.read_bytes() and b"role" not in path.read_bytes()


def test_machines_that_share_a_sealed_bucket_go_on_bit_for_bit(server, tmp_path, tiny_model, words):
    fleet = Fleet(tmp_path, tiny_model, server.port)
    fleet.env["TORPOR_KEY_COMMAND"] = f"echo {KEY}"
    alone = fleet.machine("alone")
    prompts = [f"{WORD} {words(300)}", f" More {WORD}", " Yet more"]
    expected = [alone.run("lovelace", prompt).ok().json["text"] for prompt in prompts]
    machine = fleet.machine("a")
    assert machine.run("lovelace", prompts[0], *fleet.remote, env=fleet.env).ok().json["text"] == expected[0]
    with fleet.serve("b") as worker:
        answer = turn(worker, prompts[1], agent="lovelace", max_tokens=8, key="turn-1").json()
        assert answer["text"] == expected[1] and answer["tokens"]["cached"] > 300
        assert worker.stop() == 0
    last = machine.run("lovelace", prompts[2], *fleet.remote, env=fleet.env).ok()
    assert last.json["text"] == expected[2] and KEY not in last.err
    same_rows(machine, alone, "lovelace")
    with s3.Proxy(server.port) as proxy:
        bucket = Sealed(fleet.url, server, proxy, tmp_path)
        kept = [(key, bucket.raw(key)) for key in bucket.raw_keys()]
    assert len(kept) > 5
    for key, data in kept:
        assert "lovelace" not in key  # no hexadecimal number has that
        assert WORD.encode() not in data and KEY.encode() not in data and b"turn-1" not in data
    fleet.env["TORPOR_KEY_COMMAND"] = f"echo {OTHER}"
    fleet.run("a", "lovelace", "And?").fails("invalid", "another key")
    del fleet.env["TORPOR_KEY_COMMAND"]
    fleet.run("a", "lovelace", "And?").fails("invalid", "is sealed")
