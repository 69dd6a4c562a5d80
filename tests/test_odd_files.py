"""What nobody would write: names that are no files, containers that break a rule, numbers that can't be, deep nesting."""

import fcntl
import json
import os
import re
import shutil
import time

import pytest

from conftest import ROOT, forge, xxh3

import torpor

MARK = "0123456789abcdef" * 2


def odd_names(cli):
    """Names that mean something to a store, where a file of that name may be missing."""
    segment = cli.segments()[0].parent
    yield from (cli.store / name for name in (
        "x.safetensors", "y.json", ".tmp-1-2", ".torpor-tmp-1-2", ".torpor-tmp-1-2-reserves-999999999999"))
    yield segment / (segment.name + MARK[2:] + ".safetensors")
    yield segment / ".torpor-tmp-3-4"
    yield segment / ".tmp-3-4"
    yield cli.store / "parts" / f"{MARK}-{MARK}.safetensors"
    yield cli.store / "parts" / ".torpor-tmp-5-6"


@pytest.mark.parametrize("make", [lambda path: path.mkdir(parents=True), os.mkfifo], ids=["directory", "pipe"])
def test_what_is_no_file_is_nobodys(ada, words, make):
    ada.run("eve", words(300), "--raw").ok()
    (ada.store / "parts").mkdir(exist_ok=True)
    before = ada("du", "--json").ok().json
    names = list(odd_names(ada))
    for path in names:
        make(path)
    assert ada("du", "--json").ok().json == before
    assert [agent["agent"] for agent in ada("ls", "--json").ok().json] == ["ada", "eve"]
    assert ada("verify", "--json").ok().json["ok"]
    for command in (["show", "x"], ["rm", "x"], ["verify", "x"], ["rewind", "x", 0]):
        ada(*command).fails("not_found", "x")
    ada("rm", "eve").ok()
    assert "removed 0 files" in ada("gc").ok().out
    # A save that has to make room looks at all of them.
    ada.run("bob", "Bob: " + words(600), "--raw").ok()
    (ada.store / "bob.safetensors").unlink()
    held = ada("du", "--json").ok().json["total_bytes"]
    ada.run("ada", words(40), "--raw", "--disk-budget", held + 1000).ok()
    assert all(path.exists() and not path.is_file() for path in names)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("nothing")], ids=["directory", "pipe", "link"])
def test_what_has_the_name_of_a_new_segment_and_is_no_file_is_an_error(ada, words, make):
    first = ada.segments()[0]
    ada("rm", "ada").ok()
    ada("gc").ok()
    make(first)
    ada.run("ada", words(600), "--raw", timeout=60).fails("io", first.name, "aside", answered=True)
    ada.run("ada", words(200), "--raw").ok()
    ada("gc").ok()


# ---- containers

def test_data_that_is_not_aligned_is_damage(ada, tmp_path):
    ada.run("ada", " and then", "--raw").ok()
    exported = tmp_path / "ada.safetensors"
    ada("export", "ada", exported).ok()
    ada("import", forge(exported, tmp_path / "same.safetensors"), "same").ok()
    for shift in (8, 1, 63):
        odd = forge(exported, tmp_path / "odd.safetensors", shift=shift)
        ada("import", odd, "odd").fails("corruption", "odd.safetensors", "64")
    [part] = (ada.store / "parts").iterdir()
    for path, whole in ((ada.segments()[1], 256), (part, 0), (ada.agent_file("ada"), 0)):
        spoilt = ada.copy(tmp_path / "spoilt" / path.name)
        target = spoilt.store / path.relative_to(ada.store)
        # A part is known by its checksum, so its agent has to name the forged one.
        forge(path, target, shift=8)
        report = [r for r in spoilt("verify", "--json").json["agents"] if r["agent"] == "ada"][0]
        assert "64" in report["problems"][0] and report["intact_tokens"] == whole


# ---- sidecars and other numbers

MOST = 2**63 - 1
DEEP = "[" * 1_000_000 + "]" * 1_000_000


def claim(cli, agent, **numbers):
    """The agent's sidecar with other numbers, and a checksum that fits."""
    sidecar = cli.store / f"{agent}.json"
    fields = json.loads(sidecar.read_text()) | numbers | {"sidecar_checksum": "0" * 32}
    text = json.dumps(fields, indent=2, ensure_ascii=False).replace('"DEEP"', DEEP) + "\n"
    sidecar.write_text(text.replace("0" * 32, xxh3(text.encode()), 1))
    return sidecar


def test_a_sidecar_serves_an_agent_with_parts(tiny, words):
    for text in (words(300), words(20), "Once more."):
        tiny.run("ada", text, "--raw").ok()
    written = claim(tiny, "ada", model="somebody's").stat()  # which shows that the sidecar is read
    [listed] = tiny("ls", "--json").ok().json
    assert listed["model"] == "somebody's"
    assert (tiny.store / "ada.json").stat() == written, "ls had no reason to write it anew"
    assert listed["bytes"] == tiny("show", "ada", "--json").ok().json["bytes"]


