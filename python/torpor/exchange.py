"""mlx-lm's prompt-cache files, both dialects (`mlx_lm.generate --prompt-cache-file`, `mlx_lm.cache_prompt`)."""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import _mlx_lm  # noqa: F401  # first: it says what is missing
import mlx.core as mx
from mlx.utils import tree_unflatten
from mlx_lm.models import cache as mlx_cache

from ._codec import cache_class
from .errors import CorruptionError, Error, InvalidArgumentError, NotFoundError


def load_prompt_cache(path: str | os.PathLike[str]) -> tuple[list[Any], dict[str, str]]:
    """(cache, metadata) of a prompt-cache file that mlx-lm wrote, of this version's dialect or of that up to 0.31, whatever its
    name ends in.

    Such a file holds no token ids, and no checksum: what is damaged in it is not found.
    """
    path = str(Path(path).expanduser())
    if not Path(path).is_file():
        raise NotFoundError(f"There is no prompt-cache file '{path}'.")
    try:
        arrays, metadata = mx.load(path, format="safetensors", return_metadata=True)
        if metadata.get("2.0") == "":
            with _as_safetensors(path) as named:
                return mlx_cache.load_prompt_cache(named, return_metadata=True)
        meta_states, user, classes = tree_unflatten(list(metadata.items()))
        states = tree_unflatten(list(arrays.items())) if arrays else []
        states += [[]] * (len(classes) - len(states))
        return [_old(*layer) for layer in zip(classes, states, meta_states, strict=True)], user or {}
    except Error:
        raise  # some of Torpor's own are of the next line's, too
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise CorruptionError(f"'{path}' is no prompt-cache file of mlx-lm, or is damaged: {error}.") from error


def _old(name, state, meta):
    """A layer of the old dialect, in which an object was its arrays (`state`) and texts (`meta`)."""
    if name == "CacheList":
        made = mlx_cache.CacheList(*(_old(*child) for child in zip(meta[0], state, meta[1], strict=True)))
    elif name in ("ArraysCache", "MambaCache"):
        made = mlx_cache.ArraysCache(len(state))
        made.cache = list(state)
    elif name in ("KVCache", "ConcatenateKVCache"):
        made = cache_class(name)()
        if state:
            made.keys, made.values = state
            made.offset = made.keys.shape[2]
    elif name == "QuantizedKVCache":
        offset, group_size, bits = map(int, meta)
        made = mlx_cache.QuantizedKVCache(group_size, bits)
        made.keys, made.values = map(tuple, state)
        made.offset = offset
    elif name == "RotatingKVCache":
        keep, max_size, offset, index = map(int, meta)
        made = mlx_cache.RotatingKVCache(max_size, keep)
        made.keys, made.values = state
        made.offset, made._idx = offset, index
    elif name == "ChunkedKVCache" and int(meta[1]) == 0:
        made = mlx_cache.ChunkedKVCache(int(meta[0]))
        made.keys, made.values = state
        made.offset = made.keys.shape[2]
    else:
        raise InvalidArgumentError(f"A {name} of the old prompt-cache dialect can't be read; save it with mlx-lm 0.32 or newer.")
    return made


def save_prompt_cache(path: str | os.PathLike[str], cache: Sequence[Any], metadata: Mapping[str, str] | None = None) -> None:
    """Writes `cache` as mlx-lm's own prompt-cache file. `mlx_lm.generate` also wants "model" and "tokenizer_config" (a
    JSON text) in the metadata."""
    target = Path(path).expanduser()
    if target.suffix == ".safetensors":
        mlx_cache.save_prompt_cache(str(target), cache, metadata)
        return
    # MLX adds the ending to other names; the name given is the name written.
    with tempfile.TemporaryDirectory(prefix=".torpor-", dir=target.parent) as directory:
        written = os.path.join(directory, "cache.safetensors")
        mlx_cache.save_prompt_cache(written, cache, metadata)
        os.replace(written, target)


@contextmanager
def _as_safetensors(path: str) -> Iterator[str]:
    """A name of the file that ends as mlx-lm's reader wants it."""
    if path.endswith(".safetensors"):
        yield path
        return
    with tempfile.TemporaryDirectory() as directory:
        named = os.path.join(directory, "cache.safetensors")
        os.symlink(os.path.abspath(path), named)
        yield named
