"""The examples run, and do what they say."""

import os
import re
import subprocess
import sys

import pytest

from conftest import BUILD, ROOT


def example(name, *args, store, **env):
    ended = subprocess.run([sys.executable, ROOT / "examples" / name, *map(str, args)], capture_output=True, text=True, timeout=300,
                           env={**os.environ, "PYTHONPATH": str(BUILD / "python"), "TORPOR_STORE": str(store), **env})
    assert ended.returncode == 0, ended.stderr
    return ended


def test_an_mlx_lm_script_remembers_in_five_added_lines(tiny_model, tmp_path, tokenizer):
    source = (ROOT / "examples" / "mlx_lm_agent.py").read_text()
    assert re.findall(r"  # (\d)$", source, re.M) == ["1", "2", "3", "4", "5"]
    told = [example("mlx_lm_agent.py", tiny_model, message, 4, store=tmp_path).stderr
            for message in ("My name is Ada.", "What is my name?")]
    counts = [list(map(int, re.search(r"\[(\d+) tokens held before, (\d+) read\]", text).groups())) for text in told]
    (held, read), (held_again, read_again) = counts
    # mlx-lm's own counter of what it prefilled. Of the answer's four tokens the last may not be in the cache yet.
    assert held == 0 and held_again in (read + 3, read + 4)
    # Neither the system prompt, which the template adds to a conversation without one, nor the message before.
    new = "<|im_end|>\n<|im_start|>user\nWhat is my name?<|im_end|>\n<|im_start|>assistant\n"
    assert read_again == len(tokenizer.encode(new).ids)


IN_MEMORY = """
import sys
import mlx.core as mx, mlx_lm
from mlx_lm.generate import batch_generate, generate_step
from mlx_lm.models.cache import make_prompt_cache
model, tokenizer = mlx_lm.load(sys.argv[1])
cache = make_prompt_cache(model)
for text in ("Once upon a time", " and then"):
    ids = tokenizer.encode(text, add_special_tokens=cache[0].empty())
    print(tokenizer.decode([t for t, _ in generate_step(mx.array(ids), model, prompt_cache=cache, max_tokens=4)]))
caches = None
for texts in (("I am Ada.", "I am Bob. I keep a lighthouse."), (" And", " And")):
    ids = [tokenizer.encode(text, add_special_tokens=caches is None) for text in texts]
    said = batch_generate(model, tokenizer, ids, caches, max_tokens=4, return_prompt_caches=True)
    caches = said.caches
    print("\\n".join(said.texts))
"""


def test_steps_and_batches_of_mlx_lms_go_on_in_another_process_as_in_one(tiny_model, tmp_path):
    for name in ("mlx_lm_steps.py", "mlx_lm_batch.py"):
        source = (ROOT / "examples" / name).read_text()
        assert re.findall(r"  # (\d)$", source, re.M) == ["1", "2", "3", "4", "5"]
    steps = [example("mlx_lm_steps.py", tiny_model, text, 4, store=tmp_path)
             for text in ("Once upon a time", " and then")]
    batches = [example("mlx_lm_batch.py", tiny_model, *texts, store=tmp_path, MAX_TOKENS="4")
               for texts in (("I am Ada.", "I am Bob. I keep a lighthouse."), (" And", " And"))]
    said = "".join(ended.stdout for ended in steps + batches)
    alone = subprocess.run([sys.executable, "-c", IN_MEMORY, tiny_model], capture_output=True, text=True, timeout=300)
    assert re.sub("^batch[01]: ", "", said, flags=re.M) == alone.stdout and alone.stdout, alone.stderr
    held = [list(map(int, re.findall(r"\[(\d+) tokens held before", ended.stderr))) for ended in steps + batches]
    assert held[0] == [0] and held[1][0] > 4 and held[2] == [0, 0] and min(held[3]) > 4


def test_ten_agents_in_the_memory_of_three(tiny_model, tmp_path):
    def run(*args):
        return example("ten_agents.py", tiny_model, "--budget", 0.4, "--store", tmp_path / "agents", *args, store=tmp_path).stdout

    lines = run().splitlines()
    turns = [line.split() for line in lines[:20]]
    assert [turn[0] for turn in turns[:10]] == [turn[0] for turn in turns[10:]] and len({turn[0] for turn in turns}) == 10
    assert all("is new" in line for line in lines[:10]) and all("wakes in" in line for line in lines[10:20])
    reused = [int(re.search(r"(\d+) tokens reused", line)[1]) for line in lines[:20]]
    assert all(second > first for first, second in zip(reused[:10], reused[10:]))
    assert lines[20].startswith("3 of 10 agents are awake in 0.4 MB of 0.4 MB")
    assert "is new" not in run()  # another process wakes them all


def test_a_team_asks_hears_and_concludes_and_is_there_again(tiny_model, tmp_path):
    def run():
        return example("team.py", tiny_model, "Shall we sail today?", "--max-tokens", 4, store=tmp_path).stdout.splitlines()

    first, second = run(), run()
    for lines in (first, second):
        turns = [re.match(r"(\w+) (\w+): .*\[\d+ tokens reused, \d+ read\]$", line).groups() for line in lines[:-1] if "[" in line]
        assert turns == [("ask", "ada"), ("ask", "bob"), ("round", "ada"), ("round", "bob"), ("conclude", "eve"), ("handoff", "bob")]
        assert lines[-1].startswith("bob has the conversation")
    held = [list(map(int, re.findall(r"(\d+) tokens \(", lines[-1]))) for lines in (first, second)]
    assert len(held[0]) == 3 and all(more > less for less, more in zip(*held))


def test_the_plot_of_first_tokens(tiny_model, tmp_path):
    pytest.importorskip("matplotlib")
    said = example("plot_first_token.py", tiny_model, "--tokens", "64,128", "--runs", 1, "--output", tmp_path / "plot.png",
                   store=tmp_path).stdout
    assert len(re.findall(r"^ *\d+ +\d+ ms +[\d.]+ ms +[\d.]+ ms +\d+x$", said, re.M)) == 2
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
