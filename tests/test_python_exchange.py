"""mlx-lm's prompt-cache files, both ways."""

import runpy

import mlx.core as mx
import mlx_lm.models.cache as mlx_cache
import pytest
from mlx.utils import tree_flatten

from conftest import ROOT
from test_python_caches import MAKERS, held, same

import torpor


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "ConcatenateKVCache"])  # mlx-lm can't load those back
def test_a_file_of_mlx_lm_becomes_an_agent_and_a_file_again(kind, tmp_path):
    cache = [MAKERS[kind](mx.float16) for _ in range(2)]
    mlx_cache.save_prompt_cache(str(tmp_path / "theirs.safetensors"), cache, {"note": "hello"})
    read, metadata = torpor.load_prompt_cache(tmp_path / "theirs.safetensors")
    assert metadata == {"note": "hello"}
    store = torpor.CachePersistence(tmp_path / "store")
    store.save_agent_cache("ada", read, metadata)
    torpor.save_prompt_cache(tmp_path / "ours.safetensors", *store.load_agent_cache("ada"))
    again, metadata = mlx_cache.load_prompt_cache(str(tmp_path / "ours.safetensors"), return_metadata=True)
    assert metadata == {"note": "hello"}
    for a, b in zip(cache, again, strict=True):
        assert type(a) is type(b)
        for (key, x), (other, y) in zip(tree_flatten(held(a) if isinstance(held(a), tuple) else a.state),
                                        tree_flatten(held(b) if isinstance(held(b), tuple) else b.state), strict=True):
            assert key == other and (same(x, y) or x == y)


def test_a_file_that_mlx_lm_0_31_wrote_is_read(tmp_path):
    cache, metadata = torpor.load_prompt_cache(ROOT / "tests/goldens/prompt_cache/old.safetensors")
    expected = runpy.run_path(str(ROOT / "scripts/make-goldens-prompt-cache"))["caches"]()
    assert metadata == {"note": "hello"}
    store = torpor.CachePersistence(tmp_path / "store")
    store.save_agent_cache("ada", cache)
    for read in (cache, store.load_agent_cache("ada")[0]):
        for a, b in zip(expected, read, strict=True):
            assert type(a) is type(b) and rows_of(a, b)


def rows_of(a, b):
    """The same rows and numbers; how much capacity is spare is not in an old file."""
    if isinstance(a, mlx_cache.CacheList):
        return all(map(rows_of, a.caches, b.caches))
    if isinstance(a, mlx_cache.ArraysCache):
        return same(a.cache, b.cache)
    if isinstance(a, mlx_cache.RotatingKVCache):
        return same((a.keys, a.values, a.offset, a._idx, a.keep, a.max_size), (b.keys, b.values, b.offset, b._idx, b.keep, b.max_size))
    return a.offset == b.offset and all(same(x, y) for (_, x), (_, y) in zip(
        tree_flatten(a.keys_and_values()), tree_flatten(b.keys_and_values()), strict=True))


def test_what_is_no_prompt_cache_is_refused(tmp_path):
    with pytest.raises(torpor.NotFoundError):
        torpor.load_prompt_cache(tmp_path / "nothing.safetensors")
    mx.save_safetensors(str(tmp_path / "plain.safetensors"), {"a": mx.zeros(3)})
    with pytest.raises(torpor.CorruptionError, match="plain"):
        torpor.load_prompt_cache(tmp_path / "plain.safetensors")
