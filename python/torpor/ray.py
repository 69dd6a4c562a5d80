"""Workers as replicas of Ray Serve (2.60): requests of one agent go to one replica.

    # RAY_SERVE_SESSION_ID_HEADER_KEY=x-torpor-agent ray start --head
    from ray import serve
    import torpor.ray
    serve.run(torpor.ray.app({"model": "path/to/model", "max_replicas": 8}))

Each replica is a server as torpor.asgi has it. Ray starts, places, scales and ends them; docs/fleet.md has the rest.
"""

import asyncio
import math
from collections.abc import Mapping
from typing import Any

import ray.serve
from ray.serve._private.constants import SERVE_SESSION_ID
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, RequestRouterConfig

from . import asgi
from .engine import Engine
from .errors import InvalidArgumentError, IoError

AGENT_HEADER = "x-torpor-agent"
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_HELD = 0.7  # of a replica's memory budget: the share that agents who may not sleep should hold at most
_OF_APPLICATION = ("aliases", "authenticate", "api_key_file", "allow_hosts", "share_prefixes", "queue", "max_body",
                   "drain_timeout", "idle_unload", "session_ttl")


class Worker:
    """One replica: an Engine, and the server over it. Its other arguments are those of Engine and of
    torpor.asgi.application."""

    def __init__(self, model: str, **settings: Any) -> None:
        served = {name: settings.pop(name) for name in _OF_APPLICATION if name in settings}
        self._engine = Engine(model, **settings)
        self._application = asgi.application(self._engine, **served)

    def __serve_build_asgi_app__(self) -> asgi.Application:
        return self._application

    async def check_health(self) -> None:
        """What a balancer asks. IoError: Ray ends this replica and starts another."""
        said: list[int] = []
        request = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> asgi.Message:
            if not request:
                await asyncio.Event().wait()  # it does not hang up; the application stops listening
            return request.pop()

        async def send(message: asgi.Message) -> None:
            if message["type"] == "http.response.start":
                said.append(message["status"])

        await self._application({"type": "http", "method": "GET", "path": "/health", "raw_path": b"/health",
                                 "query_string": b"", "headers": [(b"host", b"localhost")], "client": None,
                                 "server": None}, receive, send)
        if said != [200]:
            raise IoError(f"The worker takes no turns: /health answers {said[0] if said else 'nothing'}.")

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
