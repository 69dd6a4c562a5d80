"""The command line as people use it: what may be left out, what is refused before it does harm, what is said at the end."""

import json
import os
import re
import shutil
import subprocess
import time

import pytest
from safetensors.numpy import load_file

from conftest import BIN, EXIT, Result, Torpor, forge, make_tiny_model


@pytest.fixture
def talked(tiny):
    """An agent, `ada`, with a system prompt and three exchanges."""
    tiny.run("ada", "One", "--system", "Be brief.", max_tokens=4).ok()
    tiny.run("ada", "Two", max_tokens=4).ok()
    tiny.run("ada", "Three", max_tokens=4).ok()
    return tiny


def exchanges(cli, agent="ada"):
    return cli("show", agent, "--json").ok().json["exchanges"]


def held(cli, agent="ada"):
    cli("export", agent, cli.store.parent / "held.safetensors", "--force").ok()
    return load_file(cli.store.parent / "held.safetensors")["tokens"].tolist()


def said(cli, agent="ada"):
    return [message["content"] for message in cli("show", agent, "--json").ok().json["messages"] if message["role"] == "user"]


def shell(cli, command, env=None):
    """The command line with redirections that only a shell can make."""
    return Result(subprocess.run(["sh", "-c", command], cwd=cli.store.parent, capture_output=True, timeout=120, env={
        **os.environ, "TORPOR": str(BIN), "TORPOR_STORE": str(cli.store), "M": str(cli.model), **(env or {})}))


# ---- standard streams

@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", ">&- --json", "<&- >&-"])
def test_with_standard_output_closed_nothing_is_printed_into_the_stores_files(tiny, closed):
    result = shell(tiny, f'"$TORPOR" run --model "$M" --agent ada --prompt hi --max-tokens 4 {closed}')
    assert result.code == EXIT["io"], result.err
    assert [path.read_bytes() for path in tiny.store.glob(".locks/*") if path.suffix == ".lock" and not path.name.startswith(".")] == [b""]
    tiny("verify", "ada").ok()
    for command in ('export ada "$PWD/out.safetensors"', 'fork ada eve'):
        assert shell(tiny, f'"$TORPOR" {command} >&-').code == EXIT["io"]
    tiny("verify").ok()


def test_with_standard_input_closed_there_is_none(tiny):
    assert shell(tiny, '"$TORPOR" chat --model "$M" --agent ada --json <&-').ok().out == ""
    shell(tiny, '"$TORPOR" run --model "$M" --agent ada --prompt-file - --json <&-').fails("invalid", "empty")


def test_a_dash_for_a_prompt_is_standard_input(tiny, tokenizer):
    turn = tiny("run", "--model", tiny.model, "--prompt", "-", "--raw", "--json", "--max-tokens", 1, stdin="hello there").ok().json
    assert turn["tokens"]["prompt"] == len(tokenizer.encode("hello there").ids)


# ---- the model may be left out

def test_an_old_agent_goes_on_with_its_own_model(tiny):
    tiny.run("ada", "Hello").ok()
    turn = tiny("run", "--agent", "ada", "--prompt", "And?", "--max-tokens", 2, "--json", env={"TORPOR_MODEL": "/nowhere"}).ok().json
    assert turn["model"] == str(tiny.model) and turn["tokens"]["cached"] > 0
    assert json.loads(tiny("chat", "--agent", "ada", "--json", "--max-tokens", 2, stdin="And?\n").ok().out)["model"] == str(tiny.model)


def test_a_new_agent_takes_the_environments_model(tiny):
    command = ("run", "--agent", "ada", "--prompt", "Hello", "--max-tokens", 2, "--json")
    tiny(*command, env={"TORPOR_MODEL": ""}).fails("usage", "--model", "TORPOR_MODEL", "'ada' is new")
    tiny(*command, env={"TORPOR_MODEL": str(tiny.model)}).ok()
    tiny("perplexity", "--file", "-", "--tokens", 8, "--json", stdin="Once upon a time there was a lamp.",
         env={"TORPOR_MODEL": str(tiny.model)}).ok()
    tiny("bench", env={"TORPOR_MODEL": ""}).fails("usage", "--model", "TORPOR_MODEL")


def test_a_model_that_moved_is_asked_for(tiny, tmp_path):
    tiny.model = shutil.copytree(tiny.model, tmp_path / "before")
    tiny.run("ada", "Hello").ok()
    tiny.model.rename(tmp_path / "after")
    tiny("run", "--agent", "ada", "--prompt", "And?").fails("not_found", "before", "--model")
    tiny("why", "ada", "--prompt-file", "-", stdin="Hello").fails("not_found", "before", "--model")
    tiny("run", "--model", tmp_path / "after", "--agent", "ada", "--prompt", "And?", "--max-tokens", 1).ok()


