"""Torpor's engine for asyncio: turns, streams and calls that are awaited, tasks that are cancelled."""

import asyncio
import inspect

import pytest

import torpor

ENDLESS = 100_000  # tokens: until something ends the turn, or the context is full


@pytest.fixture
def alone(tiny_model, tmp_path):
    """alone(main) runs main(engine); alone(main, text_queue=1) with these settings of an engine's."""
    def run(main, **settings):
        async def begin():
            async with torpor.AsyncEngine(tiny_model, tmp_path / "store", **settings) as engine:
                return await asyncio.wait_for(main(engine), 300)

        return asyncio.run(begin())

    return run


async def status(engine, agent_id):
    return next((status for status in await engine.agents() if status.agent_id == agent_id), None)


def test_awaited_turns_say_what_turns_say(alone, tiny_model, tmp_path):
    def ask(i):
        return f"I am agent {i}", dict(raw=True, max_tokens=20 + i, temperature=1.0, seed=i, logprobs=1)

    async def together(engine):
        async def talk(i):
            prompt, options = ask(i)
            async with engine.agent(f"agent{i}").stream(prompt, **options) as stream:
                text = "".join([piece async for piece in stream])
                assert (await stream.result()).text == text and [piece async for piece in stream] == []
            return text, (await engine.agent(f"agent{i}").turn(" and", raw=True, max_tokens=4)).text

        said = await asyncio.gather(*map(talk, range(8)))
        assert (await engine.work()).most_turns > 1
        return said

    said = alone(together)
    with torpor.Engine(tiny_model, tmp_path / "alone") as engine:
        for i, texts in enumerate(said):
            prompt, options = ask(i)
            agent = engine.agent(f"agent{i}")
            assert texts == (agent.turn(prompt, **options).text, agent.turn(" and", raw=True, max_tokens=4).text)


def test_every_method_of_an_engine_and_an_agent_has_its_twin():
    for twin, plain, other in ((torpor.AsyncEngine, torpor.Engine, set()), (torpor.AsyncAgent, torpor.Agent, set()),
                               (torpor.AsyncTextStream, torpor.TextStream, {"close": "aclose"})):
        other = dict(other)
        for name, member in vars(plain).items():
            if name.startswith("_"):
                continue
            found = inspect.getattr_static(twin, other.get(name, name))
            if callable(member):  # of the same arguments, but for on_text: `async for` gives pieces
                theirs = dict(inspect.signature(member).parameters)
                theirs.pop("on_text", None)
                assert list(inspect.signature(found).parameters) == list(theirs), name
    assert inspect.signature(torpor.AsyncEngine) == inspect.signature(torpor.Engine)


def test_the_life_of_an_agent_awaited(alone):
    async def main(engine):
        ada = engine.agent("ada", system="Be brief.")
        result = await ada.turn("hello", max_tokens=4)
        said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"},
                {"role": "assistant", "content": result.text}]
        assert await ada.messages() == said and len(await ada.tokens()) == result.tokens.context
        assert (await ada.tokens())[:result.tokens.prompt] == await engine.prompt_tokens(said[:2])
        bob = await ada.fork("bob", 3)
        await bob.rewind(2)
        await bob.pin()
        await ada.rename("eve")
        await bob.save()
        await engine.save_all()
        assert (ada.id, ada.system, repr(bob)) == ("eve", "Be brief.", "<torpor.AsyncAgent 'bob'>")
        assert [(s.agent_id, s.pinned, s.unsaved) for s in await engine.agents()] == [("bob", True, False),
                                                                                     ("eve", False, False)]
        assert (await bob.next_logits()).ndim == 1
        await bob.sleep()
        assert await bob.prefetch()
        assert {memory.agent for memory in (await engine.memory_usage()).agents} == {"eve"}
        await ada.remove()
        assert [s.agent_id for s in engine.engine.agents()] == ["bob"]
        assert (await engine.turn("x", raw=True, max_tokens=2)).tokens.generated == 2
        assert "".join([piece async for piece in engine.stream("x", raw=True, max_tokens=2)])
        with pytest.raises(torpor.NotFoundError, match="nobody"):
            await engine.agent("nobody").save()
        with pytest.raises(torpor.InvalidArgumentError, match="empty"):
            await bob.turn("")
        with pytest.raises(torpor.InvalidArgumentError, match="empty"):
            async for _ in bob.stream(""):
                pass

    alone(main)


@pytest.mark.parametrize("waits", ["for the turn", "for a piece", "for the result", "in the block", "in the queue"])
def test_a_cancelled_task_leaves_the_agent_as_it_was(alone, waits):
    async def main(engine):
        ada = engine.agent("ada")
        await ada.turn("hello", raw=True, max_tokens=4)
        held, begun, streams = (await status(engine, "ada")).tokens, asyncio.Event(), []

        async def talk():
            if waits == "for the turn":
                await ada.turn(" more", raw=True, max_tokens=ENDLESS)
            async with ada.stream(" more", raw=True, max_tokens=ENDLESS) as stream:
                streams.append(stream)
                if waits == "for the result":
                    await stream.result()
                async for _ in stream:
                    begun.set()
                    if waits == "in the block":
                        await asyncio.Event().wait()

        if waits == "in the queue":
            ahead = ada.stream(" ahead", raw=True, max_tokens=ENDLESS)
            await anext(ahead)
        task = asyncio.create_task(talk())
        if waits in ("for a piece", "in the block"):
            await begun.wait()
        else:
            while not (await status(engine, "ada")).in_turn:
                pass
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert all(stream._running.poll()[1] for stream in streams)  # the task that was cancelled waited
        if waits == "in the queue":
            assert (await status(engine, "ada")).in_turn
            with pytest.raises(TimeoutError):  # a cancellation, too
                async with asyncio.timeout(0.01):
                    await ahead.result()
        assert (await status(engine, "ada")).tokens == held and not (await status(engine, "ada")).in_turn
        assert (await ada.turn(" more", raw=True, max_tokens=2)).tokens.cached == held

    alone(main)


