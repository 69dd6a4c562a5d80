"""Servers over a bucket, and faults from a seed (chaos.py). `make fleet` runs it for long."""

import asyncio
import os

import chaos
import pytest
from fleet_turns import compare_transcript


def run(options, directory, model):
    wrong, table, done = asyncio.run(chaos.run(options, directory, model))
    print(f"\n{table}")
    assert wrong == []
    return done


def test_no_acknowledged_turn_is_lost_doubled_reordered_or_other_than_undisturbed(tmp_path, tiny_model):
    options = chaos.Options(agents=100, turns=500, workers=3, kills=8, pauses=1, partitions=4, restarts=1, sweeps=2,
                            clients=32, lease=2.0, logits=3, seed=int(os.environ.get("TORPOR_SEED", 18)),
                            store="gofakes3")
    done = run(options, tmp_path, tiny_model)
    assert done.done == options.turns and done.faults["kill"] == options.kills and done.recoveries


ACKNOWLEDGED = [("one", "a"), ("two", "b"), ("three", "c")]


@pytest.mark.parametrize("held, words", [
    (ACKNOWLEDGED, None),
    (ACKNOWLEDGED[:2], "turn 2 is lost"),
    (ACKNOWLEDGED + ACKNOWLEDGED[1:2], "turn 1 is there 2 times"),
    (ACKNOWLEDGED[::-1], "another order"),
    ([("one", "z"), *ACKNOWLEDGED[1:]], "turn 0 has another answer"),
    ([*ACKNOWLEDGED, ("four", "d")], "1 turns that nobody acknowledged")])
def test_a_transcript_that_is_not_what_was_acknowledged_is_told(held, words):
    wrong = compare_transcript("ada", ACKNOWLEDGED, held)
    assert wrong == [] if words is None else len(wrong) == 1 and words in wrong[0]
