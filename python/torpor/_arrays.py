"""MLX's arrays as memory that the store reads and writes, by what mlx.core offers to all: so any version of it will do."""

import ctypes
import json
import os
import struct
import threading
from math import prod
from typing import Any

from . import _mlx_lm  # noqa: F401  # first: it says what is missing
import mlx.core as mx

from .errors import IncompatibleError, InvalidArgumentError, ResourceExhaustedError

#: What safetensors calls the dtypes that MLX has.
_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32, "I32": mx.int32, "U8": mx.uint8,
           "I8": mx.int8, "U16": mx.uint16, "I16": mx.int16, "U64": mx.uint64, "I64": mx.int64, "F64": mx.float64,
           "BOOL": mx.bool_}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
#: Rows are copied four times as fast to a line of the CPU's cache, where MLX's memory seldom begins.
_LINE = 64
_LARGEST = 2**31 - 1  # dimension
#: Seconds in which MLX, had it any threads, would have computed nothing.
_PATIENCE = 5
_process = os.getpid()  # in which MLX is known to have its threads, or will start them


def _memory(array: mx.array) -> ctypes.Array[ctypes.c_ubyte]:
    """What holds its elements, of whatever dtype: some mean nothing to a memoryview."""
    return (ctypes.c_ubyte * array.nbytes).from_buffer(memoryview(array))


def _view(array: mx.array) -> memoryview:
    """The same for the store."""
    return memoryview(_memory(array)).cast("B")


def _plain(array: mx.array) -> mx.array:
    """With nothing between its elements. One that is so is not touched: in a forked process MLX can compute nothing."""
    return array if memoryview(array).c_contiguous else mx.contiguous(array)


def readable(arrays: list[tuple[str, mx.array]]) -> list[tuple[str, str, tuple[int, ...], memoryview]]:
    """(name, dtype, shape, memory) of each, evaluated."""
    for name, array in arrays:
        if array.dtype not in _NAMES:
            raise InvalidArgumentError(f"The array '{name}' is of a dtype that can't be saved.")
    mx.eval([array for _, array in arrays])
    plain = [_plain(array) for _, array in arrays]
    mx.eval(plain)
    return [(name, _NAMES[array.dtype], array.shape, _view(array)) for (name, _), array in zip(arrays, plain)]


class _Unread:
    """A safetensors file whose tensors are left as they are: MLX has memory for them, and nobody has written it yet. (Any
    other way to an array writes it, which takes as long as to read the rows.)"""

    closed = False

    def __init__(self, shapes: list[tuple[str, list[int]]]) -> None:
        header, self._end = {}, 0
        for i, (dtype, shape) in enumerate(shapes):
            begin, self._end = self._end, self._end + prod(shape) * _DTYPES[dtype].size
            header[str(i)] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, self._end]}
        text = json.dumps(header).encode()
        self._head, self._at = struct.pack("<Q", len(text)) + text, 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, len(self._head) + self._end)[whence]
        return self._at

    def readinto(self, memory: Any) -> int:
        view = memoryview(memory)
        head = self._head[self._at:self._at + view.nbytes]
        view[:len(head)] = head
        self._at += view.nbytes
        return view.nbytes

    def read(self, size: int) -> bytes:
        read = bytearray(size)
        self.readinto(read)
        return bytes(read)


def _demand_threads() -> None:
    """What MLX does in this process, which was forked, comes to an end; else it would wait for its parent's threads."""
    global _process
    stream, over = mx.default_stream(mx.default_device()), threading.Event()

    def compute() -> None:
        mx.load(_Unread([("U8", [1])]), format="safetensors")  # type: ignore[arg-type]
        mx.synchronize(stream)
        over.set()

    threading.Thread(target=compute, daemon=True).start()
    if not over.wait(_PATIENCE):
        raise InvalidArgumentError("MLX computed in the process that this one was forked from, and its threads are not here; "
                                   "load in a process that multiprocessing starts by \"spawn\".")
    _process = os.getpid()


def _unwritten(shapes: list[tuple[str, list[int]]]) -> list[mx.array]:
    if os.getpid() != _process:
        _demand_threads()
    made = mx.load(_Unread(shapes), format="safetensors")  # type: ignore[arg-type]
    arrays = [made[str(i)] for i in range(len(shapes))]
    try:
        mx.eval(arrays)
    except (MemoryError, RuntimeError) as error:
        raise ResourceExhaustedError(f"There is no memory for a cache ({error}).") from None
    return arrays


class Rows:
    """Arrays whose rows are about to be written. They are MLX's own, and belong to the cache alone: MLX writes further rows
    into them, and copies none."""

    def __init__(self, named: list[tuple[str, str, list[int]]]) -> None:
        """(name, dtype, shape) of each."""
        spare = [_LINE // _DTYPES[dtype].size for _, dtype, _ in named]
        roomy = _unwritten([(dtype, [prod(shape) + more] if prod(shape) + more <= _LARGEST else shape)
                            for more, (_, dtype, shape) in zip(spare, named)])
        self.arrays: dict[str, mx.array] = {}
        for (name, _, shape), memory in zip(named, roomy):
            if memory.ndim == 1:
                first = -ctypes.addressof(_memory(memory)) % _LINE // memory.itemsize
                memory = mx.as_strided(memory, shape, offset=first)
            self.arrays[name] = memory
        mx.eval(self.arrays)

    def writable(self) -> list[memoryview]:
        """Their memory, in their order."""
        return [_view(array) for array in self.arrays.values()]


class States:
    """Arrays whose shapes are not known before they are read."""

    def __init__(self) -> None:
        self._read: list[mx.array] = []

    def writable(self, size: int) -> memoryview:
        """Memory of the next one, aligned to 8."""
        self._read += _unwritten([("U64", [-(-size // 8)])])
        return _view(self._read[-1])

    def arrays(self, named: list[tuple[str, str, list[int]]]) -> dict[str, mx.array]:
        """By name; (name, dtype, shape) of each in the order in which they were read."""
        arrays = {}
        for memory, (name, dtype, shape) in zip(self._read, named, strict=True):
            if dtype not in _DTYPES:
                raise IncompatibleError(f"An array of the dtype '{dtype}' is none that MLX has.")
            if max(shape, default=1) > _LARGEST or prod(shape) > _LARGEST - 8:
                raise IncompatibleError(f"The array '{name}' is larger than MLX can have.")
            arrays[name] = memory.view(_DTYPES[dtype])[:prod(shape)].reshape(shape)
        mx.eval(arrays)
        self._read.clear()
        return arrays