# ---- numbers

@pytest.mark.parametrize("option", [["--temperature", "nan"], ["--top-p", "nan"], ["--temperature", "inf"], ["--seed", "-1"]])
def test_what_is_no_number_is_refused_before_the_model_is_looked_for(tiny, option):
    tiny("run", "--model", "/nowhere", "--agent", "ada", "--prompt", "hi", *option).fails("usage", option[0])


def test_answers_differ_unless_a_seed_is_given_and_the_seed_is_told(tiny):
    args = ("run", "--model", tiny.model, "--prompt", "hi", "--raw", "--temperature", 1, "--max-tokens", 8, "--json")
    first, second = tiny(*args).ok().json, tiny(*args).ok().json
    assert (first["text"], first["seed"]) != (second["text"], second["seed"])
    again = tiny(*args, "--seed", first["seed"]).ok().json
    assert (again["text"], again["seed"]) == (first["text"], first["seed"])
    assert "seed" not in tiny.run("ada", "hi").ok().json, "the likeliest token has no seed"


# ---- exchanges

def test_show_tells_where_exchanges_begin_and_end(talked):
    parts = exchanges(talked)
    assert [part["begin"] for part in parts] == [0, *(part["end"] for part in parts[:-1])]
    assert parts[-1]["end"] == talked("show", "ada", "--json").ok().json["cache_size"]
    text = talked("show", "ada").ok().out
    for i, part in enumerate(parts, 1):
        assert f"[user] exchange {i}, tokens {part['begin']} to {part['end']}\n" in text


def test_rewind_and_fork_count_exchanges(talked):
    ends = [part["end"] for part in exchanges(talked)]
    assert talked("fork", "ada", "eve", "--turn", 2).ok().out.startswith(f"eve begins with {ends[1]} tokens of ada")
    assert said(talked, "eve") == ["One", "Two"]
    assert talked("rewind", "ada", "--turns", 2).ok().out == f"ada keeps {ends[0]} of {ends[2]} tokens\n"
    assert said(talked) == ["One"]
    assert talked("rewind", "eve", "--turns", 2, "--json").ok().json["tokens"] == 0
    talked("rewind", "ada", "--turns", 2).fails("invalid", "1 exchanges")
    talked("rewind", "ada").fails("usage", "--turns")
    talked("rewind", "ada", 3, "--turns", 1).fails("usage")
    talked("fork", "ada", "bob", "--turn", 9).fails("invalid", "1 exchanges")


def test_every_command_that_acts_says_what_it_did(talked, tmp_path):
    out = tmp_path / "out.safetensors"
    for command, line in ((["pin", "ada"], "ada is pinned"), (["pin", "--off", "ada"], "ada is no longer pinned"),
                          (["fork", "ada", "eve"], "eve begins with"), (["rename", "eve", "bob"], "eve is now bob"),
                          (["upgrade", "ada"], "ada is of today's format"), (["export", "ada", out], f"wrote {out} and its .json, "),
                          (["import", out, "carol"], "imported carol"), (["repair", "ada"], "ada is intact"),
                          (["rm", "carol"], "removed carol"), (["gc"], "removed 0 files"), (["gc", "--dry-run"], "would remove 0 files")):
        result = talked(*command).ok()
        assert result.out.startswith(line) and result.out.count("\n") == 1, (command, result.out)
    for command in (["pin", "ada"], ["fork", "ada", "eve"], ["rename", "eve", "dora"], ["upgrade", "ada"], ["rewind", "dora", 5],
                    ["export", "ada", out, "--force"], ["import", out, "carol"], ["repair", "ada"], ["gc"], ["rm", "carol", "dora"]):
        assert isinstance(talked(*command, "--json").ok().json, dict)


# ---- files that are there

@pytest.mark.parametrize("there", ["out.safetensors", "out.json"])
def test_an_export_replaces_nothing_unless_it_is_told_to(ada, tmp_path, there):
    (tmp_path / there).write_text("mine")
    ada("export", "ada", tmp_path / "out.safetensors").fails("invalid", there, "--force")
    assert (tmp_path / there).read_text() == "mine" and len(list(tmp_path.glob("out.*"))) == 1
    ada("export", "ada", tmp_path / "out.safetensors", "--force").ok()
    assert (tmp_path / there).read_bytes() != b"mine"
    ada("export", "ada", tmp_path / "out.safetensors", "--format", "mlx-lm").fails("invalid", "--force")


