"""Turns of many agents, for bench/fleet_sim.py: of public traces by their path, or made up from a seed.

Three forms are read, and none is fetched: a directory of coding sessions as kv-cache-tester has them (`requests` with
`t`, `in`, `out`, `hash_ids`), Mooncake's JSON lines (`timestamp`, `input_length`, `output_length`, `hash_ids`), and
Azure's CSV (`TIMESTAMP,ContextTokens,GeneratedTokens`), whose requests know nothing of each other.
"""

import bisect
import csv
import datetime
import json
import math
import random
import statistics
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Turn:
    tokens_in: int     # the whole prompt
    kept: int          # so many of its first tokens the agent holds from its last turn
    tokens_out: int
    gap: float = 0.0   # seconds from the end of the agent's last turn; of the first, from the session's start
    at: float = 0.0    # seconds from the trace's start before which it does not come


@dataclass
class Session:
    agent: str
    start: float
    shared: tuple = ("", 0)  # a prefix that other agents have too: its name, its tokens
    turns: list = field(default_factory=list)


@dataclass
class Shape:
    """What a generator's sessions are like. Lengths are tokens, times seconds."""
    turns: tuple           # median and sigma of a log-normal
    first: tuple           # the first prompt beyond the shared prefix: median and sigma
    growth: tuple          # from one prompt to the next: median and sigma
    out: tuple             # median and sigma
    rewrites: float        # the share of turns that change history
    rewrite_kept: float    # of the prompt before, the mean share that such a turn keeps
    rewrite_size: float    # the mean size of such a turn's prompt, of the one before
    gaps: tuple            # quantiles of the pause between two turns: (share, seconds); straight in the logarithm
    shared: int            # tokens of each shared prefix
    prefixes: int          # how many of them there are
    most: int              # no prompt is longer


# Coding sessions: fitted to every fifth trace of kv-cache-tester, 142 sessions of 8,842 turns. tests/test_fleet_sim.py
# compares. The shared prefix is that of the one trace that was looked at; how many there are is assumed.
CODING = Shape(turns=(48, 0.72), first=(18_000, 1.1), growth=(741, 1.672), out=(219, 1.2), rewrites=0.024,
               rewrite_kept=0.25, rewrite_size=0.62,
               gaps=((0, 0.7), (0.5, 9.7), (0.515, 10), (0.862, 60), (0.9, 103), (0.954, 300), (0.99, 1_980),
                     (1, 32_000)),
               shared=14_800, prefixes=4, most=1_000_000)
# Mooncake's conversation trace: 12,031 requests an hour, 12,035 tokens in and 343 out on average, 36.6% seen before. If
# the number of turns is geometric with mean m, the share that was seen is 1 - 1/m, and a prompt is m steps long. The
# sigmas and the pauses are assumed.
CHAT = Shape(turns=(1.577, 0), first=(4_629, 1.0), growth=(4_629, 1.0), out=(190, 1.087), rewrites=0, rewrite_kept=1,
             rewrite_size=1, gaps=((0, 2), (0.5, 30), (0.9, 180), (1, 1_800)), shared=0, prefixes=1, most=128_000)
SHAPES = {"coding": CODING, "chat": CHAT}


def generate(shape, sessions, seconds, seed):
    """So many sessions that begin evenly within `seconds`."""
    chance = random.Random(seed)
    shares, pauses = [share for share, _ in shape.gaps], [math.log(pause) for _, pause in shape.gaps]

    def lognormal(median, sigma):
        return median * math.exp(chance.gauss(0, sigma))

    def pause():
        where = chance.random()
        i = min(bisect.bisect_right(shares, where), len(shares) - 1)
        part = (where - shares[i - 1]) / (shares[i] - shares[i - 1])
        return math.exp(pauses[i - 1] + part * (pauses[i] - pauses[i - 1]))

    def number_of_turns():
        median, sigma = shape.turns
        if sigma:
            return max(1, round(lognormal(median, sigma)))
        return 1 + int(math.log(1 - chance.random()) / math.log(1 - 1 / median))  # geometric, of this mean

    made = []
    for number in range(sessions):
        session = Session(f"agent-{number}", chance.uniform(0, seconds),
                          (f"prefix-{chance.randrange(shape.prefixes)}" if shape.shared else "", shape.shared))
        size, context = 0, 0
        for turn in range(number_of_turns()):
            before = size
            if turn == 0:
                size, kept = shape.shared + max(1, round(lognormal(*shape.first))), 0
            elif chance.random() < shape.rewrites:
                kept = round(max(shape.shared, before * chance.uniform(0, 2 * shape.rewrite_kept)))
                size = max(kept, round(before * chance.uniform(0, 2 * shape.rewrite_size))) + 1
            else:
                size = before + max(1, round(lognormal(*shape.growth)))
                kept = context
            if size > shape.most:  # the client begins anew behind the shared prefix
                size = shape.shared + max(1, round(lognormal(*shape.first)))
                kept = shape.shared
            kept = min(kept, size - 1)
            session.turns.append(Turn(size, kept, max(1, round(lognormal(*shape.out))), pause() if turn else 0))
            context = size + session.turns[-1].tokens_out
        made.append(session)
    return made


def common(one, other):
    number = 0
    for a, b in zip(one, other):
        if a != b:
            break
        number += 1
    return number


def follow(last, tokens_in, tokens_out, blocks, block):
    """A turn after (tokens in, tokens out, blocks) of the agent's last, or its first where there is none."""
    kept = 0
    if last:
        same = common(last[2], blocks)
        # All of the last prompt is there: so is its answer, which the agent has computed.
        kept = last[0] + last[1] if same >= last[0] // block else same * block
    return Turn(tokens_in, min(kept, max(0, tokens_in - 1)), max(1, tokens_out))


