"""Workers as replicas of Ray Serve (2.60): requests of one agent go to one replica.

    # RAY_SERVE_SESSION_ID_HEADER_KEY=x-torpor-agent ray start --head
    from ray import serve
    import torpor.ray
    serve.run(torpor.ray.app({"model": "path/to/model", "max_replicas": 8}))

Each replica is a server as torpor.asgi has it. Ray starts, places, scales and ends them; docs/fleet.md has the rest.

With a bucket an agent may be awake in another replica than the one that Ray places it in from now on. That one asks the
other to let it sleep, and goes on with it.
"""

import asyncio
import collections
import contextlib
import itertools
import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import ray
import ray.exceptions
import ray.serve
from ray.serve._private.constants import SERVE_SESSION_ID
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, RequestRouterConfig

from . import asgi
from .engine import Engine
from .errors import InvalidArgumentError, IoError

AGENT_HEADER = "x-torpor-agent"
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_LETTERS = "torpor-letters"
_PATIENCE = 60.0  # seconds that a request waits for its agent
_HELD = 0.7  # of a replica's memory budget: the share that agents who may not sleep should hold at most
_OF_APPLICATION = ("aliases", "authenticate", "api_key_file", "allow_hosts", "share_prefixes", "queue", "max_body",
                   "drain_timeout", "idle_unload", "session_ttl")


class _Letters:
    """What replicas ask of each other; one Ray actor. It keeps nothing: who got no answer asks again."""

    def __init__(self) -> None:
        self._boxes: dict[str, asyncio.Queue[int]] = collections.defaultdict(asyncio.Queue)
        self._asked: dict[int, tuple[Any, asyncio.Future[None]]] = {}
        self._numbers = itertools.count()

    async def ask(self, replica: str, letter: Any, seconds: float) -> None:
        """Returns once it was answered, or after so many seconds."""
        number, answered = next(self._numbers), asyncio.get_running_loop().create_future()
        self._asked[number] = letter, answered
        self._boxes[replica].put_nowait(number)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await answered
        finally:
            del self._asked[number]

    async def next(self, replica: str) -> tuple[int, Any]:
        """What the replica is asked next, and its number."""
        while True:
            number = await self._boxes[replica].get()
            if number in self._asked:
                return number, self._asked[number][0]

    async def answer(self, number: int) -> None:
        if number in self._asked and not self._asked[number][1].done():
            self._asked[number][1].set_result(None)


class _Shared:
    """An application of a replica whose agents others may have, and may want."""

    def __init__(self, application: asgi.Application, name: str) -> None:
        self._application, self._name = application, name
        self._reader: asyncio.Task[None] | None = None

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        self.listen()
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        end, came = loop.time() + _PATIENCE, []

        async def again() -> asgi.Message:
            if unread:
                return unread.pop(0)
            message = await receive()
            came.append(message)
            return message

        while True:
            unread, told = list(came), _Moved(send, last=loop.time() > end)
            await self._application(scope, again, told)
            if told.agent is None:
                return
            headers = [(name, value) for name, value in scope["headers"] if name in (b"authorization", b"x-api-key")]
            with contextlib.suppress(ray.exceptions.RayError):
                await _letters().ask.remote(told.owner, (told.agent, headers), 5.0)
            await asyncio.sleep(0.05)

    def listen(self) -> None:
        """Hears from now on what others ask. Any number of times."""
        if self._reader is None:
            self._reader = asyncio.get_running_loop().create_task(self._listen())

    async def _listen(self) -> None:
        while True:
            try:
                number, (agent, headers) = await _letters().next.remote(self._name)
                asyncio.get_running_loop().create_task(self._let_go(number, agent, headers))
            except ray.exceptions.RayError:  # the process that has them is gone
                await asyncio.sleep(1)

    async def _let_go(self, number: int, agent: str, headers: list[tuple[bytes, bytes]]) -> None:
        """For whom the headers' key admits. An agent whose turn runs is asked for again."""
        path = f"/torpor/v1/agents/{quote(agent, safe='')}/sleep"
        await _request(self._application, "POST", path, b"{}", [*headers, (b"content-type", b"application/json")])
        with contextlib.suppress(ray.exceptions.RayError):
            await _letters().answer.remote(number)


