"""Answers that are guessed and verified, several tokens at a time, through the command line and Python."""

import json

import torpor

# Of all tokens three are likely, so what was said comes again.
FEW = {64: 60.0, 65: 57.0, 66: 57.0}
TURN = {"raw": True, "max_tokens": 80, "logit_bias": FEW}


def test_guesses_change_no_answer_and_are_counted(tiny_model, tmp_path):
    with torpor.Engine(tiny_model, tmp_path / "store") as engine:
        found = set()
        for seed in range(4):
            options = {**TURN, "temperature": 0.5 * seed, "seed": seed}
            guessed, plain = (engine.turn("hello", speculate=speculate, **options) for speculate in (None, False))
            assert guessed.text == plain.text
            assert 0 <= guessed.tokens.accepted <= guessed.tokens.proposed and plain.tokens.proposed == 0
            found.add(guessed.tokens.accepted > 0)
        assert True in found
        work = engine.work()
        assert work.accepted_tokens > 0 and work.rejected_tokens >= 0


def test_no_speculate_computes_one_token_at_a_time(tiny):
    bias = ("--raw", "--logit-bias", json.dumps({str(token): value for token, value in FEW.items()}))
    guessed = tiny.run("a", "hello", *bias, max_tokens=80).ok().json
    plain = tiny.run("b", "hello", *bias, "--no-speculate", max_tokens=80).ok().json
    assert guessed["text"] == plain["text"]
    assert 0 < guessed["tokens"]["accepted"] <= guessed["tokens"]["proposed"]
    assert plain["tokens"]["proposed"] == plain["tokens"]["accepted"] == 0
