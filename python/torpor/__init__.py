"""Torpor: LLM agents that sleep to disk and wake in milliseconds.

For mlx-lm: `MLXCacheExtractor` takes the cache out of generation, `CachePersistence` keeps it per agent.

    import mlx_lm, torpor
    model, tokenizer = mlx_lm.load(path)
    text, cache = torpor.MLXCacheExtractor(model, tokenizer).generate("Hello")
    torpor.save_agent_cache("nora", cache)        # and in another process:
    cache, metadata = torpor.load_agent_cache("nora")

For speed, Torpor's own engine: `Engine` and its `Agent`s, which compute a turn's new tokens only, sleep and wake by themselves.

    with torpor.Engine(path) as engine:
        for piece in engine.agent("ada").stream("Hello"):
            print(piece, end="", flush=True)

For asyncio, `AsyncEngine` does the same, awaited.

Errors are subclasses of `torpor.Error`. Whatever waits for a disk or a model lets other threads run.
"""

from collections.abc import Callable as _Callable, Iterable as _Iterable, Mapping as _Mapping, Sequence as _Sequence
from functools import cache as _once
from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from pkgutil import extend_path as _extend_path
from typing import TYPE_CHECKING as _TYPE_CHECKING, Any as _Any, Literal as _Literal

__path__ = _extend_path(__path__, __name__)  # torpor and torpor-store may be in two directories, as with `pip --user`

from . import _log
from .errors import (BusyError, CancelledError, CorruptionError, Error, IncompatibleError, InternalError,
                     InvalidArgumentError, IoError, NotFoundError, ResourceExhaustedError)
from .results import (AgentMemory, EngineWork, MemoryUsage, MessageDivergence, SaveResult, TokenLogprob,
                      TokenLogprobs, TurnBytes, TurnResult, TurnTiming, TurnTokens)

if _TYPE_CHECKING:
    from .async_engine import AsyncAgent, AsyncEngine, AsyncTextStream
    from .engine import Agent, AgentStatus, Engine, EngineSettings, TextStream, TurnOptions
    from .exchange import load_prompt_cache, save_prompt_cache
    from .extractor import Generation, MLXCacheExtractor
    from .persistence import CachePersistence
    from .team import StepOptions, Team, TeamAnswer, TeamResult

__all__ = [
    "Agent", "AgentMemory", "AgentStatus", "AsyncAgent", "AsyncEngine", "AsyncTextStream", "BusyError",
    "CachePersistence", "CancelledError", "CorruptionError", "Engine", "EngineSettings", "EngineWork", "Error",
    "Generation", "IncompatibleError", "InternalError", "InvalidArgumentError", "IoError", "MLXCacheExtractor",
    "MemoryUsage", "MessageDivergence", "NotFoundError", "ResourceExhaustedError", "SaveResult", "StepOptions", "Team",
    "TeamAnswer", "TeamResult", "TextStream", "TokenLogprob", "TokenLogprobs", "TurnBytes", "TurnOptions",
    "TurnResult", "TurnTiming", "TurnTokens", "common_prefix", "delete_agent_cache", "get_cache_disk_usage",
    "get_cache_memory", "get_cache_size", "list_cached_agents", "load_agent_cache", "load_prompt_cache",
    "save_agent_cache", "save_prompt_cache", "set_log_handler", "validate_cache_structure",
]

# What the engine has, and what needs mlx-lm: imported when it is asked for, so that either is of use without the other.
_ENGINE = {
    **dict.fromkeys(("AsyncAgent", "AsyncEngine", "AsyncTextStream"), "async_engine"),
    **dict.fromkeys(("Agent", "AgentStatus", "Engine", "EngineSettings", "TextStream", "TurnOptions"), "engine"),
    **dict.fromkeys(("StepOptions", "Team", "TeamAnswer", "TeamResult"), "team"),
}
_MLX_LM = {
    **dict.fromkeys(("load_prompt_cache", "save_prompt_cache"), "exchange"),
    **dict.fromkeys(("Generation", "MLXCacheExtractor"), "extractor"),
    "CachePersistence": "persistence",
}

if not _TYPE_CHECKING:  # to a checker of types every name is there, and no other
    if _find_spec("torpor._linked") is None:
        __all__ = [name for name in __all__ if name not in _ENGINE]

    def __getattr__(name):
        if name not in _ENGINE and name not in _MLX_LM:
            raise AttributeError(f"module 'torpor' has no attribute '{name}'")
        value = getattr(_import_module("." + (_ENGINE.get(name) or _MLX_LM[name]), __name__), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})


def set_log_handler(handler: _Callable[[_Literal["debug", "info", "warning"], str], object] | None) -> None:
    """Tells `handler` what Torpor goes on without: a sidecar that could not be written, a prefetch that failed. Without one (None,
    as at the start) nobody is told. Of the whole process.

    It gets a level and a sentence, on whichever thread has something to say, several at a time. What it raises goes to
    `sys.unraisablehook`. When this returns, the handler before is not running and is not called again. InvalidArgumentError from
    within a handler.
    """
    _log.set_handler(handler)


def get_cache_size(cache: _Sequence[_Any]) -> int:
    """Tokens that an mlx-lm cache has seen, as the first of its layers that count them tells (recurrent ones don't);
    of a batch, positions. 0 when no layer counts."""
    for layer in cache:
        offset = getattr(layer, "offset", None)
        if size := offset if isinstance(offset, int) else layer.size():
            return size
    return 0


def get_cache_memory(cache: _Sequence[_Any]) -> int:
    """Bytes of an mlx-lm cache's real buffers, spare capacity included."""
    return sum(0 if layer.empty() else layer.nbytes for layer in cache)


def validate_cache_structure(cache: object) -> bool:
    """Whether `cache` is a sound list of mlx-lm's cache objects, which save_agent_cache would take."""
    from . import _codec
    return _codec.validate(cache) is None


@_once
def _default() -> "CachePersistence":
    from .persistence import CachePersistence
    return CachePersistence()


def save_agent_cache(agent_id: str, cache: _Sequence[_Any], metadata: _Mapping[str, str] | None = None, *,
                     tokens: _Iterable[int] | None = None) -> SaveResult:
    """CachePersistence.save_agent_cache on the default store ($TORPOR_STORE, else ~/.agent_caches), of no named model."""
    return _default().save_agent_cache(agent_id, cache, metadata, tokens=tokens)


def load_agent_cache(agent_id: str) -> tuple[list[_Any], dict[str, str]]:
    """CachePersistence.load_agent_cache on the default store."""
    return _default().load_agent_cache(agent_id)


def common_prefix(agent_id: str, tokens: _Iterable[int]) -> int:
    """CachePersistence.common_prefix on the default store."""
    return _default().common_prefix(agent_id, tokens)


def list_cached_agents() -> list[dict[str, _Any]]:
    """CachePersistence.list_cached_agents on the default store."""
    return _default().list_cached_agents()


def delete_agent_cache(agent_id: str) -> None:
    """CachePersistence.delete_agent_cache on the default store."""
    _default().delete_agent_cache(agent_id)


def get_cache_disk_usage() -> dict[str, int]:
    """CachePersistence.get_cache_disk_usage on the default store."""
    return _default().get_cache_disk_usage()
