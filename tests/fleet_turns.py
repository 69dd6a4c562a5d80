"""Turns of a fleet's agents, from a seed, and what became of them (chaos.py, test_ray.py)."""

import collections
import random

WORDS = "lamp oil wick glass tower stair storm tide gull keeper door log night dawn boat rope bell fog".split()
SYSTEM = "You keep the log of a lighthouse, and you answer in few words. " + " ".join(WORDS * 12)


def prompt_of(agent, number, seed):
    words = random.Random(f"{seed} {agent} {number}")
    return f"{agent} {number}: " + " ".join(words.choices(WORDS, k=words.randint(6, 40)))


def body_of(agent, number, seed):
    """Every other agent draws its answers."""
    drawn = {"temperature": 0.8, "seed": number} if int(agent.rpartition("-")[2]) % 2 else {"temperature": 0}
    first = {"agent": agent, "system": SYSTEM} if number == 0 else {}
    return {"prompt": prompt_of(agent, number, seed), "max_tokens": 6, **drawn, **first}


def path_of(agent, number):
    return "/torpor/v1/agents" if number == 0 else f"/torpor/v1/agents/{agent}/turn"


def compare_transcript(agent, acknowledged, held):
    """What is wrong with an agent's messages, in a sentence each. `acknowledged` and `held`: (prompt, answer) each."""
    wrong = []
    prompts = [prompt for prompt, _ in held]
    counts = collections.Counter(prompts)
    for number, (prompt, answer) in enumerate(acknowledged):
        if counts[prompt] == 0:
            wrong.append(f"{agent}: turn {number} is lost")
        elif counts[prompt] > 1:
            wrong.append(f"{agent}: turn {number} is there {counts[prompt]} times")
        elif (prompt, answer) not in held:
            wrong.append(f"{agent}: turn {number} has another answer than was acknowledged")
    known = [prompt for prompt, _ in acknowledged]
    if extra := [prompt for prompt in prompts if prompt not in known]:
        wrong.append(f"{agent}: has {len(extra)} turns that nobody acknowledged")
    if not wrong and prompts != known:
        wrong.append(f"{agent}: turns are in another order")
    return wrong


def messages(torpor, agent):
    """(prompt, answer) each."""
    said = torpor("show", agent, "--json").ok().json["messages"]
    spoken = [one["content"] for one in said if one["role"] != "system"]
    return list(zip(spoken[::2], spoken[1::2]))
