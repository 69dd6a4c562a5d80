"""The server as an ASGI application, for a Python host: uvicorn, hypercorn, or a framework that mounts applications.

    # llm.py, for `uvicorn llm:app`
    import torpor.asgi
    app = torpor.asgi.application("path/to/model")

It answers what `torpor serve` answers: OpenAI's, Anthropic's and Ollama's dialects, agents, teams, metrics, the
dashboard. Sockets, TLS and access logs are the host's. The host runs it on asyncio.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Unpack
from urllib.parse import quote

from . import _arguments
from ._engine_half import _core
from .engine import Engine, EngineSettings, _core_options
from .errors import Error, InternalError, InvalidArgumentError

if not hasattr(_core, "CoreServer"):
    raise ImportError("This build of torpor has no server; build it with -DTORPOR_SERVER=ON.")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
_Headers = list[tuple[bytes, bytes]]

_CLOSED = "The application is closed; make another one."
_BODY_SECONDS = 120.0  # from a request's head to its body's end
_STALL_SECONDS = 120.0  # a reader that takes nothing for so long is cut off


class Application:
    """What `application` returns: an ASGI 3 application. Any number of requests at a time, of one event loop."""

    def __init__(self, core: "_core.CoreServer", key_file: Path | None, queue: int, max_body: int, max_bodies: int,
                 drain_timeout: float) -> None:
        self._core = core
        self._key_file = key_file
        self._max_body = max_body
        self._max_bodies = max_bodies
        self._drain_timeout = drain_timeout
        self._closed = False
        self._held = 0  # bytes of bodies under way
        self._exchanges: set[_core.Exchange] = set()  # under way
        # Requests that compute nothing are answered beside a full queue.
        self._workers = ThreadPoolExecutor(queue + 64, "torpor-asgi")

    @property
    def api_key(self) -> str:
        """The key that the first start made, which this user may use; empty when there is none, or nobody needs one."""
        return "" if self._key_file is None else _core.local_key(self._key_file)

    def reload_keys(self) -> None:
        """Reads the file of keys again. After an error the old ones stay. InvalidArgumentError, IoError."""
        if self._key_file is not None:
            self._core.read_keys(self._key_file)

    async def aclose(self) -> None:
        """Takes no turn from now on, gives those under way `drain_timeout` seconds, takes the others back, saves agents
        and frees models. The end of a host's lifespan does this. An engine that was given stays open."""
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        self._core.drain()
        end = loop.time() + self._drain_timeout
        while self._exchanges and loop.time() < end:
            await asyncio.sleep(0.05)
        for exchange in self._exchanges:
            exchange.leave()
        while self._exchanges:
            await asyncio.sleep(0.05)
        self._closed = True
        await loop.run_in_executor(None, self._workers.shutdown)
        await loop.run_in_executor(None, self._core.close)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close"})

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup" and self._closed:
                await send({"type": "lifespan.startup.failed", "message": _CLOSED})
            elif message["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                try:
                    await self.aclose()
                except Error as error:
                    await send({"type": "lifespan.shutdown.failed", "message": str(error)})
                else:
                    await send({"type": "lifespan.shutdown.complete"})
                return

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytearray()
        try:
            try:
                async with asyncio.timeout(_BODY_SECONDS):
                    refused = await self._read(scope, receive, body)
            except TimeoutError:
                refused = 408
            if refused is not None:
                await self._handle(scope, receive, send, b"" if refused else bytes(body), refused)
        finally:  # also of a request that the host gives up
            self._held -= len(body)

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> int | None:
        """The body, or the status that it is refused with; None: the client has gone."""
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > self._max_body:
            return 413
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            piece = message.get("body", b"")
            if len(body) + len(piece) > self._max_body:
                return 413
            if self._held + len(piece) > self._max_bodies:
                return 503
            body += piece
            self._held += len(piece)
            if not message.get("more_body", False):
                return 0

    async def _handle(self, scope: Scope, receive: Receive, send: Send, body: bytes, refused: int) -> None:
        if self._closed:  # perhaps while the body came
            raise InvalidArgumentError(_CLOSED)
        loop = asyncio.get_running_loop()
        exchange = _core.Exchange(scope["method"], _path(scope), scope.get("query_string", b""), list(scope["headers"]),
                                  body, _peer(scope), refused)
        answer = _Answer(loop, send, exchange, scope["method"] == "HEAD")
        work = loop.run_in_executor(self._workers, self._core.handle, exchange, answer)
        self._exchanges.add(exchange)
        work.add_done_callback(lambda _: self._exchanges.discard(exchange))
        leaving = loop.create_task(_watch(receive, answer))
        try:
            # The host may give this up; the turn is taken back then, on its own thread.
            await asyncio.shield(work)
        finally:
            leaving.cancel()
            answer.leave()
        if not answer.ended and not answer.gone:
            raise InternalError("An answer has failed before its end; its connection is to be cut.")


class _Answer:
    """The answer to one request. The server's thread calls it; what it says is sent on the event loop's."""

    def __init__(self, loop: asyncio.AbstractEventLoop, send: Send, exchange: "_core.Exchange", head: bool) -> None:
        self.gone = False  # the client
        self.ended = False
        self._loop = loop
        self._send = send
        self._exchange = exchange
        self._head = head  # nobody wants a body
        self._sending = asyncio.Lock()
        self._silence: asyncio.Task[None] | None = None
        self._spoke = loop.time()

    def leave(self) -> None:
        """On the event loop's thread: nothing can be said any more."""
        self._exchange.leave()
        if self._silence is not None:
            self._silence.cancel()

    def whole(self, status: int, headers: _Headers, body: bytes) -> None:
        self._tell(_start(status, [*headers, (b"content-length", str(len(body)).encode())]),
                   _piece(b"" if self._head else body, more=False))

    def begin(self, status: int, headers: _Headers) -> None:
        unbuffered = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        self._tell(_start(status, [*headers, *unbuffered]))

    def write(self, data: bytes) -> bool:
        return self._tell(_piece(data, more=True))

    def keep_alive(self, data: bytes, idle: float) -> None:
        self._run(self._keep_alive(data, idle))

    def end(self) -> None:
        self._tell(_piece(b"", more=False))

    def _tell(self, *messages: Message) -> bool:
        """Whether it was sent. Waits while the reader is slow."""
        return self._run(self._say(*messages))

    def _run(self, work: Any) -> bool:
        try:
            sent = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:  # the loop is closed
            work.close()
            self._exchange.leave()
            return False
        try:
            sent.result(_STALL_SECONDS)
            return not self.gone
        except (Exception, CancelledError):  # it reads nothing; or the host has no more to do with it
            sent.cancel()
            self._exchange.leave()
            return False

    async def _say(self, *messages: Message) -> None:
        async with self._sending:
            for message in messages:
                await self._send(message)
                self._spoke = self._loop.time()
                if message["type"] == "http.response.body" and not message["more_body"]:
                    self.ended = True
        if self.ended and self._silence is not None:
            self._silence.cancel()

    async def _keep_alive(self, data: bytes, idle: float) -> None:
        if self._silence is not None:
            self._silence.cancel()
        self._silence = self._loop.create_task(self._fill(data, idle))

    async def _fill(self, data: bytes, idle: float) -> None:
        while True:
            await asyncio.sleep(max(0.0, self._spoke + idle - self._loop.time()))
            if self._loop.time() >= self._spoke + idle:
                await self._say(_piece(data, more=True))


async def _watch(receive: Receive, answer: _Answer) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    answer.gone = True
    answer.leave()


def _start(status: int, headers: _Headers) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}