# ---- lists

def test_ls_sorts_as_people_count_and_prints_names_alone(tiny_ada_source, tmp_path):
    cli = tiny_ada_source.copy(tmp_path / "store")
    for name in ("a10", "a2", "a1", "b", "a02"):
        cli("fork", "ada", name).ok()
    names = ["a1", "a02", "a2", "a10", "ada", "b"]
    assert cli("ls", "-q").ok().out.split() == names
    assert [agent["agent"] for agent in cli("ls", "--json").ok().json] == names
    assert cli("rm", "a1", "nobody", "a2").fails("not_found", "nobody").code
    assert cli("ls", "-q").ok().out.split() == names, "nothing goes when one is not there"
    cli("rm", "a1", "a2", "b").ok()
    assert cli("ls", "-q").ok().out.split() == ["a02", "a10", "ada"]
    cli.store = tmp_path / "nothing"
    assert cli("ls", "-q").ok().out == "" and "no directory" in cli("ls").ok().out


def test_prune_removes_what_was_not_used_for_long(ada, words):
    for agent in ("eve", "old"):
        ada.run(agent, words(300), "--raw").ok()
    ada("fork", "ada", "kept").ok()
    forge(ada.agent_file("old"), ada.agent_file("old"), {"updated_at": "2020-01-01T00:00:00Z"})
    ada("pin", "kept").ok()
    assert ada("prune", "--older-than", "30d", "--dry-run").ok().out.startswith("would remove old, ")
    assert ada("prune", "--older-than", "30d", "--json").ok().json == {"removed": ["old"], "dry_run": False}
    assert ada("ls", "-q").ok().out.split() == ["ada", "eve", "kept"]
    for age in ("30", "d", "-1d", "1y", "nan d"):
        ada("prune", f"--older-than={age}").fails("invalid", "age")


def test_du_and_a_dry_run_count_what_killed_saves_left(ada):
    left = ada.store / ".torpor-tmp-1-2"
    left.write_bytes(b"x" * 5000)
    os.utime(left, (time.time() - 7200,) * 2)
    usage = ada("du", "--json").ok().json
    assert (usage["temporary_files"], usage["temporary_bytes"]) == (1, 5000)
    assert "unfinished" in ada("du").ok().out
    cache = {"TORPOR_CACHE": str(ada.store.parent / "cache")}
    dry = ada("gc", "--dry-run", "--json", env=cache).ok().json
    assert dry == {"files_removed": 1, "bytes_freed": 5000, "packed_files_removed": 0, "packed_bytes_freed": 0,
                   "dry_run": True} and left.exists()
    assert ada("gc", "--json", env=cache).ok().json == dry | {"dry_run": False} and not left.exists()


# ---- damage

def test_repair_keeps_what_is_intact(ada):
    segments = ada("show", "ada", "--json").ok().json["segments"]
    (ada.store / "segments" / segments[1][:2] / f"{segments[1]}.safetensors").unlink()
    assert ada("verify", "ada").code == EXIT["corruption"]
    assert ada("repair", "ada", "--json").ok().json["tokens"] == 256
    assert ada("verify", "ada", "--json").ok().json["agents"][0]["intact_tokens"] == 256
    (ada.store / "segments" / segments[0][:2] / f"{segments[0]}.safetensors").unlink()
    ada("repair", "ada").fails("corruption", "ada", "again")


def test_rebuild_computes_what_was_lost_again(ada, tmp_path):
    tokens, other = held(ada), ada.copy(tmp_path / "other")
    ada("fork", "ada", "eve").ok()
    for path in ada.segments():
        path.unlink()
    assert ada("verify", "ada").code == EXIT["corruption"]
    assert ada("rebuild", "ada", "--json").ok().json["tokens"] == len(tokens)
    ada("verify", "ada").ok()
    assert held(ada) == tokens
    turn, undamaged = (cli.run("ada", " and then", "--raw").ok().json for cli in (ada, other))
    assert (turn["text"], turn["tokens"]["cached"]) == (undamaged["text"], len(tokens))


