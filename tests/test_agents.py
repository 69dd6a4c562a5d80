"""Many agents: through chat's commands in one process, and through fork, rewind, pin, rename, why on sleeping ones."""

import json
import random
import subprocess

import pytest


def chat(torpor, agent, lines, *args, max_tokens=8):
    """Everything that chat prints: turns and /memory objects, in order."""
    result = torpor("chat", "--model", torpor.model, "--agent", agent, "--max-tokens", max_tokens, "--json", *args,
                    stdin="".join(line + "\n" for line in lines)).ok()
    return [json.loads(line) for line in result.out.split("\n") if line]


def turns(objects):
    return [one for one in objects if "text" in one]


def memories(objects):
    return [one for one in objects if "kv_bytes" in one]


def test_ten_agents_under_a_budget_of_three_answer_as_they_would_alone(tiny, tmp_path, words, tiny_model):
    """100 random turns; the tokens are those of ten uninterrupted runs, the budget holds, no old token is prefilled."""
    import conftest
    random.seed(1)
    names = [f"agent{i}" for i in range(10)]
    start = {name: f"{name} {words(1990)}" for name in names}  # nothing in common, so nothing is shared
    order = [random.choice(names) for _ in range(100)]
    says = [f" {random.randrange(1000)} and then" for _ in order]
    per_token = 2 * 2 * 64 * 2  # layers, keys and values, head_dim, f16
    budget = 3 * per_token * 256 * 11  # 2,000 tokens and what the turns add: eleven segments

    script = []
    for name in names:
        script += [f"/agent {name}", start[name], "/memory"]
    for name, text in zip(order, says):
        script += [f"/agent {name}", text, "/memory"]
    options = ["--raw", "--temperature", "1", "--seed", "3"]
    objects = chat(tiny, names[0], script, *options, "--memory-budget", budget, "--write-behind", max_tokens=4)
    assert all(one["kv_bytes"] <= budget == one["budget"] for one in memories(objects))
    assert max(len(one["agents"]) for one in memories(objects)) <= 4

    alone = conftest.Torpor(tmp_path / "alone", tiny_model)
    expected = {}
    for name in names:
        mine = [text for who, text in zip(order, says) if who == name]
        expected[name] = chat(alone, name, [start[name], *mine], *options, max_tokens=4)
    seen = {name: [] for name in names}
    for turn in turns(objects):
        seen[turn["agent"]].append(turn)
    for name in names:
        assert [turn["text"] for turn in seen[name]] == [turn["text"] for turn in expected[name]]
        for before, turn in zip(seen[name], seen[name][1:]):
            assert turn["tokens"]["cached"] == before["tokens"]["context"]
    tiny("verify").ok()


def test_what_cannot_fit_is_said(tiny, words):
    tiny.run("a", words(600), "--raw", "--memory-budget", "100KB").fails("exhausted", "memory budget")
    assert tiny("ls", "--json").ok().json == []
    tiny.run("a", words(600), "--raw", "--memory-budget", "10MiB").ok()


def test_fork_shares_segments_and_both_go_their_own_way(ada, words):
    before = set(ada.segments())
    ada("fork", "ada", "eve").ok()
    ada("fork", "ada", "bob", "--at", 300).ok()
    assert set(ada.segments()) == before
    sizes = {one["agent"]: one["cache_size"] for one in ada("ls", "--json").ok().json}
    assert sizes == {"ada": sizes["ada"], "eve": sizes["ada"], "bob": 300}
    turn = {name: ada.run(name, " and then", "--raw").ok().json for name in ("ada", "eve", "bob")}
    assert turn["ada"]["text"] == turn["eve"]["text"]
    assert turn["bob"]["tokens"]["cached"] == 300
    ada("fork", "ada", "eve").fails("invalid", "eve")
    ada("fork", "nobody", "new").fails("not_found", "nobody")
    ada("fork", "ada", "new", "--at", 10**6).fails("invalid", "holds")
    ada("verify").ok()


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 600])
def test_a_rewound_agent_is_a_fresh_prefill_of_the_prefix(ada, tiny, words, n, tokenizer):
    ada("rewind", "ada", n).ok()
    assert ada("show", "ada", "--json").ok().json["cache_size"] == n
    more = " and then"
    rewound = ada.run("ada", more, "--raw").ok().json
    assert rewound["tokens"]["cached"] == n
    prefix = tokenizer.decode(tokenizer.encode(words(600)).ids[:n], skip_special_tokens=False)
    fresh = tiny.run("fresh", prefix + more, "--raw").ok().json
    assert fresh["tokens"]["prompt"] == rewound["tokens"]["prompt"]
    assert fresh["text"] == rewound["text"]
    ada("rewind", "ada", 10**6).fails("invalid", "holds")


