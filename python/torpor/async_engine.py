"""Torpor's engine for asyncio: what torpor.Engine does, awaited."""

import asyncio
import functools
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Concatenate, Literal, ParamSpec, Self, TypeVar, Unpack

from .engine import Agent, AgentStatus, Engine, Prompt, TextStream, TurnOptions
from .errors import InvalidArgumentError
from .results import EngineWork, MemoryUsage, SaveResult, TurnResult

import mlx.core as mx

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _taking(other: Callable[Concatenate[Any, _P], None]) -> Callable[[Callable[..., None]],
                                                                     Callable[Concatenate[Any, _P], None]]:
    """What it decorates takes the arguments of `other`."""
    return lambda function: functools.update_wrapper(function, other, assigned=(), updated=())


class AsyncEngine:
    """torpor.Engine for asyncio; it takes the same arguments.

        async with torpor.AsyncEngine("path/to/model") as engine:
            print((await engine.agent("ada").turn("My name is Ada.")).text)

    The loop goes on while the model is loaded, turns are computed and disks are waited for. Streams need no thread of
    Python's. Other calls wait on one each; when their task is cancelled, they are done all the same.

    `engine` is the torpor.Engine, once it is open; both may be used side by side.
    """

    @_taking(Engine.__init__)
    def __init__(self, *args: Any, **options: Any) -> None:
        """The arguments are Engine's. Loads nothing yet: `async with` or `open` does."""
        self._make = functools.partial(Engine, *args, **options)
        self._engine: Engine | None = None
        self._loading = threading.Lock()
        # Calls wait for turns, and those for their readers: with fewer threads than calls, all could wait for all.
        self._pool = ThreadPoolExecutor(1024, "torpor")

    def __repr__(self) -> str:
        return f"<torpor.AsyncEngine {self._engine._model!r}>" if self._engine else "<torpor.AsyncEngine, not open>"

    @property
    def engine(self) -> Engine:
        """The engine itself. InvalidArgumentError before it is open."""
        if self._engine is None:
            raise InvalidArgumentError("The engine is not open; use 'async with', or await its open().")
        return self._engine

    async def open(self) -> Self:
        """Loads the model, unless it is loaded. Raises what Engine raises."""
        await self._call(self._load)
        return self

    def _load(self) -> None:
        with self._loading:  # one of those that open it at a time
            if self._engine is None:
                self._engine = self._make()

    async def close(self) -> None:
        """As Engine.close."""
        if self._engine is not None:
            await self._call(self._engine.close)

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        traceback: TracebackType | None) -> None:
        await self._call(self.engine.__exit__, kind, error, traceback)

    def agent(self, agent_id: str, system: str | None = None) -> "AsyncAgent":
        """As Engine.agent; waits for nothing."""
        return AsyncAgent(self, self.engine.agent(agent_id, system))

    async def agents(self) -> list[AgentStatus]:
        """As Engine.agents."""
        return await self._call(self.engine.agents)

    async def turn(self, prompt: Prompt, *, system: str | None = None, **options: Unpack[TurnOptions]) -> TurnResult:
        """Answers a prompt without an agent. As AsyncAgent.turn; else as Engine.turn."""
        return await self.stream(prompt, system=system, **options).result()

    def stream(self, prompt: Prompt, *, system: str | None = None,
               **options: Unpack[TurnOptions]) -> "AsyncTextStream":
        """Answers a prompt without an agent. As AsyncAgent.stream; else as Engine.stream."""
        return AsyncTextStream(self.engine.stream(prompt, system=system, **options))

    async def prompt_tokens(self, prompt: Prompt, *, system: str | None = None, raw: bool | None = None,
                            special: bool | None = None, tools: Sequence[Mapping[str, Any]] | None = None,
                            template_args: Mapping[str, Any] | None = None) -> list[int]:
        """As Engine.prompt_tokens."""
        return await self._call(functools.partial(
            self.engine.prompt_tokens, prompt, system=system, raw=raw, special=special, tools=tools,
            template_args=template_args))

    async def save_all(self) -> None:
        """As Engine.save_all."""
        await self._call(self.engine.save_all)

    async def memory_usage(self) -> MemoryUsage:
        """As Engine.memory_usage."""
        return await self._call(self.engine.memory_usage)

    async def work(self) -> EngineWork:
        """As Engine.work."""
        return await self._call(self.engine.work)

    async def _call(self, function: Callable[..., _T], *args: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)