class _Moved:
    """Sends an answer on, but for a 307 to another replica: what it says is kept. The last one is 503."""

    def __init__(self, send: asgi.Send, last: bool) -> None:
        self._send, self._last = send, last
        self.owner = ""
        self.agent: str | None = None

    async def __call__(self, message: asgi.Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 307:
            headers = dict(message["headers"])
            if self._last:
                left = [one for one in message["headers"] if one[0] != b"location"]
                message = {**message, "status": 503, "headers": [*left, (b"retry-after", b"1")]}
            else:
                self.owner = headers[b"location"].split(b"/")[2].decode()
                self.agent = headers[b"x-torpor-agent"].decode()
        if self.agent is None:
            await self._send(message)


def _letters() -> Any:
    actor = ray.remote(num_cpus=0)(_Letters)
    return actor.options(name=_LETTERS, namespace="torpor", get_if_exists=True).remote()


async def _request(application: asgi.Application, method: str, path: str, body: bytes = b"",
                   headers: list[tuple[bytes, bytes]] | None = None) -> int:
    """The status; 0: none came."""
    said: list[int] = []
    request = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> asgi.Message:
        if not request:
            await asyncio.Event().wait()  # it does not hang up; the application stops listening
        return request.pop()

    async def send(message: asgi.Message) -> None:
        if message["type"] == "http.response.start":
            said.append(message["status"])

    await application({"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
                       "headers": [(b"host", b"localhost"), *(headers or [])], "client": None, "server": None},
                      receive, send)
    return said[0] if said else 0


class Worker:
    """One replica: an Engine, and the server over it. Its other arguments are those of Engine and of
    torpor.asgi.application."""

    def __init__(self, model: str, **settings: Any) -> None:
        served = {name: settings.pop(name) for name in _OF_APPLICATION if name in settings}
        shared = settings.get("remote") is not None
        name = ray.serve.get_replica_context().replica_id.unique_id if shared else ""
        if shared:
            settings["advertise"] = f"http://{name}"  # what other replicas know it by; no host
        self._engine = Engine(model, **settings)
        self._application = asgi.application(self._engine, **served)
        self._shared = _Shared(self._application, name) if shared else None

    def __serve_build_asgi_app__(self) -> asgi.Application | _Shared:
        return self._shared or self._application

    async def check_health(self) -> None:
        """What a balancer asks. IoError: Ray ends this replica and starts another."""
        if self._shared is not None:
            self._shared.listen()
        said = await _request(self._application, "GET", "/health")
        if said != 200:
            raise IoError(f"The worker takes no turns: /health answers {said or 'nothing'}.")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The share of the memory budget that agents hold who may not sleep now: their turn runs or is not saved yet,
        or they are pinned. Others are there only because there is room."""
        memory = self._engine.memory_usage()
        held = sum(agent.bytes for agent in memory.agents if agent.unsaved or agent.pinned)
        return {"kv_held": held / memory.budget if memory.budget else 0.0}

    async def __del__(self) -> None:
        """After the application: it has ended or taken back its turns, and saved its agents."""
        self._engine.close()


def replicas_wanted(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """So many that each replica has the turns that it is scaled to at most, and memory to spare."""
    held = sum((context.aggregated_metrics or {}).get("kv_held", {}).values())
    wanted = max(math.ceil(context.total_num_requests / context.config.target_ongoing_requests),
                 math.ceil(held / _HELD))
    lowest, highest = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(lowest, min(highest, wanted)), context.policy_state


def app(args: Mapping[str, Any]) -> ray.serve.Application:
    """The application, as Serve's configuration files build it (`import_path: torpor.ray:app`).

    args: `model`, and what else Worker takes. Of the fleet `min_replicas` (1), `max_replicas` (1), `num_cpus` of each
        (1), turns that a replica is scaled to (`turns`, 8) and takes at most (`queue`, 64), `drain_timeout` (30 s).

    Raises InvalidArgumentError if Ray places requests by another header than x-torpor-agent.
    """
    settings = dict(args)
    if SERVE_SESSION_ID.lower() != AGENT_HEADER:
        raise InvalidArgumentError(f"Ray places requests by the header '{SERVE_SESSION_ID}'; start it with the "
                                   f"environment variable RAY_SERVE_SESSION_ID_HEADER_KEY={AGENT_HEADER}.")
    if "model" not in settings:
        raise InvalidArgumentError("No model is named; give its directory as the argument 'model'.")
    lowest, cpus = settings.pop("min_replicas", 1), settings.pop("num_cpus", 1)
    scaling = AutoscalingConfig(
        min_replicas=lowest, max_replicas=settings.pop("max_replicas", max(1, lowest)),
        target_ongoing_requests=settings.pop("turns", 8),
        policy=AutoscalingPolicy(policy_function="torpor.ray:replicas_wanted"))
    settings.setdefault("threads", cpus)
    drain = settings.setdefault("drain_timeout", 30)
    worker = ray.serve.deployment(
        name="torpor", autoscaling_config=scaling, ray_actor_options={"num_cpus": cpus},
        max_ongoing_requests=settings.setdefault("queue", 64), health_check_period_s=3, health_check_timeout_s=10,
        # Turns end first, then agents are saved. A replica that is still there is killed then.
        graceful_shutdown_wait_loop_s=1, graceful_shutdown_timeout_s=2 * drain + 30,
        # No fallback: it would send an agent elsewhere while it is awake.
        request_router_config=RequestRouterConfig(request_router_class=ROUTER,
                                                  request_router_kwargs={"num_fallback_replicas": 0}),
    )(ray.serve.ingress()(Worker))
    return worker.bind(**settings)
