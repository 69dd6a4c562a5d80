"""The Python module's store: mlx-lm's cache objects go in and come out as they were."""

import copy
import gc
import json
import os
import shutil
import resource
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import mlx_lm.models.cache as mlx_cache
import pytest
from safetensors import safe_open

from conftest import BUILD, MODEL, ROOT, make_tiny_model

import torpor
from torpor import _codec

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def same(a, b):
    """Equal bit for bit, in value, class and structure."""
    if isinstance(a, mx.array):
        return (isinstance(b, mx.array) and a.dtype == b.dtype and a.shape == b.shape
                and (a.size == 0 or mx.array_equal(mx.contiguous(a).reshape(-1).view(mx.uint8),
                                                   mx.contiguous(b).reshape(-1).view(mx.uint8)).item()))
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, mlx_cache._BaseCache):
        return vars(a).keys() == vars(b).keys() and all(same(v, vars(b)[k]) for k, v in vars(a).items())
    return a == b


def fill(cache, n, dtype=mx.float16, batch=1, heads=2, dim=64):
    """`n` random tokens through the cache's own update, then one by one as decoding does."""
    for step in (n - 2, 1, 1):
        cache.update_and_fetch(*(mx.random.normal((batch, heads, step, dim)).astype(dtype) for _ in range(2)))
    return cache


def arrays_cache(dtype):
    cache = mlx_cache.ArraysCache(3)
    cache[0], cache[2] = mx.random.normal((1, 3, 7)).astype(dtype), mx.random.normal((1, 5)).astype(dtype)
    return cache


def batch_cache(dtype):
    return fill(mlx_cache.BatchKVCache([1, 3, 0]), 9, dtype, batch=3)


def nested(dtype):
    inner = mlx_cache.CacheList(arrays_cache(dtype), fill(mlx_cache.RotatingKVCache(16, keep=4), 40, dtype))
    return mlx_cache.CacheList(inner, fill(mlx_cache.KVCache(), 9, dtype))


MAKERS = {
    "KVCache": lambda dtype: fill(mlx_cache.KVCache(), 300, dtype),
    "ConcatenateKVCache": lambda dtype: fill(mlx_cache.ConcatenateKVCache(), 300, dtype),
    "QuantizedKVCache 8 bits": lambda dtype: fill(mlx_cache.QuantizedKVCache(64, 8), 300, dtype),
    "QuantizedKVCache 4 bits": lambda dtype: fill(mlx_cache.QuantizedKVCache(32, 4), 300, dtype),
    "RotatingKVCache": lambda dtype: fill(mlx_cache.RotatingKVCache(16, keep=4), 40, dtype),
    "ChunkedKVCache": lambda dtype: fill(mlx_cache.ChunkedKVCache(64), 40, dtype),
    "ArraysCache": arrays_cache,
    "CacheList": nested,
    "BatchKVCache": batch_cache,
    "BatchRotatingKVCache": lambda dtype: fill(mlx_cache.BatchRotatingKVCache(16, [0, 2]), 40, dtype, batch=2),
    "an empty KVCache": lambda dtype: mlx_cache.KVCache(),
}


def held(cache):
    """What the rows mean: rows past the offset are spare, and come back as zeros."""
    if isinstance(cache, (mlx_cache.KVCache, mlx_cache.QuantizedKVCache)) and cache.keys is not None:
        return cache.keys_and_values(), cache.offset
    return cache


@pytest.fixture
def store(tmp_path):
    return torpor.CachePersistence(tmp_path / "store")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MAKERS)
def test_a_cache_of_every_class_comes_back_as_it_was(store, kind, dtype):
    cache = [MAKERS[kind](dtype) for _ in range(2)]
    store.save_agent_cache("ada", cache, {"note": "hello"})
    again, metadata = torpor.CachePersistence(store.root).load_agent_cache("ada")
    assert metadata == {"note": "hello"}
    assert all(type(a) is type(b) and same(held(a), held(b)) for a, b in zip(cache, again, strict=True))
    if kind.startswith(("KVCache", "Quantized")):
        assert vars(again[0]).keys() == vars(cache[0]).keys()
        for a, b in zip(cache, again):  # and goes on alike
            mx.random.seed(1)
            fill(a, 5, dtype)
            mx.random.seed(1)
            fill(b, 5, dtype)
            assert same(held(a), held(b))


