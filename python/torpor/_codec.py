"""mlx-lm's cache objects as rows, state and texts, and back.

A cache is a list of objects, one per layer; what an object holds is its `vars()`. `encode` gives a JSON description of them
in which each array is a reference, and the arrays, of two kinds:

- rows: arrays of the sliceable kinds of cache, `[1, heads, capacity, dim]` with one row per token, which the store cuts into
  segments. The description keeps the capacity; rows past the offset come back as zeros.
- state: all others, kept as they are.
"""

import json

from . import _mlx_lm  # noqa: F401  # first: it says what is missing
import mlx.core as mx
from mlx_lm.models import cache as mlx_cache

from .errors import CorruptionError, IncompatibleError, InvalidArgumentError

_SLICEABLE = ("KVCache", "QuantizedKVCache", "ConcatenateKVCache")
_ROW_DTYPES = (mx.float32, mx.float16, mx.bfloat16, mx.uint32)
_QUANTIZED_PARTS = ("", "_scales", "_biases")
_DTYPE_NAMES = {getattr(mx, name): name for name in (
    "bool_", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")}
_to_json = json.JSONEncoder(check_circular=False, separators=(",", ":")).encode


def cache_class(name):
    found = getattr(mlx_cache, name, None)
    if not (isinstance(found, type) and issubclass(found, mlx_cache._BaseCache)):
        raise CorruptionError(f"The agent's description names the cache class '{name}', which this mlx-lm does not have.")
    return found


def validate(cache):
    """None, or one sentence that says what is wrong with `cache`."""
    if not isinstance(cache, (list, tuple)) or not cache:
        return "A cache is a list with one cache object for each layer."
    for i, layer in enumerate(cache):
        if getattr(mlx_cache, type(layer).__name__, None) is not type(layer) or not isinstance(layer, mlx_cache._BaseCache):
            return f"Layer {i} is a {type(layer).__name__}, which is no cache class of mlx-lm."
        for inner in _inner(layer):
            if type(inner).__name__ in _SLICEABLE and inner.keys is not None:
                if any(array.ndim != 4 or array.shape[2] < inner.offset for array in _row_arrays(inner)):
                    return f"Layer {i} holds fewer rows than its offset of {inner.offset}."
    return None


def _row_arrays(layer):
    quantized = isinstance(layer.keys, (tuple, list))
    return [*layer.keys, *layer.values] if quantized else [layer.keys, layer.values]


def _is_sliceable(layer):
    """Whether `layer` is of a kind with one row per token, holds any, and is for one sequence."""
    return (type(layer).__name__ in _SLICEABLE and layer.keys is not None and layer.offset > 0
            and all(a.ndim == 4 and a.shape[0] == 1 and a.dtype in _ROW_DTYPES for a in _row_arrays(layer)))


def _inner(layer):
    """`layer`, and the caches that it is made of."""
    yield layer
    if type(layer).__name__ == "CacheList":
        for inner in layer.caches:
            yield from _inner(inner)


class _Encoder:
    def __init__(self, cache):
        sliceable = [inner for layer in cache for inner in _inner(layer) if _is_sliceable(inner)]
        # A row is one of every layer's for the same token: layers that hold different numbers of them have none in common.
        self.n_rows = sliceable[0].offset if len({layer.offset for layer in sliceable}) == 1 else 0
        self.sliceable = {id(layer) for layer in sliceable} if self.n_rows else set()
        self.rows, self.state = [], []

    def layer(self, layer, name):
        arrays = self.rows if id(layer) in self.sliceable else self.state
        return {"class": type(layer).__name__,
                "vars": {key: self.value(value, f"{name}_{key}", arrays) for key, value in vars(layer).items()}}

    def value(self, value, name, arrays):
        if isinstance(value, mx.array):
            if value.size:
                arrays.append((name, value))
            if value.dtype not in _DTYPE_NAMES:
                raise InvalidArgumentError(f"{name} is an array of {value.dtype}, which can't be saved.")
            return {"array": name, "dtype": _DTYPE_NAMES[value.dtype], "shape": value.shape}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (list, tuple)):
            # The parts of a quantized tensor have the names that the format gives them.
            parts = _QUANTIZED_PARTS if arrays is self.rows and len(value) == 3 else [f"_{i}" for i in range(len(value))]
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [self.value(v, name + part, arrays) for v, part in zip(value, parts)]}
        if isinstance(value, mlx_cache._BaseCache):
            return self.layer(value, name)
        raise InvalidArgumentError(f"{name} is a {type(value).__name__}, which can't be saved.")


def encode(cache):
    """(description, rows, state, number of rows): what `Store.save` takes."""
    if problem := validate(cache):
        raise InvalidArgumentError(problem)
    encoder = _Encoder(cache)
    layers = [encoder.layer(layer, f"layer_{i}") for i, layer in enumerate(cache)]
    return _to_json({"layers": layers, "rows": encoder.n_rows}), encoder.rows, encoder.state, encoder.n_rows


def parse(description):
    """What `capacities` and `decode` take."""
    described = json.loads(description)
    if described.get("layout") == "whole":
        raise IncompatibleError("The agent was saved by a Torpor that kept caches of several kinds otherwise; save it anew.")
    return described


def capacities(described, n_rows):
    """{name: third dimension} of the arrays that `Store.load` may have to make for `n_rows` rows. Full ones of a cache
    that grows in steps get a step's more: for the next token mlx-lm would copy them whole."""
    return {array["array"]: array["shape"][2] + (step if array["shape"][2] == n_rows else 0)
            for array, step in _references(described, 0) if len(array["shape"]) == 4}


def _references(described, step):
    """(description, rows in which its cache grows) of each array."""
    if isinstance(described, dict) and "array" in described:
        yield described, step
    elif isinstance(described, dict):
        if "class" in described:
            step = getattr(cache_class(described["class"]), "step", 0)
        for inner in described.values():
            yield from _references(inner, step)
    elif isinstance(described, list):
        for inner in described:
            yield from _references(inner, step)


def _layer(described, arrays):
    made = cache_class(described["class"])
    made = made.__new__(made)  # as mlx-lm's from_state
    for key, value in described["vars"].items():
        setattr(made, key, _value(value, arrays))
    return made


def _value(described, arrays):
    if not isinstance(described, dict):
        return described
    if "array" in described:
        name = described["array"]
        if 0 in described["shape"]:
            return mx.zeros(described["shape"], getattr(mx, described["dtype"]))
        if name not in arrays:
            raise CorruptionError(f"The agent lacks the array '{name}' that its description names.")
        return arrays[name]
    if "class" in described:
        return _layer(described, arrays)
    if "tuple" in described:
        return tuple(_value(value, arrays) for value in described["tuple"])
    return [_value(value, arrays) for value in described["list"]]


def _cut(layer, n_rows):
    layer.trim(layer.offset - n_rows)
    if type(layer).__name__ == "ConcatenateKVCache":  # which has no spare capacity
        layer.keys, layer.values = layer.keys[..., :n_rows, :], layer.values[..., :n_rows, :]


def decode(described, arrays, n_rows):
    """The cache that is described; `arrays` as the store keeps them, by name, with their first `n_rows` rows: fewer than were saved
    when the agent has been cut since."""
    cache = [_layer(layer, arrays) for layer in described["layers"]]
    if n_rows < described.get("rows", 0):
        for inner in (inner for layer in cache for inner in _inner(layer) if _is_sliceable(inner)):
            _cut(inner, n_rows)
    return cache
