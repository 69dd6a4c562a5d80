"""One exception class for each of Torpor's error codes."""


class Error(Exception):
    """What failed, on what, and what to do, in one sentence. Its subclasses are all there are.

    The same as data; None where it does not apply.
    """

    agent: str | None = None
    """Id of the agent that could not be worked on."""
    path: str | None = None
    """File or directory, as it was opened."""
    field: str | None = None
    """What is wrong: a field of the identity or of a file, or a member of the C++ API's options ("TurnRequest::system")."""
    expected: str | None = None
    """What `field` would have to be."""
    found: str | None = None
    """What `field` is."""

    def __str__(self) -> str:
        return Exception.__str__(self)  # the sentence as it is, which KeyError would put into quotation marks


class NotFoundError(Error, KeyError):
    """No such agent, model or file. A KeyError."""


class CorruptionError(Error):
    """Bytes on disk are not what was written."""


class IncompatibleError(Error):
    """Intact, but of another model, dtype or format version."""


class InvalidArgumentError(Error, ValueError):
    """The caller asked for something that can't be. A ValueError."""


class IoError(Error, OSError):
    """The operating system refused: disk full, read-only, no permission. An OSError; `path` says of which file, and its
    `errno` is None."""


class BusyError(Error):
    """The agent is being used by another process or thread."""


class ResourceExhaustedError(Error):
    """A budget or limit would be exceeded."""


class CancelledError(Error):
    """Stopped on request."""


class InternalError(Error):
    """A defect of Torpor's own."""