def test_a_cache_that_grew_writes_what_is_new(store):
    cache = [fill(mlx_cache.KVCache(), 600) for _ in range(2)]
    first = store.save_agent_cache("ada", cache, tokens=range(600))
    for layer in cache:
        fill(layer, 20)
    second = store.save_agent_cache("ada", cache, tokens=range(620))
    assert (first.segments_written, second.segments_written, second.segments_shared) == (2, 0, 2)
    assert second.segments == first.segments
    again, _ = torpor.CachePersistence(store.root).load_agent_cache("ada")
    assert all(same(held(a), held(b)) for a, b in zip(cache, again))
    assert store.common_prefix("ada", [*range(610), 7]) == 610


def mixed(n, dtype=mx.float16):
    """As of models whose layers are of several kinds: global and sliding attention, a recurrent state, a list of two."""
    return [fill(mlx_cache.KVCache(), n, dtype), fill(mlx_cache.RotatingKVCache(64, keep=4), n, dtype),
            mlx_cache.CacheList(arrays_cache(dtype), fill(mlx_cache.KVCache(), n, dtype)),
            fill(mlx_cache.QuantizedKVCache(64, 8), n, dtype), fill(mlx_cache.KVCache(), n, dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cache_of_several_kinds_comes_back_and_goes_on_alike(store, dtype):
    cache = mixed(600, dtype)
    result = store.save_agent_cache("ada", cache, tokens=range(600))
    assert result.segments_written == 2 and store.agent_tokens("ada") == list(range(600))
    with safe_open(store.root / "ada.safetensors", "numpy") as file:  # Hugging Face's
        assert {"rows", "layer_1_keys", "layer_2_caches_0_cache_0", "tokens"} <= set(file.keys())
        assert file.get_tensor("tokens").tolist() == list(range(600))
        if dtype != mx.bfloat16:  # which numpy has not
            assert file.get_tensor("layer_1_keys").tolist() == cache[1].keys.tolist()
    again, _ = torpor.CachePersistence(store.root).load_agent_cache("ada")
    assert all(same(held(a), held(b)) for a, b in zip(cache, again, strict=True))
    for layers in (cache, again):
        mx.random.seed(2)
        for layer in (layers[0], layers[1], layers[3], layers[4]):
            fill(layer, 100, dtype)
    assert all(same(held(a), held(b)) for a, b in zip(cache, again))


def test_of_a_cache_of_several_kinds_the_rows_are_shared_and_the_rest_is_written(store):
    cache = mixed(600)
    store.save_agent_cache("ada", cache, tokens=range(600))
    for layer in (cache[0], cache[1], cache[2][1], cache[3], cache[4]):
        fill(layer, 200)
    cache[2][0][1] = mx.arange(5)
    result = store.save_agent_cache("ada", cache, tokens=range(800))
    assert (result.segments_written, result.segments_shared) == (1, 2)
    again, _ = torpor.CachePersistence(store.root).load_agent_cache("ada")
    assert all(same(held(a), held(b)) for a, b in zip(cache, again))
    # Another agent, whose rows are the same: of it the ring and the state are written.
    result = store.save_agent_cache("bob", cache, tokens=range(800))
    assert result.segments_written == 0
    # Without ids too, and where the layers hold different numbers of tokens, which have no rows in common.
    store.save_agent_cache("ada", cache)
    assert store.agent_tokens("ada") is None
    assert all(same(held(a), held(b)) for a, b in zip(cache, store.load_agent_cache("ada")[0]))
    cache[0].trim(10)
    assert store.save_agent_cache("ada", cache, tokens=[1, 2, 3]).segments == []
    assert store.agent_tokens("ada") == [1, 2, 3]
    assert all(same(held(a), held(b)) for a, b in zip(cache, store.load_agent_cache("ada")[0]))


def test_the_command_line_copies_a_cache_of_several_kinds_whole_or_not_at_all(tiny, tmp_path):
    store = torpor.CachePersistence(tiny.store)
    cache = mixed(600)
    store.save_agent_cache("ada", cache, {"note": "hello"}, tokens=range(600))
    tiny("fork", "ada", "bob").ok()
    tiny("rename", "ada", "eve").ok()
    tiny("export", "eve", tmp_path / "eve.safetensors").ok()
    tiny("import", tmp_path / "eve.safetensors", "zoe").ok()
    tiny("verify").ok()
    for agent in ("bob", "eve", "zoe"):
        again, metadata = store.load_agent_cache(agent)
        assert metadata == {"note": "hello"} and all(same(held(a), held(b)) for a, b in zip(cache, again))
    tiny("fork", "bob", "new", "--at", 300).fails("invalid", "state", "whole")
    tiny("rewind", "bob", 300).fails("invalid", "state")
    tiny("export", "bob", tmp_path / "bob.safetensors", "--format", "mlx-lm").fails("incompatible", "torpor.save_prompt_cache")
    tiny.run("bob", "Hello").fails("incompatible")


@pytest.mark.parametrize("kind", ["KVCache", "ConcatenateKVCache", "QuantizedKVCache 8 bits", "CacheList"])
def test_a_cache_cut_on_the_command_line_is_that_prefix(tiny, kind):
    store = torpor.CachePersistence(tiny.store)
    make = (lambda: mlx_cache.CacheList(fill(mlx_cache.KVCache(), 300))) if kind == "CacheList" else lambda: MAKERS[kind](mx.float16)
    cache = [make() for _ in range(2)]
    store.save_agent_cache("ada", cache, tokens=range(300))
    for n in (299, 256, 7, 0):
        tiny("fork", "ada", f"at-{n}", "--at", n).ok()
        again, _ = store.load_agent_cache(f"at-{n}")
        for a, b in zip(cache, again):
            a, b = (a[0], b[0]) if kind == "CacheList" else (a, b)
            expected = copy.copy(a)
            _codec._cut(expected, n)
            assert b.offset == n
            assert same([x[..., :n, :] for x in _codec._row_arrays(expected)], [x[..., :n, :] for x in _codec._row_arrays(b)])
            assert all(mx.all(x[..., n:, :] == 0).item() for x in _codec._row_arrays(b))
            if n:  # and goes on like a cache that was trimmed
                rows = [mx.random.normal((1, 2, 1, 64)).astype(mx.float16) for _ in range(2)]
                assert same(list(expected.update_and_fetch(*rows)), list(b.update_and_fetch(*rows)))


def test_every_dtype_that_an_array_may_have(store):
    cache = mlx_cache.ArraysCache(13)
    for i, dtype in enumerate((mx.bool_, mx.uint8, mx.uint16, mx.uint32, mx.uint64, mx.int8, mx.int16, mx.int32, mx.int64, mx.float16,
                               mx.bfloat16, mx.float32)):
        cache[i] = mx.random.randint(0, 2, (3, 5)).astype(dtype)
    cache[12] = mx.array(3.5)
    store.save_agent_cache("ada", [cache])
    assert same(store.load_agent_cache("ada")[0], [cache])
    cache[12] = mx.array([1j])
    with pytest.raises(torpor.InvalidArgumentError, match="complex64"):
        store.save_agent_cache("ada", [cache])


@pytest.mark.parametrize("tokens", [[1, 2**31], [1, -1, 3], [1, 2]], ids=str)
def test_ids_that_can_t_be(store, tokens):
    with pytest.raises(torpor.InvalidArgumentError):
        store.save_agent_cache("ada", [fill(mlx_cache.KVCache(), 3)], tokens=tokens)


def test_ids_of_any_kind(store):
    cache = [fill(mlx_cache.KVCache(), 3)]
    for tokens in (mx.array([7, 8, 9]), iter((7, 8, 9)), (7.0, 8.0, 9.0), [mx.array(7), 8, True + 8]):
        store.save_agent_cache("ada", cache, tokens=tokens)
        assert store.agent_tokens("ada") == [7, 8, 9]


def test_a_loaded_cache_is_let_go_of_when_nobody_has_it_any_more(store):
    store.save_agent_cache("ada", large_cache())
    gc.collect()
    gc.disable()  # whoever sleeps and wakes agents can't wait for it
    try:
        before = mx.get_active_memory()
        cache, _ = store.load_agent_cache("ada")
        assert mx.get_active_memory() >= before + 6 * 2 * 1100 * 8 * 128 * 2
        del cache
        assert mx.get_active_memory() == before
    finally:
        gc.enable()


def in_threads(n, work):
    """work(0) ... work(n - 1) at once, each with a stream of its own. Raises what one of them raised."""
    failures = []

    def run(i):
        try:
            with mx.stream(mx.new_stream(mx.cpu)):
                work(i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def large_cache(n=1100):
    """Large enough that its arrays share large pages: 6 layers of 2.6 MB of keys and as much of values."""
    return [fill(mlx_cache.KVCache(), n, heads=8, dim=128) for _ in range(6)]


def test_large_caches_share_no_memory_and_outlive_each_other(store):
    caches = [large_cache(), large_cache()]
    for i, cache in enumerate(caches):
        store.save_agent_cache(str(i), cache)
    first, second, again = (store.load_agent_cache(id)[0] for id in ("0", "1", "0"))
    assert same(first, caches[0]) and same(second, caches[1]) and same(again, caches[0])

    # Written to where they lie, then past their capacity; one layer stays when the others are gone.
    for layer, other in zip(first, again):
        row = mx.full((1, 8, 1, 128), 3, mx.float16)
        keys = layer.update_and_fetch(row, row)[0]
        assert mx.all(keys[..., -1, :] == 3).item()
        mx.eval(layer.keys, layer.values)
        assert other.offset == 1100 and mx.all(other.keys[..., 1100:, :] == 0).item()
    assert same(again, caches[0])
    kept = again[3]
    del first, again
    gc.collect()
    # Memory that was let go of serves the next load, whatever it held.
    for _ in range(3):
        assert same(store.load_agent_cache("1")[0], caches[1])
        assert same(kept, caches[0][3])
    many = mx.zeros((1, 8, 300, 128), mx.float16)
    kept.update_and_fetch(many, many)
    assert mx.array_equal(kept.keys[..., :1100, :], caches[0][3].keys[..., :1100, :]).item()
    assert same(second, caches[1])


def test_large_caches_loaded_by_four_threads_at_once(store):
    caches = [large_cache(1000 + i) for i in range(4)]
    for i, cache in enumerate(caches):
        store.save_agent_cache(str(i), cache)

    def work(i):
        for _ in range(5):
            assert same(store.load_agent_cache(str(i))[0], caches[i])

    in_threads(4, work)


def rows(n, dtype=mx.float16):
    made = [mx.random.normal((1, 8, n, 128)).astype(dtype) for _ in range(2)]
    mx.eval(made)
    return made


@pytest.mark.parametrize("make", [mlx_cache.KVCache, mlx_cache.QuantizedKVCache], ids=lambda make: make.__name__)
@pytest.mark.parametrize("n", [512, 600], ids=["full", "not full"])
def test_what_is_appended_to_a_loaded_cache_is_written_in_place(store, make, n):
    cache = [fill(make(), n, heads=8, dim=128) for _ in range(3)]
    store.save_agent_cache("ada", cache)
    loaded, again = (store.load_agent_cache("ada")[0] for _ in range(2))
    for step in (1, 100, 60):
        new = [rows(step) for _ in cache]
        for layer, appended in zip(cache, new):
            mx.eval(layer.update_and_fetch(*appended))
        held_before = mx.get_active_memory()
        mx.reset_peak_memory()
        for layer, appended in zip(loaded, new):
            layer.update_and_fetch(*appended)
            mx.eval(layer.keys, layer.values)
        whole = sum(array.nbytes for array in _codec._row_arrays(loaded[0]))
        assert mx.get_peak_memory() - held_before < whole / 2, "a layer was copied"
    assert all(same(held(a), held(b)) for a, b in zip(cache, loaded, strict=True))
    # Neither the other load nor the file knows of it.
    for other in (again, store.load_agent_cache("ada")[0]):
        for a, b in zip(cache, other, strict=True):
            assert b.offset == n
            assert same([x[..., :n, :] for x in _codec._row_arrays(a)], [x[..., :n, :] for x in _codec._row_arrays(b)])
            assert all(mx.all(x[..., n:, :] == 0).item() for x in _codec._row_arrays(b))


def test_copies_of_a_loaded_cache_do_not_see_what_is_written_to_each_other(store):
    store.save_agent_cache("ada", [fill(mlx_cache.KVCache(), 600, heads=8, dim=128)])
    one = store.load_agent_cache("ada")[0][0]
    view, before = one.keys[..., :600, :], mx.array(one.keys[..., :600, :] + 0)
    other = copy.deepcopy(one)
    mx.eval(view, before)
    new = rows(1), rows(1)
    for layer, appended in zip((one, other), new):
        mx.eval(layer.update_and_fetch(*appended))
    one.keys[..., :1, :] = 7
    mx.eval(one.keys)
    for layer, appended in zip((one, other), new):
        assert layer.offset == 601 and same(layer.keys[..., 600:601, :], appended[0])
    assert same(view, before) and same(other.keys[..., :600, :], before)


def resident_bytes():
    if os.path.exists("/proc/self/statm"):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: the most so far


def test_large_caches_are_let_go_of_one_by_one_and_all_at_once(store):
    store.save_agent_cache("ada", large_cache())
    resident = []
    for _ in range(20):
        cache, _ = store.load_agent_cache("ada")
        part = cache[1:]
        del cache
        del part
        resident.append(resident_bytes())
    assert resident[-1] - resident[2] < 100e6, "17 caches of 31 MB came and went"


def test_a_cache_trimmed_and_filled_again_under_the_same_ids_is_saved_as_it_is(store):
    cache = [fill(mlx_cache.KVCache(), 600) for _ in range(2)]
    first = store.save_agent_cache("ada", cache, tokens=range(600))
    mlx_cache.trim_prompt_cache(cache, 200)
    for layer in cache:
        fill(layer, 200)  # other rows than before, as a model may compute them with other bits
    second = store.save_agent_cache("ada", cache, tokens=range(600))
    assert (second.segments_written, second.segments_shared) == (1, 1) and second.segments[0] == first.segments[0]
    again, _ = torpor.CachePersistence(store.root).load_agent_cache("ada")
    assert all(same(held(a), held(b)) for a, b in zip(cache, again))


def test_a_cache_changed_by_hand_is_saved_as_it_is(store):
    cache = [fill(mlx_cache.KVCache(), 600) for _ in range(2)]
    store.save_agent_cache("ada", cache, tokens=range(600))
    cache[-1].values[..., 300, :] = 7  # the last layer: seen even with the same ids
    store.save_agent_cache("ada", cache, tokens=range(600))
    assert all(same(held(a), held(b)) for a, b in zip(cache, store.load_agent_cache("ada")[0]))
    cache[0].keys[..., 300, :] = 7  # another one: seen without ids, as the docstring says
    store.save_agent_cache("ada", cache)
    assert all(same(held(a), held(b)) for a, b in zip(cache, store.load_agent_cache("ada")[0]))


def test_arrays_that_are_not_contiguous_or_not_computed_yet_are_saved_as_they_are(store):
    cache = [fill(mlx_cache.KVCache(), 300)]
    cache[0].keys = cache[0].keys.transpose(0, 1, 3, 2).swapaxes(2, 3)[:, ::-1]
    cache[0].values = cache[0].values + 1
    store.save_agent_cache("ada", cache)
    assert same(held(cache[0]), held(store.load_agent_cache("ada")[0][0]))


def test_caches_of_unknown_tokens_never_take_each_others_rows(store):
    caches = {name: [fill(mlx_cache.KVCache(), 600)] for name in ("ada", "bob", "eve")}
    for name, cache in caches.items():
        assert store.save_agent_cache(name, cache).segments_written == 2
    for name, cache in caches.items():
        assert same(held(cache[0]), held(store.load_agent_cache(name)[0][0]))
    assert store.common_prefix("ada", [1, 2]) == 0
    for layer in caches["ada"]:
        fill(layer, 4)
    assert store.save_agent_cache("ada", caches["ada"]).segments_written == 0


def test_the_operations_on_a_store(store):
    cache = [fill(mlx_cache.KVCache(), 9)]
    store.save_agent_cache("ada", cache)
    assert [agent["agent_id"] for agent in store.list_cached_agents()] == ["ada"]
    assert store.list_cached_agents()[0]["cache_size"] == torpor.get_cache_size(cache) == 9
    assert torpor.get_cache_memory(cache) == cache[0].nbytes
    assert torpor.validate_cache_structure(cache) and not torpor.validate_cache_structure([object()])
    assert store.get_cache_disk_usage()["agents"] == 1
    store.delete_agent_cache("ada")
    with pytest.raises(torpor.NotFoundError, match="ada"):
        store.load_agent_cache("ada")


def test_what_was_kept_whole_before_there_was_state_is_refused(store):
    store._store.save("ada", [], [], b"", [], "mlx-lm", [("mlx_lm.cache", '{"layout":"whole","layers":[]}')], [], "rename")
    with pytest.raises(torpor.IncompatibleError, match="save it anew"):
        store.load_agent_cache("ada")


def test_rows_that_are_fewer_than_the_offset_are_told_in_a_list_of_caches_too(store):
    inner = fill(mlx_cache.KVCache(), 9)
    inner.offset = 500
    for layer in (inner, mlx_cache.CacheList(inner)):
        with pytest.raises(torpor.InvalidArgumentError, match="Layer 0 holds fewer rows than its offset of 500"):
            store.save_agent_cache("ada", [layer])


def test_errors_are_of_their_classes(store):
    cache = [fill(mlx_cache.KVCache(), 9)]
    with pytest.raises(torpor.InvalidArgumentError):
        store.save_agent_cache("../ada", cache)
    with pytest.raises(torpor.InvalidArgumentError, match="9 tokens, but 2"):
        store.save_agent_cache("ada", cache, tokens=[1, 2])
    with pytest.raises(torpor.InvalidArgumentError):
        store.save_agent_cache("ada", [object()])
    torpor.CachePersistence(store.root, model={"weights": "one"}).save_agent_cache("ada", cache)
    with pytest.raises(torpor.IncompatibleError, match="weights"):
        torpor.CachePersistence(store.root, model={"weights": "other"}).load_agent_cache("ada")
    path = store.root / "ada.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(torpor.CorruptionError):
        store.load_agent_cache("ada")


def test_a_model_directory_is_the_identity(tiny_model, tmp_path):
    cache = [fill(mlx_cache.KVCache(), 9)]
    torpor.CachePersistence(tmp_path / "store", model=tiny_model).save_agent_cache("ada", cache)
    copy = make_tiny_model(tmp_path / "copy")
    again, _ = torpor.CachePersistence(tmp_path / "store", model=copy).load_agent_cache("ada")
    assert same(held(again[0]), held(cache[0]))
    other = make_tiny_model(tmp_path / "other", change=lambda config, weights: weights["model.norm.weight"].put(3, 0.5))
    with pytest.raises(torpor.IncompatibleError, match="weights"):
        torpor.CachePersistence(tmp_path / "store", model=other).load_agent_cache("ada")
    with pytest.raises(torpor.NotFoundError, match="config.json"):
        torpor.CachePersistence(tmp_path / "store", model=tmp_path)
    weights = copy / "model.safetensors"  # looked at before in this process, and other bytes now
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(torpor.IncompatibleError, match="weights"):
        torpor.CachePersistence(tmp_path / "store", model=copy).load_agent_cache("ada")


def test_an_agent_of_the_engine_is_no_mlx_lm_cache(tiny_model, tmp_path):
    torpor.Engine(tiny_model, tmp_path / "store").agent("ada").turn("hello", raw=True, max_tokens=2)
    with pytest.raises(torpor.IncompatibleError, match="torpor.Engine"):
        torpor.CachePersistence(tmp_path / "store").load_agent_cache("ada")


def test_an_agent_that_another_process_holds_is_busy(tmp_path, store):
    store.save_agent_cache("ada", [fill(mlx_cache.KVCache(), 9)])
    script = ("import fcntl,sys; f=open(sys.argv[1],'r+'); fcntl.flock(f,fcntl.LOCK_EX); print('held',flush=True); "
              "sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", script, str(store.root / ".locks" / "ada.lock")],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(torpor.BusyError):
            store.save_agent_cache("ada", [fill(mlx_cache.KVCache(), 9)])
        other.stdin.close()


def test_eight_threads_keep_their_agents_apart(store):
    def work(i):
        keys = mx.full((1, 2, 300, 16), i, mx.float32)
        cache = mlx_cache.KVCache()
        cache.keys, cache.values, cache.offset = keys, keys + 1, 300
        for _ in range(5):
            store.save_agent_cache(f"agent{i}", [cache])
            again, _ = store.load_agent_cache(f"agent{i}")
            assert same(held(again[0]), held(cache))

    in_threads(8, work)


def test_generation_goes_on_from_a_saved_cache_with_the_same_tokens(store, tmp_path):
    import mlx_lm
    model, tokenizer = mlx_lm.load(str(MODEL))
    model.set_dtype(mx.float32)
    extractor = torpor.MLXCacheExtractor(model, tokenizer)
    first = extractor.stream("The lighthouse keeper", max_tokens=4)
    assert "".join(first) == first.text and first.cache[0].offset == len(first.tokens)
    store.save_agent_cache("ada", first.cache, tokens=first.tokens)
    woken, _ = torpor.CachePersistence(store.root).load_agent_cache("ada")
    results = [extractor.stream(" and then", cache, max_tokens=4) for cache in (first.cache, woken)]
    texts = ["".join(result) for result in results]
    assert texts[0] == texts[1] and results[0].tokens == results[1].tokens
    assert results[1].prefilled == len(tokenizer.encode(" and then"))


def test_a_text_gets_bos_where_the_conversation_begins(tiny_model, tmp_path):
    """As mlx-lm's own generation gives it to a text."""
    import mlx_lm
    directory = shutil.copytree(tiny_model, tmp_path / "model")
    described = json.loads((directory / "tokenizer.json").read_text())
    described["post_processor"] = {
        "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}}
    (directory / "tokenizer.json").write_text(json.dumps(described))
    model, tokenizer = mlx_lm.load(str(directory))
    model.set_dtype(mx.float32)
    extractor = torpor.MLXCacheExtractor(model, tokenizer)
    for text in ("hello", "<|im_start|>hello"):
        [response] = mlx_lm.stream_generate(model, tokenizer, text, max_tokens=1)
        assert response.prompt_tokens == 2
        for cache in (None, mlx_cache.make_prompt_cache(model)):
            stream = extractor.stream(text, cache, max_tokens=1)
            assert "".join(stream) == response.text and stream.prefilled == 2
    list(again := extractor.stream("hello", stream.cache, max_tokens=1))
    assert again.prefilled == 1


def test_a_new_process_prefills_the_new_tokens_only(tokenizer):
    """By mlx-lm's own count (bench/python_flow.py says how)."""
    script = ROOT / "bench" / "python_flow.py"
    ended = subprocess.run([sys.executable, script, MODEL, "--document-tokens", "12", "--max-tokens", "3", "--json"],
                           env={**os.environ, "PYTHONPATH": str(BUILD / "python")},
                           capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    first, woken, cold = json.loads(ended.stdout)
    assert first["prefilled"] == 12 and first["held"] == 15
    new = len(tokenizer.encode("\nThe keeper said:").ids)
    assert woken["prefilled"] == new < cold["prefilled"] == 15 + new
    assert woken["tokens"] == cold["tokens"][15:] and woken["text"] == cold["text"]