def test_rewinding_takes_messages_back(tiny):
    first, second = chat(tiny, "a", ["One", "Two"])
    tiny("rewind", "a", first["tokens"]["context"]).ok()
    messages = tiny("show", "a", "--json").ok().json["messages"]
    assert [m["content"] for m in messages if m["role"] == "user"] == ["One"]
    again = tiny.run("a", "Two").ok().json
    assert (again["text"], again["tokens"]["cached"]) == (second["text"], first["tokens"]["context"])


def test_chat_commands_do_the_same_to_agents_that_are_awake(tiny, words):
    objects = chat(tiny, "a", [words(600), "/fork b", " left", "/agent a", " right", "/fork c 256", " middle", "/pin",
                               "/rename d", "/memory", "/rewind 100", "/memory"], "--raw")
    first, left, right, middle = turns(objects)
    assert left["tokens"]["cached"] == right["tokens"]["cached"] == first["tokens"]["context"]
    assert middle["agent"] == "c" and middle["tokens"]["cached"] == 256
    before, after = memories(objects)
    agents = {one["agent"]: one for one in before["agents"]}
    assert set(agents) == {"a", "b", "d"} and agents["d"]["pinned"]
    assert all(agents[name]["shared_bytes"] > 0 for name in agents)
    assert before["kv_bytes"] < sum(one["bytes"] for one in before["agents"])
    assert {one["agent"]: one["tokens"] for one in after["agents"]}["d"] == 100
    assert {one["agent"]: one["cache_size"] for one in tiny("ls", "--json").ok().json}["d"] == 100
    tiny("verify").ok()


@pytest.mark.parametrize("budget", ["400KB", "530KB"])  # three runs of 256 tokens are held: those alone fit, or one more
def test_a_cut_at_the_edge_of_the_budget_takes_nobody_away(tiny, words, tokenizer, budget):
    prefix = tokenizer.decode(tokenizer.encode(words(730)).ids[:300], skip_special_tokens=False)
    fresh = tiny.run("fresh", prefix + " and then", "--raw").ok().json["text"]
    for command in ("/rewind 300", "/fork eve 300"):
        objects = chat(tiny, "a", [words(730), command, " and then", "/memory"], "--raw", "--memory-budget", budget)
        assert turns(objects)[1]["tokens"]["cached"] == 300
        assert turns(objects)[1]["text"] == fresh
        assert memories(objects)[0]["kv_bytes"] <= 1000 * int(budget[:-2])
        tiny("rm", "a").ok()
    tiny("verify").ok()


def test_a_message_may_begin_with_a_slash(tiny):
    assert len(turns(chat(tiny, "a", ["/usr/bin is a directory", "//agent", "//fork a b c"]))) == 3


def test_pin_and_rename(ada):
    ada("pin", "ada").ok()
    assert ada("ls", "--json").ok().json[0]["pinned"] is True
    ada("rename", "ada", "eve").ok()
    assert [one["agent"] for one in ada("ls", "--json").ok().json] == ["eve"]
    ada("pin", "eve", "--off").ok()
    assert ada("ls", "--json").ok().json[0]["pinned"] is False
    ada("rename", "nobody", "x").fails("not_found", "nobody")
    assert ada.run("eve", " more", "--raw").ok().json["tokens"]["cached"] > 600


