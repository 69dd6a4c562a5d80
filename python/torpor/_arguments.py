"""What callers give, checked: texts, whole numbers, sizes."""

import operator
import re
from typing import Any

from .errors import InvalidArgumentError

_UNITS = {"": 1, "B": 1} | {prefix + end: base ** power for power, prefix in enumerate("KMGT", 1)
                            for end, base in (("", 1000), ("B", 1000), ("I", 1024), ("IB", 1024))}


def text(value: Any, what: str) -> str:
    """A str that is UTF-8: JSON and PDFs may leave half of a surrogate pair in one."""
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{what} must be a text, not {type(value).__name__}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"{what} is not valid Unicode: it has half of a surrogate pair at character {error.start}.") from None
    return value


def whole(value: Any, what: str, least: int, most: int) -> int:
    """An int, or what stands for one (numpy's)."""
    try:
        number = operator.index(value)
    except TypeError:
        raise InvalidArgumentError(f"{what} must be a whole number, not {value!r}.") from None
    if not least <= number <= most:
        raise InvalidArgumentError(f"{what} must be from {least} to {most}, not {number}.")
    return number


def real(value: Any, what: str) -> float:
    """A float, or what stands for one (numpy's)."""
    if not hasattr(value, "__float__") and not hasattr(value, "__index__"):  # a text has neither
        raise InvalidArgumentError(f"{what} must be a number, not {value!r}.")
    return float(value)


def seconds(value: Any, what: str, least: float, most: float) -> float:
    """A time, as `real`."""
    number = real(value, what)
    if not least <= number <= most:  # nor NaN
        raise InvalidArgumentError(f"{what} must be from {least} to {most} seconds, not {value!r}.")
    return number


def size(value: Any, what: str) -> int:
    """Bytes, or a text such as "64MB" or "1.5 GiB"."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", value)
        if match is None or match[2].upper() not in _UNITS:
            raise InvalidArgumentError(f"{what} must be a number of bytes, or a text such as '64MB' or '1GiB', not {value!r}.")
        value = int(float(match[1]) * _UNITS[match[2].upper()])
    return whole(value, what, -2**63, 2**63 - 1)  # a negative one is refused where limits are
