"""Streams of Torpor's engine in Python: read slowly, by many, beside others, and left."""

import threading

import mlx.core as mx
import pytest

import torpor

ENDLESS = 100_000  # tokens: until something ends the turn, or the context is full


@pytest.fixture
def engine(tiny_model, tmp_path):
    with torpor.Engine(tiny_model, tmp_path / "store") as engine:
        yield engine


@pytest.fixture
def hasty(tiny_model, tmp_path):
    """An engine whose turns run no more than a few pieces ahead of their readers."""
    with torpor.Engine(tiny_model, tmp_path / "store", text_queue=1) as engine:
        yield engine


def status(engine, agent_id):
    return next(status for status in engine.agents() if status.agent_id == agent_id)


@pytest.mark.parametrize("end", ["close", "drop"])
def test_a_stream_that_is_left_keeps_what_was_said(engine, end):
    ada = engine.agent("ada")
    stream = ada.stream("hello", raw=True, max_tokens=ENDLESS)
    said = next(stream) + next(stream)
    if end == "close":
        stream.close()
        result = stream.result
        assert result.finish_reason == "cancelled" and result.text.startswith(said)
        assert result.tokens.context < 4000 and said + "".join(stream) == result.text
    del stream
    held = status(engine, "ada").tokens
    assert 2 < held < 4000 and not status(engine, "ada").unsaved
    assert ada.turn(" and", raw=True, max_tokens=2).tokens.cached == held


def test_a_stream_that_was_interrupted_says_so_and_stays_over(engine, monkeypatch):
    stream = engine.agent("ada").stream("hello", raw=True, max_tokens=ENDLESS)
    next(stream)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stream, "_running", Interrupted(stream._running))
        next(stream)
    for again in (lambda: stream.result, lambda: list(stream)):
        with pytest.raises(torpor.CancelledError, match="as it was"):
            again()
    assert engine.agents() == []


class Interrupted:
    """A RunningTurn whose waits end by Ctrl-C."""

    def __init__(self, running):
        self.undo = running.undo

    def next(self):
        raise KeyboardInterrupt


def test_the_engine_answers_during_a_stream(engine):
    stream = engine.agent("ada").stream("hello", raw=True, max_tokens=ENDLESS)
    next(stream)
    assert status(engine, "ada").in_turn and engine.memory_usage().agents
    bob = engine.agent("bob").stream("hello", raw=True, max_tokens=4)  # waits for its turn
    assert not [s for s in engine.agents() if s.agent_id == "bob"]
    stream.close()
    assert bob.result.tokens.generated == 4 and not status(engine, "ada").in_turn


def test_a_stream_in_the_queue_is_left_at_once(engine):
    stream = engine.agent("ada").stream("hello", raw=True, max_tokens=ENDLESS)
    next(stream)
    queued = engine.agent("bob").stream("hello", raw=True)
    queued.close()
    assert queued.result.finish_reason == "cancelled" and queued.result.tokens.generated == 0
    undone = engine.agent("bob").stream("hello", raw=True)
    undone._undo()
    with pytest.raises(torpor.CancelledError):
        undone.result
    assert status(engine, "ada").in_turn
    stream.close()
    assert [s.agent_id for s in engine.agents()] == ["ada"]


def test_threads_that_share_a_stream_each_get_other_pieces_until_its_end(engine):
    stream = engine.agent("ada").stream("hello", raw=True, max_tokens=600)
    taken, ended = [], []

    def read():
        for piece in stream:
            taken.append(piece)
        ended.append(len(taken))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    result = stream.result
    assert sum(map(len, taken)) == len(result.text) and result.tokens.generated == 600
    assert min(ended) >= len(taken) - 3  # each of the others may have had one in its hands


def test_a_reader_that_stops_holds_up_its_own_turn_and_no_other(hasty):
    ada = hasty.agent("ada").stream("hello", raw=True, max_tokens=ENDLESS)
    said = next(ada)
    # It came first, so it would be computed to its end before.
    assert hasty.agent("bob").turn("hello", raw=True, max_tokens=200).tokens.generated == 200
    assert status(hasty, "ada").in_turn and status(hasty, "ada").tokens < 100
    said += next(ada) + next(ada)
    ada.close()
    assert said + "".join(ada) == ada.result.text and ada.result.tokens.context < 200


def test_a_turn_waits_for_no_reader_while_its_result_is_asked_for(hasty):
    stream = hasty.agent("ada").stream("hello", raw=True, max_tokens=300)
    assert stream.result.tokens.generated == 300
    assert "".join(stream) == stream.result.text
    read = []
    stream = hasty.agent("bob").stream("hello", raw=True, max_tokens=300)
    reader = threading.Thread(target=lambda: read.extend(stream))
    reader.start()
    text = stream.result.text
    reader.join()
    assert "".join(read) == text


def test_a_stopped_reader_keeps_no_stream_from_being_undone_or_dropped(hasty):
    for end in ("undo", "drop"):
        stream = hasty.agent("ada").stream("hello", raw=True, max_tokens=ENDLESS)
        next(stream)
        hasty.agent("bob").turn("hello", raw=True, max_tokens=20)
        if end == "undo":
            stream._undo()
            assert [s.agent_id for s in hasty.agents()] == ["bob"]
        del stream
    assert 0 < status(hasty, "ada").tokens < 200


def test_a_turn_takes_the_memory_of_one_whose_reader_has_stopped_and_that_one_goes_on_at_its_token(tiny_model, tmp_path, words):
    first, second, far = words(700), words(1700)[-3500:], words(3000)
    with torpor.Engine(tiny_model, tmp_path / "alone") as engine:
        expected = {name: (engine.agent(name).turn(prompt, raw=True, max_tokens=60).text, engine.agent(name).next_logits())
                    for name, prompt in (("ada", first), ("bob", second))}
    run = 2 * 2 * 64 * 2 * 256  # layers, keys and values, head_dim, f16, tokens
    with torpor.Engine(tiny_model, tmp_path / "store", memory_budget=5 * run, text_queue=1) as engine:
        ada = engine.agent("ada").stream(first, raw=True, max_tokens=60)
        said = next(ada)
        with pytest.raises(torpor.ResourceExhaustedError):
            engine.turn(far, raw=True, max_tokens=2)  # does not fit alone
        assert engine.agent("bob").turn(second, raw=True, max_tokens=60).text == expected["bob"][0]
        said += "".join(ada)
        assert said == ada.result.text == expected["ada"][0] and ada.result.tokens.generated == 60
        for name in ("ada", "bob"):
            assert mx.array_equal(engine.agent(name).next_logits(), expected[name][1])