def test_an_awaited_stream_that_is_left_keeps_what_was_said(alone):
    async def main(engine):
        ada, bob = engine.agent("ada"), engine.agent("bob")
        async with ada.stream("hello", raw=True, max_tokens=ENDLESS) as stream:
            said = await anext(stream) + await anext(stream)
        result = await stream.result()
        assert result.finish_reason == "cancelled" and said + "".join([p async for p in stream]) == result.text
        held = (await status(engine, "ada")).tokens
        assert 2 < held == result.tokens.context < 4000
        dropped = bob.stream("hello", raw=True, max_tokens=ENDLESS)
        await anext(dropped)
        del dropped
        assert 0 < (await status(engine, "bob")).tokens < 4000 and not (await status(engine, "bob")).in_turn
        with pytest.raises(ZeroDivisionError):
            async with ada.stream(" more", raw=True, max_tokens=ENDLESS) as stream:
                async for _ in stream:
                    1 / 0
        assert (await status(engine, "ada")).tokens == held

    alone(main)


def test_the_loop_goes_on_and_a_slow_reader_holds_up_no_other(alone):
    async def main(engine):
        ada = engine.agent("ada").stream("hello", raw=True, max_tokens=ENDLESS)
        said = await anext(ada)
        assert (await engine.agent("bob").turn("hello", raw=True, max_tokens=200)).tokens.generated == 200
        assert (await status(engine, "ada")).in_turn and (await status(engine, "ada")).tokens < 100
        # More calls wait for her turn than a pool of asyncio's has threads; they hold up neither her reader nor others.
        waiting = [asyncio.create_task(engine.agent("ada").save()) for _ in range(40)]
        ticks = 0
        while ticks < 20:
            said += await anext(ada)
            ticks += 1
        async with asyncio.timeout(60):
            assert (await status(engine, "ada")).in_turn and not any(task.done() for task in waiting)
        await ada.aclose()
        await asyncio.gather(*waiting)
        assert said + "".join([piece async for piece in ada]) == (await ada.result()).text

    alone(main, text_queue=1)


def test_tasks_that_share_a_stream_each_get_other_pieces(alone):
    async def main(engine):
        stream = engine.agent("ada").stream("hello", raw=True, max_tokens=300)
        taken = []

        async def read():
            async for piece in stream:
                taken.append(piece)

        # One of them asks for the result: from then on the turn waits for no reader.
        *_, result = await asyncio.gather(*(read() for _ in range(4)), stream.result())
        assert "".join(taken) == result.text and result.tokens.generated == 300
        unread = engine.agent("bob").stream("hello", raw=True, max_tokens=300)
        result = await unread.result()
        assert "".join([piece async for piece in unread]) == result.text

    alone(main, text_queue=1)


def test_tasks_that_share_a_stream_are_told_when_one_of_them_was_cancelled(alone):
    async def main(engine):
        stream = engine.agent("ada").stream("hello", raw=True, max_tokens=ENDLESS)
        begun = asyncio.Event()

        async def read():
            async for _ in stream:
                begun.set()

        tasks = [asyncio.create_task(read()) for _ in range(3)]
        await begun.wait()
        tasks[0].cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(error) for error in ended] == [asyncio.CancelledError] + 2 * [torpor.CancelledError]
        assert await status(engine, "ada") is None

    alone(main)


def test_tasks_that_open_an_engine_at_a_time_load_it_once_and_one_that_is_cancelled_leaves_it_to_the_others(
        tiny_model, tmp_path, monkeypatch):
    made = []

    async def main():
        engine = torpor.AsyncEngine(tiny_model, tmp_path / "store")
        make = engine._make
        monkeypatch.setattr(engine, "_make", lambda: made.append(make()) or made[-1])
        tasks = [asyncio.create_task(engine.open()) for _ in range(3)]
        await asyncio.sleep(0)  # all have begun
        tasks[0].cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(ended[0], asyncio.CancelledError) and ended[1:] == [engine, engine]
        assert [engine.engine] == made
        await engine.close()

    asyncio.run(main())


def test_an_engine_that_is_not_open_or_is_closed_says_so(tiny_model, tmp_path):
    async def main():
        engine = torpor.AsyncEngine(tiny_model, tmp_path / "store")
        with pytest.raises(torpor.InvalidArgumentError, match="not open"):
            engine.agent("ada")
        await engine.close()
        assert await engine.open() is await engine.open() and str(tiny_model) in repr(engine)
        ada = engine.agent("ada")
        await ada.turn("hello", raw=True, max_tokens=2)
        await engine.close()
        for call in (ada.turn("hello"), ada.save(), engine.agents()):
            with pytest.raises(torpor.InvalidArgumentError, match="closed"):
                await call
        with pytest.raises(torpor.NotFoundError):
            async with torpor.AsyncEngine(tmp_path / "no-model", tmp_path / "store"):
                pass
        with pytest.raises(torpor.ResourceExhaustedError):  # what a save behind a turn met
            async with torpor.AsyncEngine(tiny_model, tmp_path / "store", min_free=1 << 60) as engine:
                await engine.agent("ada").turn("hello", raw=True, max_tokens=2, save="behind")

    asyncio.run(main())