@pytest.mark.parametrize("numbers", [
    {"bytes": MOST, "tail_bytes": MOST}, {"bytes": 2**64 - 1}, {"bytes": 1e300}, {"bytes": -1}, {"tail_bytes": 0}, {"cache_size": -5},
    {"cache_size": 2**63}, {"bytes": "DEEP"}, {"user": {"deep": "DEEP", "more": "text"}}, {"tail_bytes": 1e300, "bytes": 1e301}, {"lineage": {"numerics": [[1e300, "f32"]]}}],
    ids=["most", "unsigned", "float", "negative", "less", "tokens", "many tokens", "deep", "deep texts", "floats", "position"])
def test_what_a_sidecar_claims_is_a_number_of_bytes_or_it_is_rebuilt(ada, words, numbers):
    ada.run("eve", words(300), "--raw").ok()
    true = {agent["agent"]: agent for agent in ada("ls", "--json").ok().json}
    held = ada("du", "--json").ok().json["agent_bytes"]
    for agent in ("ada", "eve"):
        claim(ada, agent, **numbers)
    sidecars = sum((ada.store / f"{agent}.json").stat().st_size for agent in true)
    usage = ada("du", "--json").ok().json
    assert all(0 <= value <= MOST for value in usage.values()), usage
    assert abs(usage["agent_bytes"] - held) <= sidecars, "what is on the disk counts, whatever it says"
    listed = {agent["agent"]: agent for agent in ada("ls", "--json").ok().json}
    if numbers.get("bytes") == MOST:  # nothing says that it is not so
        assert all(agent["own_bytes"] >= 0 and agent["shared_bytes"] >= 0 for agent in listed.values())
    else:
        assert listed == true


def test_a_counter_near_its_end_stays_there(ada):
    counter = ada.store / ".locks" / ".bytes_written"
    for before in (MOST - 10, MOST):
        counter.write_text(f"{before:020}")
        ada.run("ada", " and then", "--raw").ok()
        assert ada("du", "--json").ok().json["bytes_written"] == MOST
    counter.write_text(f"{2**63:020}")  # no number that a counter can have
    written = ada.run("ada", " and then", "--raw").ok().json["bytes"]["written"]
    assert written <= ada("du", "--json").ok().json["bytes_written"] < 2 * written


@pytest.mark.parametrize("limit", ["-1", "-1GB", str(2**63), str(2**64 - 1), str(2**64), "16EiB", "9223372036854775807KB"])
@pytest.mark.parametrize("option", ["--disk-budget", "--min-free", "--memory-budget"])
def test_a_limit_that_no_disk_can_have_is_refused(tiny, option, limit):
    tiny.run("ada", "Hello", f"{option}={limit}").fails("usage", option)
    assert not tiny.store.exists()


def test_the_largest_limit_is_one(tiny):
    tiny.run("ada", "Hello", "--disk-budget", MOST).ok()
    tiny.run("ada", "Hello", "--min-free", MOST).fails("exhausted", str(MOST), answered=True)
    # What others say that they have been given is counted, whatever it is.
    for k in range(3):
        (tiny.store / f".torpor-tmp-1-{k}-reserves-{MOST}").touch()
    tiny.run("ada", "Hello", "--disk-budget", 10**9, "--min-free", 1).ok()
    assert not list(tiny.store.glob(".torpor-tmp-*"))


def test_negative_limits_are_refused(tiny_model, tmp_path):
    for limits in ({"disk_budget": -1}, {"min_free": -2**63}):
        with pytest.raises(torpor.InvalidArgumentError, match="limit") as refused:
            torpor.Engine(tiny_model, tmp_path / "store", **limits)
        assert refused.value.field == "DiskLimits"


# ---- nesting

def conversation(question, n):
    return ('[{' + question + ',"ids":[0,9]},{"role":"assistant","content":"Once","ids":[9,' + str(n) + "]}]").encode()


@pytest.fixture
def told(tiny, tmp_path):
    """told(question) imports as `ada` a conversation of which the question is this JSON."""
    turn = tiny.run("source", "Who keeps the lamp?").ok().json
    tiny("export", "source", tmp_path / "source.safetensors").ok()

    def tell(question):
        messages = conversation(question, turn["tokens"]["context"])
        tiny("import", forge(tmp_path / "source.safetensors", tmp_path / "ada.safetensors", tensors={"messages": messages}), "ada").ok()
        return tiny

    return tell