def test_rebuild_makes_an_agent_another_models(talked, tmp_path):
    def other(config, weights):
        weights["lm_head.weight"] = weights["lm_head.weight"][::-1].copy()

    model = make_tiny_model(tmp_path / "other", other)
    tokens = held(talked)
    talked("run", "--model", model, "--agent", "ada", "--prompt", "Four").fails("incompatible", "weights", "torpor rebuild")
    assert talked("rebuild", "ada", "--model", model).ok().out.startswith(f"ada: {len(tokens)} tokens computed again")
    assert held(talked) == tokens and said(talked) == ["One", "Two", "Three"]
    talked.model = model
    turn = talked.run("ada", "Four").ok().json
    assert turn["tokens"]["cached"] == len(tokens) and "notices" not in turn


def test_rebuild_writes_messages_anew_for_another_tokenizer(talked, tmp_path):
    tokens, before = held(talked), exchanges(talked)
    model = make_tiny_model(tmp_path / "other")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "lamp"}))
    talked("rebuild", "ada", "--model", model).ok()
    assert held(talked) == tokens[:len(held(talked))] and len(held(talked)) >= len(tokens) - 1
    assert said(talked) == ["One", "Two", "Three"] and exchanges(talked)[:2] == before[:2]
    talked.model = model
    assert "notices" not in talked.run("ada", "Four").ok().json


# ---- two agents

def test_why_compares_two_agents(talked):
    talked("fork", "ada", "eve", "--turn", 2).ok()
    talked.run("eve", "Four", max_tokens=2).ok()
    told = talked("why", "ada", "eve", "--json").ok().json
    assert told["common_tokens"] == told["diverges_at"] > exchanges(talked)[1]["end"]
    assert "Three" in told["held"]["text"] + told["held"]["after"] and "Four" in told["prompt"]["text"] + told["prompt"]["after"]
    assert "agent ada:" in talked("why", "ada", "eve").ok().out
    talked("why", "ada", "nobody").fails("not_found", "nobody")
    talked("why", "ada").fails("usage", "--prompt-file")


def test_why_hints_at_messages_for_a_plain_text(talked):
    assert "--messages" in talked("why", "ada", "--prompt-file", "-", stdin="A plain text.").ok().out


def with_bos(model):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_a_prompt_that_begins_with_the_first_token_gets_no_second_one(tmp_path):
    cli = Torpor(tmp_path / "store", make_tiny_model(tmp_path / "model"))
    with_bos(cli.model)
    counts = [cli.run(agent, prompt, "--raw", max_tokens=1).ok().json["tokens"]["prompt"]
              for agent, prompt in (("ada", "hi"), ("eve", "<|im_start|>hi"))]
    assert counts[0] == counts[1]
    for prompt in ("hi", "<|im_start|>hi"):
        assert cli("why", "eve", "--prompt-file", "-", "--json", stdin=prompt).ok().json["diverges_at"] is None


# ---- chat

def test_an_unknown_command_is_no_message(tiny):
    for line in ("/rewindd 5", "/rewind", "/rewind x", "/list", "/exit now", "/agent bad name", "/agent", "/undo 1 2", "/undo x", "/Memory"):
        result = tiny("chat", "--model", tiny.model, "--agent", "ada", "--json", stdin=line + "\n")
        assert result.code == EXIT["invalid"] and ("//" in result.err or "not a number" in result.err), (line, result.err)
        assert not tiny.store.exists() or not tiny.agent_file("ada").exists()


def test_two_slashes_and_paths_are_messages(tiny):
    tiny.chat("ada", ["//rewind 5", "/etc/hosts is what?", "/1 of 2"], max_tokens=1)
    assert said(tiny) == ["/rewind 5", "/etc/hosts is what?", "/1 of 2"]


def test_blanks_behind_a_command_and_on_a_line_are_nothing(tiny):
    assert tiny.chat("ada", ["   ", "\t", "/exit  ", "Hello"]) == []


def test_undo_forgets_exchanges_and_keeps_the_system_prompt(tiny):
    out = tiny.chat("ada", ["One", "Two", "Three", "/undo", "/undo 1", "/turns", "Four", "/undo 2", "Five"], "--system", "Be brief.",
                    max_tokens=3)
    assert [exchange["user"] for exchange in out[3]["exchanges"]] == ["One"]
    messages = tiny("show", "ada", "--json").ok().json["messages"]
    assert [message["content"] for message in messages if message["role"] != "assistant"] == ["Be brief.", "Five"]


@pytest.mark.parametrize("more", [[], ["--write-behind"]])
def test_undo_leaves_the_agent_as_it_was_before(tiny, more):
    tiny.chat("ada", ["One", "Two", "/undo"], *more, max_tokens=3)
    tiny.chat("eve", ["One"], max_tokens=3)
    assert held(tiny, "ada") == held(tiny, "eve")


