"""Agents' caches on disk: mlx-lm's cache objects in, the same objects out."""

import os
import weakref
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from . import _arguments, _arrays, _codec, _store
from ._identity import identity_of
from .errors import CorruptionError, IncompatibleError, InvalidArgumentError
from .results import SaveResult

_DESCRIPTION = "mlx_lm.cache"
_TOKENS = "mlx_lm.tokens"
_MODEL_TEXT = "mlx-lm"


class CachePersistence:
    """A store of agents' caches. Many threads and processes may use one directory at once; a save of an agent that
    another is just saving raises BusyError.

    root: the directory; made when it is not there. Default: $TORPOR_STORE, else ~/.agent_caches. A directory with other
        files that is no store becomes one by the first save, which leaves those files alone. Until then, what lists, loads
        or removes agents raises InvalidArgumentError. Disk limits that the store keeps (`torpor limits`) bind saves too.
    model: whose caches these are: a model directory, or a dict of identity fields ({"weights": "v1"}). A load under another
        model raises IncompatibleError. None: nothing is compared.
    durability: "full" survives a power cut, "rename" a killed process, "none" is for benchmarks.
    """

    root: Path

    def __init__(self, root: str | os.PathLike[str] | None = None, model: str | os.PathLike[str] | dict[str, str] | None = None,
                 durability: Literal["full", "rename", "none"] = "full") -> None:
        self.root = Path(root).expanduser() if root is not None else Path(_store.default_store_root())
        self._store = _store.Store(self.root)
        self._model = _MODEL_TEXT if model is None or isinstance(model, dict) else str(model)
        self._identity = None if model is None else identity_of(model)
        self._durability = durability
        self._given = (self.root, model, durability)
        self._saved = {}  # agent id -> (weak references to the layers, tokens, segment names)

    def __repr__(self) -> str:
        return f"<torpor.CachePersistence {str(self.root)!r}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return CachePersistence, self._given

    def save_agent_cache(self, agent_id: str, cache: Sequence[Any], metadata: Mapping[str, str] | None = None, *,
                         tokens: Iterable[int] | None = None) -> SaveResult:
        """Saves `cache` (as `mlx_lm.models.cache.make_prompt_cache` makes it) as the agent's; atomic. Writes what is not on
        disk yet: a conversation that grew by 64 tokens writes those.

        metadata: texts by texts, given back by load_agent_cache.
        tokens: the ids of the rows held, one per row. With them agents of one prefix share its segments, and
            `common_prefix` works. Rows saved with the same ids from the same cache objects are taken to be unchanged
            when those of the last layer are, and the others are not read: a cache trimmed and filled again may have the
            same ids. After writing to rows of other layers by hand, save without `tokens`. Without them all rows are read.
        Returns a SaveResult. Raises BusyError when someone else has the agent, InvalidArgumentError (a bad id, a cache or
        metadata that can't be saved), IoError; on any of them the agent on disk is as it was.
        """
        ids = None if tokens is None else _ids(agent_id, tokens)
        user = dict(metadata or {})
        for key, value in user.items():
            if not isinstance(key, str) or not isinstance(value, str) or key.startswith(("mlx_lm.", "torpor.")):
                raise InvalidArgumentError(f"The metadata {key!r} is not a text by a text, or begins with 'mlx_lm.' or 'torpor.'.")
            _arguments.text(key, "A key of the metadata")
            _arguments.text(value, f"The metadata {key!r}")
        user[_DESCRIPTION], rows, state, n_rows = _codec.encode(cache)
        unchanged = []
        if ids is None:
            saved = array("i", [_store.UNKNOWN_TOKEN]) * n_rows
        elif not rows:
            saved = array("i")
            user[_TOKENS] = ",".join(map(str, ids))
        elif len(ids) == n_rows:
            saved = ids
            unchanged = self._unchanged(agent_id, cache, saved)
        else:
            raise InvalidArgumentError(f"The cache of agent '{agent_id}' holds {n_rows} tokens, but {len(ids)} ids are given.")
        result = self._store.save(agent_id, _arrays.readable(rows), _arrays.readable(state), saved.tobytes(),
                                  self._identity or [], self._model, list(user.items()),
                                  unchanged, self._durability)
        self._remember(agent_id, cache, saved, result.segments)
        return SaveResult.of(result)

    def load_agent_cache(self, agent_id: str) -> tuple[list[Any], dict[str, str]]:
        """(cache, metadata) of the agent: arrays of the shapes and dtypes that were saved, evaluated, and the caller's
        own. A KVCache or QuantizedKVCache that was full has room for a step of 256 rows more. The next token is written
        in place.

        Every byte is checked: damage raises CorruptionError. NotFoundError; IncompatibleError: of another model, or not saved
        from an mlx-lm cache. InvalidArgumentError in a process that was forked after MLX had computed.
        """
        described, rows, states = {}, [], _arrays.States()

        def make_rows(info, specs):
            if _DESCRIPTION not in info["user"]:
                raise IncompatibleError(f"The agent '{agent_id}' was not saved from an mlx-lm cache; use torpor.Engine.")
            described.update(_codec.parse(info["user"][_DESCRIPTION]))
            n_rows = info["cache_size"]
            capacities = _codec.capacities(described, n_rows)
            for name, *_ in specs:
                if capacities.get(name, -1) < n_rows:
                    raise CorruptionError(f"The agent '{agent_id}' holds the array '{name}', which its description does not "
                                          "name or has no room for.")
            rows.append(_arrays.Rows([(name, dtype, [1, heads, capacities[name], dim])
                                      for name, dtype, heads, dim in specs]))
            return rows[0].writable()

        info, tokens, state = self._store.load(agent_id, self._identity, make_rows, states.writable)
        metadata = info["user"]
        arrays = rows.pop().arrays | states.arrays(state)
        cache = _codec.decode(described, arrays, info["cache_size"])
        del arrays
        self._remember(agent_id, cache, array("i", tokens), info["segments"])
        return cache, {key: value for key, value in metadata.items() if not key.startswith("mlx_lm.")}

    def agent_tokens(self, agent_id: str) -> list[int] | None:
        """The ids given when the agent was saved; None when none were."""
        info = self._store.info(agent_id)
        if _TOKENS in info["user"]:
            text = info["user"][_TOKENS]
            return [int(token) for token in text.split(",")] if text else []
        tokens = self._store.tokens(agent_id)
        return None if not tokens or min(tokens) < 0 else tokens

    def common_prefix(self, agent_id: str, tokens: Iterable[int]) -> int:
        """How many of `tokens`, from the first, are the agent's; 0 when its ids are not known."""
        held = self.agent_tokens(agent_id) or []
        n = 0
        for ours, theirs in zip(held, tokens):
            if ours != int(theirs):
                break
            n += 1
        return n

    def list_cached_agents(self) -> list[dict[str, Any]]:
        """All agents by id: dicts of agent_id, model, cache_size, bytes, created_at, updated_at and more."""
        return self._store.list()

    def delete_agent_cache(self, agent_id: str) -> None:
        """Removes the agent, and the segments that no other agent uses. NotFoundError, BusyError."""
        self._store.delete(agent_id)
        self._saved.pop(agent_id, None)

    def get_cache_disk_usage(self) -> dict[str, int]:
        """Bytes and counts of agents and segments; `total_bytes` is everything."""
        return self._store.disk_usage()

    def _remember(self, agent_id, cache, tokens, segments):
        self._saved[agent_id] = ([weakref.ref(layer) for layer in cache], tokens, segments)

    def _unchanged(self, agent_id, cache, tokens):
        """Names of the leading segments that this process saved, or loaded, from these very objects with these ids."""
        layers, saved, segments = self._saved.get(agent_id, ([], [], []))
        if len(layers) != len(cache) or any(ref() is not layer for ref, layer in zip(layers, cache)):
            return []
        n = 0
        while n < len(segments) and saved[256 * n: 256 * (n + 1)] == tokens[256 * n: 256 * (n + 1)]:
            n += 1
        return segments[:n]


def _ids(agent_id, tokens):
    tokens = list(tokens)
    try:
        try:
            ids = array("i", tokens)
        except TypeError:  # what is no int may be made one
            try:
                ids = array("i", map(int, tokens))
            except (TypeError, ValueError):
                raise InvalidArgumentError(
                    f"The token ids of agent '{agent_id}' are not a flat list of whole numbers.") from None
    except OverflowError:
        raise InvalidArgumentError(f"A token id of agent '{agent_id}' is larger than 32 bits.") from None
    if min(ids, default=0) < 0:
        raise InvalidArgumentError(f"A token id of agent '{agent_id}' is negative.")
    return ids