def test_a_conversation_with_a_million_levels_beside_its_texts_goes_on(told, tmp_path):
    cli = told('"role":"user","content":"Hello","more":' + DEEP)
    assert re.search(r"^\[user\] exchange 1, tokens 0 to \d+\nHello\n", cli("show", "ada").ok().out, re.M)
    assert [m["content"] for m in cli("show", "ada", "--json").ok().json["messages"]] == ["Hello", "Once"]
    cli("verify").ok()
    cli("fork", "ada", "eve").ok()
    cli("rewind", "eve", 12).ok()
    assert [m["content"] for m in cli("show", "eve", "--json").ok().json["messages"]] == ["Hello"]
    cli("export", "ada", tmp_path / "again.safetensors").ok()
    cli("import", tmp_path / "again.safetensors", "bob").ok()
    with torpor.Engine(cli.model, cli.store) as engine:
        engine.agent("ada").turn("And?", max_tokens=2)
        engine.agent("ada").fork("carol")
    cli.chat("bob", ["And?", "/fork dora"])
    cli.run("eve", "And?").ok()
    for agent in ("ada", "carol", "bob", "eve"):
        messages = cli("show", agent, "--json").ok().json["messages"]
        assert [messages[0]["content"], messages[-2]["content"]] == ["Hello", "And?"], agent


@pytest.mark.parametrize("question", ['"role":"user","content":' + DEEP, '"role":' + DEEP + ',"content":"Hello"',
                                      '"role":"user","content":' + DEEP[1:]], ids=["content", "role", "not closed"])
def test_a_conversation_with_a_million_levels_in_its_texts_is_an_error(told, question):
    if not question.endswith((DEEP, '"Hello"')):
        with pytest.raises(AssertionError, match="exit 4: .*ada.safetensors' is damaged: one of its messages"):
            told(question)
        return
    cli = told(question)
    assert "Once" in cli("show", "ada").ok().out
    assert cli("show", "ada", "--json").ok().json["messages"][-1]["content"] == "Once"
    cli("fork", "ada", "eve").ok()
    cli.run("ada", "And?").fails("corruption", "message")
    with torpor.Engine(cli.model, cli.store) as engine, pytest.raises(torpor.CorruptionError, match="message"):
        engine.agent("eve").turn("And?", max_tokens=2)


def test_an_old_conversation_of_a_million_levels_is_read(tiny):
    shutil.copytree(ROOT / "tests/goldens/agents-v1/store", tiny.store)
    path = tiny.agent_file("chat")
    for messages in ('[{"role":' + DEEP + ',"content":"Hello"},{"role":"user","content":"Once"}]', DEEP):
        forge(path, path, {"user.messages": messages, "user.message_ends": "5,9"})
        # No conversation of Torpor's, so somebody else's metadata.
        tiny("show", "chat").ok()
        shown = tiny("show", "chat", "--json").ok().json
        assert shown["messages"] == [] and shown["user"]["messages"] == messages
        tiny("ls").ok()


# ---- litter

def agent_locks(cli):
    return sorted(path.name for path in (cli.store / ".locks").glob("*.lock") if not path.name.startswith("."))


def test_what_comes_to_nothing_leaves_no_lock(ada, tmp_path):
    damaged = tmp_path / "damaged.safetensors"
    ada("export", "ada", damaged).ok()
    damaged.write_bytes(damaged.read_bytes()[:-1])
    before = agent_locks(ada)
    ada("rewind", "nobody", 5).fails("not_found")
    ada("pin", "nobody").fails("not_found")
    ada("rename", "nobody", "eve").fails("not_found")
    ada("fork", "nobody", "eve").fails("not_found")
    ada("fork", "ada", "eve", "--at", 99999).fails("invalid")
    ada("import", damaged, "eve").fails("corruption")
    ada.run("eve", "Hello", "--disk-budget", 100).fails("exhausted", answered=True)
    ada.run("eve", "Hello", "--no-save").ok()
    ada.chat("eve", [])
    assert agent_locks(ada) == before
    with pytest.raises(torpor.InvalidArgumentError):
        torpor.CachePersistence(ada.store)._store.save("eve", [], [], b"", [], "m", [("torpor.x", "")], [], "none")
    assert agent_locks(ada) == before
    ada("fork", "ada", "eve").ok()
    ada("rename", "eve", "bob").ok()
    ada("rm", "bob").ok()
    assert agent_locks(ada) == before


def test_gc_removes_the_locks_of_agents_that_never_came_to_be(ada):
    locks = ada.store / ".locks"
    (locks / "killed.lock").touch()
    (locks / "odd.lock").mkdir()
    with (locks / "coming.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        before = agent_locks(ada)
        assert "removed 0 files" in ada("gc").ok().out
        assert agent_locks(ada) == [name for name in before if name != "killed.lock"]


def test_an_export_removes_what_a_killed_one_left_there(ada, tmp_path):
    old, new, others = (tmp_path / name for name in (".torpor-tmp-7-7", ".torpor-tmp-8-8", ".tmp-9-9"))
    for path in (old, new, others):
        path.write_text("half")
    for path in (old, others):
        os.utime(path, (time.time() - 25 * 3600,) * 2)
    ada("export", "ada", tmp_path / "ada.safetensors").ok()
    assert not old.exists() and new.exists() and others.exists()
    os.utime(new, (time.time() - 25 * 3600,) * 2)
    ada("export", "ada", tmp_path / "ada.mlx.safetensors", "--format", "mlx-lm").ok()
    assert not new.exists() and others.exists()
