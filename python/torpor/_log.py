"""Who is told what Torpor goes on without. Each half has a copy of the store's code, which speaks for itself."""

import atexit
from typing import Any

from . import _store

_halves: list[Any] = [_store]
_handler: Any = None


def set_handler(handler: Any) -> None:
    global _handler
    for i, half in enumerate(_halves):
        try:
            half.set_log_handler(handler)
        except BaseException:
            for done in _halves[:i]:
                done.set_log_handler(_handler)
            raise
    _handler = handler


def join(half: Any) -> None:
    """From now on `half` speaks to the handler, too."""
    half.set_log_handler(_handler)
    _halves.append(half)


@atexit.register
def _end() -> None:  # threads may still speak when there is no interpreter any more
    for half in _halves:
        half.set_log_handler(None)
