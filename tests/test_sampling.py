"""Stop strings, samplers and log-probabilities, through the command line and Python."""

import json

import mlx.core as mx
import pytest

from conftest import held_ids

import torpor

FOREVER = {"max_tokens": 12, "raw": True}


@pytest.fixture
def engine(tiny_model, tmp_path):
    with torpor.Engine(tiny_model, tmp_path / "store") as engine:
        yield engine


def test_a_stop_string_leaves_the_agents_tokens_too(tiny, tokenizer):
    text = tiny.run("whole", "hello", "--raw", max_tokens=12).ok().json["text"]
    for agent, stop in (("short", text[5:8]), ("long", text[8:40])):  # of some tokens, and of many
        turn = tiny.run(agent, "hello", "--raw", "--stop", stop, max_tokens=12).ok().json
        assert turn["text"] == text[:text.index(stop)] and turn["finish_reason"] == "stop"
        ids = held_ids(tiny.store, agent)
        assert tokenizer.decode(ids, skip_special_tokens=False) == "hello" + turn["text"]
        assert turn["tokens"]["context"] == len(ids)


def test_a_turn_after_a_stop_string_goes_on_from_the_text_before_it(engine):
    ada = engine.agent("ada")
    text = ada.turn("hello", **FOREVER).text
    cut = engine.agent("cut").turn("hello", stop=["never", text[5:8]], **FOREVER)
    assert cut.stop == text[5:8]
    after = engine.agent("cut").turn(" and", **FOREVER)
    assert after.tokens.cached == cut.tokens.context


def test_a_stop_string_may_be_a_special_tokens_text(engine, tiny):
    turn = engine.turn("hello", logit_bias={1: 1e4}, stop="<|im_start|>", **FOREVER)
    assert (turn.text, turn.finish_reason, turn.stop, turn.tokens.generated) == ("", "stop", "<|im_start|>", 1)
    cli = tiny.run("a", "hello", "--raw", "--logit-bias", '{"1": 10000}', "--stop", "<|im_start|>").ok().json
    assert (cli["text"], cli["stop"], cli["tokens"]["generated"]) == ("", "<|im_start|>", 1)


def test_one_token_is_the_greedy_one(engine, tiny):
    greedy = engine.turn("hello", **FOREVER).text
    assert any(engine.turn("hello", temperature=1.0, seed=seed, **FOREVER).text != greedy for seed in range(5))
    for options in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}):
        assert engine.turn("hello", temperature=1.0, seed=5, **options, **FOREVER).text == greedy
    for option in ("--top-k", "--min-p"):
        turn = tiny.run("x" + option[2:], "hello", "--raw", "--temperature", 1, option, 1, max_tokens=12).ok().json
        assert turn["text"] == greedy


def test_penalties_and_biases_change_what_comes(engine, tiny):
    def tokens(**options):
        return [found.token for found in engine.turn("hello", logprobs=0, **options, **FOREVER).logprobs]

    first = tokens()
    assert first[0] not in tokens(logit_bias={first[0]: float("-inf")})
    forced = {"logit_bias": {first[0]: 1e3}}
    assert tokens(**forced) == first[:1] * 12
    assert len(set(tokens(presence_penalty=1e4, **forced))) == 12
    assert len(set(tokens(frequency_penalty=1e4, **forced))) == 12
    assert len(set(tokens(repetition_penalty=1e6, penalty_context=0, **forced))) > 1
    cli = tiny.run("a", "hello", "--raw", "--presence-penalty", 1e4, "--logprobs", 1, max_tokens=12).ok().json
    assert len({token["token"] for token in cli["logprobs"]}) == 12
    tiny.run("b", "hello", "--logit-bias", '{"99999999": 1}').fails("invalid", "logit_bias")
    tiny.run("b", "hello", "--logit-bias", "[1]").fails("invalid", "logit-bias")


def test_the_repetition_penalty_counts_what_the_agent_held_before(engine):
    def second(**options):
        engine.agent("ada").turn("hello", **FOREVER)
        engine.agent("ada").turn(" and", **options, **FOREVER)
        warm = engine.agent("ada").turn(" more", repetition_penalty=3.0, penalty_context=0, **FOREVER).text
        engine.agent("ada").remove()
        return warm

    assert second() == second()
    assert second() != engine.turn(" more", **FOREVER).text


def test_log_probabilities_are_the_models_own(engine):
    ada = engine.agent("ada")
    turn = ada.turn("hello", temperature=1.0, seed=3, logprobs=4, presence_penalty=2.0, **FOREVER)
    assert len(turn.logprobs) == turn.tokens.generated
    ada.rewind(turn.tokens.prompt)
    logits = ada.next_logits()
    expected = logits - mx.logsumexp(logits)
    found = turn.logprobs[0]
    assert found.logprob == pytest.approx(expected[found.token].item(), abs=1e-4)
    assert [other.token for other in found.top] == mx.argsort(-logits)[:4].tolist()
    assert found.top[0].logprob == pytest.approx(expected.max().item(), abs=1e-4)
    assert all(other.logprob >= later.logprob for other, later in zip(found.top, found.top[1:]))
    assert engine.turn("hello", **FOREVER).logprobs == []
    with pytest.raises(torpor.InvalidArgumentError):
        engine.turn("hello", logprobs=65, **FOREVER)
