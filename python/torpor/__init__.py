"""Torpor: LLM agents that sleep to disk and wake in milliseconds.

For mlx-lm: `MLXCacheExtractor` takes the cache out of generation, `CachePersistence` keeps it per agent.

    import mlx_lm, torpor
    model, tokenizer = mlx_lm.load(path)
    text, cache = torpor.MLXCacheExtractor(model, tokenizer).generate("Hello")
    torpor.save_agent_cache("ada", cache)        # and in another process:
    cache, metadata = torpor.load_agent_cache("ada")

For speed: `Engine` and `Agent`, Torpor's own engine. Errors are subclasses of `torpor.Error`.
"""

from functools import cache as _once

import mlx.core  # first: _core links the library that it loads

from ._core import SaveResult, TurnResult
from ._codec import validate as _validate
from .engine import Agent, Engine
from .errors import (BusyError, CancelledError, CorruptionError, Error, IncompatibleError, InternalError,
                     InvalidArgumentError, IoError, NotFoundError, ResourceExhaustedError)
from .exchange import load_prompt_cache, save_prompt_cache
from .extractor import Generation, MLXCacheExtractor
from .persistence import CachePersistence

__all__ = [
    "Agent", "BusyError", "CachePersistence", "CancelledError", "CorruptionError", "Engine", "Error", "Generation",
    "IncompatibleError", "InternalError", "InvalidArgumentError", "IoError", "MLXCacheExtractor", "NotFoundError",
    "ResourceExhaustedError", "SaveResult", "TurnResult", "common_prefix", "delete_agent_cache", "get_cache_disk_usage",
    "get_cache_memory", "get_cache_size", "list_cached_agents", "load_agent_cache", "load_prompt_cache", "save_agent_cache",
    "save_prompt_cache", "validate_cache_structure",
]


def get_cache_size(cache):
    """Tokens that the first layer has seen; of a batch, positions."""
    offset = getattr(cache[0], "offset", None)
    return offset if isinstance(offset, int) else cache[0].size()


def get_cache_memory(cache):
    """Bytes of the real buffers, spare capacity included."""
    return sum(0 if layer.empty() else layer.nbytes for layer in cache)


def validate_cache_structure(cache):
    """Whether `cache` is a sound list of mlx-lm's cache objects, which save_agent_cache would take."""
    return _validate(cache) is None


@_once
def _default():
    return CachePersistence()


def save_agent_cache(agent_id, cache, metadata=None, *, tokens=None):
    """CachePersistence.save_agent_cache on the default store."""
    return _default().save_agent_cache(agent_id, cache, metadata, tokens=tokens)


def load_agent_cache(agent_id):
    """CachePersistence.load_agent_cache on the default store."""
    return _default().load_agent_cache(agent_id)


def common_prefix(agent_id, tokens):
    """CachePersistence.common_prefix on the default store."""
    return _default().common_prefix(agent_id, tokens)


def list_cached_agents():
    """CachePersistence.list_cached_agents on the default store."""
    return _default().list_cached_agents()


def delete_agent_cache(agent_id):
    """CachePersistence.delete_agent_cache on the default store."""
    _default().delete_agent_cache(agent_id)


def get_cache_disk_usage():
    """CachePersistence.get_cache_disk_usage on the default store."""
    return _default().get_cache_disk_usage()