def test_a_system_prompt_is_one_agents_own(tiny):
    tiny.chat("ada", ["One", "/agent eve", "/system  Speak Latin. ", "Two", "/agent bob", "Three"], "--system", "Be brief.", max_tokens=1)
    prompts = {agent: tiny("show", agent, "--json").ok().json["messages"][0]["content"] for agent in ("ada", "eve", "bob")}
    assert prompts == {"ada": "Be brief.", "eve": "Speak Latin. ", "bob": "Be brief."}
    # An old agent keeps its own: --system is for new ones, and /system too late.
    tiny.chat("ada", ["Four", "/agent eve", "Five"], "--system", "Be brief.", max_tokens=1)
    result = tiny("chat", "--agent", "eve", "--system", "Be brief.", stdin="Six\n")
    result.fails("invalid", "eve", "system")
    assert tiny("chat", "--agent", "eve", "--json", stdin="/system Be brief.\n").fails("invalid", "begun already").code


def test_an_agent_that_sleeps_is_free_for_others(tiny):
    with subprocess.Popen(tiny.command("chat", "--model", tiny.model, "--agent", "ada", "--json", "--max-tokens", 2),
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as chat:
        chat.stdin.write("Hello\n")
        chat.stdin.flush()
        assert json.loads(chat.stdout.readline())["agent"] == "ada"
        tiny.run("ada", "And?").fails("busy")
        chat.stdin.write("/sleep\n/agents\n")
        chat.stdin.flush()
        [agent] = json.loads(chat.stdout.readline())["agents"]
        assert (agent["agent"], agent["awake"]) == ("ada", False)
        tiny.run("ada", "And?").ok()
        chat.stdin.write("Go on.\n")
        chat.stdin.close()
        assert json.loads(chat.stdout.readline())["agent"] == "ada"
    assert said(tiny) == ["Hello", "And?", "Go on."]


# ---- the rest

def test_the_help_of_each_command_ends_with_its_own_examples(tiny):
    commands = re.findall(r"(?m)^  ([a-z]+) {2,}", tiny("--help").ok().out.split("Subcommands:")[1].split("Examples:")[0])
    assert len(commands) > 10
    for command in commands:
        text = tiny(command, "--help").ok().out
        examples = text.split("Examples:\n")[1].split("\n\n")[0].splitlines()
        assert examples and all(re.match(rf"  torpor {command}\b", line) for line in examples), (command, examples)
        options = text.split("Examples:\n")[0]
        assert all(option in options for option in re.findall(r" (--?[a-z-]+)", " ".join(examples))), (command, examples)

def test_a_model_whose_name_is_not_text_is_refused_before_it_is_loaded(tiny, tmp_path):
    odd = os.fsencode(tmp_path) + b"/caf\xe9"
    os.symlink(tiny.model, odd)
    result = Result(subprocess.run([os.fsencode(BIN), b"run", b"--model", odd, b"--agent", b"ada", b"--prompt", b"hi", b"--store",
                                    os.fsencode(tiny.store)], capture_output=True, timeout=120))
    result.fails("invalid", "model", "UTF-8")


@pytest.mark.parametrize("kind", ["bash", "zsh", "fish"])
def test_completions_name_the_commands_and_their_options(tiny, kind):
    script = tiny("completions", kind).ok().out
    for word in ("rewind", "prune", "turns", "older-than", "ls -q"):
        assert word in script
    if shutil.which(kind):
        subprocess.run([kind, "-n" if kind != "fish" else "--no-execute", "/dev/stdin"], input=script, text=True, check=True)


def test_bash_completes_commands_options_and_agents(ada):
    complete = ('eval "$(torpor completions bash)"; f() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _torpor; '
                'echo "${COMPREPLY[@]}"; }; f torpor rew; f torpor rewind --tur; f torpor rewind a; f torpor run --agent a; f torpor launch co; '
                'f torpor completions f')
    out = subprocess.run(["bash", "-c", complete], capture_output=True, text=True, check=True,
                         env={**os.environ, "PATH": f"{BIN.parent}:{os.environ['PATH']}", "TORPOR_STORE": str(ada.store)}).stdout
    assert out.split("\n") == ["rewind", "--turns", "ada", "ada", "codex", "fish", ""]


def test_the_summary_of_a_prompt_without_an_agent_names_nobody(tiny):
    assert "[: " not in tiny("run", "--model", tiny.model, "--prompt", "hi", "--max-tokens", 1).ok().err