def _piece(body: bytes, more: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


def _path(scope: Scope) -> bytes:
    """As sent, without what the application is mounted at."""
    path: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
    root = quote(scope.get("root_path", "")).rstrip("/").encode()
    return path.removeprefix(root) or b"/" if root and path.startswith(root) else path


def _peer(scope: Scope) -> str:
    client, server = scope.get("client"), scope.get("server")
    if client is None:
        return "unix" if server is not None and str(server[0]).startswith("/") else ""
    host, port = client
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def application(*models: str | os.PathLike[str] | Engine, aliases: Mapping[str, str] | None = None,
                store: str | os.PathLike[str] | None = None, authenticate: bool = True,
                api_key_file: str | os.PathLike[str] | None = None, allow_hosts: Iterable[str] = (),
                share_prefixes: bool = False, queue: int = 64, max_body: int | str = 64 << 20,
                drain_timeout: float = 30, idle_unload: float = 0, session_ttl: float = 7 * 86400,
                **settings: Unpack[EngineSettings]) -> Application:
    """An ASGI application over models, the first of which is loaded now. docs/server.md says what it answers.

    models: directories or repo ids, loaded when requests name them; or one Engine, which others may use beside it. An
        Engine that is closed before the application frees its model with it.
    aliases: names that requests may call models by; '*' at a name's end stands for anything.
    store: as Engine's; with an Engine, its own.
    authenticate: requests need a key of `api_key_file`. False: the host says who may ask, and all are tenant "local".
    api_key_file: lines tenant:name:hash. Default: `torpor serve`'s own file. One that is not there is made, with a
        first key, which `Application.api_key` tells.
    allow_hosts: names that a Host header may have, beside localhost and any address.
    share_prefixes: all tenants share the rows of what begins alike.
    queue: turns that run or wait; more are refused, 429 or 529.
    max_body: bytes of one request; a longer one is refused with 413. All together have eight times as much.
    drain_timeout: seconds that turns have to end, when the application is closed.
    idle_unload: seconds after which a model that nobody uses is unloaded, but for the first; 0: never.
    session_ttl: seconds after which the agent of a client's session is removed; 0: never.
    settings: of each model's Engine, which share one lease with `remote`. When that is lost `/health` is 503, and no turn
        is taken any more.

    Raises what Engine raises, and InvalidArgumentError for no model, or a model without a chat template.
    """
    engines = [model for model in models if isinstance(model, Engine)]
    names = [_arguments.text(os.fspath(model), "A model's name") for model in models if not isinstance(model, Engine)]
    if engines and (len(models) > 1 or store is not None or settings):
        raise InvalidArgumentError("An engine is served alone, with its own store and settings; leave the others out.")
    if not models:
        raise InvalidArgumentError("No model is named; give one, or an engine.")
    key_file = None
    if authenticate:
        key_file = Path(api_key_file if api_key_file is not None else _core.default_key_file()).expanduser().absolute()
    most = _arguments.size(max_body, "max_body")
    places = _arguments.whole(queue, "queue", 1, 100_000)
    core = _core.CoreServer(names, engines[0]._core if engines else None,
                            None if engines else _core_options("", store, settings), list((aliases or {}).items()),
                            share_prefixes, places, key_file, list(allow_hosts),
                            _arguments.real(idle_unload, "idle_unload"), _arguments.real(session_ttl, "session_ttl"))
    return Application(core, key_file, places, most, 8 * most, _arguments.real(drain_timeout, "drain_timeout"))