def read_coding(directory):
    """One file a session. Sub-agents, requests within a request, are sessions of their own."""
    made = []
    for path in sorted(Path(directory).glob("*.json")):
        file = json.loads(path.read_text())
        block, prefix = file.get("block_size", 64), file.get("tool_tokens", 0) + file.get("system_tokens", 0)

        def session(name, requests):
            one, last, ended = Session(name, 0.0, (f"prefix-{prefix}", prefix)), None, None
            for number, request in enumerate(sorted(requests, key=lambda request: request["t"])):
                if request.get("requests"):
                    session(f"{name}.{number}", request["requests"])
                if "hash_ids" not in request or request.get("in", 0) < 1:
                    continue
                now = (request["in"], request.get("out", 0), request["hash_ids"])
                turn = follow(last, *now, block)
                if last is None:
                    one.start = request["t"]
                    one.shared = (one.shared[0], min(prefix, request["in"] - 1))
                else:
                    turn.gap = max(0.0, request["t"] - ended)
                one.turns.append(turn)
                last, ended = now, request["t"] + request.get("api_time", 0)
            if one.turns:
                made.append(one)

        session(path.stem, file["requests"])
    return made


def read_mooncake(path, block=512):
    """Lines name no conversation. A line goes on with the one that had most of its blocks last, unless another line has
    gone on with that already."""
    made, held = [], {}  # the last block of a conversation that may go on -> (session, its last request)
    for line in Path(path).read_text().splitlines():
        request = json.loads(line)
        blocks, at = request["hash_ids"], request["timestamp"] / 1000
        now = (request["input_length"], request["output_length"], blocks)
        for depth in range(len(blocks), 0, -1):
            # The last block of a prompt may be a part of one; what is one block shorter goes on, too.
            if (depth, blocks[depth - 1]) in held:
                session, last = held.pop((depth, blocks[depth - 1]))
                break
        else:
            session, last = Session(f"agent-{len(made)}", at), None
            made.append(session)
        turn = follow(last, *now, block)
        turn.at = at
        session.turns.append(turn)
        whole = request["input_length"] // block
        if whole:
            held[(whole, blocks[whole - 1])] = (session, now)
    return made


def read_azure(path):
    """Each line is an agent of one turn."""
    made, first = [], None
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            at = datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            first = at if first is None else first
            turn = Turn(max(1, int(row["ContextTokens"])), 0, max(1, int(row["GeneratedTokens"])))
            made.append(Session(f"agent-{len(made)}", at - first, turns=[turn]))
    return made


def read(path):
    path = Path(path)
    if path.is_dir():
        return read_coding(path)
    return read_azure(path) if path.suffix == ".csv" else read_mooncake(path)


def scale(sessions, by):
    """All lengths multiplied: sessions of a large model's window, on a small one's."""
    for session in sessions:
        session.shared = (session.shared[0], int(session.shared[1] * by))
        for turn in session.turns:
            turn.tokens_in = max(2, round(turn.tokens_in * by))
            turn.kept = min(int(turn.kept * by), turn.tokens_in - 1)
            turn.tokens_out = max(1, round(turn.tokens_out * by))
        session.shared = (session.shared[0], min([session.shared[1]] + [turn.tokens_in - 1 for turn in session.turns]))
    return sessions


def quantile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))] if values else None


def describe(sessions):
    """The figures that published statistics have."""
    turns = [turn for session in sessions for turn in session.turns]
    growths, seen, rewrites, later = [], 0, 0, 0
    for session in sessions:
        for before, turn in zip([None] + session.turns, session.turns):
            if before:
                later += 1
                growths.append(max(0, turn.tokens_in - before.tokens_in))
                rewrites += turn.kept < before.tokens_in
                seen += min(turn.kept, before.tokens_in)  # an answer is new to the prompt that brings it back
    pauses = [turn.gap for session in sessions for turn in session.turns[1:]]
    return {
        "sessions": len(sessions), "turns": len(turns), "turns_of_session_mean": len(turns) / len(sessions),
        "prompt_mean": statistics.fmean(turn.tokens_in for turn in turns),
        "prompt_p50": quantile([turn.tokens_in for turn in turns], 0.5),
        "prompt_p90": quantile([turn.tokens_in for turn in turns], 0.9),
        "peak_p50": quantile([max(turn.tokens_in for turn in session.turns) for session in sessions], 0.5),
        "growth_p50": quantile(growths, 0.5), "growth_mean": statistics.fmean(growths) if growths else None,
        "out_p50": quantile([turn.tokens_out for turn in turns], 0.5),
        "out_mean": statistics.fmean(turn.tokens_out for turn in turns),
        "seen_before": seen / sum(turn.tokens_in for turn in turns), "rewrites": rewrites / later if later else 0,
        "gap_p50": quantile(pauses, 0.5), "gap_p90": quantile(pauses, 0.9), "gap_p99": quantile(pauses, 0.99),
        "gaps_over_10": sum(pause > 10 for pause in pauses) / max(1, len(pauses)),
        "gaps_over_60": sum(pause > 60 for pause in pauses) / max(1, len(pauses)),
        "gaps_over_300": sum(pause > 300 for pause in pauses) / max(1, len(pauses)),
        "idle_in_gaps_over_60": sum(pause for pause in pauses if pause > 60) / sum(pauses) if pauses else None,
    }