class AsyncAgent:
    """torpor.Agent for asyncio. Get one from AsyncEngine.agent.

    Methods do and raise what those of Agent do. Await one before you call the next, where the order matters.
    """

    engine: AsyncEngine
    agent: Agent  #: the agent itself; `id` and `system` are its

    def __init__(self, engine: AsyncEngine, agent: Agent) -> None:
        self.engine = engine
        self.agent = agent

    def __repr__(self) -> str:
        return f"<torpor.AsyncAgent {self.agent.id!r}>"

    @property
    def id(self) -> str:
        """Its id; changed by `rename`."""
        return self.agent.id

    @property
    def system(self) -> str | None:
        """The system message that was given."""
        return self.agent.system

    async def turn(self, prompt: Prompt, **options: Unpack[TurnOptions]) -> TurnResult:
        """One user turn, as Agent.turn; `stream` gives its text as it comes. A task that is cancelled meanwhile gives
        the turn up: the agent is as it was before, unless the turn was complete."""
        return await self.stream(prompt, **options).result()

    def stream(self, prompt: Prompt, **options: Unpack[TurnOptions]) -> "AsyncTextStream":
        """As `turn`, which begins at once; gives an AsyncTextStream to iterate over. Waits for nothing."""
        return AsyncTextStream(self.agent.stream(prompt, **options))

    async def fork(self, new_id: str, at_token: int | None = None, *,
                   save: Literal["wait", "behind"] = "wait") -> "AsyncAgent":
        """As Agent.fork."""
        forked = await self.engine._call(functools.partial(self.agent.fork, new_id, at_token, save=save))
        return AsyncAgent(self.engine, forked)

    async def rewind(self, n_tokens: int, *, save: Literal["wait", "behind"] = "wait") -> None:
        """As Agent.rewind."""
        await self.engine._call(functools.partial(self.agent.rewind, n_tokens, save=save))

    async def rename(self, new_id: str) -> None:
        """As Agent.rename."""
        await self.engine._call(self.agent.rename, new_id)

    async def remove(self) -> None:
        """As Agent.remove."""
        await self.engine._call(self.agent.remove)

    async def pin(self, pinned: bool = True, *, save: Literal["wait", "behind"] = "wait") -> None:
        """As Agent.pin."""
        await self.engine._call(functools.partial(self.agent.pin, pinned, save=save))

    async def prefetch(self) -> bool:
        """As Agent.prefetch."""
        return await self.engine._call(self.agent.prefetch)

    async def save(self) -> SaveResult:
        """As Agent.save."""
        return await self.engine._call(self.agent.save)

    async def sleep(self) -> None:
        """As Agent.sleep."""
        await self.engine._call(self.agent.sleep)

    async def tokens(self) -> list[int]:
        """As Agent.tokens."""
        return await self.engine._call(lambda: self.agent.tokens)

    async def messages(self) -> list[dict[str, Any]]:
        """As Agent.messages."""
        return await self.engine._call(lambda: self.agent.messages)

    async def next_logits(self) -> mx.array:
        """As Agent.next_logits."""
        return await self.engine._call(self.agent.next_logits)


class AsyncTextStream(AsyncIterator[str]):
    """The text of a turn, in pieces, as TextStream gives it.

        async with ada.stream("Hello") as stream:
            async for piece in stream:
                print(piece, end="", flush=True)
        result = await stream.result()

    Leaving the block ends the turn before its next token and waits until it is over; the agent keeps what was said. An
    error in the block gives the turn up: the agent is as it was before, unless the turn was complete. So does
    cancelling a task that waits for a piece or for the result. It waits until the agent is as it was.

    Without the block, dropping the stream ends the turn too; the event loop then stands until that is over. Any number
    of tasks of one loop may use a stream; each gets other pieces.
    """

    def __init__(self, stream: TextStream) -> None:
        self._running = stream._running
        self._seed = stream._seed
        self._unread: deque[str] = deque()  # taken from the turn while nobody iterated
        self._changed: asyncio.Future[None] | None = None  # of all tasks that wait for the turn

    async def __anext__(self) -> str:
        try:
            while not self._unread:
                piece, over = self._running.poll()
                if piece is not None:
                    return piece
                if over:
                    self._running.result()  # raises what the turn raised
                    raise StopAsyncIteration
                await self._change()
        except asyncio.CancelledError:
            await self._give_up()
            raise
        return self._unread.popleft()

    async def result(self) -> TurnResult:
        """The turn's TurnResult; waits until it is over. Raises what the turn raised. What was not read by then can be
        read afterwards."""
        try:
            await self._over()
        except asyncio.CancelledError:
            await self._give_up()
            raise
        return TurnResult.of_turn(self._running.result(), self._seed)

    async def aclose(self) -> None:
        """Ends the turn before its next token, and waits until it is over. Its result says "cancelled", unless it was
        complete; the agent keeps what was said."""
        self._running.cancel()
        await self._over()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        traceback: TracebackType | None) -> None:
        await (self.aclose() if error is None else self._give_up())

    async def _give_up(self) -> None:
        self._running.give_up()
        await self._over()

    async def _over(self) -> None:
        while True:
            piece, over = self._running.poll()
            if piece is not None:
                self._unread.append(piece)
                self._wake()  # a task that iterates
            elif over:
                return
            else:
                await self._change()

    async def _change(self) -> None:
        """Waits until there is a piece, or the turn is over."""
        if self._changed is None:
            loop = asyncio.get_running_loop()
            self._changed = loop.create_future()
            loop.add_reader(self._running.fileno(), self._wake)
        await asyncio.shield(self._changed)  # one task's cancellation is not the others'

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.get_loop().remove_reader(self._running.fileno())
            self._changed.set_result(None)
            self._changed = None
