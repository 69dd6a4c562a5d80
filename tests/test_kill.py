"""kill -9 at random moments of a process that talks with ten agents: nothing is lost but the turn in flight.

TORPOR_KILLS=N sets how many processes die (12; `make soak` kills hundreds).
"""

import json
import os
import random
import subprocess
import threading
import time

import pytest

KILLS = int(os.environ.get("TORPOR_KILLS", 12))


def talk_until_killed(torpor, agents, seed, lifetime):
    """The turns that were answered before the process died, in order, and how the process ended."""
    rng = random.Random(seed)
    script = "".join(rng.choice([f"/agent {rng.choice(agents)}\n", f" {rng.randrange(10**6)} and then\n", " more\n"])
                     for _ in range(3000))
    process = subprocess.Popen(torpor.command("chat", "--model", torpor.model, "--agent", agents[0], "--raw", "--json",
                                              "--max-tokens", "40", "--durability", "rename", "--memory-budget", "2MB"),
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    threading.Thread(target=lambda: feed(process, script), daemon=True).start()
    first = process.stdout.readline()  # it works by now
    timer = threading.Timer(lifetime, process.kill)
    timer.start()
    lines = [first, *process.stdout.read().split(b"\n")]
    timer.cancel()
    assert process.wait() == -9, process.stderr.read()
    turns = []
    for line in lines:
        try:
            turns.append(json.loads(line))
        except json.JSONDecodeError:
            pass  # the line that was being written
    return turns


def feed(process, script):
    try:
        process.stdin.write(script.encode())
        process.stdin.close()
    except OSError:
        pass


def test_nothing_is_lost_but_the_turn_in_flight(tiny):
    rng = random.Random(4)
    answered = {}  # tokens each agent held when its last answer was told
    for kill in range(KILLS):
        if kill % 12 == 0:  # new agents, before the old ones fill the model's context
            for agent in tiny("ls", "--json").ok().json:
                tiny("rm", agent["agent"]).ok()
            agents = [f"agent{kill}-{i}" for i in range(10)]
            answered.clear()
        for turn in talk_until_killed(tiny, agents, rng.random(), rng.uniform(0.0, 0.5)):
            cached, context = turn["tokens"]["cached"], turn["tokens"]["context"]
            # What this process found of the agent is what was told last, or one turn more that was saved and not told.
            assert cached >= answered.get(turn["agent"], 0)
            answered[turn["agent"]] = context
        tiny("verify").ok()
        held = {one["agent"]: one["cache_size"] for one in tiny("ls", "--json").ok().json}
        assert all(held[agent] >= context for agent, context in answered.items())
    assert answered
    assert tiny("gc").ok()
    tiny("verify").ok()
    assert not list(tiny.store.rglob(".torpor-tmp-*"))
    # And each goes on from there.
    for agent in sorted(answered)[:3]:
        turn = tiny.run(agent, " The end", "--raw").ok().json
        assert turn["tokens"]["cached"] >= answered[agent] and "damage" not in turn


@pytest.mark.parametrize("commands", [
    ["fork agent0 fork{i}", "rewind fork{i} 5", "rename fork{i} renamed{i}", "gc", "rm renamed{i}", "pin agent0"]])
def test_commands_killed_at_random_moments_harm_nobody(tiny, words, commands):
    rng = random.Random(5)
    tiny.run("agent0", words(700), "--raw").ok()
    for i in range(KILLS * 2):
        command = tiny.command(*commands[i % len(commands)].format(i=i // len(commands)).split())
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0, 0.008))
        process.kill()
        process.wait()
        tiny("verify").ok()
        assert {one["agent"]: one["cache_size"] for one in tiny("ls", "--json").ok().json}["agent0"] == 708
    tiny("gc").ok()
    assert tiny.run("agent0", " more", "--raw").ok().json["tokens"]["cached"] == 708