def test_a_new_agent_starts_from_what_another_has_on_disk(ada, words):
    turn = ada.run("new", words(650), "--raw").ok().json
    assert turn["tokens"]["cached"] == 512 and turn["bytes"]["read"] > 0
    fresh = ada.run("other", "Something else", "--raw").ok().json
    assert fresh["tokens"]["cached"] == 0


def test_a_prompt_without_an_agent_leaves_only_segments(tiny, words):
    common = ["run", "--model", tiny.model, "--prompt", words(600), "--raw", "--max-tokens", 4, "--json"]
    first = tiny(*common).ok().json
    assert first["tokens"]["cached"] == 0 and tiny("ls", "--json").ok().json == []
    second = tiny(*common).ok().json
    assert second["tokens"]["cached"] == 512 and second["text"] == first["text"]
    assert tiny("du", "--json").ok().json["orphan_segments"] == 2
    tiny("gc").ok()
    assert tiny(*common, "--no-save").ok().json["tokens"]["cached"] == 0
    assert tiny("du", "--json").ok().json["segments"] == 0


def test_why_names_the_first_token_that_differs(ada, words, tmp_path, tokenizer):
    text = words(600)
    ids = tokenizer.encode(text).ids
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(tokenizer.decode(ids[:400], skip_special_tokens=False) + " zebra crossing")
    found = ada("why", "ada", "--prompt-file", prompt, "--json").ok().json
    mine = tokenizer.encode(prompt.read_text()).ids
    common = next(i for i, (a, b) in enumerate(zip(ids, mine)) if a != b)
    assert found["common_tokens"] == found["diverges_at"] == common and found["sealed_tokens"] == 256
    assert found["prompt"]["token"] == mine[common] and found["held"]["token"] == ids[common]
    assert found["before"] == tokenizer.decode(ids[common - 8:common], skip_special_tokens=False)
    out = ada("why", "ada", "--prompt-file", prompt).ok().out
    assert f"they part at token {common}" in out and "zebra" in out

    prompt.write_text(text)
    whole = ada("why", "ada", "--prompt-file", prompt, "--json").ok().json
    assert whole["diverges_at"] is None and whole["common_tokens"] == 600 and whole["prompt"] is None


def test_why_renders_messages(real, tmp_path):
    real.run("a", "Hello", max_tokens=4).ok()
    messages = tmp_path / "messages.json"
    messages.write_text(json.dumps([{"role": "user", "content": "Hello"}]))
    found = real("why", "a", "--prompt-file", messages, "--messages", "--json").ok().json
    assert found["common_tokens"] == found["prompt_tokens"]
    messages.write_text("{")
    real("why", "a", "--prompt-file", messages, "--messages").fails("invalid")


def test_ls_says_what_is_shared_and_who_is_awake(ada):
    ada("fork", "ada", "eve").ok()
    listed = {one["agent"]: one for one in ada("ls", "--json").ok().json}
    for one in listed.values():
        assert one["own_bytes"] + one["shared_bytes"] == one["bytes"] and one["shared_bytes"] > 0
        assert one["state"] == "asleep"
    process = subprocess.Popen(ada.command("chat", "--model", ada.model, "--agent", "eve", "--raw", "--max-tokens", "2"),
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdin.write(b" more\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    assert {one["agent"]: one["state"] for one in ada("ls", "--json").ok().json} == {"ada": "asleep", "eve": "awake"}
    process.stdin.close()
    process.stdout.read()
    assert process.wait(timeout=60) == 0


def test_the_disk_budget_is_kept(ada, words):
    used = ada("du", "--json").ok().json["total_bytes"]
    before = ada.state()
    ada.run("big", words(2000)[::-1], "--raw", "--disk-budget", used + 20000).fails("exhausted", "budget", answered=True)
    assert ada.state() == before
    ada.run("small", "Hi", "--raw", "--disk-budget", used + 500000).ok()
