"""mlx-lm's cache objects as rows and texts, and back.

A cache is a list of objects, one per layer; what an object holds is its `vars()`. `encode` gives a JSON description of them
in which each array is a reference, and the arrays. Two layouts, said by the description's "layout":

- "rows": every layer is a sliceable kind at one offset. Array `layer_{i}_keys` holds one row per token, so the store cuts
  it into segments. The description keeps the capacity (`shape`); rows past the offset come back as zeros.
- "whole": any other. Every array is kept as it is, as 32-bit words `[1, n, 1, dim]` in the one row of a pseudo-token.
"""

import json

import mlx.core as mx
from mlx_lm.models import cache as mlx_cache

from .errors import CorruptionError, InvalidArgumentError

_SLICEABLE = ("KVCache", "QuantizedKVCache", "ConcatenateKVCache")
_ROW_DTYPES = (mx.float32, mx.float16, mx.bfloat16, mx.uint32)
_QUANTIZED_PARTS = ("", "_scales", "_biases")


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
        if type(layer).__name__ in _SLICEABLE and layer.keys is not None:
            for array in _row_arrays(layer):
                if array.ndim != 4 or array.shape[2] < layer.offset:
                    return f"Layer {i} holds fewer rows than its offset of {layer.offset}."
    return None


def _row_arrays(layer):
    quantized = isinstance(layer.keys, (tuple, list))
    return [*layer.keys, *layer.values] if quantized else [layer.keys, layer.values]


def sliceable(cache):
    """Whether the layers are all of kinds with one row per token, for one sequence, at one offset."""
    return all(
        type(layer).__name__ in _SLICEABLE and layer.keys is not None and layer.offset == cache[0].offset > 0
        and all(a.ndim == 4 and a.shape[0] == 1 and a.dtype in _ROW_DTYPES for a in _row_arrays(layer))
        for layer in cache)


class _Encoder:
    def __init__(self, rows):
        self.rows = rows
        self.arrays = []

    def layer(self, layer, name):
        return {"class": type(layer).__name__,
                "vars": {key: self.value(value, f"{name}_{key}") for key, value in vars(layer).items()}}

    def value(self, value, name):
        if isinstance(value, mx.array):
            return self.array(value, name)
        if isinstance(value, (list, tuple)):
            # The parts of a quantized tensor have the names that the format gives them.
            parts = _QUANTIZED_PARTS if self.rows and len(value) == 3 else [f"_{i}" for i in range(len(value))]
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [self.value(v, name + part) for v, part in zip(value, parts)]}
        if isinstance(value, mlx_cache._BaseCache):
            return self.layer(value, name)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise InvalidArgumentError(f"{name} is a {type(value).__name__}, which can't be saved.")

    def array(self, array, name):
        reference = {"array": name, "dtype": str(array.dtype).removeprefix("mlx.core."), "shape": list(array.shape)}
        if array.size:
            self.arrays.append((name, array if self.rows else _words(array)))
        return reference


def _words(array):
    """`array` as uint32 `[1, n, 1, dim]`, padded with zeros; `_from_words` undoes it."""
    flat = mx.contiguous(array).reshape(-1).view(mx.uint8)
    words = (flat.size + 3) // 4
    dim = 1024
    while words > dim * 65536:
        dim *= 2
    dim = min(dim, words)
    count = (words + dim - 1) // dim
    padded = mx.pad(flat, (0, count * dim * 4 - flat.size))
    return padded.view(mx.uint32).reshape(1, count, 1, dim)


def _from_words(words, dtype, shape):
    size = dtype.size
    for n in shape:
        size *= n
    return words.reshape(-1).view(mx.uint8)[:size].view(dtype).reshape(shape)


def encode(cache):
    """(description, arrays, number of rows): what `Store.save` takes."""
    if problem := validate(cache):
        raise InvalidArgumentError(problem)
    rows = sliceable(cache)
    encoder = _Encoder(rows)
    layers = [encoder.layer(layer, f"layer_{i}") for i, layer in enumerate(cache)]
    n_rows = cache[0].offset if rows else int(bool(encoder.arrays))
    return json.dumps({"layout": "rows" if rows else "whole", "layers": layers}), encoder.arrays, n_rows


def capacities(description):
    """{name: third dimension} of the arrays that `Store.load` is to make."""
    described = json.loads(description)
    rows = described["layout"] == "rows"
    return {v["array"]: v["shape"][2] if rows else 1 for v in _references(described["layers"])}


def _references(described):
    if isinstance(described, dict) and "array" in described:
        yield described
    elif isinstance(described, (dict, list)):
        for inner in described.values() if isinstance(described, dict) else described:
            yield from _references(inner)


class _Decoder:
    def __init__(self, rows, arrays):
        self.rows = rows
        self.arrays = arrays

    def layer(self, described):
        made = cache_class(described["class"])
        made = made.__new__(made)  # as mlx-lm's from_state
        for key, value in described["vars"].items():
            setattr(made, key, self.value(value))
        return made

    def value(self, described):
        if not isinstance(described, dict):
            return described
        if "array" in described:
            return self.array(described)
        if "class" in described:
            return self.layer(described)
        if "tuple" in described:
            return tuple(map(self.value, described["tuple"]))
        return list(map(self.value, described["list"]))

    def array(self, reference):
        name, dtype, shape = reference["array"], getattr(mx, reference["dtype"]), reference["shape"]
        if 0 in shape:
            return mx.zeros(shape, dtype)
        if name not in self.arrays:
            raise CorruptionError(f"The agent lacks the array '{name}' that its description names.")
        return self.arrays[name] if self.rows else _from_words(self.arrays[name], dtype, shape)


def decode(description, arrays):
    """The cache of a description; `arrays` as the store keeps them, by name."""
    described = json.loads(description)
    decoder = _Decoder(described["layout"] == "rows", arrays)
    return [decoder.layer(layer) for layer in described["layers"]]
